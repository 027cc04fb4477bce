"""vcr_loss on a CPU, forward and backward, against plain PyTorch: the reference and the Gram form, eager and compiled.

    pytest benchmarks/bench_losses.py [--full]               checks and times
    pytest benchmarks/bench_losses.py --benchmark-disable    checks only

Before anything is timed, the loss and gradient of every provider are compared with the reference in float64. Then the
providers take turns, so that a slow spell of the machine meets all of them. The input of a step is not in the cache,
unless it is so small that even 64 copies fit there. Columns:

x eager   the eager reference's median time over the provider's
x plain   the same for the fastest plain PyTorch
copies    peak memory beyond the input, gradient included, in copies of h
others    the share of the machine that other processes used meanwhile. From a few percent on it spoils the ratios,
          above all those of many small operations.
"""

import time
from functools import partial
from typing import Any

import providers
import pytest
import records
import torch
from providers import SIGMA, Case, Provider, compiled
from timing import BusyElsewhere, Host, Region, Rotating, copies, peak_bytes, spread, take_turns

SECONDS, SECONDS_FULL = 2.0, 10.0  # the rounds of a case take about this long ...
ROUNDS, ROUNDS_FULL = (3, 200), (5, 1000)  # ... but they are at least and at most this many
MOST_SECONDS, MOST_BYTES = 60.0, 8e9  # a compiled reference that needs more for a step is not timed

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
    """Each provider's name with its function, or with the reason why it is left out."""
    gram_form = providers.gram_form_of(case)
    return {
        "eager reference": providers.eager_reference,
        "compiled reference": compiled(providers.eager_reference),
        "gram form": gram_form,
        "compiled gram form": compiled(gram_form),
        "ours": providers.ours,
        "ours compiled": compiled(providers.ours),
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = CASES + (MORE_CASES if metafunc.config.getoption("--full") else [])
    metafunc.parametrize("case", cases, ids=lambda case: str(case).replace(", ", "x"))


def test_vcr_loss(case, check_only, report, full, request):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    parts = [SIGMA * torch.randn(case.n, t, case.d, generator=generator) for t in case.steps]
    h_bytes, host = sum(part.nbytes for part in parts), Host()
    parts, *sets = [
        [part.clone().requires_grad_() for part in parts] for _ in range(1 + copies(h_bytes, host.cache_bytes))
    ]
    loss, gradient = providers.judge(parts)

    rows: dict[str, dict[str, Any]] = {}
    regions: dict[str, Region] = {}
    functions = compared(case)
    for number, (name, function) in enumerate(functions.items()):
        row = rows[name] = {"N, T, d": str(case), "provider": name}
        if isinstance(function, str):
            row["note"] = function
            continue
        step = partial(providers.step, function, parts)
        if "compiled" in name:
            step()
        started = time.perf_counter()
        outputs, peak = peak_bytes(step, host)
        seconds = time.perf_counter() - started
        error = max(providers.errors(outputs, loss, gradient))
        assert error <= max(providers.tolerance("fp32", case.n)), (
            f"{name} at {case}: off by {error:.1e} relative to the reference in float64"
        )
        row |= {"copies": peak / h_bytes, "_error": error}
        if name == "compiled reference" and (seconds > MOST_SECONDS or peak > MOST_BYTES):
            row["note"] = f"not timed: {seconds:.0f} s and {peak / 1e9:.1f} GB for a step"
        else:
            # Each starts with another copy, so that it does not find in the cache what the one before has read.
            first = number * len(sets) // len(functions)
            regions[name] = Region(Rotating(partial(providers.step, function), sets, first))
    if check_only:
        return

    found, busy = request.getfixturevalue("ceilings"), BusyElsewhere()
    seconds, rounds = (SECONDS_FULL, ROUNDS_FULL) if full else (SECONDS, ROUNDS)
    times = take_turns(host, regions, seconds, *rounds)
    elsewhere, medians = busy.share(), {name: spread(of_one).median for name, of_one in times.items()}
    eager, plain = medians["eager reference"], min(medians[name] for name in PLAIN if name in medians)
    shape = case.n, sum(case.steps), case.d
    for name, of_one in times.items():
        median, least, iqr = spread(of_one)
        rows[name] |= {"x eager": eager / median, "x plain": plain / median, "_median_ms": median, "_min_ms": least}
        rows[name] |= {"_iqr_ms": iqr, "_rounds": len(of_one), "_busy_elsewhere": elsewhere}
        work = records.floor_bytes(*shape, 4), records.floor_flops(*shape)
        rows[name] |= records.achieved(median, *work, found.copy, found.products["fp32"])
    met = "yes" if rows["ours"]["x eager"] >= case.target else "no"
    rows["ours"] |= {"target": case.target, "met": met, "others": f"{elsewhere:.0%}"}
    report(list(rows.values()))
