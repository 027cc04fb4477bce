"""vcr_loss on a CPU, forward and backward, against plain PyTorch: the reference and the Gram form, eager and compiled.

    pytest benchmarks/bench_losses.py [--full]               checks and times
    pytest benchmarks/bench_losses.py --benchmark-disable    checks alone

Every provider's loss and gradient are checked against the reference in float64 before anything is timed. Then the
providers take turns, one step each per round, and pytest-benchmark times ours: a slow spell meets all of them. Every
step finds its input out of the cache, as far as 64 copies of it reach. Columns:
`x eager` is the eager reference's median over the provider's, `x plain` that of the fastest plain PyTorch; `copies` is
the peak of memory beyond the input, gradient included, in copies of h; `others` is the share of the machine that other
processes used meanwhile, which from a few percent on spoils the ratios too: many small operations suffer most.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import providers
import pytest
import records
import torch
from providers import SIGMA, Case, Outputs, Provider, compiled
from timing import BusyElsewhere, Host, Rotating, copies, peak_bytes

SECONDS, SECONDS_FULL = 2.0, 10.0  # a case's rounds take about this long ...
ROUNDS, ROUNDS_FULL = (3, 200), (5, 1000)  # ... but are no fewer and no more than this
MOST_SECONDS, MOST_BYTES = 60.0, 8e9  # a compiled reference that needs more for a step is left out

Step = Callable[[], Outputs]

CASES = [
    Case(160, (10,), 2048, target=20.0),
    Case(256, (26,), 1024, target=7.0),
    Case(256, (15,), 512, target=4.0),
    Case(256, (10, 5), 512),
    Case(256, (15,), 256, target=1.7),
    Case(128, (9,), 256),
    Case(64, (8,), 128),
    Case(32, (4,), 64),
    Case(1024, (1,), 256),
    Case(4096, (1,), 64),
    Case(16384, (1,), 64),
]
MORE_CASES = [
    Case(160, (100,), 2048, target=20.0),
    Case(2, (1,), 1),
    Case(256, (1,), 8192),
    Case(256, (1,), 2048),
    Case(512, (15,), 512),
    Case(256, (26,), 2048, target=7.0),
    Case(2048, (1,), 1024),
    Case(1000, (7,), 100),
    Case(33, (5, 6, 7), 65),
]
PLAIN = ("eager reference", "compiled reference", "gram form", "compiled gram form")


def compared(case: Case) -> dict[str, Provider | str]:
    """Name to function, or to the reason why it is left out."""
    gram_form = providers.gram_form_of(case)
    return {
        "eager reference": providers.eager_reference,
        "compiled reference": compiled(providers.eager_reference),
        "gram form": gram_form,
        "compiled gram form": compiled(gram_form),
        "ours": providers.ours,
        "ours compiled": compiled(providers.ours),
    }


# -- The benchmark --------------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = CASES + (MORE_CASES if metafunc.config.getoption("--full") else [])
    metafunc.parametrize("case", cases, ids=lambda case: str(case).replace(", ", "x"))


def test_vcr_loss(case, benchmark, report, full, request):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    parts = [SIGMA * torch.randn(case.n, t, case.d, generator=generator) for t in case.steps]
    parts = [part.requires_grad_() for part in parts]
    h_bytes = sum(part.nbytes for part in parts)
    loss, gradient = providers.judge(parts)

    host = Host()
    sets = [
        [part.detach().clone().requires_grad_() for part in parts] for _ in range(copies(h_bytes, host.cache_bytes))
    ]
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    functions = compared(case)
    for number, (name, function) in enumerate(functions.items()):
        rows[name] = {"N, T, d": str(case), "provider": name}
        if isinstance(function, str):
            rows[name]["note"] = function
            continue
        step: Step = partial(providers.step, function, parts)
        if "compiled" in name:
            step()
        started = time.perf_counter()
        outputs, peak = peak_bytes(step, host)
        seconds = time.perf_counter() - started
        error = max(providers.errors(outputs, loss, gradient))
        assert error <= max(providers.tolerance("fp32", case.n)), (
            f"{name} at {case}: off by {error:.1e} relative to the reference in float64"
        )
        rows[name] |= {"copies": peak / h_bytes, "_error": error}
        if name == "compiled reference" and (seconds > MOST_SECONDS or peak > MOST_BYTES):
            rows[name]["note"] = f"not timed: {seconds:.0f} s and {peak / 1e9:.1f} GB for a step"
        else:
            # Each starts elsewhere, so that none finds in the cache what the one before it has read.
            steps[name] = Rotating(partial(providers.step, function), sets, number * len(sets) // len(functions))
    if benchmark.disabled:
        return

    found = request.getfixturevalue("ceilings")
    busy = BusyElsewhere()
    timed = _take_turns(benchmark, case, steps, full)
    elsewhere = busy.share()
    for name, times in timed.items():
        low, median, high = statistics.quantiles(times, n=4)
        rows[name] |= {"_median_ms": 1e3 * median, "_min_ms": 1e3 * min(times), "_iqr_ms": 1e3 * (high - low)}
        rows[name] |= {"_rounds": len(times), "_busy_elsewhere": elsewhere}
        shape = case.n, sum(case.steps), case.d
        work = records.floor_bytes(*shape, 4), records.floor_flops(*shape)
        rows[name] |= records.achieved(1e3 * median, *work, found.copy, found.products["fp32"])
    _compare(rows, case)
    rows["ours"]["others"] = f"{elsewhere:.0%}"
    report(list(rows.values()))


def _take_turns(benchmark: Any, case: Case, steps: dict[str, Step], full: bool) -> dict[str, list[float]]:
    """Seconds of every step: rounds in which each provider goes once, ours last and timed by pytest-benchmark."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def time_one(name: str) -> None:
        started = time.perf_counter()
        steps[name]()
        times[name].append(time.perf_counter() - started)

    def time_the_others() -> None:
        for name in steps:
            if name != "ours":
                time_one(name)

    time_the_others()
    time_one("ours")
    fewest, most = ROUNDS_FULL if full else ROUNDS
    seconds = sum(sum(x) for x in times.values())
    rounds = round(min(max((SECONDS_FULL if full else SECONDS) / seconds, fewest), most))
    benchmark.group = str(case)
    gc.collect()
    benchmark.pedantic(steps["ours"], setup=time_the_others, rounds=rounds - 1)  # one is done
    times["ours"] += benchmark.stats.stats.data
    return times


def _compare(rows: dict[str, dict[str, Any]], case: Case) -> None:
    """Puts the ratios, and for ours the target, into rows."""
    eager = rows["eager reference"]["_median_ms"]
    plain = min(row["_median_ms"] for name, row in rows.items() if name in PLAIN and "_median_ms" in row)
    for name, row in rows.items():
        if "_median_ms" in row:
            ratios = {"x eager": eager / row["_median_ms"], "x plain": plain / row["_median_ms"]}
            note = row.pop("note", None)
            copies = row.pop("copies")
            row |= ratios | {"copies": copies} | ({"note": note} if note else {})
        if name == "ours":
            row["target"] = case.target
            row["met"] = "yes" if row["x eager"] >= case.target else "no"
