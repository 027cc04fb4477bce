"""The losses on generated tensors.

Loss and gradient must equal those of reference.py in float64 if the compute dtype can hold them, and be NaN or infinite
if not. Anything that is not a valid input must raise one clear error.
"""

from typing import Any, NamedTuple

import pytest
import tolerances
import torch
import ways
from fuzz import fuzz, layouts
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import VCRLoss, VICRegLoss, covariance_penalty, variance_hinge, vcr_loss

ALPHA, BETA = 1.7, 0.4
BOUNDS = {
    torch.float16: tolerances.FLOAT16,
    torch.bfloat16: tolerances.BFLOAT16,
    torch.float32: tolerances.FLOAT32,
    torch.float64: tolerances.FLOAT64,
}
DTYPES = st.sampled_from(sorted(BOUNDS, key=str))
# Means in sigmas, with the bound for float32. float64 has digits to spare; half precision has lost them in the input.
MEANS = {0: tolerances.FLOAT32, 30: tolerances.MEAN_30_SIGMA, 1000: tolerances.MEAN_1000_SIGMA}
# Powers of ten of the scale. From 9 on, squares of squares overflow float32. float16 itself has a small range.
EXPONENTS = (st.one_of(st.just(0), st.integers(7, 11), st.integers(-30, 30)), st.integers(-6, 4))
FORMS = st.sampled_from(("auto", "gram", "covariance"))


# -- Inputs ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """hs: the input, a sequence or (if `alone`) one tensor. bound: on the error of the terms."""

    hs: list[Tensor]
    alone: bool
    bound: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, d, dtype = draw(st.integers(2, 9)), draw(st.integers(1, 9)), draw(DTYPES)
    mean, exponent = draw(st.sampled_from([*MEANS])), draw(EXPONENTS[dtype == torch.float16])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    what = draw(st.sampled_from(["", "", "", "constant", "zero", "nan", "inf", "-inf"]))
    hs = []
    for _ in range(draw(st.integers(1, 3))):
        middle = draw(st.lists(st.integers(1, 4), max_size=2))
        x = torch.randn(n, *middle, d, generator=generator, dtype=torch.float64)
        x = (x + 0.5 * x.roll(1, dims=-1)) * torch.linspace(0.3, 1.5, d, dtype=torch.float64) + mean
        if what == "constant":
            x[..., draw(st.integers(0, d - 1))] = 3.0
        elif what == "zero":
            x = x * 0
        h = (x * 10.0**exponent).to(dtype)
        if what in ("nan", "inf", "-inf"):
            h[tuple(draw(st.integers(0, size - 1)) for size in h.shape)] = float(what)
        hs.append(draw(layouts(h)))
    bound = MEANS[mean] if dtype == torch.float32 else BOUNDS[dtype]
    return Case(hs, len(hs) == 1 and draw(st.booleans()), bound)


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


