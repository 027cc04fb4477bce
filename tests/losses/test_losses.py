"""Terms and gradients of variance_hinge, covariance_penalty and vcr_loss against reference.py in float64.

Errors, the compiler and memory are in test_losses_interfaces.py, VICReg is in test_vicreg.py.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import tolerances
import torch
import ways
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import analytic, covariance_penalty, variance_hinge, vcr_loss

ALPHA, BETA = 1.7, 0.4
FORMS = ("gram", "covariance")
# (N, T, d): the smallest shapes, odd ones, and N below, equal to and above d.
SHAPES = [(2, 1, 1), (2, 3, 5), (3, 1, 7), (5, 2, 3), (7, 5, 1), (17, 4, 13), (33, 3, 65), (64, 2, 64), (160, 2, 300)]
# Where the CPU operator works on several steps and samples at once: steps and one left over, samples, both and a sample
# left over, no product.
SHAPES += [(130, 11, 3), (256, 1, 2), (193, 3, 5), (601, 2, 1)]


class Judged(NamedTuple):
    """For each output (loss, variance, covariance): its value, what its error is relative to, and its gradient."""

    values: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


def judge(h: Tensor, threshold: float = 1.0, eps: float = 1e-4) -> Judged:
    """reference.vcr of h (N, ..., d) in float64."""
    x = h.detach().double().contiguous().requires_grad_()
    slices = x.reshape(h.shape[0], -1, h.shape[-1])
    values = reference.vcr(slices, ALPHA, BETA, threshold, eps)
    gradients = tuple(torch.autograd.grad(v, x, retain_graph=True)[0] for v in values)
    penalty = tolerances.penalty_scale(slices)
    return Judged(values, (ALPHA * values[1] + BETA * penalty, values[1], penalty), gradients)


def assert_agrees(h: Tensor, form: str = "auto", bound: float = tolerances.FLOAT32, **arguments: float) -> None:
    """Each output of vcr_loss(h), and its gradient alone, is within `bound` of the reference."""
    leaf = h.detach().requires_grad_()
    terms = vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form, **arguments)
    expected = judge(h, **arguments)
    bound_of_terms = min(bound, tolerances.FLOAT32) if h.dtype in (torch.float16, torch.bfloat16) else bound
    for name, value, right, scale, gradient in zip(terms._fields, terms, *expected, strict=True):
        assert value.dtype == analytic.compute_dtype(h)
        assert value.shape == ()
        assert relative(value, right, scale) <= bound_of_terms, name
        (ours,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert ours.dtype == h.dtype
        # At d = 1 the penalty and its gradient are zero. Ours is a difference, which is zero up to rounding.
        zero = name == "covariance" and h.shape[-1] == 1
        right_scale = h.double().norm() ** 3 if zero else None
        assert relative(ours, gradient, right_scale) <= bound, f"gradient of {name}"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Features of different spread (0.3 to 1.5, so the hinge is on for some), correlated with their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, dims=-1)
    return (x * torch.linspace(0.3, 1.5, shape[-1], dtype=torch.float64)).to(dtype)


@pytest.fixture(params=ways.WAYS)
def way(request, monkeypatch) -> None:
    """By the operator for each instruction set; by plain operations in the smallest blocks, and all at once."""
    ways.take(request.param, monkeypatch)


@pytest.fixture
def poison(monkeypatch) -> None:
    """New memory is filled with NaN, so that an element nobody wrote shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.mark.usefixtures("way", "poison")
