"""What every benchmark shares: the --full option, the table at the end of a run, and the small file in results/.

A benchmark hands its rows to the `report` fixture. Rows that belong together are measured in one session, in turns, so
their ratios mean something on a busy machine; absolute times of a CPU go to the file only.
"""

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import records
import report as reports
import timing
import torch

from vjvcr_fast.data.files import write_atomic

collect_ignore = ["bench_losses.py"] if torch.cuda.is_available() else ["bench_losses_cuda.py", "bench_decode_cuda.py"]

BUSY = 0.1  # a run during which other processes used more than this share of the machine is shown, not kept
ROWS = pytest.StashKey[dict[str, list[list[records.Row]]]]()
EXPECTED = pytest.StashKey[dict[str, int]]()
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="more rounds, the paper's shapes, a larger grid (many minutes)"
    )
    parser.addoption(
        "--results",
        type=Path,
        default=records.ROOT / "benchmarks" / "results",
        help="folder for the files of whole runs",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[EXPECTED] = {}, {}
    config.stash[MACHINE] = _machine(config)  # now: the file this run writes is no change of the code


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """How many tests each file has before -k takes some away: only whole runs are kept."""
    for item in items:
        name = _name(item.path)
        config.stash[EXPECTED][name] = config.stash[EXPECTED].get(name, 0) + 1


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the files say of the machine; a benchmark may add to it."""
    return request.config.stash[MACHINE]


@pytest.fixture(scope="session")
def ceilings(machine: dict[str, Any]) -> timing.Ceilings:
    """The rates of this machine, measured once; in the files, too."""
    if torch.cuda.is_available():
        copied = min(timing.COPIED, torch.cuda.mem_get_info()[0] // 8)
        found = timing.ceilings(timing.Cuda(), copied)
    else:
        found = timing.ceilings(timing.Host(), timing.HOST_COPIED, timing.HOST_SIDE, ("fp32",))
    machine["copy_gb_per_s"] = records.rounded(found.copy / 1e9)
    machine["product_tflop_per_s"] = {name: records.rounded(rate / 1e12) for name, rate in found.products.items()}
    return found


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[list[records.Row]], None]:
    """report(rows): one call per test. A row is a flat dict of text and numbers; keys that start with an underscore
    go to the file and not into the table. `_busy_elsewhere` is the share of the machine that others used meanwhile."""
    return lambda rows: request.config.stash[ROWS].setdefault(_name(request.path), []).append(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    machine = config.stash[MACHINE]
    for name, groups in config.stash[ROWS].items():
        rows = [row for group in groups for row in group]
        terminalreporter.section(f"{name} on {machine['device']}")
        for line in _table(rows):
            terminalreporter.write_line(line)
        if len(groups) < config.stash[EXPECTED][name]:
            terminalreporter.write_line("a part of the benchmarks: results/ left as it is")
            continue
        busy = max(row.get("_busy_elsewhere", 0.0) for row in rows)
        if busy > BUSY:
            terminalreporter.write_line(f"others used up to {busy:.0%} of the machine: results/ left as it is")
            continue
        results = records.results(name, machine, rows)
        path = config.getoption("--results") / records.file_name(name, machine)
        if not machine["full"] and records.of_a_full_run(path):
            terminalreporter.write_line(f"{path} is of a --full run: left as it is")
            continue
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, records.dumps(results))
        terminalreporter.write_line(f"written: {path}")
        if "targets" in results:
            text = reports.gpu_report(results)
            write_atomic(path.with_suffix(".md"), text)
            terminalreporter.write_line(text)


def _table(rows: list[records.Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.startswith("_")))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _name(path: Path) -> str:
    return path.stem.removeprefix("bench_")


def _machine(config: pytest.Config) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": records.commit(),
        "dirty": records.dirty(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "full": bool(config.getoption("--full")),
        "load_before": records.rounded(os.getloadavg()[0]),
        "command": _command(config.invocation_params.args),
    } | (_gpu() if cuda else {})


def _command(arguments: Sequence[str]) -> str:
    """Without the folder for the results, which changes nothing of them."""
    shown = [a for a in arguments if not a.startswith("--results=")]
    if "--results" in shown:
        at = shown.index("--results")
        shown[at : at + 2] = []
    return " ".join(["pytest", *shown])


def _gpu() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "cache_mb": round(found.L2_cache_size / 2**20, 1),
        "memory_gb": round(found.total_memory / 1e9, 1),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()
