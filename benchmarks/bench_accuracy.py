"""Relative errors of loss and gradient in float32 against the reference in float64, as N, d and T grow.

    pytest benchmarks/bench_accuracy.py [--full]

Ours in plain torch and in the Triton kernels, beside the reference itself in float32. Where there is no GPU the kernels
run in Triton's interpreter, in a process of its own, over a smaller grid: what it shows is the order of the sums, for
it multiplies in float32 whatever a kernel asks for. `--full` adds TF32 and bfloat16 on a GPU.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import providers
import pytest
import torch
from providers import ALPHA, BETA, SIGMA, Parts, Provider, tolerance
from records import Row
from timing import precision
from torch import Tensor

from vjvcr_fast.losses import vcr_loss

SIZES = "N", "d", "T"


class Grid(NamedTuple):
    """Values of each of SIZES; where one varies, the other two are as in `base`. Numbers are means over `seeds`."""

    base: dict[str, int]
    values: dict[str, tuple[int, ...]]
    seeds: int


BASE = {"N": 64, "d": 128, "T": 4}
CPU = Grid(
    BASE,
    {"N": (4, 16, 64, 256, 1024, 4096, 16384), "d": (2, 8, 32, 128, 512, 2048), "T": (1, 4, 16, 64, 256)},
    seeds=4,
)
QUICK = Grid(BASE, {"N": (4, 16, 64, 256, 1024), "d": (2, 8, 32, 128, 512), "T": (1, 4, 16)}, seeds=2)
# The interpreter takes its time, and a GPU compiles for every shape.
INTERPRETER = Grid(BASE, {"N": (4, 16, 64, 256, 1024), "d": (2, 8, 32, 128, 512, 2048), "T": (1, 4, 16)}, seeds=2)
CUDA = Grid({"N": 256, "d": 512, "T": 8}, {"N": (64, 256, 1024, 16384), "d": (64, 512, 2048), "T": (1, 8, 64)}, seeds=4)


def in_triton(parts: Parts) -> Tensor:
    return vcr_loss(parts[0], alpha=ALPHA, beta=BETA, backend="triton").loss


def measured(function: Provider, title: str, grid: Grid, device: torch.device, name: str = "fp32") -> Iterator[Row]:
    """A row for each shape of the grid: the root mean squares of the errors over the seeds. name: of the precision."""
    for sweep in SIZES:
        for value in grid.values[sweep]:
            sizes = {**grid.base, sweep: value}
            with precision(name) as dtype:
                found = [_errors(function, sizes, seed, device, dtype) for seed in range(grid.seeds)]
            loss, gradient = (math.hypot(*x) / grid.seeds**0.5 for x in zip(*found, strict=True))
            fixed = ", ".join(f"{size} = {sizes[size]}" for size in SIZES if size != sweep)
            row = {"provider": title, "sweep": sweep, "fixed": fixed, **sizes, "_precision": name}
            yield row | {"loss error": loss, "gradient error": gradient}


def _errors(
    function: Provider, sizes: dict[str, int], seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    h = SIGMA * torch.randn(sizes["N"], sizes["T"], sizes["d"], generator=generator)
    parts = [h.to(device, dtype).requires_grad_()]
    return providers.errors(providers.step(function, parts), *providers.judge(parts))


def _check(rows: Sequence[Row]) -> None:
    for row in rows:
        bound = max(tolerance(row["_precision"], row["N"]))
        assert max(row["loss error"], row["gradient error"]) <= bound, f"{row}: allowed {bound:.1e}"


# -- The benchmarks -------------------------------------------------------------------------------------------------


def test_torch(report, full):
    device, grid = torch.device("cpu"), CPU if full else QUICK
    if torch.cuda.is_available():
        device, grid = torch.device("cuda"), CUDA
    yardstick = measured(providers.eager_reference, "reference in float32", grid, device)
    rows = [*measured(providers.ours_in_torch, "torch", grid, device)]
    report([*yardstick, *rows])
    _check(rows)


def test_triton(report, full):
    pytest.importorskip("triton")
    if not full and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter takes its time: --full")
    rows = _on_cuda(full) if torch.cuda.is_available() else _interpreted()
    report(rows)
    _check(rows)


def _on_cuda(full: bool) -> list[Row]:
    names = {"fp32": "Triton", "tf32": "Triton, TF32", "bf16": "Triton, bfloat16"} if full else {"fp32": "Triton"}
    device = torch.device("cuda")
    return [row for name, title in names.items() for row in measured(in_triton, title, CUDA, device, name)]


def _interpreted() -> list[Row]:
    """In a process of its own: TRITON_INTERPRET is read where triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps([*measured(in_triton, "Triton, interpreted", INTERPRETER, torch.device("cpu"))]))
