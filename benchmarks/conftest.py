"""What every benchmark shares: the --full option, the table at the end of a run, and the small file in results/.

A benchmark hands its rows to the `report` fixture. Rows that belong together are measured in one session, in turns, so
their ratios mean something on a busy machine; absolute times go to the file only.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

BUSY = 0.1  # a run during which other processes used more than this share of the machine is shown, not kept
RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
EXPECTED = pytest.StashKey[dict[str, int]]()
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more rounds and a larger grid (many minutes)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[EXPECTED] = {}, {}
    config.stash[MACHINE] = _machine(config)  # now: the file this run writes is no change of the code


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """How many tests each file has before -k takes some away: only whole runs are kept."""
    for item in items:
        name = item.path.stem.removeprefix("bench_")
        config.stash[EXPECTED][name] = config.stash[EXPECTED].get(name, 0) + 1


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[list[dict[str, Any]]], None]:
    """report(rows): one call per test. A row is a flat dict of text and numbers; keys that start with an underscore
    go to the file and not into the table. `_busy_elsewhere` is the share of the machine that others used meanwhile."""
    name = request.path.stem.removeprefix("bench_")
    return lambda rows: request.config.stash[ROWS].setdefault(name, []).append(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, groups in config.stash[ROWS].items():
        rows = [row for group in groups for row in group]
        terminalreporter.section(f"{name} on {config.stash[MACHINE]['device']}")
        for line in _table(rows):
            terminalreporter.write_line(line)
        if len(groups) < config.stash[EXPECTED][name]:
            terminalreporter.write_line("a part of the benchmarks: results/ left as it is")
            continue
        busy = max(row.get("_busy_elsewhere", 0.0) for row in rows)
        if busy > BUSY:
            terminalreporter.write_line(f"others used up to {busy:.0%} of the machine: results/ left as it is")
            continue
        path = RESULTS / f"{name}-{_slug(config.stash[MACHINE]['device'])}.json"
        path.parent.mkdir(exist_ok=True)
        rows = [{key.removeprefix("_"): _rounded(value) for key, value in row.items()} for row in rows]
        text = ",\n".join("    " + json.dumps(row) for row in rows)  # a row is a line: readable, and so are diffs
        head = json.dumps(config.stash[MACHINE], indent=2).removesuffix("\n}")
        path.write_text(f'{head},\n  "rows": [\n{text}\n  ]\n}}\n')
        terminalreporter.write_line(f"written: benchmarks/results/{path.name}")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.startswith("_")))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _machine(config: pytest.Config) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_before": _rounded(os.getloadavg()[0]),
        "command": " ".join(["pytest", *config.invocation_params.args]),
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
