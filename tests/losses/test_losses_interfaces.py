"""The losses, beyond the numbers of test_losses.py: errors, autocast, the compiler, functional gradients.

Also what must never happen: waiting for the GPU, a d x d matrix if N < d, work for a gradient that nobody needs.
"""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tolerances
import torch
import ways
from tolerances import relative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vjvcr_fast import native, reference
from vjvcr_fast.losses import (
    VCRLoss,
    VCRTerms,
    VICRegLoss,
    analytic,
    backends,
    covariance_penalty,
    variance_hinge,
    vcr_loss,
)

ALPHA, BETA = 1.7, 0.4
WIDE, TALL = (6, 3, 20), (20, 3, 6)  # the Gram form's shape and the covariance form's


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(0.8).to(dtype)


def loss_of(h: Tensor) -> Tensor:
    return vcr_loss(h, alpha=ALPHA, beta=BETA).loss


def reference_gradient(h: Tensor) -> Tensor:
    x = h.detach().double().requires_grad_()
    return torch.autograd.grad(reference.vcr(x, ALPHA, BETA)[0], x)[0]


H = random(*WIDE)


class Recorder(TorchDispatchMode):
    """Records the name of every operation inside the context, and the size of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out

    def products(self) -> int:
        return sum(name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_") for name in self.names)


# Calls with one of their numbers.
NUMBERS = {
    "alpha": [lambda v: vcr_loss(H, alpha=v, beta=1.0).loss, lambda v: VCRLoss(v, 1.0)(H).loss],
    "beta": [lambda v: vcr_loss(H, alpha=1.0, beta=v).loss, lambda v: VCRLoss(1.0, v)(H).loss],
    "threshold": [
        lambda v: variance_hinge(H, threshold=v),
        lambda v: vcr_loss(H, alpha=1.0, beta=1.0, threshold=v).loss,
        lambda v: VCRLoss(1.0, 1.0, threshold=v)(H).loss,
    ],
    "eps": [
        lambda v: variance_hinge(H, eps=v),
        lambda v: vcr_loss(H, alpha=1.0, beta=1.0, eps=v).loss,
        lambda v: VCRLoss(1.0, 1.0, eps=v)(H).loss,
        lambda v: VICRegLoss(eps=v)(H, H),
    ],
    "lambda_param": [lambda v: VICRegLoss(lambda_param=v)(H, H)],
    "mu_param": [lambda v: VICRegLoss(mu_param=v)(H, H)],
    "nu_param": [lambda v: VICRegLoss(nu_param=v)(H, H)],
}


class TestErrors:
    @pytest.mark.parametrize("function", [variance_hinge, covariance_penalty, loss_of])
    @pytest.mark.parametrize(
        ("h", "error", "message"),
        [
            (torch.randn(1, 3, 4), ValueError, r"shape \(1, 3, 4\) and dtype torch.float32.*N >= 2"),
            (torch.randn(5), ValueError, r"shape \(5,\) and dtype torch.float32"),
            (torch.tensor(1.0), ValueError, r"shape \(\) and dtype torch.float32"),
            (torch.ones(4, 3, dtype=torch.int64), TypeError, r"shape \(4, 3\) and dtype torch.int64"),
            (torch.ones(4, 3, dtype=torch.complex64), TypeError, r"dtype torch.complex64"),
            (torch.ones(4, 0, 3), ValueError, r"shape \(4, 0, 3\).*empty"),
            ([], ValueError, "empty sequence"),
            ([torch.ones(4, 3), "h_y"], TypeError, r"h\[1\] is str"),
            ([torch.ones(4, 3), torch.ones(5, 3)], ValueError, r"h\[1\] has shape \(5, 3\).*\(4, 3\)"),
            ([torch.ones(4, 3), torch.ones(4, 2)], ValueError, r"h\[1\] has shape \(4, 2\).*\(4, 3\)"),
            ([torch.ones(4, 3), torch.ones(4, 3).double()], TypeError, r"torch.float64.*torch.float32"),
            ([torch.ones(4, 3), torch.ones(4, 3, device="meta")], ValueError, "on meta"),
        ],
    )
    def test_input(self, function, h, error, message):
        with pytest.raises(error, match=message):
            function(h)

    def test_arguments(self):
        h = torch.ones(4, 3)
        with pytest.raises(ValueError, match=r"form='fast'.*gram, covariance"):
            vcr_loss(h, alpha=1, beta=1, form="fast")
        with pytest.raises(ValueError, match=r"backend='cuda'.*torch, triton, reference"):
            vcr_loss(h, alpha=1, beta=1, backend="cuda")
        for call in (lambda: vcr_loss(h, alpha=1, beta=1, eps=-1.0), lambda: variance_hinge(h, eps=-1.0)):
            with pytest.raises(ValueError, match=r"eps=-1.0"):
                call()

    @pytest.mark.parametrize("name", NUMBERS)
    @pytest.mark.parametrize(
        ("value", "error", "says"),
        [
            (float("nan"), ValueError, "=nan"),
            (float("-inf"), ValueError, "=-inf"),
            (10**400, ValueError, "=1000"),
            ("1.0", TypeError, "='1.0'"),
            (None, TypeError, "=None"),
            (1j, TypeError, "=1j"),
            (torch.ones(2), TypeError, r" has shape \(2,\) and dtype torch.float32"),
        ],
        ids=lambda value: str(value)[:8],
    )
    def test_what_is_no_number(self, name, value, error, says):
        for call in NUMBERS[name]:
            with pytest.raises(error, match=f"^{name}{says}.*: a finite number is needed$"):
                call(value)

    @pytest.mark.parametrize("name", NUMBERS)
    def test_a_weight_that_is_to_be_learned(self, name):
        """Its gradient would be None, or zero. With the terms there is one."""
        weight = torch.nn.Parameter(torch.tensor(0.5))
        for call in NUMBERS[name]:
            with pytest.raises(
                TypeError, match=rf"^{name} .* a gradient.*alpha \* terms.variance \+ beta \* terms.cov"
            ):
                call(weight)
            with pytest.raises(TypeError, match=f"^{name} .* requires a gradient"):
                torch.func.grad(call)(torch.tensor(0.5))
        terms = vcr_loss(random(*WIDE), alpha=1.0, beta=1.0)
        (weight * terms.variance).backward()
        assert weight.grad == terms.variance

    @pytest.mark.parametrize("make", [torch.tensor, np.float32, np.array, Fraction, lambda half: torch.tensor([half])])
    def test_other_numbers(self, make):
        h, half = random(*WIDE), make(0.5)
        same = vcr_loss(h, alpha=half, beta=half, threshold=half, eps=half)
        assert same == vcr_loss(h, alpha=0.5, beta=0.5, threshold=0.5, eps=0.5)
        assert VICRegLoss(half, half, half, eps=half)(h, h + 1) == VICRegLoss(0.5, 0.5, 0.5, eps=0.5)(h, h + 1)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
    @pytest.mark.parametrize("backend", ["torch", "reference", *(["native"] if native.MISSING is None else [])])
    def test_tensors_are_not_rounded_to_their_own_dtype(self, backend, dtype):
        """Beside numbers as small as 1 / (N^2 T d), or as exact as float64."""
        h = torch.randn(256, 16, 256, generator=torch.Generator().manual_seed(0))
        for leaf in (h.requires_grad_(), random(*WIDE, dtype=torch.float64).requires_grad_()):
            found = []
            for weight in (torch.tensor(3, dtype=dtype), 3.0):
                given = {"alpha": weight, "beta": weight, "covariance_divisor": "d(d-1)", "backend": backend}
                loss = vcr_loss(leaf, **given).loss
                found.append((loss, *torch.autograd.grad(loss, leaf)))
            limit = tolerances.FLOAT64 if leaf.dtype == torch.float64 else tolerances.FLOAT32
            assert all(relative(ours, right) <= limit for ours, right in zip(*found, strict=True))


@pytest.mark.parametrize("way", ways.HERE)
def test_subnormal_halves_where_subnormal_numbers_are_flushed(way, monkeypatch):
    """They are not subnormal in float32."""
    ways.take(way, monkeypatch)
    h = (random(64, 1, 4) * 2e-5).half()
    given = {"alpha": 1.0, "beta": 0.0, "threshold": 1e-4, "eps": 0.0}
    torch.set_flush_denormal(True)
    try:
        loss = vcr_loss(h, **given, backend="native").loss
    finally:
        torch.set_flush_denormal(False)
    assert relative(loss, vcr_loss(h.double(), **given, backend="reference").loss) <= tolerances.FLOAT32


class TestInterfaces:
    def test_module(self):
        h = random(*WIDE)
        terms = VCRLoss(ALPHA, BETA, threshold=2.0, eps=1e-3, form="covariance")(h)
        assert isinstance(terms, VCRTerms)
        expected = vcr_loss(h, alpha=ALPHA, beta=BETA, threshold=2.0, eps=1e-3, form="covariance")
        assert all(torch.equal(a, b) for a, b in zip(terms, expected, strict=True))

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_backends_agree(self, shape):
        gradients = []
        for backend in ("native" if native.MISSING is None else "auto", "torch", "reference"):
            leaves = [random(*shape).requires_grad_(), random(*shape, seed=1).requires_grad_()]
            vcr_loss(leaves, alpha=ALPHA, beta=BETA, backend=backend).loss.backward()
            gradients.append(torch.cat([leaf.grad for leaf in leaves], dim=1))
        assert all(relative(g, gradients[-1]) <= tolerances.FLOAT32 for g in gradients)
        assert set(backends.explain()) == {"cpu", "cuda"}

    def test_gradient_of_one_tensor_of_a_sequence(self):
        h_x, h_y = random(*WIDE), random(*WIDE, seed=1).requires_grad_()
        vcr_loss([h_x, h_y], alpha=ALPHA, beta=BETA).loss.backward()
        right = reference_gradient(torch.cat([h_x, h_y.detach()], dim=1))[:, WIDE[1] :]
        assert h_x.grad is None
        assert relative(h_y.grad, right) <= tolerances.FLOAT32

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_computes_in_float32(self, shape, dtype):
        """Forward, and even backward, under autocast give the same bits as without."""
        plain, under = (random(*shape, dtype=dtype).requires_grad_() for _ in range(2))
        loss_of(plain).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(under)
            loss.backward()
            assert VICRegLoss()(under, under).dtype == torch.float32
        assert loss.dtype == torch.float32
        assert torch.equal(under.grad, plain.grad)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, context):
        h = random(*WIDE).requires_grad_()
        with context():
            terms = vcr_loss(h, alpha=ALPHA, beta=BETA)
        assert not any(x.requires_grad for x in terms)
        assert torch.equal(terms.loss, loss_of(h))

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_functional_gradients(self, shape):
        h = random(*shape)
        assert relative(torch.func.grad(loss_of)(h), reference_gradient(h)) <= tolerances.FLOAT32

        def penalty(f):
            return lambda x: torch.func.grad(f)(x).square().sum()

        x = h.double()
        right = torch.func.grad(penalty(lambda x: reference.vcr(x, ALPHA, BETA)[0]))(x)
        assert relative(torch.func.grad(penalty(loss_of))(x), right) <= tolerances.FLOAT64

        gradients = torch.func.grad(lambda *h: vcr_loss(h, alpha=ALPHA, beta=BETA).loss, argnums=(0, 1))(h, h + 1)
        right = reference_gradient(torch.cat([h, h + 1], dim=1))
        assert relative(torch.cat(gradients, dim=1), right) <= tolerances.FLOAT32


class TestCompiled:
    """Under torch.compile(fullgraph=True) nothing breaks the graph and the numbers stay the same."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        "backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)]
    )
    @pytest.mark.parametrize("form", ["auto", "covariance"])
    def test_whole_graph(self, form, backend):
        """The first backend does all that inductor does, except for its C++ compiler, which takes half a minute."""

        def step(h_x: Tensor, h_y: Tensor) -> Tensor:
            terms = vcr_loss([h_x * 2, h_y], alpha=ALPHA, beta=BETA, form=form)
            return terms.loss + terms.variance - terms.covariance

        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
            leaves = [random(*WIDE).requires_grad_(), random(*WIDE, seed=1).requires_grad_()]
            loss = function(*leaves)
            loss.backward()
            results.append((loss, torch.cat([leaf.grad for leaf in leaves])))
        assert all(relative(b, a) <= tolerances.COMPILED for a, b in zip(*results, strict=True))

    def test_large_half_precision(self):
        leaf = (random(*WIDE) * 1e3).half().requires_grad_()
        expected = vcr_loss(leaf, alpha=ALPHA, beta=0.0).loss
        compiled = torch.compile(lambda h: vcr_loss(h, alpha=ALPHA, beta=0.0).loss, fullgraph=True, backend="aot_eager")
        assert compiled(leaf).isfinite()
        assert relative(compiled(leaf), expected, scale=1.0) <= tolerances.COMPILED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_double_backward_is_refused(self, dtype):
        """It cannot work in a compiled graph. It must raise an error rather than be silently wrong."""
        leaf = random(*WIDE).to(dtype).requires_grad_()
        loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.square().sum(), leaf)

    def test_without_gradients_under_autocast_and_in_modules(self):
        h = random(*WIDE, dtype=torch.bfloat16)
        module, vicreg = VCRLoss(ALPHA, BETA), VICRegLoss()
        for function in (lambda h: module(h).loss, lambda h: vicreg(h, h + 1), variance_hinge, covariance_penalty):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                assert relative(compiled(h), function(h)) <= tolerances.COMPILED


