"""The compiled operators against their formula in float64, and as torch and its compiler see them."""

import math

import pytest
import tolerances
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative
from torch import Tensor

from vjvcr_fast import native

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LIMITS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 1.0)]


def arguments(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """z, v, gradient, step, momentum; the second sample is frozen."""
    generator = torch.Generator().manual_seed(0)
    z, v, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    step, momentum = (torch.rand(shape[0], generator=generator, dtype=torch.float64) for _ in range(2))
    step[1:2] = 0
    return [x.to(device, dtype) for x in (z, v, gradient, step, momentum)]


def formula(
    z: Tensor, v: Tensor, gradient: Tensor, step: Tensor, momentum: Tensor, weight: float, lower: float, upper: float
) -> tuple[Tensor, Tensor]:
    z, v, gradient = z.double(), v.double(), gradient.double()
    step, momentum = (x.double().view(-1, *[1] * (z.ndim - 1)) for x in (step, momentum))
    moved = v - step * gradient
    after = (moved.sign() * (moved.abs() - step * weight).clamp(min=0)).clamp(lower, upper)
    ahead = after + momentum * (after - z)
    return torch.where(step == 0, z, after), torch.where(step == 0, v, ahead)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 20), (2, 1), (7,), (3, 4, 5), (300, 123), (4, 0), (0, 4)])
def test_proximal_step(shape, dtype, limits, device):
    z, v, *others = arguments(*shape, dtype=dtype, device=device)
    expected = formula(z, v, *others, 0.3, *limits)
    assert torch.ops.vjvcr.proximal_step(z, v, *others, 0.3, *limits) is None
    bound = tolerances.FLOAT32 if dtype == torch.float32 else tolerances.FLOAT64
    for made, right in zip((z, v), expected, strict=True):
        assert relative(made, right) <= bound


def test_zeros_are_exact_and_nan_is_not_hidden():
    z, v, gradient, step, momentum = arguments(4, 6)
    gradient[2, 3] = math.nan
    torch.ops.vjvcr.proximal_step(z, v, gradient, step, momentum, 1e9, -math.inf, math.inf)
    assert z[2, 3].isnan()
    assert v[2, 3].isnan()
    z[2, 3] = 0
    assert not z[[0, 2, 3]].any()


@given(st.integers(1, 5), st.integers(0, 9), st.floats(0, 2), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_it_lowers_what_it_minimises(n, width, weight, seed):
    """x -> (x - v)^2 / 2 + weight |x| at the step's result, against a thousand other points."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n, width, generator=generator, dtype=torch.float64)
    z, one, zero = torch.zeros_like(v), torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    torch.ops.vjvcr.proximal_step(z, v.clone(), torch.zeros_like(v), one, zero, weight, -math.inf, math.inf)
    others = torch.linspace(-4, 4, 1000, dtype=torch.float64)[:, None, None]
    value = (z - v) ** 2 / 2 + weight * z.abs()
    assert (value <= (others - v) ** 2 / 2 + weight * others.abs() + 1e-12).all()


@pytest.mark.cuda
def test_both_devices_round_alike():
    on_cpu, on_gpu = arguments(64, 40), arguments(64, 40, device="cuda")
    for made in (on_cpu, on_gpu):
        torch.ops.vjvcr.proximal_step(*made, 0.3, 0.0, 1.0)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))


@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        (0, lambda x: x.half(), "float32 or float64"),
        (1, lambda x: x[:2], "z's shape"),
        (2, lambda x: x.double(), "dtype and device"),
        (3, lambda x: x[:2], "one number a sample"),
        (2, lambda x: x.mT.contiguous().mT, "contiguous"),
    ],
)
def test_what_does_not_fit_is_named(at, change, words):
    tensors = arguments(3, 4)
    tensors[at] = change(tensors[at])
    with pytest.raises(RuntimeError, match=words):
        torch.ops.vjvcr.proximal_step(*tensors, 0.3, -1.0, 1.0)


def test_opcheck():
    torch.library.opcheck(torch.ops.vjvcr.proximal_step.default, (*arguments(3, 4), 0.3, -1.0, 1.0))


def test_compiled():
    def twice(z, v, *others):
        z, v = z.clone(), v.clone()
        for _ in range(2):
            torch.ops.vjvcr.proximal_step(z, v, *others, 0.3, -1.0, 1.0)
        return z, v

    tensors = arguments(3, 4)
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*tensors), twice(*tensors), strict=True))


def test_the_host_math_of_the_sources():
    host = pytest.importorskip("vjvcr_fast._native", reason="pybind11 was not there when the operators were built")
    z, v, gradient, step, momentum = arguments(5, 20, dtype=torch.float64)
    columns = step[:, None].numpy(), momentum[:, None].numpy()
    after = host.proximal(v.numpy(), gradient.numpy(), columns[0], 0.3, -1.0, 1.0)
    ahead = host.extrapolate(after, z.numpy(), columns[1])
    torch.ops.vjvcr.proximal_step(z, v, gradient, step, momentum, 0.3, -1.0, 1.0)
    moved = [0, 2, 3, 4]
    assert torch.equal(z[moved], torch.from_numpy(after)[moved])
    assert torch.equal(v[moved], torch.from_numpy(ahead)[moved])
