"""What people wrap around a loss: transforms of torch.func, forward-mode AD, graphs, hooks, checkpoints, threads.

By the compiled operator and by plain operations in the smallest blocks, against reference.py in float64. What is passed
to the losses, learned weights too, is in test_losses_interfaces.py; uses of the Triton kernels are in test_triton.py.
"""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tolerances
import torch
import torch.nn.functional as F
import ways
from tolerances import relative
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, functional, graph
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from vjvcr_fast import native, reference
from vjvcr_fast.losses import (
    SIGRegLoss,
    VCRLoss,
    VICRegLoss,
    covariance_penalty,
    projections,
    sigreg,
    variance_hinge,
    vcr_loss,
)

ALPHA, BETA = 1.7, 0.4
WIDE, TALL = (4, 3, 6), (6, 2, 3)  # the Gram form's shape and the covariance form's
Function = Callable[[Tensor], Tensor]


@pytest.fixture(params=[*ways.HERE[-1:], 1], autouse=True)
def way(request, monkeypatch) -> None:
    ways.take(request.param, monkeypatch)


@pytest.fixture(params=[WIDE, TALL], ids=["wide", "tall"])
def h(request) -> Tensor:
    return random(*request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(0.8)


def loss_of(h: Tensor) -> Tensor:
    return vcr_loss(h, alpha=ALPHA, beta=BETA).loss


def right_loss(h: Tensor, *settings: float) -> Tensor:
    """settings: alpha, beta, threshold, eps; none are those of `loss_of`."""
    return reference.vcr(h, *(settings or (ALPHA, BETA)))[0]


def sigreg_of(h: Tensor) -> Tensor:
    return sigreg(h, seed=3, directions=20)


def drawn(h: Tensor) -> Tensor:
    return projections.drawn(3, h.shape[-1], 20, h.device, native.MISSING is None).to(h.dtype)


def right_sigreg(h: Tensor) -> Tensor:
    return reference.sigreg(h, drawn(h))


BOTH = pytest.mark.parametrize(("loss_of", "right"), [(loss_of, right_loss), (sigreg_of, right_sigreg)])


def right_gradient(h: Tensor, *settings: float) -> Tensor:
    return grad(lambda h: right_loss(h, *settings))(h.detach())


def gradient_of(h: Tensor, loss_of: Function = loss_of) -> Tensor:
    leaf = h.clone().requires_grad_()
    loss_of(leaf * 1).backward()  # of what is no leaf
    return leaf.grad


def assert_same(ours: Tensor, right: Tensor) -> None:
    assert relative(ours, right) <= tolerances.FLOAT64


def assert_right(loss: Tensor, gradient: Tensor, h: Tensor, *settings: float) -> None:
    assert_same(loss, right_loss(h, *settings))
    assert_same(gradient, right_gradient(h, *settings))


def everything(h: Tensor) -> Tensor:
    """The results of all losses, (7,)."""
    vcr, of_drawn = vcr_loss(h, alpha=ALPHA, beta=BETA), sigreg(h, directions=drawn(h))
    return torch.stack([*vcr, variance_hinge(h), covariance_penalty(h), VICRegLoss()(h, h.square()), of_drawn])


def right_everything(h: Tensor) -> Tensor:
    vcr, both = reference.vcr(h, ALPHA, BETA), torch.cat([h, h.square()], dim=1)
    vicreg = 25 * reference.variance_hinge(both) + 2 * reference.covariance_penalty(both)
    return torch.stack([*vcr, *vcr[1:], 25 * F.mse_loss(h, h.square()) + vicreg, right_sigreg(h)])


def batch(h: Tensor, *sizes: int) -> Tensor:
    return h * torch.linspace(0.5, 1.5, torch.Size(sizes).numel()).view(*sizes, 1, 1, 1)


def dual(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def dual_of_gradient(f: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        point = forward_ad.make_dual(x.clone().requires_grad_(), x.cos())
        (gradient,) = torch.autograd.grad(f(point).sum(), point, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent


def many_gradients(f: Function, x: Tensor, by_vmap: bool) -> Tensor:
    point = x.clone().requires_grad_()
    value = f(point)
    incoming = torch.stack([torch.full_like(value.detach(), factor) for factor in (1.0, -2.0)])
    if by_vmap:
        return vmap(lambda g: torch.autograd.grad(value, point, g, retain_graph=True)[0])(incoming)
    return torch.autograd.grad(value, point, incoming, is_grads_batched=True)[0]


def squared_gradient(f: Function) -> Function:
    return lambda x: grad(lambda x: f(x).sum())(x).square().sum()


# (f, h) -> a tensor.
TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "vmap": lambda f, h: vmap(f)(batch(h, 2)),
    "vmap over a dimension within": lambda f, h: vmap(f, in_dims=2)(batch(h, 2).movedim(0, 2)),
    "vmap, nested": lambda f, h: vmap(vmap(f), in_dims=1)(batch(h, 2, 3)),
    "vmap of grad": lambda f, h: vmap(grad(lambda h: f(h).sum()))(batch(h, 2)),
    "grad of grad": lambda f, h: grad(squared_gradient(f))(h),
    "jacrev": lambda f, h: jacrev(f)(h),
    "jacfwd": lambda f, h: jacfwd(f)(h),
    "hessian": lambda f, h: hessian(lambda h: f(h).sum())(h),
    "jvp": lambda f, h: jvp(f, (h,), (h.cos(),))[1],
    "linearize": lambda f, h: linearize(f, h)[1](h.cos()),
    "functionalize": lambda f, h: functionalize(f)(h),
    "dual numbers": dual,
    "dual numbers of a gradient": dual_of_gradient,
    "many gradients at once": functools.partial(many_gradients, by_vmap=False),
    "vmap of autograd.grad": functools.partial(many_gradients, by_vmap=True),
    "jacobian": lambda f, h: functional.jacobian(f, h, vectorize=True),
    "jacobian, forward": lambda f, h: functional.jacobian(f, h, vectorize=True, strategy="forward-mode"),
    "hvp": lambda f, h: functional.hvp(lambda h: f(h).sum(), h, h.cos())[1],
}
SLOW = {"linearize": pytest.mark.slow}


class TestTransforms:
    @pytest.mark.parametrize("transform", [pytest.param(name, marks=SLOW.get(name, ())) for name in TRANSFORMS])
    def test_any(self, transform, h):
        ours, right = (TRANSFORMS[transform](f, h) for f in (everything, right_everything))
        assert_same(ours, right)

    @pytest.mark.parametrize("name", ["alpha", "beta", "threshold", "eps"])
    def test_vmap_over_numbers(self, name, h):
        given: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "threshold": 1.0, "eps": 1e-4}
        ours = vmap(lambda x: vcr_loss(h, **{**given, name: x}).loss)(torch.tensor([0.2, 1.5], dtype=torch.float64))
        assert_same(ours, torch.stack([right_loss(h, *{**given, name: x}.values()) for x in (0.2, 1.5)]))

    @pytest.mark.parametrize("transform", ["vmap of grad", "dual numbers"])
    def test_the_operator_on_demand(self, transform, h, monkeypatch):
        monkeypatch.setattr(native, "MISSING", None)
        with pytest.raises(ValueError, match=r"backend='native': transforms of torch\.func and forward-mode AD cannot"):
            TRANSFORMS[transform](lambda h: vcr_loss(h, alpha=ALPHA, beta=BETA, backend="native").loss, h)


class TestGraphs:
    @pytest.fixture(params=[*ways.HERE[-1:], pytest.param(1, marks=pytest.mark.slow)], autouse=True)
    def way(self, request, monkeypatch) -> None:
        ways.take(request.param, monkeypatch)
        torch._dynamo.reset()

    @pytest.fixture
    def h(self) -> Tensor:
        return random(*WIDE)

    @pytest.mark.parametrize("transform", ["vmap of grad", "jvp"])
    def test_transforms(self, transform, h):
        """An operator in such a graph would have no derivative."""
        transformed = torch.compile(TRANSFORMS[transform], backend="aot_eager", fullgraph=True)
        assert_same(transformed(loss_of, h), TRANSFORMS[transform](right_loss, h))

    @pytest.mark.parametrize("kind", ["argument", "attribute", "tensor"])
    def test_weights_that_change_are_one_graph(self, kind, h):
        """Or two: at first the compiler takes a number for a constant."""
        module, counter = VCRLoss(1.0, BETA), CompileCounterWithBackend("aot_eager")
        call = (lambda h, a: module(h).loss) if kind == "attribute" else lambda h, a: vcr_loss(h, alpha=a, beta=a).loss
        compiled = torch.compile(call, backend=counter, fullgraph=True)
        for alpha in (0.5, 0.7, 0.9, 1.1, 1.3):
            leaf, beta = h.clone().requires_grad_(), BETA if kind == "attribute" else alpha
            module.alpha = alpha
            loss = compiled(leaf, torch.tensor(alpha, dtype=torch.float64) if kind == "tensor" else alpha)
            loss.backward()
            assert_right(loss, leaf.grad, h, alpha, beta)
        assert counter.frame_count <= 2

    def test_tensors_as_threshold_and_eps(self, h):
        def loss_with(h: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
            return vcr_loss(h, alpha=ALPHA, beta=BETA, threshold=threshold, eps=eps).loss

        leaf = h.clone().requires_grad_()
        given = torch.tensor([0.9, 1e-3], dtype=torch.float64)
        loss = torch.compile(loss_with, backend="aot_eager", fullgraph=True)(leaf, *given)
        loss.backward()
        assert_right(loss, leaf.grad, h, ALPHA, BETA, 0.9, 1e-3)

    @pytest.mark.parametrize("shape", [(4, 3, 9), TALL], ids=["wide", "tall"])
    def test_any_batch_size_is_one_graph(self, shape):
        compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
        for more in (0, 1, 3):
            leaf = random(shape[0] + more, *shape[1:]).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=more > 0):
                loss = compiled(leaf)
                loss.backward()
            assert_right(loss, leaf.grad, leaf)

    @BOTH
    def test_compiled_backward(self, loss_of, right, h):
        """The loss itself is not compiled."""
        leaf = h.clone().requires_grad_()
        loss = loss_of(leaf)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            (3 * loss).backward()
        assert_same(loss, right(h))
        assert_same(leaf.grad / 3, grad(right)(h))

    @BOTH
    def test_export(self, loss_of, right, h):
        """Loaded again, it is trained with any N and T."""

        class Loss(nn.Module):
            def forward(self, h: Tensor) -> Tensor:
                return sigreg_of(h) if loss_of is sigreg_of else vcr_loss(h, alpha=ALPHA, beta=BETA, form="gram").loss

        n, t = torch.export.Dim("n", min=2), torch.export.Dim("t")
        file = io.BytesIO()
        torch.export.save(torch.export.export(Loss(), (h,), dynamic_shapes=({0: n, 1: t},)), file)
        file.seek(0)
        leaf = random(h.shape[0] + 2, h.shape[1] + 1, h.shape[2]).requires_grad_()
        loss = torch.export.load(file).module()(leaf)
        loss.backward()
        assert_same(loss, right(leaf))
        assert_same(leaf.grad, grad(right)(leaf.detach()))

    @BOTH
    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, mode, loss_of, right, h):
        def step(h: Tensor) -> Tensor:
            leaf = h.detach().requires_grad_()
            return torch.autograd.grad(loss_of(leaf), leaf)[0]

        other = 1.1 * h
        assert_same(make_fx(step, tracing_mode=mode)(h)(other), grad(right)(other))
        leaf = other.clone().requires_grad_()
        make_fx(loss_of, tracing_mode=mode)(h)(leaf).backward()
        assert_same(leaf.grad, grad(right)(other))

    def test_fake_tensors(self, h):
        with FakeTensorMode():
            leaf = torch.empty(h.shape, dtype=torch.bfloat16, requires_grad=True)
            terms = vcr_loss([leaf, leaf], alpha=ALPHA, beta=BETA)
            (2 * terms.loss).backward(retain_graph=True)
            (gradient,) = torch.autograd.grad(terms.variance, leaf, create_graph=True)
            gradient.sum().backward()
            module = SIGRegLoss(directions=20)
            loss = module([leaf, leaf])
            (2 * loss).backward(retain_graph=True)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            gradient.sum().backward()
        assert (terms.loss.dtype, loss.dtype, leaf.grad.shape) == (torch.float32, torch.float32, h.shape)


class TestAutograd:
    @pytest.mark.parametrize(
        "context",
        [
            graph.save_on_cpu,
            graph.allow_mutation_on_saved_tensors,
            torch.autograd.detect_anomaly,
            functools.partial(graph.disable_saved_tensors_hooks, "none here"),
            functools.partial(graph.saved_tensors_hooks, pickle.dumps, pickle.loads),
        ],
    )
    @BOTH
    @pytest.mark.filterwarnings("ignore:Anomaly Detection")
    def test_contexts(self, context, loss_of, right, h):
        with context():
            gradient = gradient_of(h, loss_of)
        assert_same(gradient, grad(right)(h))

    @pytest.mark.parametrize("loss_of", [loss_of, sigreg_of])
    def test_hooks_see_all_that_is_kept(self, loss_of, h):
        """Nothing as large as h is kept beside what they see."""
        seen: list[Tensor] = []
        leaf = h.clone().requires_grad_()
        with graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
            loss = loss_of(leaf)
        assert sum(x.shape == h.shape for x in seen) == 1
        assert not hasattr(loss.grad_fn, "gradients")

    @pytest.mark.parametrize("loss_of", [loss_of, sigreg_of])
    def test_an_input_that_has_changed(self, loss_of, h):
        leaf = h.clone().requires_grad_()
        x = leaf * 1
        loss = loss_of(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @BOTH
    def test_accumulation_and_a_graph_that_is_retained(self, loss_of, right, h):
        loss, right = loss_of(leaf := h.clone().requires_grad_()), grad(right)(h)
        loss.backward(retain_graph=True)
        (0.5 * loss).backward(retain_graph=True)
        loss.backward()
        loss_of(leaf).backward()
        assert_same(leaf.grad, 3.5 * right)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    def test_the_same_tensor_twice(self, h):
        leaf = h.clone().requires_grad_()
        vcr_loss([leaf, leaf], alpha=ALPHA, beta=BETA).loss.backward()
        assert_same(leaf.grad, grad(lambda h: right_loss(torch.cat([h, h], dim=1)))(h))

    def test_lbfgs(self, h):
        def end(function: Function) -> Tensor:
            leaf = h.clone().requires_grad_()
            optimizer = torch.optim.LBFGS([leaf], max_iter=8, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = function(leaf)
                loss.backward()
                return loss

            optimizer.step(closure)
            return right_loss(leaf.detach())

        # Rounding grows from step to step.
        assert relative(end(loss_of), end(right_loss), scale=right_loss(h)) <= tolerances.FLOAT32

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
    def test_a_gradient_has_the_strides_of_its_tensor(self, order, h):
        """Where the tensor is dense: then the optimizer copies nothing. Plain operations on one block need not."""
        leaf = h.permute(order).contiguous().permute(order).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
        assert gradient.stride() == leaf.stride()
        assert_same(gradient, right_gradient(h))


class Block(nn.Module):
    """A layer with the loss of its output inside."""

    def __init__(self, d: int, **options: Any) -> None:
        super().__init__()
        self.layer, self.loss = nn.Linear(d, d, dtype=torch.float64), VCRLoss(ALPHA, BETA, **options)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layer(h).tanh()
        return h, self.loss(h).loss


class TestModules:
    @pytest.mark.parametrize("options", [{}, {"gradient": "backward"}, {"backend": "reference"}], ids=str)
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoints(self, options, reentrant, h):
        torch.manual_seed(0)
        block, gradients = Block(h.shape[-1], **options), []
        for call in (functools.partial(checkpoint, block, use_reentrant=reentrant), block):
            leaf = h.clone().requires_grad_()
            x, first = call(leaf)
            x, second = call(x)
            (first + second + x.sum()).backward()
            gradients.append([leaf.grad, *(p.grad for p in block.parameters())])
            block.zero_grad()
        assert all(relative(a, b) <= tolerances.FLOAT64 for a, b in zip(*gradients, strict=True))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies(self, copied, h):
        counting = SIGRegLoss(directions=20)
        counting(h)
        assert torch.equal(copied(counting)(h), counting(h))
        module, vicreg = VCRLoss(ALPHA, torch.tensor(BETA, dtype=torch.float64), eps=1e-2), VICRegLoss(nu_param=3.0)
        module(h)
        assert torch.equal(copied(module)(h).loss, module(h).loss)
        assert torch.equal(copied(vicreg)(h, h + 1), vicreg(h, h + 1))


class TestSideBySide:
    @BOTH
    def test_threads(self, loss_of, right, h):
        scaled = [factor * h for factor in range(1, 21)]
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(functools.partial(gradient_of, loss_of=loss_of), scaled)
            for gradient, x in zip(found, scaled, strict=True):
                assert_same(gradient, grad(right)(x))

    def test_a_forked_process(self):
        """After threads were used. Like every parallel operation of torch it needs torch.set_num_threads(1) there, as
        DataLoader's workers have it."""
        before, h = torch.get_num_threads(), random(64, 4, 256)
        torch.set_num_threads(2)
        try:
            loss_of(h)
            options = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": 60}
            (found,) = DataLoader([h], batch_size=None, collate_fn=gradient_of, **options)
        finally:
            torch.set_num_threads(before)
        assert_same(found, right_gradient(h))


def test_a_module_that_counts_under_transforms(h):
    """Not where they allow it to change nothing: but its own error says so, and evaluation mode has no such limit."""
    module = SIGRegLoss(directions=20)
    vmap(module)(batch(h, 2))
    assert module.step == 1
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        grad(module)(h)
    module.eval()
    assert relative(grad(module)(h), gradient_of(h, module)) <= tolerances.FLOAT32


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
@pytest.mark.parametrize("name", ["loss", "sums"])
def test_the_operators_of_sigreg_by_themselves_can_be_differentiated(name, h):
    leaf, grid = h.clone().requires_grad_(), projections.Settings().grid(h.device)
    a, scale = projections.unit(random(h.shape[2], 20)), 1 / (h[..., 0].numel() * 20)
    if name == "loss":
        loss, made = torch.ops.vjvcr.sigreg_cpu(leaf, a, grid, False, scale)
    else:
        loss = projections.loss_of(torch.ops.vjvcr.sigreg_sums_cpu(leaf, a, grid, False), grid, scale)
    first, second = grad(lambda h: reference.sigreg(h, a)), grad(squared_gradient(lambda h: reference.sigreg(h, a)))
    assert_same(torch.autograd.grad(3 * loss, leaf, retain_graph=True)[0], 3 * first(h))
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert_same(gradient, first(h))
    assert_same(torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)[0], second(h))
    if name == "loss":
        assert_same(torch.autograd.grad(made.square().sum(), leaf)[0], second(h))


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
def test_the_operator_by_itself_can_be_differentiated(h):
    """In graphs it has no Python around it."""
    leaf = h.clone().requires_grad_()
    options = (ALPHA, BETA, 1.0, 1e-4, h.shape == WIDE, True, True, [False])
    loss, variance, covariance, _ = torch.ops.vjvcr.vcr_cpu([leaf], *options)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert_same(gradient, right_gradient(h))
    (gradient,) = torch.autograd.grad(ALPHA * variance + BETA * covariance, leaf, create_graph=True)
    assert_same(gradient, right_gradient(h))
    assert_same(torch.autograd.grad(gradient.square().sum(), leaf)[0], grad(squared_gradient(right_loss))(h))