@pytest.fixture
def by_torch(monkeypatch) -> None:
    """As without the compiled operators."""
    monkeypatch.setattr(native, "MISSING", "not wanted here")


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
class TestOperator:
    """What the compiled operator is asked for."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[tuple[str, list[bool]]]:
        """The operators that were called, with the tensors for which they made gradients."""
        found: list[tuple[str, list[bool]]] = []
        operators = torch.ops.vjvcr

        def recorded(name: str):
            operator = getattr(operators, name)
            return lambda *arguments: found.append((name, arguments[-1])) or operator(*arguments)

        recorders = SimpleNamespace(**{name: recorded(name) for name in ("vcr_cpu", "vcr_cpu_backward")})
        monkeypatch.setattr(torch.ops, "vjvcr", recorders)
        return found

    def test_the_gradient_of_the_loss_comes_with_the_loss(self, calls):
        h_x, h_y = random(*WIDE), random(*WIDE, seed=1).requires_grad_()
        terms = vcr_loss([h_x, h_y], alpha=ALPHA, beta=BETA)
        (3 * terms.loss).backward(retain_graph=True)
        assert calls == [("vcr_cpu", [False, True])]
        terms.loss.backward()
        assert calls[1:] == [("vcr_cpu_backward", [False, True])], "given away once"
        assert relative(h_y.grad, 4 * reference_gradient(torch.cat([h_x, h_y], dim=1))[:, WIDE[1] :]) <= 1e-5

    def test_a_term_alone_is_computed_in_backward(self, calls):
        leaf = random(*WIDE).requires_grad_()
        vcr_loss(leaf, alpha=ALPHA, beta=BETA).variance.backward()
        assert calls == [("vcr_cpu", [True]), ("vcr_cpu_backward", [True])]

    def test_no_gradient_that_nobody_asked_for(self, calls):
        leaf = random(*WIDE).requires_grad_()
        with torch.no_grad():
            loss_of(leaf)
        loss_of(leaf.detach())
        vcr_loss(leaf, alpha=ALPHA, beta=BETA, gradient="backward")
        loss_of(random(*WIDE, dtype=torch.bfloat16).requires_grad_())
        assert calls == [("vcr_cpu", [False])] * 4

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_opcheck(self, shape, dtype):
        hs = [random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)]
        options = (ALPHA, BETA, 1.0, 1e-4, shape is WIDE, True, True, [True, False])
        torch.library.opcheck(torch.ops.vjvcr.vcr_cpu.default, (hs, *options))
        incoming = (torch.tensor(0.5), None, torch.tensor(2.0, dtype=torch.float64))
        torch.library.opcheck(torch.ops.vjvcr.vcr_cpu_backward.default, (hs, *incoming, *options))

    def test_tensors_that_do_not_fit(self):
        h, options = random(*WIDE), (ALPHA, BETA, 1.0, 1e-4, True, True, True)
        for hs, made in (([h], []), ([h[0]], [True]), ([h[:1]], [True]), ([h, h.double()], [True] * 2),
                         ([h, h[:, :, :3]], [True] * 2), ([h.long()], [True])):  # fmt: skip
            with pytest.raises(RuntimeError, match="vcr: "):
                torch.ops.vjvcr.vcr_cpu(hs, *options, made)

    def test_an_unknown_instruction_set(self, monkeypatch):
        monkeypatch.setenv("VJVCR_CPU", "mmx")
        with pytest.raises(RuntimeError, match="VJVCR_CPU=mmx: this CPU has baseline"):
            loss_of(random(*WIDE))

    @pytest.mark.parametrize(
        "shape",
        [(160, 5, 300), (40, 3, 5000), (3000, 1, 40), (700, 1, 513), (130, 7, 130), (4096, 37, 3), (64_007, 1, 1)],
    )
    def test_threads_change_no_bit(self, shape):
        """Steps for some threads, the rest shared out within a step; with a sum of products, and with one."""
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                leaf = random(*shape, dtype=torch.float32).requires_grad_()
                loss = loss_of(leaf)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


class TestNeverDone:
    def test_a_matrix_of_features_where_samples_are_fewer(self):
        n, steps, d = 8, 4, 256
        h = random(n, steps, d).requires_grad_()
        with Recorder() as recorder:
            loss_of(h).backward()
        assert recorder.largest <= n * steps * d < d * d

    @pytest.mark.usefixtures("by_torch")
    @pytest.mark.parametrize("shape", [WIDE, TALL])
    @pytest.mark.parametrize("whole", [True, False])
    def test_products_that_plain_operations_do_not_need(self, shape, whole, monkeypatch):
        """Forward takes one a block, and so does backward for a tensor that needs a gradient; the hinge takes none."""
        if not whole:
            monkeypatch.setattr(analytic, "_BLOCK", 1)
        h, h_x, each = random(*shape).requires_grad_(), random(*shape), 1 if whole else shape[1]
        with torch.no_grad(), Recorder() as recorder:
            loss_of(h)
        assert recorder.products() == each
        with Recorder() as recorder:
            terms = vcr_loss([h_x, h], alpha=ALPHA, beta=BETA)
        assert recorder.products() == 2 * each, "the forward pass of two tensors"
        with Recorder() as recorder:
            terms.loss.backward(retain_graph=True)
            terms.variance.backward()
        assert recorder.products() == each, "the backward passes"
        with Recorder() as recorder:
            variance_hinge(h).backward()
        assert recorder.products() == 0, "the hinge alone needs none"

    @pytest.mark.parametrize("shape", [WIDE, TALL])
    def test_synchronisation_with_the_host(self, shape, monkeypatch):
        h = random(*shape).requires_grad_()
        for way in ways.WAYS:
            ways.take(way, monkeypatch)
            with Recorder() as recorder:
                loss_of(h).backward()
                VICRegLoss()(h, h + 1).backward()
            assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(recorder.names)
        # Tensors without data take the same path as on a GPU. To read a value from one raises an error.
        leaf = torch.empty(shape, device="meta", requires_grad=True)
        terms = vcr_loss([leaf, leaf], alpha=ALPHA, beta=BETA)
        (terms.loss + terms.variance + terms.covariance).backward()
        assert leaf.grad.shape == shape


_MEMORY = """
import sys, torch
from vjvcr_fast.losses import vcr_loss

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

