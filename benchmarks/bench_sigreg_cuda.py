"""sigreg on a CUDA GPU, forward and backward, against plain PyTorch in three precisions.

    pytest benchmarks/bench_sigreg_cuda.py                        checks and times
    pytest benchmarks/bench_sigreg_cuda.py --benchmark-disable    checks alone

As bench_losses_cuda.py, with its columns; "of product" counts the three products of N d K. All but the last are given
the directions; the last one draws them, as training does. The plain ones compute bfloat16 input in float32.
"""

import functools

import providers
import pytest
import torch
from bench_losses_cuda import PRECISIONS, SECONDS, SECONDS_FULL, compare, report_or_skip
from providers import Case, Parts, Provider
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import projections, sigreg

DIRECTIONS = 1024
CASES = [Case(256, (15,), 512), Case(128, (1,), 512), Case(256, (26,), 1024), Case(8192, (1,), 512)]


def eager_reference(parts: Parts, directions: Tensor) -> Tensor:
    return reference.sigreg(torch.cat(list(parts), dim=1).float(), directions)


def compared(directions: Tensor) -> dict[str, Provider | str]:
    plain = functools.partial(eager_reference, directions=directions)
    return {
        "eager reference": plain,
        "ours": lambda parts: sigreg(parts, directions=directions),
        "ours, drawing": lambda parts: sigreg(parts, directions=DIRECTIONS, seed=0),
        "ours in torch": lambda parts: sigreg(parts, directions=directions, backend="torch"),
        "compiled reference": providers.compiled(plain),
    }


def judge(parts: Parts, directions: Tensor) -> tuple[Tensor, Tensor]:
    """As providers.judge: one time step after the other, since the reference keeps N K 17 numbers of each several
    times."""
    h, a = torch.cat([part.detach() for part in parts], dim=1), directions.double()
    total, gradient = torch.zeros((), dtype=torch.float64, device=h.device), torch.empty(h.shape, device=h.device)
    for t in range(h.shape[1]):
        x = h[:, t : t + 1].double().requires_grad_()
        loss = reference.sigreg(x, a) / h.shape[1]
        gradient[:, t : t + 1] = torch.autograd.grad(loss, x)[0]
        total += loss.detach()
    return total, gradient


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = [(case, name) for case in CASES for name in PRECISIONS]
    ids = [f"{str(case).replace(', ', 'x')}-{name}" for case, name in wanted]
    metafunc.parametrize(("case", "name"), wanted, ids=ids)


def test_sigreg(case, name, device, found, report, full):
    directions = projections.drawn(0, case.d, DIRECTIONS, device.torch_device)
    flops = 6 * case.n * sum(case.steps) * case.d * DIRECTIONS
    run = functools.partial(
        compare, case, name, device, found, SECONDS_FULL if full else SECONDS, compared(directions),
        judge=functools.partial(judge, directions=directions), flops=flops,
    )  # fmt: skip
    report_or_skip(run, case, name, found, report)
