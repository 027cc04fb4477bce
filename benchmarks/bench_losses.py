"""vcr_loss and VICRegLoss on a CPU, forward and backward, against plain PyTorch: eager and compiled.

    pytest benchmarks/bench_losses.py [--full]               checks and times
    pytest benchmarks/bench_losses.py --benchmark-disable    checks only

Plain PyTorch is the reference, or VICReg's formula, and the same written with the smaller of the two products. lightly
joins where it is installed. Before anything is timed, the loss and gradient of every provider are compared
with the reference in float64. Then the providers take turns, so that a slow spell of the machine meets all of them. The
input of a step is not in the cache, unless it is so small that even 64 copies fit there. Columns:

x eager      the eager reference's median time over the provider's
x plain      the same for the fastest plain PyTorch
of product   the floor's flops per second (records.py) over the machine's rate of float32 products (timing.ceilings)
copies       peak memory beyond the input, gradient included, in copies of h
target       our goals, and what was reached
others       the share of the machine that other processes used meanwhile. From a few percent on it spoils the ratios,
             above all those of many small operations.
"""

import time
from functools import partial

import providers
import pytest
import records
import torch
from providers import Case, Provider, compiled
from records import Row

from vjvcr_fast.bench.timing import BusyElsewhere, Ceilings, Host, Region, Rotating, peak_bytes, spread, take_turns

# About how many seconds the rounds of a case take; how many there are at least and at most.
QUICK, FULL = (2.0, 3, 200), (6.0, 3, 1000)
MOST_SECONDS, MOST_BYTES = 60.0, 8e9  # a compiled reference that needs more for a step is not timed

CASES = [
    Case(256, (26,), 1024, eager=18, plain=2.2),
    Case(256, (15,), 512, eager=6, plain=2),
    Case(256, (10, 5), 512),
    Case(256, (15,), 256, eager=3, plain=1.8),
    Case(128, (9,), 256),
    Case(64, (8,), 128, eager=4, plain=2),
    Case(32, (4,), 64, eager=4, plain=2),
    Case(1024, (1,), 256),
    Case(4096, (1,), 64, eager=2, plain=1.6),
    Case(16384, (1,), 64, eager=2, plain=1.6),
]
MORE_CASES = [
    Case(160, (100,), 2048, eager=120, plain=3, product=0.55),
    Case(256, (26,), 2048, eager=32, plain=2.5, product=0.55),
    Case(160, (10,), 2048),
    Case(2, (1,), 1),
    Case(256, (1,), 8192, eager=130, plain=2),
    Case(2048, (1,), 8192),
    Case(256, (1,), 2048),
    Case(512, (15,), 512),
    Case(2048, (1,), 1024),
    Case(1000, (7,), 100),
    Case(33, (5, 6, 7), 65),
]
# Of VICReg: two branches (N, d).
VICREG = [Case(n, (1, 1), d) for n, d in ((256, 2048), (256, 512), (64, 128))]
MORE_VICREG = [Case(n, (1, 1), d) for n, d in ((256, 8192), (2048, 8192), (1024, 2048))]
PLAIN = ("eager reference", "compiled reference", "smaller form", "compiled smaller form")
Functions = dict[str, Provider | str]  # each provider's name with its function, or with the reason why it is left out


def compared(vicreg: bool) -> Functions:
    plain = (
        (providers.vicreg, providers.smaller_vicreg) if vicreg else (providers.eager_reference, providers.smaller_form)
    )
    ours = providers.vicreg_ours if vicreg else providers.ours
    both = [(function, compiled(function)) for function in plain]
    found = dict(zip(PLAIN, [*both[0], *both[1]], strict=True))
    if vicreg:
        found["lightly"] = providers.lightly()
    return found | {"ours": ours, "ours compiled": compiled(ours)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    vicreg, full = "vicreg" in metafunc.function.__name__, metafunc.config.getoption("--full")
    cases, more = (VICREG, MORE_VICREG) if vicreg else (CASES, MORE_CASES)
    metafunc.parametrize("case", cases + (more if full else []), ids=lambda case: str(case).replace(", ", "x"))


def test_vcr_loss(case, check_only, report, full, request):
    torch._dynamo.reset()
    found = None if check_only else request.getfixturevalue("ceilings")
    rows = compare(case, compared(vicreg=False), found, FULL if full else QUICK)
    if not check_only:
        report([{"N, T, d": str(case)} | row for row in rows.values()])


def test_vicreg_loss(case, check_only, report, full, request):
    torch._dynamo.reset()
    found = None if check_only else request.getfixturevalue("ceilings")
    rows = compare(case, compared(vicreg=True), found, FULL if full else QUICK, vicreg=True)
    if not check_only:
        report([{"N, d": f"{case.n}, {case.d}"} | row for row in rows.values()])


def compare(
    case: Case, functions: Functions, found: Ceilings | None, rounds: tuple[float, int, int], vicreg: bool = False
) -> dict[str, Row]:
    """A row for each provider, which has been checked. Without ceilings nothing is timed."""
    host = Host()
    sets = providers.inputs(case.n, case.steps, case.d, torch.float32, host)
    parts = sets[0]
    judged = providers.judge(parts, vicreg)
    rows, regions = dict[str, Row](), dict[str, Region]()
    for number, (name, function) in enumerate(functions.items()):
        row = rows[name] = {"provider": name}
        if isinstance(function, str):
            row["note"] = function
            continue
        step = partial(providers.step, function, parts)
        if "compiled" in name:
            step()
        started = time.perf_counter()
        outputs, peak = peak_bytes(step, host)
        seconds = time.perf_counter() - started
        error = max(providers.errors(outputs, *judged))
        assert error <= max(providers.tolerance("fp32", case.n)), (
            f"{name} at {case}: off by {error:.1e} relative to the reference in float64"
        )
        row |= {"copies": peak / sum(part.nbytes for part in parts), "_error": error}
        if name == "compiled reference" and (seconds > MOST_SECONDS or peak > MOST_BYTES):
            row["note"] = f"not timed: {seconds:.0f} s and {peak / 1e9:.1f} GB for a step"
        else:
            # Each starts with another copy, so that it does not find in the cache what the one before has read.
            first = number * len(sets) // len(functions)
            regions[name] = Region(Rotating(partial(providers.step, function), sets, first))
    if found is not None:
        busy = BusyElsewhere()
        times = take_turns(host, regions, *rounds)
        put_times(rows, case, times, found, busy.share())
    return rows


def put_times(rows: dict[str, Row], case: Case, times: dict[str, list[float]], found: Ceilings, others: float) -> None:
    medians = {name: spread(of_one).median for name, of_one in times.items()}
    eager, plain = medians[PLAIN[0]], min(medians[name] for name in (*PLAIN, "lightly") if name in medians)
    shape = case.n, sum(case.steps), case.d
    for name, of_one in times.items():
        median, least, iqr = spread(of_one)
        rows[name] |= {"x eager": eager / median, "x plain": plain / median, "_median_ms": median, "_min_ms": least}
        rows[name] |= {"_iqr_ms": iqr, "_rounds": len(of_one), "_busy_elsewhere": others}
        work = records.floor_bytes(*shape, 4), records.floor_flops(*shape)
        rows[name] |= records.achieved(median, *work, found.copy, found.products["fp32"])
    rows["ours"] = records.goals(rows["ours"], case.goals) | {"others": f"{others:.0%}"}