n, steps, d = map(int, sys.argv[1:])
vcr_loss(torch.randn(n, 2, d, requires_grad=True), alpha=1.0, beta=1.0).loss.backward()  # libraries load
h = torch.randn(n, steps, d, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark restarts here
before = status("VmRSS")
vcr_loss(h, alpha=1.0, beta=1.0).loss.backward()
print((status("VmHWM") - before) / h.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("shape", [(160, 24, 1024), pytest.param((160, 100, 2048), marks=pytest.mark.slow, id="CATER")])
def test_peak_memory(shape):
    """Measured in a process of its own. The slow case is the paper's CATER shape."""
    arguments = [sys.executable, "-c", _MEMORY, *map(str, shape)]
    root = Path(backends.__file__).parents[2]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    copies = float(done.stdout)
    assert 0.9 <= copies <= tolerances.MEMORY_COPIES  # the gradient is one copy: less would mean nothing was measured


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_rounded_once(dtype):
    """Whatever the incoming gradient is: rounding it too would scale all of the gradient."""
    leaf = random(64, 16, 512).to(dtype).requires_grad_()
    scale = 1.0 + 1.9 * torch.finfo(dtype).eps  # in the middle of two numbers
    (scale * loss_of(leaf)).backward()
    right = scale * reference_gradient(leaf)
    assert abs((leaf.grad.double() * right).sum() / right.square().sum() - 1) <= 0.02 * torch.finfo(dtype).eps
