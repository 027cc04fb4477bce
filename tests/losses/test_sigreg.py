"""Numbers of sigreg, its conventions and its directions: against reference.py in float64 and formulas written out here.

Interfaces (errors, the compiler, processes, memory) are in test_sigreg_interfaces.py.
"""

import math
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
import ways
from fuzz import fuzz, layouts
from hypothesis import strategies as st
from test_losses import STRIDES
from tolerances import relative
from torch import Tensor

from vjvcr_fast import native, reference
from vjvcr_fast.losses import SIGRegLoss, projections, sigreg
from vjvcr_fast.losses.projections import Settings

BOUNDS = {
    torch.float16: tolerances.FLOAT16,
    torch.bfloat16: tolerances.BFLOAT16,
    torch.float32: tolerances.FLOAT32,
    torch.float64: tolerances.FLOAT64,
}
# (N, T, d, K): the smallest shapes, odd ones, several blocks of samples, groups of directions and sums of a product.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 1, 7, 33), (50, 2, 3, 300), (70, 1, 65, 40), (33, 3, 300, 290), (7, 5, 1, 9)]
CONVENTIONS: dict[str, dict[str, Any]] = {
    "lightly": {},
    "eb_jepa": {"knots": 10, "symmetric": True, "scale_by_n": False},
    "paper": {"limit": 5.0, "symmetric": True},
    "fewest": {"knots": 2},
    "fewest symmetric": {"knots": 2, "symmetric": True, "limit": 0.7},
    "three": {"knots": 3, "symmetric": True, "limit": 2.0},
    "many": {"knots": 40, "limit": 4.0},
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Not quite normal: so neither loss nor gradient is a small difference."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.2 * x + 0.2 * x.square()).to(dtype)


def directions_of(d: int, count: int, seed: int = 0) -> Tensor:
    """(d, count) in float64, exactly as float32 has them."""
    made = torch.randn(d, count, generator=torch.Generator().manual_seed(seed))
    return projections.unit(made).double()


def judge(h: Tensor, directions: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """reference.sigreg of h (N, ..., d) in float64, and its gradient."""
    x = h.detach().double().contiguous().requires_grad_()
    loss = reference.sigreg(x.reshape(len(h), -1, h.shape[-1]), directions, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def assert_agrees(h: Tensor, count: int = 20, bound: float | None = None, **options: Any) -> None:
    leaf, directions = h.detach().requires_grad_(), directions_of(h.shape[-1], count)
    loss = sigreg(leaf, directions=directions, **options)
    right, gradient = judge(h, directions, **options)
    bound = BOUNDS[h.dtype] if bound is None else bound
    assert loss.dtype == (torch.float64 if h.dtype == torch.float64 else torch.float32)
    assert loss.shape == ()
    assert relative(loss, right) <= min(bound, tolerances.FLOAT32)
    (ours,) = torch.autograd.grad(loss, leaf)
    assert ours.dtype == h.dtype
    assert relative(ours, gradient) <= bound


@pytest.fixture(params=ways.WAYS)
def way(request, monkeypatch) -> None:
    ways.take(request.param, monkeypatch)


@pytest.mark.usefixtures("way")
class TestValues:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shapes(self, shape, dtype):
        assert_agrees(random(*shape[:3], dtype=dtype), shape[3])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        assert_agrees(random(17, 3, 13, dtype=dtype))

    @pytest.mark.parametrize("name", CONVENTIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_conventions(self, name, dtype):
        assert_agrees(random(9, 2, 5, dtype=dtype), **CONVENTIONS[name])

    def test_middle_dimensions(self):
        assert_agrees(random(6, 5))
        assert_agrees(random(6, 2, 3, 5))

    @pytest.mark.parametrize("layout", STRIDES)
    def test_strides(self, layout):
        assert_agrees(STRIDES[layout](random(6, 4, 5)))

    def test_a_sequence_is_its_concatenation(self):
        parts = [random(6, 2, 5, seed=1), random(6, 5, seed=2), random(6, 3, 2, 5, seed=3)]
        leaves, directions = [p.clone().requires_grad_() for p in parts], directions_of(5, 20)
        loss = sigreg(leaves, directions=directions)
        right, gradient = judge(torch.cat([p.reshape(6, -1, 5) for p in parts], dim=1), directions)
        loss.backward()
        assert relative(loss, right) <= tolerances.FLOAT32
        ours = torch.cat([leaf.grad.reshape(6, -1, 5) for leaf in leaves], dim=1)
        assert relative(ours, gradient) <= tolerances.FLOAT32

    def test_a_tensor_that_is_there_twice(self):
        leaf, directions = random(6, 2, 5, dtype=torch.float64).requires_grad_(), directions_of(5, 20)
        loss = sigreg([leaf, leaf, leaf.detach()], directions=directions)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        right, gradient = judge(leaf, directions)
        assert relative(loss, right) <= tolerances.FLOAT64
        assert relative(first, 2 / 3 * gradient) <= tolerances.FLOAT64

    def test_large_values(self):
        """Within what float32 leaves of a projection of that size: 1e3 sigma has 3e-5 in its last digits, times t."""
        assert_agrees(random(40, 2, 9) * 1e3, bound=1e-3)
        assert_agrees(random(40, 2, 9, dtype=torch.float64) * 1e3)

    @pytest.mark.parametrize("scale", [0.0, 1e-30, 1e3, 1e8, 1e30])
    @pytest.mark.parametrize("d", [1, 9])
    def test_finite(self, scale, d):
        leaf = (random(8, 2, d) * scale).requires_grad_()
        loss = sigreg(leaf, directions=directions_of(d, 40))
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
        if scale == 0:  # all samples in one point: the gradient is zero by symmetry
            assert relative(loss, judge(leaf, directions_of(d, 40))[0]) <= tolerances.FLOAT32
            assert leaf.grad.abs().max() == 0

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("shape", [(4, 2, 1), (60, 2, 6)])
    def test_nan_and_inf_are_never_hidden(self, shape, value):
        h = random(*shape)
        h[1, 1, 0] = value
        leaf = h.requires_grad_()
        loss = sigreg(leaf, directions=directions_of(shape[2], 40))
        loss.backward()
        assert loss.isnan()
        assert leaf.grad[:, 1].isnan().all(), "the time step that has it"
        assert leaf.grad[:, 0].isfinite().all(), "other time steps are independent"

    def test_backward_twice(self):
        leaf, directions = random(60, 3, 5).requires_grad_(), directions_of(5, 40)
        loss = sigreg(leaf, directions=directions)
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(-3 * loss, leaf, retain_graph=True)
        (third,) = torch.autograd.grad(loss, leaf)
        assert torch.equal(first, kept), "later passes must not change what was returned before"
        assert relative(second, -3 * first) <= tolerances.FLOAT32
        assert relative(third, first) <= tolerances.FLOAT32

    @pytest.mark.parametrize("name", ["lightly", "eb_jepa"])
    def test_double_backward(self, name):
        directions = directions_of(4, 3)
        leaves = [random(3, 2, 4, dtype=torch.float64, seed=i).requires_grad_() for i in (0, 1)]

        def loss(*hs: Tensor) -> Tensor:
            return sigreg(hs, directions=directions, **CONVENTIONS[name])

        assert torch.autograd.gradcheck(loss, leaves)
        assert torch.autograd.gradgradcheck(loss, leaves)


@fuzz(
    60,
    250,
    data=st.data(),
    dtype=st.sampled_from(sorted(BOUNDS, key=str)),
    name=st.sampled_from(sorted(CONVENTIONS)),
    exponent=st.integers(-3, 2),
    way=st.sampled_from((*ways.WAYS, 40)),
)
def test_any_shape_stride_and_type(data: Any, dtype: Any, name: str, exponent: int, way: str | int) -> None:
    n, d, count = (data.draw(st.integers(1, most)) for most in (9, 9, 70))
    directions = directions_of(d, count)
    hs = [
        data.draw(layouts((random(n, steps, d, seed=steps) * 10.0**exponent).to(dtype)))
        for steps in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    ]
    leaves = [h.detach().requires_grad_() for h in hs]
    with pytest.MonkeyPatch.context() as patch:
        ways.take(way, patch)
        loss = sigreg(leaves, directions=directions, **CONVENTIONS[name])
        gradients = torch.autograd.grad(loss, leaves)
    right, gradient = judge(torch.cat(hs, dim=1), directions, **CONVENTIONS[name])
    # Projections of size 100 have rounding errors of 4e-6, and cosines of 3 times as much.
    bound = max(BOUNDS[dtype], 1e-4 if exponent == 2 and dtype != torch.float64 else 0)
    assert relative(loss, right) <= min(bound, 1e-4)
    ours, least = torch.cat(gradients, dim=1), torch.finfo(dtype).tiny
    size = float(gradient.norm()) + n * least + 1e-7 * (dtype != torch.float64)
    assert relative(ours, gradient, size) <= bound


def test_standard_normal_samples():
    """The expected loss is sum_j w_j (1 - phi_j^2), whatever N and d."""
    _, phi, weights = Settings().grid(torch.device("cpu"))
    expected = float((weights * (1 - phi.square())).sum())
    assert expected == pytest.approx(1.05, abs=0.005)
    generator = torch.Generator().manual_seed(0)
    for n, d in ((20, 2), (100, 40), (7, 300)):
        h = torch.randn(n, 400, d, generator=generator)
        found = float(sigreg(h, directions=32, seed=n))
        assert found == pytest.approx(expected, rel=0.1), (n, d)


# -- Conventions, written out ---------------------------------------------------------------------------------------


def of_lightly(x: np.ndarray) -> float:
    """LeJEPA's MINIMAL.md, lightly, stable-worldmodel: knots on [0, 3], doubled weights, times N. x: (N, K)."""
    total, width = 0.0, 3 / 16
    for j in range(17):
        t = 3 * j / 16
        phi, weight = math.exp(-t * t / 2), width if j in (0, 16) else 2 * width
        error = (np.cos(t * x).mean(axis=0) - phi) ** 2 + np.sin(t * x).mean(axis=0) ** 2
        total += weight * phi * error.mean() * len(x)
    return total


def of_eb_jepa(x: np.ndarray, limit: float = 3.0, knots: int = 10, factor: float = 1.0) -> float:
    """eb_jepa's BCS; with limit 5, 17 knots and the factor N the listing in LeJEPA's paper."""
    t = np.linspace(-limit, limit, knots)
    phi = np.exp(-t * t / 2)
    error = np.abs(np.exp(1j * x[:, :, None] * t).mean(axis=0) - phi) ** 2 * phi
    return float(np.mean(((error[:, 1:] + error[:, :-1]) / 2 * (t[1:] - t[:-1])).sum(axis=1))) * factor


@pytest.mark.usefixtures("way")
def test_the_conventions_of_others():
    h, directions = random(11, 3, 6, dtype=torch.float64), directions_of(6, 30)
    x = [h[:, t].numpy() @ directions.numpy() for t in range(3)]
    for name, of in {
        "lightly": of_lightly,
        "eb_jepa": of_eb_jepa,
        "paper": lambda x: of_eb_jepa(x, 5.0, 17, len(x)),
    }.items():
        expected = np.mean([of(each) for each in x])
        assert float(sigreg(h, directions=directions, **CONVENTIONS[name])) == pytest.approx(expected, rel=1e-12)
        assert float(reference.sigreg(h, directions, **CONVENTIONS[name])) == pytest.approx(expected, rel=1e-12)


# -- Sines and cosines ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
@pytest.mark.parametrize("way", ways.HERE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 5e-15)])
@pytest.mark.parametrize("name", ["lightly", "eb_jepa"])
def test_sines_and_cosines_of_any_size(way, dtype, bound, name, monkeypatch):
    """One sample and one direction: the sums are a sine and a cosine. The last knot has the error of 16 rotations."""
    ways.take(way, monkeypatch)
    generator, settings = torch.Generator().manual_seed(0), Settings(**CONVENTIONS[name])
    grid = settings.grid(torch.device("cpu"))
    for size in (1e-3, 1.0, 30.0, 1e3, 1e6, 1e9):
        x = (torch.randn(1, 500, 1, generator=generator, dtype=torch.float64) * size).to(dtype)
        sums = projections.sums_of(x, torch.ones(1, 1, dtype=dtype), settings, native=True)[..., 0].double()
        angles = x.double()[0] * grid[0]
        # The knots themselves, times x, have no more digits in float64.
        allowed = bound + (2e-15 * size if dtype == torch.float64 else 0)
        assert (sums[:, 0] + grid[1] - angles.cos()).abs().max() <= allowed
        assert (sums[:, 1] - angles.sin()).abs().max() <= allowed
        if size == 1e-3:  # small sines keep their digits
            assert ((sums[:, 1] - angles.sin()) / angles.sin()).abs().max() <= bound


# -- Directions -----------------------------------------------------------------------------------------------------


class TestDirections:
    def drawn(self, *arguments: Any, native: bool = False) -> Tensor:
        return projections.drawn(*arguments, torch.device("cpu"), native)

    @pytest.mark.parametrize("native", [False, True] if native.MISSING is None else [False])
    def test_uniform_on_the_sphere(self, native):
        a = self.drawn(5, 200, 3001, native=native)
        assert a.shape == (200, 3001)
        assert (a.square().sum(dim=0) - 1).abs().max() <= 1e-6
        scaled = a.double() * 200**0.5
        assert scaled.mean().abs() <= 5 / scaled.numel() ** 0.5
        assert (scaled.mean(dim=1).abs() <= 5 / 3001**0.5).all()
        assert (scaled.mean(dim=0).abs() <= 5 / 200**0.5).all()
        products = scaled @ scaled.mT / 3001 - torch.eye(200)
        assert products.abs().max() <= 6 * (2 / 3001) ** 0.5
        fourth = 3 * 200 / 202  # of a coordinate of the sphere
        assert abs(float(scaled.pow(4).mean()) - fourth) <= 0.02
        assert 4.2 <= float(scaled.abs().max()) <= 6.0

    @pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
    @pytest.mark.parametrize("way", ways.HERE)
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 300), (130, 1000)])
    def test_the_same_by_the_operator(self, way, shape, monkeypatch):
        ways.take(way, monkeypatch)
        for seed in (0, 7, -(2**63)):
            plain, ours = self.drawn(seed, *shape), self.drawn(seed, *shape, native=True)
            assert (plain - ours).abs().max() <= 2e-6

    def test_a_function_of_the_seed(self):
        h = random(9, 2, 6)
        one = sigreg(h, seed=1, directions=30)
        before = torch.get_rng_state()
        assert sigreg(h, seed=1, directions=30) == one
        assert sigreg(h, seed=torch.tensor([1]), directions=30) == one
        assert sigreg(h, seed=1 + 2**64, directions=30) == one
        assert sigreg(h, seed=np.int64(1), directions=np.int32(30)) == one
        assert len({float(sigreg(h, seed=seed, directions=30)) for seed in (1, 2, -1, 2**40)}) == 4
        assert relative(sigreg(h, seed=1, directions=30, backend="torch"), one) <= tolerances.FLOAT32
        assert relative(sigreg(h, seed=1, directions=30, backend="reference"), one) <= tolerances.FLOAT32
        double = sigreg(h.double(), seed=1, directions=30)
        assert relative(one, double) <= tolerances.FLOAT32
        assert torch.get_rng_state().equal(before)

    def test_from_a_generator(self):
        h, before = random(9, 2, 6), torch.get_rng_state()
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        losses = [[float(sigreg(h, directions=30, generator=g)) for _ in range(2)] for g in generators]
        assert losses[0] == losses[1]
        assert losses[0][0] != losses[0][1]
        assert torch.get_rng_state().equal(before)
        torch.set_default_dtype(torch.float64)
        try:
            again = [float(sigreg(h, directions=30, generator=generators[0].manual_seed(3)))]
        finally:
            torch.set_default_dtype(torch.float32)
        assert again == losses[0][:1], "the default dtype has no say"

    def test_another_layout(self):
        h, directions = random(9, 2, 6), directions_of(6, 30)
        expected = sigreg(h, directions=directions)
        assert sigreg(h, directions=directions.mT.contiguous().mT) == expected
        assert sigreg(h, directions=torch.stack([directions, directions], 2)[..., 0].bfloat16().double()) != expected


