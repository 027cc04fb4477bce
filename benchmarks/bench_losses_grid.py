"""vcr_loss on a CPU over a grid of 60 shapes: is any of them slower than plain PyTorch?

    pytest benchmarks/bench_losses_grid.py [--full]

The shapes were chosen before anything was tuned: of all whose eager reference stays below 4 GB and takes no more than
about a second, those that lie farthest apart in N, T and d. Everything is measured as in bench_losses.py, in shorter
rounds. Plain PyTorch is compiled once for all shapes (dynamic=True), since to compile for each would take an hour.

x plain    the fastest plain PyTorch's median time over ours; `fastest` says which that is
"""

import bench_losses
import providers
import pytest
import torch
from providers import Case, compiled

QUICK, FULL = (0.5, 3, 100), (2.0, 5, 300)  # as in bench_losses.py

# fmt: off
SHAPES = [
    (2, 1, 1), (2, 1, 1024), (2, 2, 8192), (2, 3, 64), (2, 8, 8), (2, 15, 1),
    (2, 15, 512), (2, 32, 32), (2, 128, 1), (2, 128, 100), (2, 128, 1024), (3, 2, 8),
    (5, 3, 512), (5, 100, 8), (16, 1, 8192), (16, 2, 100), (16, 8, 3), (16, 8, 4096),
    (16, 32, 1), (16, 32, 128), (16, 32, 1024), (33, 1, 1), (33, 1, 17), (33, 1, 512),
    (33, 32, 17), (33, 128, 100), (64, 3, 2048), (64, 8, 128), (64, 128, 1024), (128, 2, 64),
    (128, 3, 8), (128, 15, 1), (128, 100, 3), (256, 1, 8192), (256, 32, 100), (256, 32, 1024),
    (256, 128, 32), (500, 1, 256), (500, 3, 1), (500, 8, 2048), (500, 15, 8), (1024, 2, 17),
    (1024, 8, 64), (1024, 128, 1), (2048, 1, 3), (2048, 32, 1), (2048, 100, 100), (2048, 128, 8),
    (4096, 1, 2048), (4096, 2, 256), (4096, 8, 512), (4096, 32, 32), (16384, 1, 1), (16384, 1, 64),
    (16384, 3, 8), (16384, 8, 1), (16384, 8, 64), (16384, 15, 8), (16384, 100, 8), (16384, 128, 1),
]
# fmt: on
FUNCTIONS = {
    "eager reference": providers.eager_reference,
    "compiled reference": compiled(providers.eager_reference, dynamic=True),
    "smaller form": providers.smaller_form,
    "compiled smaller form": compiled(providers.smaller_form, dynamic=True),
    "ours": providers.ours,
}


@pytest.fixture(scope="module", autouse=True)
def recompiled():
    """Compiled once for all shapes, but anew where a size is 1, and for either form."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shape(shape, check_only, report, full, request):
    n, steps, d = shape
    case = Case(n, (steps,), d)
    found = None if check_only else request.getfixturevalue("ceilings")
    rows = bench_losses.compare(case, FUNCTIONS, found, FULL if full else QUICK)
    if check_only:
        return
    fastest = min(bench_losses.PLAIN, key=lambda name: rows[name]["_median_ms"])
    times = {f"_{name}, ms": row["_median_ms"] for name, row in rows.items()}
    kept = {key: value for key, value in rows["ours"].items() if key not in ("provider", "_median_ms")}
    report([{"N, T, d": str(case), "fastest": fastest} | kept | times])
