"""The Triton kernels: terms and gradients against reference.py in float64, then the operator and its surroundings.

The same tests run on a CUDA device where there is one, and on CPU tensors in Triton's interpreter:

    TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py

test_interpreted.py does that. The interpreter does not round products as tensor cores do, so the tests of that are in
the class at the end, which needs a device.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
import test_losses
import tolerances
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import ALPHA, BETA, FORMS, Judged, judge
from tolerances import relative
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vjvcr_fast import reference
from vjvcr_fast.losses import VCRLoss, VCRTerms, backends, covariance_penalty, ops, variance_hinge, vcr_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    reason = "no CUDA device; without one: TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py"
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("vjvcr_fast.kernels.vcr")
import aot  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.cuda]
HALF = (torch.float16, torch.bfloat16)
WIDE, TALL = (6, 3, 20), (20, 3, 6)  # the Gram form's shape and the covariance form's
# The interpreter is a thousand times slower and leaves these to the slow tests. A device runs all.
LATER = (pytest.mark.slow,) if INTERPRETED else ()


def later(*cases: tuple[object, ...]) -> list[object]:
    return [pytest.param(*case, marks=LATER) for case in cases]


def in_turns(names: str, *dimensions: Sequence[object]) -> pytest.MarkDecorator:
    """All combinations. The interpreter takes turns: for each combination of the other dimensions it runs one value of
    the last, and leaves the rest for later."""
    *others, last = dimensions
    cases = []
    for at in itertools.product(*map(range, map(len, others))):
        for i, value in enumerate(last):
            values = [dimension[j] for dimension, j in zip(others, at, strict=True)]
            cases.append(pytest.param(*values, value, marks=() if sum(at) % len(last) == i else LATER))
    fixtures = [name for name in names.split(", ") if name == "route"]
    return pytest.mark.parametrize(names.split(", "), cases, indirect=fixtures)


ROUTES = ("kernels", "library")
# (N, T, d). They reach every configuration (there is a test for that), several parts of the features and of the batch,
# several panels, rows whose length is a multiple of 16 and others, and sizes that fill no tile.
SHAPES = {
    "gram": [
        *[(2, 1, 1), (2, 3, 5), (17, 2, 48), (40, 2, 9), (40, 1, 48), (65, 2, 144), (97, 1, 20), (129, 1, 20)],
        *[(129, 1, 48), (161, 1, 162), (257, 1, 16), (1030, 1, 16)],
    ],
    "covariance": [
        *[(2, 1, 1), (5, 2, 3), (40, 2, 17), (70, 1, 33), (270, 1, 65), (600, 1, 20), (30, 1, 250)],
    ],
}
LARGER = {
    "gram": [
        *[(3, 1, 7), (16, 2, 33), (17, 3, 40), (33, 2, 70), (81, 1, 97), (97, 1, 130), (97, 1, 144), (129, 1, 200)],
        *[(145, 1, 208), (193, 1, 200), (257, 1, 272), (385, 1, 20), (1030, 1, 40)],
    ],
    "covariance": [
        *[(2, 3, 5), (40, 3, 17), (70, 2, 33), (140, 1, 65), (300, 2, 100), (20, 1, 144), (30, 1, 256)],
        *[(1100, 1, 5), (9, 2, 300)],
    ],
}
# For half precision, each in the form that "auto" takes: they reach the configurations for TF32.
HALF_SHAPES = [
    *[(16, 2, 33), (17, 1, 48), (33, 1, 70), (33, 1, 80), (65, 1, 66), (97, 1, 98), (129, 1, 130), (129, 1, 144)],
    *[(193, 1, 194), (9, 1, 3), (40, 2, 17), (66, 1, 33), (70, 1, 65)],
]
CASES = [(shape, form) for form in FORMS for shape in SHAPES[form]]
LARGER_CASES = [(shape, form) for form in FORMS for shape in LARGER[form]]

# What arrives at backward for (loss, variance, covariance); None: the term was not used.
Incoming = tuple[float | None, float | None, float | None]
LOSS: Incoming = (3.0, None, None)
EACH: list[Incoming] = [LOSS, (None, 2.0, None), (None, None, -0.5), (0.5, -2.0, 3.0)]


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """The bounds on terms and on gradients. The interpreter multiplies in float32, so only the gradient's own rounding
    shows there."""
    exact = tolerances.TF32X3
    if INTERPRETED:
        last = {torch.float16: tolerances.FLOAT16, torch.bfloat16: tolerances.BFLOAT16}
        return exact, last.get(dtype, exact)
    if dtype == torch.bfloat16:
        return tolerances.BFLOAT16_PRODUCTS, tolerances.BFLOAT16_PRODUCTS_GRADIENT
    if dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return tolerances.TF32, tolerances.TF32_GRADIENT
    return exact, exact


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return test_losses.random(*shape, dtype=dtype, seed=seed).to(DEVICE)


def placed(h: Tensor, order: Sequence[int] = (0, 1, 2), steps: Sequence[int] = (1, 1, 1)) -> Tensor:
    """h with its dimensions in this order in memory and `steps` elements between neighbours. Everything between and
    around them is NaN."""
    memory = torch.full([h.shape[i] * steps[i] + 2 for i in order], torch.nan, dtype=h.dtype, device=h.device)
    view = memory.permute([list(order).index(i) for i in range(3)])
    view = view[tuple(slice(1, 1 + size * step, step) for size, step in zip(h.shape, steps, strict=True))]
    return view.copy_(h)


def fused(h: Tensor | Sequence[Tensor], **arguments) -> VCRTerms:
    return vcr_loss(h, alpha=ALPHA, beta=BETA, backend="triton", **arguments)


def loss_of(h: Tensor | Sequence[Tensor]) -> Tensor:
    return fused(h).loss


def gradients(terms: VCRTerms, inputs: Sequence[Tensor], incoming: Incoming) -> tuple[Tensor, ...]:
    used = [(term, torch.full_like(term, g)) for term, g in zip(terms, incoming, strict=True) if g is not None]
    return torch.autograd.grad([term for term, _ in used], inputs, [g for _, g in used], retain_graph=True)


def assert_terms(terms: VCRTerms, expected: Judged, bound: float) -> None:
    for name, value, right, scale in zip(terms._fields, terms, expected.values, expected.scales, strict=True):
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert relative(value, right, scale) <= bound, name


def assert_gradient(ours: Tensor, h: Tensor, expected: Judged, incoming: Incoming, bound: float) -> None:
    right = sum(g * gradient for g, gradient in zip(incoming, expected.gradients, strict=True) if g is not None)
    scale = None
    if h.shape[-1] == 1:
        # The penalty is zero, and its gradient a difference that is zero up to rounding: of two numbers of this size.
        z = h.double() - h.double().mean(dim=0)
        size = 4 * z.norm() ** 3 / (z[0].numel() * (len(z) - 1) ** 2)
        scale = right.norm() + size * sum(abs(g or 0) for g in incoming)
    assert ours.dtype == h.dtype
    assert relative(ours, right, scale) <= bound, f"gradient of {incoming}"


def assert_agrees(h: Tensor, form: str = "auto", incoming: Sequence[Incoming] = (LOSS,), **arguments: float) -> None:
    """Checks the terms of h (N, ..., d) and, for each of `incoming`, the gradient."""
    leaf = h.detach().requires_grad_()
    terms = fused(leaf, form=form, **arguments)
    expected, (of_terms, of_gradients) = judge(h, **arguments), bounds(h.dtype)
    assert_terms(terms, expected, of_terms)
    for coefficients in incoming:
        # As large as a loss scale: float16 would lose the small entries.
        scaled = tuple(None if g is None else g * h.numel() for g in coefficients)
        (ours,) = gradients(terms, [leaf], scaled)
        assert_gradient(ours, h, expected, scaled, of_gradients)


@pytest.fixture
def guarded(monkeypatch) -> Iterator[None]:
    """Fills new memory and its surroundings with NaN. Elements that nobody wrote show, and so do writes past an end.
    Each buffer of a workspace has surroundings of its own."""
    margin, margins = 64, []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def guarded(*args, make=make, **kwargs) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type != DEVICE.type or not tensor.is_floating_point():
                return tensor
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            memory = tensor.new_full((elements + 2 * margin,), torch.nan)
            margins.extend([memory[:margin], memory[-margin:]])
            return memory.as_strided(tensor.shape, tensor.stride(), margin)

        monkeypatch.setattr(torch, name, guarded)
    for module in aot.MODULES:
        if hasattr(module, "workspace"):
            monkeypatch.setattr(module, "workspace", apart)
    yield
    assert margins
    assert all(memory.isnan().all() for memory in margins)


def apart(device: torch.device, *sizes: int) -> list[Tensor]:
    return [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]


@pytest.fixture
def older(monkeypatch) -> None:
    """A GPU of compute capability 8.0, whose tiles are smaller."""
    monkeypatch.setattr(kernels.gram, "architecture", lambda device: 80)


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch) -> None:
    """Sends small shapes through our products, or through torch's, as large ones go."""
    if request.param == "library":
        through_the_library(monkeypatch)


