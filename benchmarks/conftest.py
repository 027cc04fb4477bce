"""What all benchmarks share: the option --full, the table at the end of a run, and the file in results/.

A benchmark compares ways to compute one thing, called providers. It measures them in one session, in turns, so that
their ratios mean something on a busy machine, and hands one row per provider to the fixture `report`. The times of a
CPU go to the file only.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cpuinfo  # of pytest-benchmark
import pytest
import records
import report as reports
import timing
import torch

collect_ignore = ["bench_losses.py"] if torch.cuda.is_available() else ["bench_losses_cuda.py"]

BUSY = 0.1  # if other processes used more than this share of the machine, a run is shown but not kept
ROWS = pytest.StashKey[dict[str, list[list[records.Row]]]]()
EXPECTED = pytest.StashKey[dict[str, int]]()
MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more rounds and larger shapes (takes half an hour)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.stash[ROWS], config.stash[EXPECTED] = {}, {}
    config.stash[MACHINE] = _machine(config)  # now, since the file that this run writes is no change of the code


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Counts the tests of each file before -k takes some away: only whole runs are kept."""
    for item in items:
        name = _name(item.path)
        config.stash[EXPECTED][name] = config.stash[EXPECTED].get(name, 0) + 1


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def device() -> timing.Device:
    return timing.current()


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the files say about the machine. A benchmark may add to it."""
    return request.config.stash[MACHINE]


@pytest.fixture(scope="session")
def ceilings(machine: dict[str, Any]) -> timing.Ceilings:
    """The rates of this machine, measured once. They go to the files, too."""
    found = timing.ceilings(timing.current())
    machine["copy_gb_per_s"] = records.rounded(found.copy / 1e9)
    machine["product_tflop_per_s"] = {name: records.rounded(rate / 1e12) for name, rate in found.products.items()}
    return found


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[list[records.Row]], None]:
    """report(rows): call it once per test. A row is a flat dict of text and numbers. A key with a leading underscore
    goes to the file and not into the table. `_busy_elsewhere` is the share of the machine that others used."""
    return lambda rows: request.config.stash[ROWS].setdefault(_name(request.path), []).append(rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    machine, say = config.stash[MACHINE], terminalreporter.write_line
    for name, groups in config.stash[ROWS].items():
        rows = [row for group in groups for row in group]
        terminalreporter.section(f"{name} on {machine['device']}")
        for line in _table(rows):
            say(line)
        path = records.ROOT / "benchmarks" / "results" / records.file_name(name, machine)
        busy = max(row.get("_busy_elsewhere", 0.0) for row in rows)
        if len(groups) < config.stash[EXPECTED][name]:
            say("not saved: this was only a part of the benchmark")
        elif busy > BUSY:
            say(f"not saved: other processes used up to {busy:.0%} of the machine")
        elif not machine["full"] and records.of_a_full_run(path):
            say(f"not saved: {path} is from a --full run")
        else:
            results = records.results(name, machine, rows)
            path.write_text(records.dumps(results))
            say(f"written: {path}")
            if "targets" in results:
                path.with_suffix(".md").write_text(reports.gpu_report(results))
                say(reports.gpu_report(results))


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
    commit, dirty = records.commit()
    found = {
        "device": "cpu",
        "processor": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": None,
        "triton": next((x.version for x in importlib.metadata.distributions(name="triton")), None),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "full": bool(config.getoption("--full")),
        "load_before": records.rounded(os.getloadavg()[0]),
        "command": " ".join(["pytest", *config.invocation_params.args]),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties("cuda")
        found |= {"device": gpu.name, "cuda": torch.version.cuda, "compute_capability": f"{gpu.major}.{gpu.minor}"}
        found |= {"multiprocessors": gpu.multi_processor_count, "cache_mb": round(gpu.L2_cache_size / 2**20, 1)}
        found |= {"memory_gb": round(gpu.total_memory / 1e9, 1)}
    return found
