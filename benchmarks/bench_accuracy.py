"""Relative errors of loss and gradient against the reference in float64, as N, d and T grow.

    pytest benchmarks/bench_accuracy.py [--full]

Compared are our plain torch code, our Triton kernels, and the reference itself in float32. Without a GPU, the kernels
run with --full only, in Triton's interpreter, which takes minutes. It shows the effect of the order of sums: it
multiplies in float32 whatever a kernel asks for. On a GPU, --full adds TF32 and bfloat16.
"""

import json
import math
import os
import subprocess
import sys

import providers
import torch
from providers import SIGMA, Provider, tolerance
from records import Row

from vjvcr_fast.bench.timing import precision

BASE = {"N": 64, "d": 128, "T": 4}  # one of the three varies, the other two are these
GRID = {"N": (4, 16, 64, 256, 1024), "d": (2, 8, 32, 128, 512, 2048), "T": (1, 4, 16)}
MORE = {"N": (4096, 16384), "d": (), "T": (64, 256)}  # with --full; too large for the interpreter
SEEDS = 4
IN_TRITON = providers.ours_with(backend="triton")


def measured(function: Provider, title: str, grid: dict[str, tuple[int, ...]], name: str = "fp32") -> list[Row]:
    """A row for each shape, with root mean squares over the seeds. name: one of timing.PRECISIONS."""
    rows = []
    for sweep, value in [(size, value) for size in BASE for value in grid[size]]:
        sizes = BASE | {sweep: value}
        with precision(name) as dtype:
            found = [_errors(function, sizes, seed, dtype) for seed in range(SEEDS)]
        loss, gradient = (math.hypot(*x) / SEEDS**0.5 for x in zip(*found, strict=True))
        fixed = ", ".join(f"{size} = {sizes[size]}" for size in BASE if size != sweep)
        row = {"provider": title, "sweep": sweep, "fixed": fixed, **sizes, "_precision": name}
        rows.append(row | {"loss error": loss, "gradient error": gradient})
    return rows


def _errors(function: Provider, sizes: dict[str, int], seed: int, dtype: torch.dtype) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    h = SIGMA * torch.randn(sizes["N"], sizes["T"], sizes["d"], generator=generator)
    parts = [h.to("cuda" if torch.cuda.is_available() else "cpu", dtype).requires_grad_()]
    return providers.errors(providers.step(function, parts), *providers.judge(parts))


def test_accuracy(report, full):
    grid = {size: values + (MORE[size] if full else ()) for size, values in GRID.items()}
    rows = measured(providers.ours_in_torch, "torch", grid)
    if torch.cuda.is_available():
        titles = {"fp32": "Triton"} | ({"tf32": "Triton, TF32", "bf16": "Triton, bfloat16"} if full else {})
        rows += [row for name, title in titles.items() for row in measured(IN_TRITON, title, grid, name)]
    elif full:
        # In a process of its own, because TRITON_INTERPRET is read when triton is imported.
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows += json.loads(done.stdout)
    report([*measured(providers.eager_reference, "reference in float32", grid), *rows])
    for row in rows:
        bound = max(tolerance(row["_precision"], row["N"]))
        assert max(row["loss error"], row["gradient error"]) <= bound, f"{row}: allowed {bound:.1e}"


if __name__ == "__main__":
    print(json.dumps(measured(IN_TRITON, "Triton, interpreted", GRID)))