def through_the_library(monkeypatch) -> None:
    monkeypatch.setattr(kernels.gram, "MOST_SAMPLES", 1)
    monkeypatch.setattr(kernels.covariance, "MOST_FEATURES", 1)


@pytest.mark.parametrize("arch", [80, 90])
def test_shapes_reach_every_configuration(arch):
    """bfloat16's are left out: they are chosen in the same way as those of the other types."""
    reached = configurations(arch, [(*case, dtype) for case in CASES for dtype in (torch.float32, torch.float16)])
    on_hopper_only = {name for name in aot.tables() if "HOPPER" in name} | {"gram.TILES[tf32x3, 128]"}
    expected = {name for name in aot.tables() if "bf16" not in name} - (on_hopper_only if arch == 80 else set())
    assert reached == expected


def test_cases_run_every_configuration():
    full = configurations(90, [(*case, torch.float32) for case in CASES])
    shapes = [(shape, "gram" if shape[0] < shape[2] else "covariance") for shape in HALF_SHAPES]
    half = configurations(90, [(*case, torch.float16) for case in shapes])
    names = {name for name in aot.tables() if "bf16" not in name}
    not_split = {name for name in names if "[tf32," in name or "[tf32]" in name} | {"gradient.COVARIANCE[64]"}
    assert names - not_split <= full
    assert not_split <= half


def configurations(arch: int, cases: Sequence[tuple[tuple[int, ...], str, torch.dtype]]) -> set[str]:
    """The names of the configurations that serve these shapes, forms and dtypes."""
    with aot.recording(arch) as launches:
        for shape, form, dtype in cases:
            aot.call_launchers(torch.empty(shape, dtype=dtype, device="meta"), form == "gram")
    names = {id(config): name for name, config in aot.tables().items()}
    return {names[id(made.config)] for made in launches}


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's, which compiles nothing")
def test_ahead_of_time_compilation_is_refused():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_all([90], 1)