# -- The reference --------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """Per output (loss, variance, covariance): value, gradient (N, T, d), and what their errors are relative to.

    largest: of the sums that lead to them. margin: of the column nearest to the hinge's kink, where the gradient jumps.
    """

    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    gradient_scales: tuple[Tensor, ...]
    largest: float
    margin: float


def together(hs: list[Tensor]) -> Tensor:
    return torch.cat([h.detach().reshape(len(h), -1, h.shape[-1]) for h in hs], dim=1)


def judge(hs: list[Tensor], threshold: float, alpha: float = ALPHA, beta: float = BETA) -> Judged:
    """reference.vcr in float64.

    A hinge is the threshold minus sigma, and the penalty a product minus its diagonal. Rounding errors are relative to
    what is subtracted, which may be much more than the difference.
    """
    x = together(hs).double()
    x = (x - x[:1]).requires_grad_()  # a mean of many sigma would cost the reference digits, too
    n, steps, d = x.shape
    values = reference.vcr(x, alpha, beta, threshold)
    gradients = tuple(torch.autograd.grad(value, x, retain_graph=True)[0] for value in values)
    z = (x - x.mean(dim=0)).detach().transpose(0, 1)
    products = (z @ z.mT).square().sum(dim=(1, 2))
    penalty = tolerances.penalty_scale(x)
    variance = values[1].detach().clamp_min(0.1 * threshold)
    steep = (z.square().sum(dim=(1, 2)) * products).sum().sqrt() * 4 / (steps * d * (n - 1) ** 2)
    flat = gradients[1].norm()
    sigma = (z.square().sum(dim=1) / (n - 1) + 1e-4).sqrt()
    return Judged(
        values,
        gradients,
        (alpha * variance + beta * penalty, variance, penalty),
        (alpha * flat + beta * steep, flat, steep),
        float(products.sum()),
        float((sigma / threshold - 1).abs().min()),
    )


def assert_close(ours: Tensor, right: Tensor, scale: Tensor, bound: float, what: str) -> None:
    """The error is at most bound * scale, plus a few of the smallest numbers of the dtype."""
    about = torch.finfo(ours.dtype)
    least = about.tiny * (about.eps if about.bits == 16 else 16) * right.numel() ** 0.5
    error, size = float((ours.detach().double() - right.detach()).norm()), float(scale.detach())
    assert error <= bound * size + least, f"{what}: {error:.3g} of {size:.3g}"


def assert_can_be_held(ours: Tensor, right: Tensor, what: str) -> None:
    """A result that is too large for the dtype is not finite."""
    assert float(right.detach().abs()) <= torch.finfo(ours.dtype).max or not ours.isfinite(), what


# -- Numbers --------------------------------------------------------------------------------------------------------


@fuzz(
    250,
    1000,
    case=cases(),
    form=FORMS,
    gradient=st.sampled_from(("auto", "forward", "backward")),
    threshold=st.sampled_from((1.0, 0.4, 3.0)),
    way=st.sampled_from((*ways.WAYS, 40)),
)
def test_numbers(case: Case, form: str, gradient: str, threshold: float, way: str | int) -> None:
    leaves = [h.detach().requires_grad_() for h in case.hs]
    before = [h.clone() for h in case.hs]
    with pytest.MonkeyPatch.context() as patch:
        ways.take(way, patch)
        options: Any = {"alpha": ALPHA, "beta": BETA, "threshold": threshold, "form": form, "gradient": gradient}
        h: Any = leaves[0] if case.alone else leaves
        terms = vcr_loss(h, **options)
        gradients = [torch.autograd.grad(term, leaves, retain_graph=True) for term in terms]
        hinge, penalty = variance_hinge(h, threshold=threshold), covariance_penalty(h)
    for leaf, content, of_leaf in zip(leaves, before, zip(*gradients, strict=True), strict=True):
        torch.testing.assert_close(leaf.detach(), content, rtol=0, atol=0, equal_nan=True)
        assert all(g.dtype == leaf.dtype and g.shape == leaf.shape for g in of_leaf)
    if not all(h.isfinite().all() for h in case.hs):
        assert all(term.isnan() for term in (*terms, hinge, penalty))
        return
    right, held = judge(case.hs, threshold), torch.finfo(terms.loss.dtype).max / 8
    for name, ours, value in zip(terms._fields, terms, right.values, strict=True):
        assert_can_be_held(ours, value, name)
    if right.largest > held:
        return
    bound = min(case.bound, tolerances.MEAN_1000_SIGMA if case.hs[0].dtype == torch.float32 else tolerances.FLOAT32)
    for name, ours, value, scale in zip(terms._fields, terms, right.values, right.scales, strict=True):
        assert_close(ours, value, scale, bound, name)
    assert_close(hinge, right.values[1], right.scales[1], bound, "variance_hinge")
    assert_close(penalty, right.values[2], right.scales[2], bound, "covariance_penalty")
    assume(right.margin > 2 * case.bound)
    for name, ours, wanted, scale in zip(terms._fields, gradients, right.gradients, right.gradient_scales, strict=True):
        if float(wanted.abs().max()) < torch.finfo(leaves[0].dtype).max / 2:
            assert_close(together(list(ours)), wanted, scale, case.bound, f"gradient of {name}")


@fuzz(80, 250, case=cases(), factor=st.sampled_from((1.0, 0.9, -1.1)))
def test_vicreg(case: Case, factor: float) -> None:
    h = case.hs[0]
    z = [h, (factor * h.double().roll(1, dims=0)).to(h.dtype)]
    leaves = [x.detach().requires_grad_() for x in z]
    loss = VICRegLoss()(*leaves)
    gradients = torch.autograd.grad(loss, leaves)
    if not all(x.isfinite().all() for x in z):
        assert not loss.isfinite()
        return
    right, x = judge(z, 1.0, 25.0, 2.0), [x.detach().double().requires_grad_() for x in z]
    invariance = 25 * torch.nn.functional.mse_loss(*x)
    assert_can_be_held(loss, invariance + right.values[0], "VICReg")
    if max(right.largest, float(invariance.detach())) > torch.finfo(loss.dtype).max / 100:
        return
    bound = min(case.bound, tolerances.MEAN_1000_SIGMA if h.dtype == torch.float32 else tolerances.FLOAT32)
    assert_close(loss, invariance + right.values[0], invariance + right.scales[0], bound, "VICReg")
    assume(right.margin > 2 * case.bound)
    wanted = right.gradients[0] + together(list(torch.autograd.grad(invariance, x)))
    if float(wanted.abs().max()) < torch.finfo(h.dtype).max / 100:
        scale = wanted.norm() + right.gradient_scales[0]
        assert_close(together(list(gradients)), wanted, scale, case.bound, "gradient of VICReg")


# -- Invariants -----------------------------------------------------------------------------------------------------


@st.composite
def grids(draw: st.DrawFn) -> Tensor:
    """(N, T, d), multiples of 1/8 up to 2. Every dtype holds them exactly, also after adding whole numbers up to 8."""
    shape = draw(st.integers(2, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return (torch.randint(-16, 17, shape, generator=generator) / 8).to(draw(DTYPES))


def bound_of(h: Tensor) -> float:
    """The bound on terms, which are computed in float32 or better."""
    return min(BOUNDS[h.dtype], tolerances.FLOAT32)


@fuzz(60, 250, h=grids(), form=FORMS, seed=st.integers(0, 10**6))
def test_the_order_of_samples_and_their_means_do_not_matter(h: Tensor, form: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(h), generator=generator)
    shift = torch.randint(-8, 9, h.shape[1:], generator=generator).to(h.dtype)
    right, loss = judge([h], 1.0), VCRLoss(ALPHA, BETA, form=form)  # type: ignore[arg-type]
    for changed in (h[order], h + shift):
        for name, a, b, scale in zip(loss(h)._fields, loss(h), loss(changed), right.scales, strict=True):
            assert_close(b, a.double(), scale, bound_of(h), name)


@fuzz(60, 250, h=grids(), power=st.integers(-3, 4), form=FORMS)
def test_the_penalty_grows_with_the_fourth_power(h: Tensor, power: int, form: str) -> None:
    """Exactly, if the scale is a power of two."""
    options: Any = {"alpha": ALPHA, "beta": BETA, "form": form}
    once, scaled = vcr_loss(h, **options).covariance, vcr_loss(h * 2.0**power, **options).covariance
    assert scaled == once * 2.0 ** (4 * power)


@fuzz(60, 250, h=grids(), form=FORMS)
def test_gradients_of_a_column_add_up_to_nothing(h: Tensor, form: str) -> None:
    leaf = h.requires_grad_()
    right = judge([h], 1.0)
    terms = vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form)  # type: ignore[arg-type]
    for term, scale in zip(terms, right.gradient_scales, strict=True):
        (gradient,) = torch.autograd.grad(term, leaf, retain_graph=True)
        least = torch.finfo(h.dtype).tiny * len(h)
        assert (gradient.double().sum(dim=0).abs() <= BOUNDS[h.dtype] * scale + least).all()


# -- Invalid inputs -------------------------------------------------------------------------------------------------

OTHERS = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 3), max_size=4)
NO_TENSORS = [None, 5, 1.0, "h", b"h", {}, {1: 2}, [], [None], [[1.0, 2.0]], object(), torch.eye(3).numpy(), iter([])]
FUNCTIONS = {
    "vcr_loss": lambda h: vcr_loss(h, alpha=1.0, beta=1.0),
    "variance_hinge": variance_hinge,
    "covariance_penalty": covariance_penalty,
    "VCRLoss": VCRLoss(1.0, 1.0),
}


def assert_refused(name: str, h: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^h(\[\d\])? (has|is) ") as error:
        FUNCTIONS[name](h)
    assert str(error.value).isprintable()


@fuzz(
    150,
    500,
    name=st.sampled_from([*FUNCTIONS]),
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    dtypes=st.lists(st.sampled_from([*BOUNDS, *OTHERS]), min_size=3, max_size=3),
    alone=st.booleans(),
)
def test_any_shape_and_dtype(name: str, shapes: list[list[int]], dtypes: list[torch.dtype], alone: bool) -> None:
    """Valid input gives finite numbers. Anything else raises an error of one line that names the tensor."""
    hs = [torch.ones(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    hs = hs[:1] if alone else hs
    allowed = len({(len(h) if h.ndim else 0, h.shape[-1:], h.dtype) for h in hs}) == 1
    allowed &= all(h.dtype in BOUNDS and h.ndim >= 2 and 0 not in h.shape and len(h) >= 2 for h in hs)
    h: Any = hs[0] if alone else hs
    if allowed:
        out = FUNCTIONS[name](h)
        assert (out if isinstance(out, Tensor) else out.loss).isfinite()
    else:
        assert_refused(name, h)


@pytest.mark.parametrize("h", [*NO_TENSORS, torch.eye(3).to_sparse()], ids=lambda h: type(h).__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_tensor(name: str, h: Any) -> None:
    assert_refused(name, h)


@fuzz(60, 125, shapes=st.tuples(SHAPES, SHAPES), dtypes=st.tuples(*[st.sampled_from([*BOUNDS, *OTHERS])] * 2))
def test_branches_that_do_not_fit(shapes: tuple[list[int], ...], dtypes: tuple[torch.dtype, ...]) -> None:
    a, b = (torch.ones(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    fits = a.dtype == b.dtype and a.dtype in BOUNDS and a.shape == b.shape
    if fits and a.ndim >= 2 and len(a) >= 2 and 0 not in a.shape:
        assert VICRegLoss()(a, b).isfinite()
    else:
        with pytest.raises((TypeError, ValueError), match=r"^(h\[|z_a)") as error:
            VICRegLoss()(a, b)
        assert str(error.value).isprintable()