@pytest.mark.parametrize("form", FORMS)
class TestValues:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_float32(self, shape, form):
        assert_agrees(random(*shape), form)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_float64(self, shape, form):
        assert_agrees(random(*shape, dtype=torch.float64), form, tolerances.FLOAT64)

    @pytest.mark.parametrize("arguments", [{"threshold": 0.5}, {"threshold": 3.0}, {"eps": 0.0}, {"eps": 0.1}])
    def test_threshold_and_eps(self, arguments, form):
        assert_agrees(random(9, 3, 11), form, **arguments)

    @pytest.mark.parametrize("scale", [1e-3, 1e3])
    def test_scale(self, scale, form):
        assert_agrees(random(19, 3, 23) * scale, form)

    @pytest.mark.parametrize(("mean", "bound"), [(30, tolerances.MEAN_30_SIGMA), (1e3, tolerances.MEAN_1000_SIGMA)])
    def test_large_means(self, mean, bound, form):
        signs = torch.tensor([1.0, -1.0, 0.5]).repeat(10)[:23]
        assert_agrees(random(19, 3, 23) + mean * signs, form, bound)

    @pytest.mark.parametrize(
        ("dtype", "bound"), [(torch.bfloat16, tolerances.BFLOAT16), (torch.float16, tolerances.FLOAT16)]
    )
    @pytest.mark.parametrize("shape", [(2, 3, 5), (17, 1, 13)])
    def test_half_precision(self, shape, dtype, bound, form):
        assert_agrees(random(*shape, dtype=dtype), form, bound)

    def test_middle_dimensions(self, form):
        assert_agrees(random(6, 5), form)
        assert_agrees(random(6, 2, 3, 5), form)
        assert_agrees(random(6, 2, 1, 2, 5), form)

    def test_sequence_is_its_concatenation(self, form):
        parts = [random(6, 2, 5, seed=1), random(6, 5, seed=2), random(6, 3, 2, 5, seed=3)]
        leaves = [p.clone().requires_grad_() for p in parts]
        whole = torch.cat([p.reshape(6, -1, 5) for p in parts], dim=1)
        terms = vcr_loss(leaves, alpha=ALPHA, beta=BETA, form=form)
        expected = judge(whole)
        for value, right, scale in zip(terms, expected.values, expected.scales, strict=True):
            assert relative(value, right, scale) <= tolerances.FLOAT32
        terms.loss.backward()
        ours = torch.cat([leaf.grad.reshape(6, -1, 5) for leaf in leaves], dim=1)
        assert relative(ours, expected.gradients[0]) <= tolerances.FLOAT32

    def test_constant_columns(self, form):
        """Their hinge is threshold - sqrt(eps), their gradient zero."""
        h = random(8, 2, 5)
        h[..., 1], h[:, 0, 3] = 1234.5, 0.0
        assert_agrees(h, form)
        leaf = h.requires_grad_()
        vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form).loss.backward()
        assert leaf.grad[..., 1].abs().max() == 0
        assert leaf.grad[:, 0, 3].abs().max() == 0

    def test_terms_on_their_own(self, form):
        """variance_hinge and covariance_penalty choose the form by shape: one shape for each."""
        for h in (random(5, 2, 9), random(9, 2, 5)):
            leaf, expected = h.requires_grad_(), judge(h, threshold=1.2)
            hinge, penalty = variance_hinge(leaf, threshold=1.2), covariance_penalty(leaf)
            assert relative(hinge, expected.values[1]) <= tolerances.FLOAT32
            assert relative(penalty, expected.values[2], expected.scales[2]) <= tolerances.FLOAT32
            for value, right in ((hinge, expected.gradients[1]), (penalty, expected.gradients[2])):
                assert relative(torch.autograd.grad(value, leaf)[0], right) <= tolerances.FLOAT32

    def test_any_combination_of_outputs(self, form):
        leaf = random(6, 3, 5).requires_grad_()
        terms, expected = vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form), judge(leaf)
        (0.5 * terms.loss - 2.0 * terms.variance + 3.0 * terms.covariance).backward()
        right = 0.5 * expected.gradients[0] - 2.0 * expected.gradients[1] + 3.0 * expected.gradients[2]
        assert relative(leaf.grad, right) <= tolerances.FLOAT32

    def test_backward_twice(self, form):
        leaf = random(6, 3, 5).requires_grad_()
        terms = vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form)
        (first,) = torch.autograd.grad(terms.loss, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(terms.loss, leaf, retain_graph=True)
        assert torch.equal(first, second)
        # Later passes must not change a gradient that was returned before.
        (third,) = torch.autograd.grad(-3 * terms.loss, leaf, retain_graph=True)
        (fourth,) = torch.autograd.grad(-3 * terms.loss, leaf)
        assert torch.equal(third, fourth)
        assert relative(third, -3 * first) <= tolerances.FLOAT32

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("shape", [(4, 2, 1), (4, 2, 6), (8, 2, 3)])
    def test_nan_and_inf_are_never_hidden(self, shape, value, form):
        h = random(*shape)
        h[1, 1, 0] = value
        leaf = h.requires_grad_()
        terms = vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form)
        assert all(x.isnan() for x in terms)
        for output in terms:
            (gradient,) = torch.autograd.grad(output, leaf, retain_graph=True)
            assert gradient[:, 1, 0].isnan().all(), "the column that has it"
            assert gradient[:, 0].isfinite().all(), "other time steps are independent"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(180, 2, 600), (60, 1, 1700), (600, 2, 180), (1700, 1, 60)])
def test_pieces(shape):
    """Time steps of more than one of the operator's pieces, in either form: for one product, and for a sum of some."""
    assert_agrees(random(*shape))


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed (T, N, d)": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "features not last": lambda h: h.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every third sample": lambda h: torch.stack([h, 0 * h, h - 1], dim=1).flatten(0, 1)[::3],
    "every second frame": lambda h: torch.stack([h, 0 * h], dim=2).flatten(1, 2)[:, ::2],
    "every second feature": lambda h: torch.stack([h, 0 * h], dim=3).flatten(2, 3)[..., ::2],
    "an offset": lambda h: torch.nn.functional.pad(h, (3, 1, 2, 1, 1, 1))[1:-1, 2:-1, 3:-1],
    "expanded over N": lambda h: h[:1].expand_as(h),
    "expanded over T": lambda h: h[:, :1].expand_as(h),
    "expanded over d": lambda h: h[..., :1].expand_as(h),
}