# -- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("guarded")
class TestNumbers:
    @pytest.mark.parametrize(("shape", "form"), [*CASES, *later(*LARGER_CASES)])
    def test_float32(self, shape, form):
        assert_agrees(random(*shape), form)

    @pytest.mark.parametrize(
        "shape",
        [
            *[(65, 1, 144), (161, 1, 20), (70, 1, 33)],
            *later(*(((n, 1, d),) for n, d in [(97, 130), (161, 162), (257, 272), (70, 33), (140, 65), (300, 100)])),
        ],
    )
    @pytest.mark.usefixtures("older")
    def test_float32_on_an_older_device(self, shape):
        assert_agrees(random(*shape))

    @in_turns("shape, dtype", HALF_SHAPES, HALF)
    def test_half_precision(self, shape, dtype):
        assert_agrees(random(*shape, dtype=dtype))

    @pytest.mark.parametrize(
        ("shape", "dtype"), later(*itertools.product([(97, 1, 130), (257, 1, 258), (140, 1, 65), (300, 1, 100)], HALF))
    )
    def test_larger_half_precision(self, shape, dtype):
        assert_agrees(random(*shape, dtype=dtype))

    @in_turns("route, shape, dtype", ROUTES, [WIDE, TALL, (260, 2, 9), (9, 1, 130)], [torch.float32, *HALF])
    @pytest.mark.usefixtures("route")
    def test_each_term_alone(self, shape, dtype):
        assert_agrees(random(*shape, dtype=dtype), incoming=EACH)

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "arguments",
        [{"threshold": 0.5, "eps": 0.0}, {"threshold": 3.0, "eps": 0.1}, {"threshold": -3.0, "eps": 0.1}],
    )
    def test_threshold_and_eps(self, arguments, form):
        assert_agrees(random(9, 2, 11), form, **arguments)

    @in_turns("route, form, scale", ROUTES, FORMS, [1e-3, 1e3])
    @pytest.mark.usefixtures("route")
    def test_scale(self, scale, form):
        assert_agrees(random(19, 2, 23) * scale, form)

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("mean", [1e4, *later((30,), (1e3,))])
    @pytest.mark.parametrize(
        ("shape", "form"), [((19, 2, 33), "gram"), ((270, 1, 33), "gram"), ((600, 1, 33), "covariance")]
    )
    def test_large_means(self, shape, form, mean):
        """The error is as small as without. Both sides see the same rounded input."""
        signs = torch.tensor([1.0, -1.0, 0.5], device=DEVICE).repeat(11)
        assert_agrees(random(*shape) + mean * signs, form)

    @in_turns(
        "route, case, row",
        ROUTES,
        [((19, 2, 33), "gram"), ((270, 1, 33), "gram"), ((600, 1, 33), "covariance")],
        (0, 1),
    )
    @pytest.mark.usefixtures("route")
    def test_an_outlier(self, case, row):
        """All samples are shifted by the first one, so an outlier there matters most."""
        shape, form = case
        h = random(*shape)
        h[row] += 1e3
        assert_agrees(h, form)

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("form", FORMS)
    def test_constant_columns(self, form):
        h = random(8, 2, 5)
        h[..., 1], h[:, 0, 3] = 1234.5, 0.0
        assert_agrees(h, form)
        (gradient,) = gradients(fused(h.requires_grad_(), form=form), [h], LOSS)
        assert gradient[..., 1].abs().max() == 0
        assert gradient[:, 0, 3].abs().max() == 0

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("form", FORMS)
    def test_a_constant_batch(self, form):
        h = random(*WIDE)[:1].expand(WIDE).requires_grad_()
        terms = fused(h, form=form)
        (gradient,) = gradients(terms, [h], LOSS)
        assert relative(terms.variance, judge(h).values[1]) <= tolerances.TF32X3
        assert terms.covariance == 0
        assert gradient.abs().max() == 0

    @in_turns(
        "route, case, bad",
        ROUTES,
        [
            ((4, 2, 6), "gram"),
            ((161, 2, 6), "gram"),
            ((8, 2, 3), "covariance"),
            ((260, 2, 6), "covariance"),
        ],
        [(0, "nan"), (1, "nan"), (0, "-inf"), (1, "inf")],
    )
    @pytest.mark.usefixtures("route")
    def test_nan_and_inf_are_never_hidden(self, case, bad):
        (shape, form), (row, value) = case, bad
        h = random(*shape)
        h[row, 1, 0] = float(value)
        leaf = h.requires_grad_()
        terms = fused(leaf, form=form)
        assert all(term.isnan() for term in terms)
        for incoming in EACH[:3]:
            (gradient,) = gradients(terms, [leaf], incoming)
            assert gradient[:, 1, 0].isnan().all(), "the column that has it"
            assert gradient[:, 0].isfinite().all(), "other time steps are independent"

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("form", FORMS)
    def test_nan_of_a_single_feature_is_not_off_the_diagonal_only(self, form):
        h = random(6, 2, 1)
        h[1, 1, 0] = torch.nan
        assert fused(h, form=form).covariance.isnan()

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("form", FORMS)
    def test_a_term_that_nobody_uses_has_no_part_in_the_gradient(self, form):
        """Without eps the sigma of a constant feature has an infinite slope, which must not reach the gradient of the
        covariance penalty. And the hinge is flat where squares overflow."""
        h = random(*WIDE)
        h[:, 1, 0] = 1.0
        h.requires_grad_()
        terms = vcr_loss(h, alpha=ALPHA, beta=BETA, eps=0.0, form=form, backend="triton")
        (gradient,) = gradients(terms, [h], (None, None, 2.0))
        assert relative(gradient, 2 * judge(h).gradients[2]) <= tolerances.TF32X3
        large = (1e12 * random(*WIDE)).requires_grad_()
        (gradient,) = gradients(fused(large, form=form), [large], (None, 2.0, None))
        assert not gradient.any()

    @pytest.mark.usefixtures("route")
    @pytest.mark.parametrize("function", [variance_hinge, covariance_penalty])
    @pytest.mark.parametrize("shape", [WIDE, TALL, *later(((1100, 1, 5),))])
    def test_terms_on_their_own(self, shape, function):
        h = random(*shape).requires_grad_()
        value, at = function(h, backend="triton"), 1 if function is variance_hinge else 2
        values, scales, expected = judge(h)
        assert relative(value, values[at], scales[at]) <= tolerances.TF32X3
        assert relative(torch.autograd.grad(value, h)[0], expected[at]) <= tolerances.TF32X3

    @pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 5), (6, 2, 1, 2, 5), (9, 4)])
    def test_other_numbers_of_dimensions(self, shape):
        assert_agrees(random(*shape))


