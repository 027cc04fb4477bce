"""sigreg on a CPU, forward and backward, against plain PyTorch: the reference, eager and compiled.

    pytest benchmarks/bench_sigreg.py                        checks and times
    pytest benchmarks/bench_sigreg.py --benchmark-disable    checks only

As in bench_losses.py: loss and gradient of every provider are compared with the reference in float64, then the
providers take turns. All but the last are given the directions; the last one draws new ones at each call, as training
does. Columns:

x eager   the eager reference's median time over the provider's
x plain   the same for the faster of the two references
copies    peak memory beyond the input, gradient included, in copies of h
x memory  the eager reference's peak memory over the provider's
others    the share of the machine that other processes used meanwhile
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import records
import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.bench.timing import BusyElsewhere, Host, Region, Rotating, copies, peak_bytes, spread, take_turns
from vjvcr_fast.losses import projections, sigreg

DIRECTIONS = 1024
ERROR, ERROR_OF_PLAIN = 1e-5, 1e-4  # the largest relative errors; the compiler's sums over 8192 samples have 5e-5
ROUNDS = 5.0, 3, 200  # of a case: seconds, fewest and most
CASES: dict[tuple[int, int, int], dict[str, float]] = {
    (256, 15, 512): {"x eager": 12.0, "x plain": 2.5, "x memory": 20.0},
    (128, 1, 512): {"x eager": 8.0, "x plain": 2.5},
}
MORE_CASES: dict[tuple[int, int, int], dict[str, float]] = {
    (256, 26, 1024): {},
    (1024, 1, 256): {},
    (32, 4, 64): {},
    (8192, 1, 512): {},
}


def step(loss_of: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss_of(h)
    return loss.detach(), torch.autograd.grad(loss, h)[0]


def judge(h: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """The reference in float64, one time step after the other: it keeps N K 17 numbers for each, several times."""
    total, gradient, a = torch.zeros((), dtype=torch.float64), torch.empty_like(h), directions.double()
    for t in range(h.shape[1]):
        x = h[:, t : t + 1].detach().double().requires_grad_()
        loss = reference.sigreg(x, a) / h.shape[1]
        gradient[:, t : t + 1] = torch.autograd.grad(loss, x)[0]
        total += loss.detach()
    return total, gradient


def compared(directions: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    plain, seeds = partial(_reference, directions=directions), itertools.count()
    return {
        "eager reference": plain,
        "compiled reference": torch.compile(plain, fullgraph=True, dynamic=False),
        "in torch": partial(sigreg, directions=directions, backend="torch"),
        "ours": partial(sigreg, directions=directions),
        "ours, drawing": lambda h: sigreg(h, directions=DIRECTIONS, seed=next(seeds)),
    }


def _reference(h: Tensor, directions: Tensor) -> Tensor:
    return reference.sigreg(h, directions)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [*CASES, *(MORE_CASES if metafunc.config.getoption("--full") else ())]
    metafunc.parametrize("case", cases, ids=lambda case: "x".join(map(str, case)))


def test_sigreg(case, check_only, report):
    torch._dynamo.reset()
    directions = projections.drawn(0, case[2], DIRECTIONS, torch.device("cpu"))
    rows = compare(case, directions, compared(directions), None if check_only else ROUNDS)
    if not check_only:
        report(rows)


def compare(
    case: tuple[int, int, int],
    directions: Tensor,
    functions: dict[str, Callable[[Tensor], Tensor]],
    rounds: tuple[float, int, int] | None,
) -> list[dict[str, Any]]:
    """A row for each provider, which has been checked. rounds: seconds, fewest and most; with None nothing is timed."""
    host = Host()
    h = torch.randn(case, generator=torch.Generator().manual_seed(0))
    sets = [h.clone().requires_grad_() for _ in range(1 + copies(h.nbytes, host.cache_bytes))]
    loss, gradient = judge(h, directions)
    rows: dict[str, dict[str, Any]] = {}
    regions: dict[str, Region] = {}
    for number, (name, function) in enumerate(functions.items()):
        run = partial(step, function)
        run(sets[0])
        (ours, made), peak = peak_bytes(partial(run, sets[0]), host)
        if "drawing" not in name:
            error = max(float((ours - loss).abs() / loss), float((made - gradient).norm() / gradient.norm()))
            assert error <= (ERROR_OF_PLAIN if "reference" in name else ERROR), (
                f"{name} at {case}: off by {error:.1e} relative to the reference in float64"
            )
        rows[name] = {"N, T, d": ", ".join(map(str, case)), "provider": name, "copies": peak / h.nbytes}
        rows[name]["x memory"] = rows["eager reference"]["copies"] / rows[name]["copies"]
        first = number * len(sets) // len(functions)
        regions[name] = Region(Rotating(run, sets, first))
    if rounds is None:
        return list(rows.values())

    busy = BusyElsewhere()
    times = take_turns(host, regions, *rounds)
    elsewhere, medians = busy.share(), {name: spread(of_one).median for name, of_one in times.items()}
    eager, plain = medians["eager reference"], min(medians[name] for name in medians if "reference" in name)
    for name, of_one in times.items():
        median, least, iqr = spread(of_one)
        rows[name] |= {"x eager": eager / median, "x plain": plain / median, "_median_ms": median, "_min_ms": least}
        rows[name] |= {"_iqr_ms": iqr, "_rounds": len(of_one), "_busy_elsewhere": elsewhere}
    rows["ours"] = records.goals(rows["ours"], (CASES | MORE_CASES).get(case, {})) | {"others": f"{elsewhere:.0%}"}
    return list(rows.values())