@pytest.mark.usefixtures("way", "poison")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(layout, form):
    h = STRIDES[layout](random(6, 4, 5))
    assert h.shape == (6, 4, 5)
    if layout == "expanded over N":  # no variance: the gradient is exactly zero, so there is no relative error
        leaf = h.requires_grad_()
        terms = vcr_loss(leaf, alpha=ALPHA, beta=BETA, form=form)
        terms.loss.backward()
        assert terms.covariance == 0
        assert relative(terms.variance, judge(h).values[1]) <= tolerances.FLOAT32
        assert leaf.grad.abs().max() == 0
    else:
        assert_agrees(h, form)


def test_gradient_through_an_expanded_view():
    """The gradient of the tensor that was expanded is the sum over its copies."""
    base = random(6, 1, 5).requires_grad_()
    vcr_loss(base.expand(6, 4, 5), alpha=ALPHA, beta=BETA).loss.backward()
    assert relative(base.grad, judge(base.detach().expand(6, 4, 5)).gradients[0].sum(1, keepdim=True)) <= 1e-5


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("form", FORMS)
class TestDoubleBackward:
    @pytest.mark.parametrize("shape", [(3, 2, 4), (4, 1, 2), (2, 2, 1)])
    def test_numerically(self, shape, form):
        h = random(*shape, dtype=torch.float64).requires_grad_()

        def outputs(h: Tensor) -> tuple[Tensor, ...]:
            return tuple(vcr_loss(h, alpha=ALPHA, beta=BETA, threshold=1.3, form=form))

        assert torch.autograd.gradcheck(outputs, h)
        assert torch.autograd.gradgradcheck(outputs, h)

    def test_like_the_reference(self, form):
        def gradient_penalty(terms: Sequence[Tensor], h: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(terms[0] + 2 * terms[2], h, create_graph=True)
            return torch.autograd.grad(gradient.square().sum(), h)[0]

        h = random(7, 3, 5, dtype=torch.float64).requires_grad_()
        ours = gradient_penalty(vcr_loss(h, alpha=ALPHA, beta=BETA, form=form), h)
        assert relative(ours, gradient_penalty(reference.vcr(h, ALPHA, BETA), h)) <= tolerances.FLOAT64

    def test_through_a_sequence(self, form):
        """Squaring the loss couples the tensors: each gradient depends on the other tensor through the loss."""
        h = random(5, 4, 3, dtype=torch.float64)
        leaves = [h[:, :1].clone().requires_grad_(), h[:, 1:].clone().requires_grad_()]
        loss = vcr_loss(leaves, alpha=ALPHA, beta=BETA, form=form).loss
        first = torch.autograd.grad(loss.square(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        x = h.clone().requires_grad_()
        (right,) = torch.autograd.grad(reference.vcr(x, ALPHA, BETA)[0].square(), x, create_graph=True)
        (right,) = torch.autograd.grad(right.square().sum(), x)
        assert relative(torch.cat(second, dim=1), right) <= tolerances.FLOAT64


BOUNDS = {
    torch.float16: tolerances.FLOAT16,
    torch.bfloat16: tolerances.BFLOAT16,
    torch.float32: tolerances.FLOAT32,
    torch.float64: tolerances.FLOAT64,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 12),
    middle=st.lists(st.integers(1, 4), max_size=3),
    d=st.integers(2, 12),
    dtype=st.sampled_from(sorted(BOUNDS, key=str)),
    form=st.sampled_from(("auto", *FORMS)),
    order=st.randoms(use_true_random=False),
    steps=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    block=st.sampled_from((1, 40, analytic._BLOCK)),
    seed=st.integers(0, 1000),
)
def test_any_shape_stride_and_type(n, middle, d, dtype, form, order, steps, block, seed):
    """Any shape, in any order of memory, with any step in each dimension."""
    h = random(n, *middle, d, dtype=dtype, seed=seed)
    permutation = list(range(h.ndim))
    order.shuffle(permutation)
    sizes = [h.shape[i] * steps[i] for i in permutation]
    strided = torch.zeros(sizes, dtype=dtype).permute([permutation.index(i) for i in range(h.ndim)])
    strided = strided[tuple(slice(None, None, step) for step in steps[: h.ndim])]
    strided.copy_(h)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analytic, "_BLOCK", block)
        assert_agrees(strided, form, BOUNDS[dtype], threshold=3.0)