# -- Layouts --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "a margin": lambda h: placed(h),
    "(T, N, d)": lambda h: placed(h, (1, 0, 2)),
    "(N, d, T)": lambda h: placed(h, (0, 2, 1)),
    "(d, T, N)": lambda h: placed(h, (2, 1, 0)),
    "every third sample": lambda h: placed(h, steps=(3, 1, 1)),
    "every second time step": lambda h: placed(h, steps=(1, 2, 1)),
    "every second feature": lambda h: placed(h, steps=(1, 1, 2)),
    "expanded over T": lambda h: h[:, :1].expand_as(h),
    "expanded over d": lambda h: h[..., :1].expand_as(h),
    "windows that overlap": lambda h: h.flatten(1).unfold(1, h.shape[2], 1)[:, : h.shape[1]],
}


@pytest.mark.usefixtures("guarded")
class TestLayouts:
    @in_turns("layout, how", list(LAYOUTS), list(itertools.product(FORMS, ROUTES)))
    def test_strides(self, layout, how, monkeypatch):
        form, through = how
        if through == "library":
            through_the_library(monkeypatch)
        assert_agrees(LAYOUTS[layout](random(9, 3, 11)), form)

    @in_turns("order, dtype", [(0, 1, 2), (1, 0, 2)], [torch.float32, *HALF])
    def test_the_gradient_lies_as_its_tensor(self, order, dtype):
        h = random(*WIDE, dtype=dtype).permute(order).contiguous().permute(order).requires_grad_()
        (gradient,) = gradients(fused(h), [h], LOSS)
        assert gradient.dtype == h.dtype
        assert gradient.stride() == h.stride()

    def test_through_an_expanded_view(self):
        """The gradient of the tensor that was expanded is the sum over its copies."""
        base = random(6, 1, 5).requires_grad_()
        loss_of(base.expand(6, 4, 5)).backward()
        right = judge(base.detach().expand(6, 4, 5)).gradients[0].sum(1, keepdim=True)
        assert relative(base.grad, right) <= tolerances.TF32X3

    @in_turns("form, route", FORMS, ROUTES)
    @pytest.mark.usefixtures("route")
    def test_a_sequence_is_its_concatenation(self, form):
        parts = [
            placed(random(7, 2, 8, seed=1), (1, 0, 2)),
            random(7, 8, seed=2),
            random(7, 1, 2, 8, seed=3),
            placed(random(7, 3, 8, seed=4), (2, 0, 1), (1, 2, 1)),
        ]
        leaves = [part.requires_grad_() for part in parts]
        whole = torch.cat([part.detach().reshape(7, -1, 8) for part in parts], dim=1)
        terms = fused(leaves, form=form)
        expected = judge(whole)
        assert_terms(terms, expected, tolerances.TF32X3)
        for incoming in (LOSS, EACH[-1]):
            ours = [g.reshape(7, -1, 8) for g in gradients(terms, leaves, incoming)]
            assert_gradient(torch.cat(ours, dim=1), whole, expected, incoming, tolerances.TF32X3)