class TestModule:
    def test_every_call_draws_anew_and_a_resumed_one_goes_on(self):
        h, loss = random(9, 2, 6), SIGRegLoss(directions=30, seed=4)
        found = [float(loss(h)) for _ in range(4)]
        assert len(set(found)) == 4
        assert list(loss.state_dict()) == ["step"]
        again = SIGRegLoss(directions=30, seed=4)
        first = [float(again(h)) for _ in range(2)]
        resumed = SIGRegLoss(directions=30, seed=4)
        resumed.load_state_dict(again.state_dict())
        assert first + [float(resumed(h)) for _ in range(2)] == found
        assert float(SIGRegLoss(directions=30, seed=5)(h)) not in found

    def test_evaluation_counts_nothing(self):
        h, loss, other = random(9, 2, 6), SIGRegLoss(directions=30), SIGRegLoss(directions=30)
        loss(h), other(h)
        loss.eval()
        values = {float(loss(h)) for _ in range(3)}
        assert len(values) == 1
        loss.train()
        assert float(loss(h)) == float(other(h)) == values.pop()

    def test_arguments_are_passed_on(self):
        h = random(9, 2, 6, dtype=torch.float64)
        for name, options in CONVENTIONS.items():
            module = SIGRegLoss(directions=30, **options)
            directions = projections.drawn(projections.splitmix(0, module.step), 6, 30, h.device).double()
            assert relative(module(h), judge(h, directions, **options)[0]) <= 1e-6, name


@pytest.mark.slow
def test_bfloat16_under_autocast_is_never_nan(one_thread: None) -> None:
    module, generator = SIGRegLoss(directions=16), torch.Generator().manual_seed(0)
    for _ in range(30_000):
        leaf = torch.randn(16, 8, generator=generator).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = module(leaf)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
