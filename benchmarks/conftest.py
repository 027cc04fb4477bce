"""What all benchmarks share: options, the tables at the end of a run, and the files in results/.

A benchmark compares ways to compute one thing, called providers. It measures them in one session, in turns, so that
their ratios mean something on a busy machine, and hands one row per provider to the fixture `report`. The times of a
CPU go to the file only, and only a whole run replaces the file.

On a GPU the tests run in the order of ORDER, and a file is written whenever a test reports: *-partial.json, which says
what is missing, until nothing is.
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import records
import report as reports
import torch

from vjvcr_fast.bench import timing
from vjvcr_fast.data.files import reason, write_atomic
from vjvcr_fast.losses import backends
from vjvcr_fast.paper.machine import processor

GPU = torch.cuda.is_available()
ON_A_GPU, ON_A_CPU = ("losses_cuda", "sigreg_cuda"), ("losses", "losses_grid", "sigreg")
collect_ignore = [f"bench_{name}.py" for name in (ON_A_CPU if GPU else ON_A_GPU)]

# What matters most on a GPU. A test comes where the first of these texts that is in its name stands; the rest is last.
ORDER = (
    "bench_losses_cuda.py::test_vcr_loss[160x100x2048-",
    "bench_losses_cuda.py::test_vcr_loss[256x15x512-",
    "bench_latents.py::TestLatents::test_infer[256-",
    "bench_latents.py::TestLatents::test_infer[512-",
    "bench_losses_cuda.py::test_vcr_loss[256x26x2048-",
    "bench_losses_cuda.py::test_vcr_loss[2600000x1x64-",
    "bench_host.py",
    "bench_training.py::test_videos_per_second[moving-mnist",
    "bench_sigreg_cuda.py",
    "bench_losses_cuda.py",
    "bench_latents.py",
    "bench_training.py",
)
BUSY = 0.1  # if other processes used more than this share of the machine, a run is shown but not kept


class Benchmark:
    """A file of benchmarks in this run. Tests are known by their names without the file's."""

    def __init__(self) -> None:
        self.tests: list[str] = []  # before -k takes some away
        self.rows: dict[str, list[records.Row]] = {}
        self.measured: set[str] = set()  # whose rows are all there
        self.reasons: dict[str, str] = {}  # why a test did not pass

    def results(self, name: str, machine: dict[str, Any]) -> records.Row:
        """The content of the file. A partial one says so, and which tests have not reported, or not to the end."""
        missing = {x: self.reasons.get(x, "not measured") for x in self.tests if x not in self.measured}
        marked = {"partial": True, "left_out": missing} if missing else {}
        return records.results(name, machine | marked, [row for rows in self.rows.values() for row in rows])


FOUND = pytest.StashKey[dict[str, Benchmark]]()
MACHINE = pytest.StashKey[dict[str, Any]]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="more rounds and larger shapes (an hour)")
    parser.addoption("--seconds", type=float, default=float("inf"), help="leaves out tests that would begin later")
    results = records.ROOT / "benchmarks" / "results"
    parser.addoption("--results", type=Path, default=results, help="the folder of the files")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND], config.stash[STARTED] = {}, time.monotonic()
    config.stash[MACHINE] = _machine(config)  # now, since the file that this run writes is no change of the code


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        config.stash[FOUND].setdefault(_name(item.path), Benchmark()).tests.append(_test(item))
    if GPU:
        items.sort(key=lambda item: next((i for i, text in enumerate(ORDER) if text in item.nodeid), len(ORDER)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("--seconds")
    if time.monotonic() - item.config.stash[STARTED] > seconds:
        pytest.skip(f"left out: the {seconds:.0f} s were over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    if call.excinfo is not None:
        error = call.excinfo.value
        said = f"{type(error).__name__}: {reason(error)}"
        item.config.stash[FOUND][_name(item.path)].reasons[_test(item)] = said
    return (yield)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def check_only(request: pytest.FixtureRequest) -> bool:
    """With pytest-benchmark's --benchmark-disable outputs are compared and nothing is timed."""
    return bool(request.config.getoption("benchmark_disable", False))


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
def found(request: pytest.FixtureRequest, machine: dict[str, Any], check_only: bool) -> timing.Ceilings | None:
    """The ceilings, which also go to the file, or None if nothing is timed."""
    if check_only:
        return None
    machine["auto"] = backends.explain()["cuda"]
    return request.getfixturevalue("ceilings")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """report(rows, more=False): call it once per test. Before that, with more=True, for rows that are there already.

    A row is a flat dict of text and numbers. A key with a leading underscore goes to the file and not into the table.
    `_busy_elsewhere` is the share of the machine that others used.
    """
    config, name, test = request.config, _name(request.path), _test(request.node)
    found = config.stash[FOUND][name]

    def report(rows: list[records.Row], more: bool = False) -> None:
        found.rows[test] = [dict(row) for row in rows]
        if not more:
            found.measured.add(test)
        if GPU:
            said = _write(_path(config, name, partial=True), found.results(name, config.stash[MACHINE]))
            print("", *_table(found.rows[test]), said, sep="\n", flush=True)  # `make gpu-bench` shows it

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    machine, say = config.stash[MACHINE], terminalreporter.write_line
    for name, found in config.stash[FOUND].items():
        if not found.rows:
            continue
        results = found.results(name, machine)
        terminalreporter.section(f"{name} on {machine['device']}")
        for line in _table([row for rows in found.rows.values() for row in rows]):
            say(line)
        path, partial = (_path(config, name, partial) for partial in (False, True))
        busy = max(row.get("busy_elsewhere", 0.0) for row in results["rows"])
        if "partial" in results:
            missing = f"{len(results['left_out'])} of {len(found.tests)} tests are missing"
            say(_write(partial, results) if GPU else f"not saved: {missing}")
        elif busy > BUSY:
            say(f"not saved: other processes used up to {busy:.0%} of the machine")
        elif not machine["full"] and records.of_a_full_run(path):
            say(f"not saved: {path} is from a --full run")
        else:
            say(_write(path, results))
            if path.exists():
                partial.unlink(missing_ok=True)
            if "targets" in results:
                say(_write(path.with_suffix(".md"), results))
        if "targets" in results:
            say(reports.gpu_report(results))


def _path(config: pytest.Config, name: str, partial: bool) -> Path:
    path = config.getoption("--results") / records.file_name(name, config.stash[MACHINE])
    return path.with_name(f"{path.stem}-partial.json") if partial else path


def _write(path: Path, results: records.Row) -> str:
    """Returns what to say. That a file cannot be written is no reason to measure no further."""
    try:
        write_atomic(path, (records.dumps if path.suffix == ".json" else reports.gpu_report)(results))
    except OSError as error:
        return f"not written: {error}"
    return f"written: {path}"


def _table(rows: list[records.Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if not key.startswith("_")))
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _name(path: Path) -> str:
    return path.stem.removeprefix("bench_")


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[2]


def _machine(config: pytest.Config) -> dict[str, Any]:
    commit, dirty = records.commit()
    found = {
        "device": "cpu",
        "processor": processor(),
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