FAR = (1 << 29) + 7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strides", [(FAR, 100, 1), (10, FAR, 1)])
def test_strides_beyond_32_bits(strides, form):
    """On a CPU, memory that nobody touches costs nothing."""
    try:
        memory = torch.empty(5 * FAR + 4096, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("5.4 GB of addresses are not to be had")
    h = memory.as_strided((6, 6, 9), strides)
    assert_agrees(h.copy_(random(6, 6, 9)), form)


# -- What surrounds the numbers -------------------------------------------------------------------------------------


class TestBackward:
    @in_turns("route, form, dtype", ROUTES, FORMS, [torch.float32, *HALF])
    @pytest.mark.parametrize("shape", [(20, 5, 31), *later(((12, 7, 65),), ((40, 5, 33),))])
    @pytest.mark.usefixtures("guarded", "route")
    def test_again(self, shape, dtype, form):
        """Backward a second time, and from other terms."""
        assert_agrees(random(*shape, dtype=dtype), form, incoming=[LOSS, LOSS, EACH[-1]])

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_a_wish_for_the_gradient_in_forward(self, shape):
        """It is accepted; the kernels compute the same in backward."""
        runs = []
        for made in ("forward", "backward", "auto"):
            h = random(*shape).requires_grad_()
            terms = fused(h, gradient=made)
            runs.append((*terms, *gradients(terms, [h], LOSS)))
        assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))

    def test_float16_waits_for_its_loss_scale(self):
        """Without the loss scale the gradient of so small a loss would round to zero."""
        h = random(*WIDE, dtype=torch.float16).requires_grad_()
        loss = vcr_loss(h, alpha=ALPHA * 2**-20, beta=BETA * 2**-20, backend="triton").loss
        (gradient,) = torch.autograd.grad(loss * 2**20, h)
        assert_gradient(gradient, h, judge(h), (1.0, None, None), bounds(h.dtype)[1])

    def test_a_gradient_given_away_is_the_callers(self):
        h = random(*WIDE).requires_grad_()
        loss = loss_of(h)
        (first,) = torch.autograd.grad(loss, h, retain_graph=True)
        kept = first.clone()
        first.zero_()
        assert relative(torch.autograd.grad(loss, h)[0], kept) <= tolerances.TF32X3

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_no_gradient_is_made_that_nobody_wants(self, shape, monkeypatch):
        calls, gradient = [], kernels.gradient.gradient
        monkeypatch.setattr(kernels.gradient, "gradient", lambda *given: calls.append(0) or gradient(*given))
        h = random(*shape)
        assert not any(term.requires_grad for term in fused(h))
        leaf = h.clone().requires_grad_()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                terms = fused(leaf)
            assert not any(term.requires_grad for term in terms)
        loss = loss_of(leaf)
        assert calls == []
        loss.backward()
        assert len(calls) == 1

    def test_one_tensor_of_a_sequence(self):
        h_x, h_y = random(*WIDE), random(*WIDE, seed=1).requires_grad_()
        loss_of([h_x, h_y]).backward()
        right = judge(torch.cat([h_x, h_y.detach()], dim=1)).gradients[0][:, WIDE[1] :]
        assert h_x.grad is None
        assert relative(h_y.grad, right) <= tolerances.TF32X3

    @pytest.mark.parametrize("form", FORMS)
    def test_double_backward(self, form):
        """Squaring the loss couples the tensors: each gradient depends on the other through it."""

        def penalty(terms: Sequence[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
            first = torch.autograd.grad(terms[0].square() + 2 * terms[2], inputs, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

        h = random(7, 4, 9)
        leaves = [h[:, :1].clone().requires_grad_(), h[:, 1:].clone().requires_grad_()]
        x = h.double().requires_grad_()
        (right,) = penalty(reference.vcr(x, ALPHA, BETA), [x])
        ours = penalty(fused(leaves, form=form), leaves)
        assert relative(torch.cat(ours, dim=1), right) <= tolerances.FLOAT32

    @pytest.mark.parametrize(
        ("route", "shape"),
        [
            *[("kernels", (300, 1, 9)), ("library", (20, 1, 33))],
            *([] if INTERPRETED else itertools.product(ROUTES, [(65, 3, 140), (300, 2, 20), (600, 2, 9)])),
        ],
        indirect=["route"],
    )
    @pytest.mark.usefixtures("route")
    def test_twice_the_same_bits(self, shape):
        """The interpreter runs programs one after the other, so there only the buffers in between could differ."""
        runs = []
        for _ in range(2):
            h = random(*shape).requires_grad_()
            terms = fused(h)
            terms.loss.backward()
            runs.append((*terms, h.grad))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_nothing_outlives_the_loss(self):
        """A reference cycle would hold memory until the garbage collector runs."""
        h = random(*WIDE).requires_grad_()
        inner = h * 1
        terms, gone = fused(inner), weakref.ref(inner)
        del inner
        assert gone() is not None
        del terms
        assert gone() is None

    @pytest.mark.parametrize("shape", [WIDE, TALL, (161, 1, 162)])
    def test_what_is_kept_is_no_part_of_something_larger(self, shape):
        """What forward needs in between is freed with it."""
        h = random(*shape).requires_grad_()
        h, *kept = fused(h).loss.grad_fn.saved_tensors
        assert len(kept) == 2
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)

    def test_the_loss_may_be_changed_in_place(self):
        h = random(*WIDE).requires_grad_()
        loss = loss_of(h)
        loss += h.sum()
        loss.backward()
        assert relative(h.grad, judge(h).gradients[0] + 1) <= tolerances.TF32X3

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_activation_checkpointing(self, shape):
        """torch.utils.checkpoint unpacks each saved tensor once."""
        h = random(*shape).requires_grad_()
        torch.utils.checkpoint.checkpoint(loss_of, h, use_reentrant=False).backward()
        assert relative(h.grad, judge(h).gradients[0]) <= tolerances.TF32X3

    def test_many_gradients_at_once(self):
        h = random(*WIDE).requires_grad_()
        incoming = torch.tensor([1.0, -2.0], device=DEVICE)
        (found,) = torch.autograd.grad(loss_of(h), h, incoming, is_grads_batched=True)
        right = judge(h).gradients[0]
        assert relative(found, torch.stack([right, -2 * right])) <= tolerances.TF32X3

    def test_a_change_in_between_is_noticed(self):
        h = random(*WIDE).requires_grad_()
        loss = fused(h).variance
        with torch.no_grad():
            h.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @in_turns("route, shape, dtype", ROUTES, [WIDE, TALL], [torch.float32, *HALF])
    @pytest.mark.usefixtures("route")
    def test_autocast_changes_no_bit(self, shape, dtype):
        plain, under = (random(*shape, dtype=dtype).requires_grad_() for _ in range(2))
        loss_of(plain).backward()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = loss_of(under)
            loss.backward()
        assert loss.dtype == torch.float32
        assert torch.equal(under.grad, plain.grad)


class TestInterfaces:
    def test_module(self):
        h = random(*WIDE)
        arguments = {"threshold": 2.0, "eps": 1e-3, "form": "covariance", "gradient": "forward"}
        terms = VCRLoss(ALPHA, BETA, backend="triton", **arguments)(h)
        assert isinstance(terms, VCRTerms)
        assert all(torch.equal(a, b) for a, b in zip(terms, fused(h, **arguments), strict=True))

    def test_what_it_cannot_serve(self):
        with pytest.raises(ValueError, match=r"backend='triton': h is float64"):
            fused(random(*WIDE, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"backend='triton': .*CPU"):
            fused(torch.empty(WIDE, device="meta"))
        with pytest.raises(ValueError, match=r"N >= 2"):
            fused(random(*WIDE)[:1])
        with pytest.raises(ValueError, match=r"backend='triton': .*torch.func"):
            torch.func.grad(loss_of)(random(*WIDE))
        strided = random(*WIDE).transpose(0, 2)
        with pytest.raises(ValueError, match=r"the last dimension's must be 1"):
            ops.vcr([strided], ALPHA, BETA, 1.0, 1e-4, False, True, True)

    def test_torchs_default_type_has_no_part(self):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            assert_agrees(random(*WIDE))
        finally:
            torch.set_default_dtype(before)

    @pytest.mark.parametrize("make", [int, torch.tensor])
    def test_other_numbers_are_weights_too(self, make):
        h = random(*WIDE)
        alpha, beta, threshold, eps = map(make, (25, 1, 1, 0))
        ours = vcr_loss(h, alpha=alpha, beta=beta, threshold=threshold, eps=eps, backend="triton")
        assert all(map(torch.equal, ours, vcr_loss(h, alpha=25.0, beta=1.0, eps=0.0, backend="triton")))

    @in_turns("case, used", [(False, True), (True, False), (True, True)], [(False, True, True), (True, False, False)])
    def test_opcheck(self, case, used):
        """Schema, fake kernel and autograd agree with what the operators do. used: of the three values."""
        gram, covariance = case
        hs = [random(5, 2, 9), placed(random(5, 1, 9, seed=1), (1, 0, 2))]
        weights = (ALPHA, BETA, 1.0, 1e-4, gram, True, covariance)
        arguments = ([h.clone().requires_grad_() for h in hs], *weights)
        assert set(torch.library.opcheck(torch.ops.vjvcr.vcr.default, arguments).values()) == {"SUCCESS"}
        kept = ops.vcr(hs, *weights)[3]
        g = torch.tensor(2.0, device=DEVICE)
        arguments = (hs, kept, *(g if one else None for one in used), *weights, [True, gram])
        found = torch.library.opcheck(torch.ops.vjvcr.vcr_backward.default, arguments)
        assert set(found.values()) == {"SUCCESS"}


class Watched(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass without a purpose."""


class TestOperators:
    """They are for whoever must see each operation. Others do not pay for them."""

    @pytest.fixture
    def refused(self, monkeypatch) -> None:
        def fail(*given: object) -> None:
            raise AssertionError("the operator was called")

        for name in ("vcr", "vcr_backward"):
            monkeypatch.setattr(ops, name, fail)

    @pytest.mark.usefixtures("refused")
    def test_eager_calls_make_do_without(self):
        h = random(*WIDE).requires_grad_()
        loss_of(h).backward()
        assert relative(h.grad, judge(h).gradients[0]) <= tolerances.TF32X3

    @pytest.mark.parametrize("watched_forward", [True, False])
    def test_a_dispatch_mode_sees_them(self, watched_forward):
        results = []
        for mode in (Watched(), contextlib.nullcontext()):
            h = random(*WIDE).requires_grad_()
            with mode if watched_forward else contextlib.nullcontext():
                loss = loss_of(h)
            with mode:
                loss.backward()
            results.append((loss, h.grad, getattr(mode, "names", [])))
        (loss, gradient, names), (right, right_gradient, _) = results
        assert ("vcr" in names) == watched_forward
        assert "vcr_backward" in names
        assert torch.equal(loss, right)
        assert torch.equal(gradient, right_gradient)

    @pytest.mark.usefixtures("refused")
    def test_a_subclass_goes_through_them(self):
        with pytest.raises(AssertionError, match="the operator was called"):
            fused(random(*WIDE).as_subclass(Labelled))

    def test_tensors_without_data(self):
        with FakeTensorMode() as mode:
            h = mode.from_tensor(random(*WIDE)).requires_grad_()
            terms = fused(h)
            terms.loss.backward()
        assert all(term.shape == () for term in terms)
        assert h.grad.shape == h.shape

    def test_the_compiler_gets_them(self):
        torch._dynamo.reset()
        graphs = []

        def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
            graphs.append(str(graph.graph))
            return graph.forward

        h = random(*WIDE).requires_grad_()
        loss = torch.compile(loss_of, fullgraph=True, backend=backend)(h)
        assert len(graphs) == 1
        assert "vjvcr.vcr" in graphs[0]
        assert torch.equal(loss, loss_of(h))


class TestCompiled:
    """Under torch.compile(fullgraph=True) nothing breaks the graph and the numbers stay the same."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", *later(("inductor",))])
    def test_whole_graph(self, backend):
        """The inputs come from other operations, in layouts that the compiler chooses."""

        def step(x: Tensor, y: Tensor) -> Tensor:
            terms = fused([(x * 2).permute(2, 0, 1), y.sin().transpose(0, 1)])
            return terms.loss + terms.variance - terms.covariance

        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
            x, y = random(3, 20, 6).requires_grad_(), random(4, 6, 20, seed=1).requires_grad_()
            loss = function(x, y)
            results.append((loss, *torch.autograd.grad(loss, [x, y])))
        assert all(relative(b, a) <= tolerances.COMPILED for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("d", [20, *later((3,))])
    def test_any_batch_size_is_one_graph(self, d):
        compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
        for i, n in enumerate((6, 8, 11)):
            h = random(n, 3, d).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                compiled(h).backward()
            assert relative(h.grad, judge(h).gradients[0]) <= tolerances.TF32X3

    def test_weights_that_change_are_one_graph(self):
        """Or two: at first the compiler takes a number for a constant."""

        def loss_with(h: Tensor, alpha: float) -> Tensor:
            return vcr_loss(h, alpha=alpha, beta=BETA, backend="triton").loss

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(loss_with, fullgraph=True, backend=counter)
        for alpha in (0.5, 0.7, 0.9, 1.1):
            h = random(*WIDE).requires_grad_()
            found, right = (torch.autograd.grad(loss(h, alpha), h)[0] for loss in (compiled, loss_with))
            assert relative(found, right) <= tolerances.COMPILED
        assert counter.frame_count <= 2

    def test_double_backward_is_refused(self):
        h = random(*WIDE).requires_grad_()
        loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(h)
        (gradient,) = torch.autograd.grad(loss, h, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.square().sum(), h)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_wish_for_the_gradient_in_forward(self, dtype):
        h = random(*WIDE, dtype=dtype).requires_grad_()
        compiled = torch.compile(lambda h: fused(h, gradient="forward").loss, fullgraph=True, backend="aot_eager")
        (gradient,) = torch.autograd.grad(compiled(h) * 100, h)
        assert_gradient(gradient, h, judge(h), (100.0, None, None), bounds(dtype)[1])

    @pytest.mark.parametrize("function", [loss_of, variance_hinge, covariance_penalty])
    def test_without_gradients_under_autocast(self, function):
        h = random(*WIDE, dtype=torch.float16)
        arguments = {} if function is loss_of else {"backend": "triton"}
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert relative(compiled(h, **arguments), function(h, **arguments)) <= tolerances.COMPILED


# -- Properties -----------------------------------------------------------------------------------------------------

few = settings(max_examples=2 if INTERPRETED else 6, deadline=None, derandomize=True)
drawn = given(shape=st.sampled_from([(9, 2, 24), (24, 2, 9), (40, 1, 21)]), seed=st.integers(0, 1000))


class TestProperties:
    @few
    @drawn
    def test_the_order_of_samples_does_not_matter(self, shape, seed):
        h = random(*shape, seed=seed)
        order = torch.randperm(len(h), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        results = []
        for x in (h.clone().requires_grad_(), h[order].requires_grad_()):
            terms = fused(x)
            results.append((terms.loss, gradients(terms, [x], LOSS)[0]))
        (loss, gradient), (loss_ordered, gradient_ordered) = results
        assert relative(loss_ordered, loss) <= tolerances.TF32X3
        assert relative(gradient_ordered, gradient[order]) <= tolerances.TF32X3

    @few
    @drawn
    def test_a_constant_does_not_matter(self, shape, seed):
        """The constant is a power of two above all entries, which are first rounded so that adding it is exact."""
        h = random(*shape, seed=seed).mul(2**16).round().div(2**16)
        (terms, leaf), (moved, moved_leaf) = (
            (fused(x), x) for x in (h.requires_grad_(), (h.detach() + 64).requires_grad_())
        )
        assert relative(moved.loss, terms.loss) <= tolerances.TF32X3
        ours, other = gradients(moved, [moved_leaf], LOSS)[0], gradients(terms, [leaf], LOSS)[0]
        assert relative(ours, other) <= tolerances.TF32X3

    @few
    @drawn
    def test_the_forms_agree(self, shape, seed):
        results = []
        for form in FORMS:
            h = random(*shape, seed=seed).requires_grad_()
            terms = fused(h, form=form)
            results.append((terms.covariance, gradients(terms, [h], LOSS)[0]))
        (penalty, gradient), (other_penalty, other_gradient) = results
        assert relative(other_penalty, penalty, tolerances.penalty_scale(h)) <= tolerances.TF32X3
        assert relative(other_gradient, gradient) <= tolerances.TF32X3


# The interpreter runs seven, and 31 as slow tests; a device runs forty, and 360 as slow tests.
FEW, MANY = (8, 38) if INTERPRETED else (41, 400)
SEEDS = [*range(1, FEW), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, *range(FEW, MANY)))]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("seed", SEEDS)
def test_any_shape_layout_and_type(seed):
    draw = Random(seed)
    dtype = draw.choice([torch.float32, torch.float32, *HALF])
    n, d = (draw.choice([draw.randint(6, 20), draw.randint(20, 140)]) for _ in range(2))
    h = random(n, draw.randint(1, 4), d, dtype=dtype, seed=seed)
    h = placed(h, draw.sample(range(3), 3), [draw.randint(1, 3) for _ in range(3)])
    form = draw.choice(["auto", *FORMS]) if dtype == torch.float32 else "auto"
    incoming = [draw.choice(EACH)]
    assert_agrees(h, form, incoming, threshold=draw.choice([0.7, 1.0, 3.0]), eps=draw.choice([1e-4, 1e-2]))


# -- On the device --------------------------------------------------------------------------------------------------


def step(h: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    loss = loss_of(h)
    return loss.detach(), torch.autograd.grad(loss, h)[0]


_FIRST_CALL = """
import time, torch
from vjvcr_fast.losses import vcr_loss
h = torch.randn(160, 100, 2048, device="cuda", requires_grad=True)
torch.cuda.synchronize()
start = time.perf_counter()
vcr_loss(h, alpha=1.0, beta=1.0, backend="triton").loss.backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set: kernels run on CPU tensors")
class TestCuda:
    @pytest.fixture
    def tf32(self) -> Iterator[None]:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield
        torch.backends.cuda.matmul.fp32_precision = before

    @pytest.mark.usefixtures("tf32")
    @pytest.mark.parametrize(
        "shape", [(16, 2, 40), (32, 2, 70), (65, 2, 144), (160, 3, 512), (300, 2, 512), (300, 2, 100), (2000, 2, 256)]
    )
    def test_tf32(self, shape):
        assert_agrees(random(*shape))

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("shape", [(160, 3, 512), (300, 2, 512), (2000, 2, 256), (1100, 1, 1200), (600, 2, 300)])
    def test_half_precision(self, shape, dtype):
        assert_agrees(random(*shape, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_a_sorted_batch(self, dtype):
        """The first samples are far from the rest of their part, which must not cost accuracy."""
        h = random(40_000, 1, 64) + torch.linspace(-3, 3, 40_000, device=DEVICE)[:, None, None]
        assert_agrees(h.to(dtype))

    def test_auto_chooses_it(self):
        h = random(*WIDE)
        assert backends.resolve("auto", h) == "triton"
        assert backends.explain()["cuda"].startswith("triton")
        plain = vcr_loss(h, alpha=ALPHA, beta=BETA)
        assert all(torch.equal(a, b) for a, b in zip(plain, fused(h), strict=True))

    def test_float64_stays_float64(self):
        h = random(*WIDE, dtype=torch.float64)
        assert backends.resolve("auto", h) == "torch"
        assert relative(vcr_loss(h, alpha=ALPHA, beta=BETA).loss, judge(h).values[0]) <= tolerances.FLOAT64

    @pytest.mark.parametrize("shape", [(64, 5, 128), (300, 5, 64), (300, 2, 400)])
    def test_graph_capture(self, shape):
        """Captured once, replayed with other numbers."""
        h = random(*shape).requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(h)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, gradient = step(h)
        for seed in (1, 2):
            with torch.no_grad():
                h.copy_(random(*shape, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            expected = judge(h)
            assert relative(loss, expected.values[0], expected.scales[0]) <= tolerances.TF32X3
            assert relative(gradient, expected.gradients[0]) <= tolerances.TF32X3

    @pytest.mark.parametrize("shape", [(64, 5, 128), (300, 5, 64), (300, 2, 400), (1100, 1, 1200)])
    def test_never_waits_for_the_device(self, shape):
        h = random(*shape).requires_grad_()
        step(h)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(h)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_peak_memory(self):
        """At the shape of CATER, 131 MB."""
        h = torch.randn(160, 100, 2048, device=DEVICE, requires_grad=True)
        step(h)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(h)
        torch.cuda.synchronize()
        above = torch.cuda.max_memory_allocated() - before - h.nbytes
        assert 0 <= above <= tolerances.CUDA_MEMORY_COPIES * h.nbytes

    @pytest.mark.parametrize("shape", [(8, (1 << 18) + 1, 1024), ((1 << 20) + 1, 32, 64)])
    def test_more_elements_than_32_bits_count(self, shape):
        """Checks terms against float64, a few time steps at once, and the gradients of the first and the last steps."""
        n, steps, d = shape
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 40 << 30:
            pytest.skip("less than 40 GiB of GPU memory free")
        h = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).mul_(0.8)
        loss, gradient = step(h.requires_grad_())
        h, expected, width = h.detach(), 0.0, max(1, (1 << 26) // (n * d))
        for part in h.split(width, dim=1):
            terms = vcr_loss(part.double(), alpha=ALPHA, beta=BETA, backend="torch")
            expected += terms.loss * part.shape[1] / steps
        of_terms, of_gradients = bounds(h.dtype)
        assert relative(loss, expected) <= of_terms
        for at in (slice(0, 2), slice(steps - 2, steps)):
            right = judge(h[:, at]).gradients[0] * (2 / steps)
            assert relative(gradient[:, at], right) <= of_gradients

    def test_the_first_call_takes_seconds(self, tmp_path):
        """In a fresh process that finds nothing compiled."""
        root = Path(backends.__file__).parents[2]
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", _FIRST_CALL]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 20

    def test_streams(self):
        tensors = [random(64, 20, 256, seed=i).requires_grad_() for i in range(4)]
        expected = [step(h) for h in tensors]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in tensors], []
        for stream, h in zip(streams, tensors, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(h))
        torch.cuda.synchronize()
        for (loss, gradient), (right, right_gradient) in zip(found, expected, strict=True):
            assert torch.equal(loss, right)
            assert torch.equal(gradient, right_gradient)

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_another_device_than_the_current(self, shape):
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device")
        assert_agrees(random(*shape).to("cuda:1"))
