"""SIGReg's Triton kernels: loss and gradient against reference.py in float64, then operators and surroundings.

As test_triton.py, on a CUDA device or on CPU tensors in Triton's interpreter, which test_interpreted.py runs. In the
interpreter products are of float32, and bfloat16 counts as TF32, to which the kernels themselves round.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_sigreg
import tolerances
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from processes import in_processes
from test_sigreg import CONVENTIONS, directions_of, judge
from test_triton import DEVICE, HALF, INTERPRETED, LAYOUTS, Watched, guarded, later, placed  # noqa: F401
from tolerances import relative
from torch import Tensor
from vjvcr_fast.kernels import launch
from vjvcr_fast.kernels import sigreg as kernels

from vjvcr_fast.losses import SIGRegLoss, ops, projections, sigreg
from vjvcr_fast.losses.projections import Settings

pytestmark = [] if INTERPRETED else [pytest.mark.cuda]
SHAPE, COUNT, FEW = (6, 2, 20), 24, {"knots": 5}  # fewer knots: the interpreter takes its time for each
DIRECTIONS = directions_of(SHAPE[2], COUNT).to(DEVICE)
# (N, T, d, K): they fill no tile; several tiles and parts of samples, blocks of directions and of features.
SHAPES = [(1, 1, 1, 1), (2, 2, 5, 7), (70, 1, 33, 70), (140, 1, 7, 16)]
LARGER = [(70, 2, 33, 70), (300, 2, 65, 130), (64, 3, 128, 64), (33, 3, 150, 100), (129, 1, 16, 1024), (600, 1, 1, 5)]


def bounds(dtype: torch.dtype) -> tuple[float, float]:
    """On the loss and on the gradient. In half precision the slopes and the gradient are rounded. What tensor cores cut
    off their sums shows on a device alone."""
    if dtype in HALF:
        of_loss = tolerances.TF32X3 if INTERPRETED else tolerances.BFLOAT16_PRODUCTS
        return of_loss, tolerances.BFLOAT16 if dtype == torch.bfloat16 else tolerances.FLOAT16
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return tolerances.TF32, tolerances.TF32_GRADIENT
    return tolerances.TF32X3, tolerances.TF32X3


@pytest.fixture(params=["tf32", "ieee"])
def precision(request) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return test_sigreg.random(*shape, dtype=dtype, seed=seed).to(DEVICE)


def loss_of(h: Any) -> Tensor:
    d = (h if isinstance(h, Tensor) else h[0]).shape[-1]
    return sigreg(h, directions=DIRECTIONS[:d], backend="triton", **FEW)


def judged(h: Tensor) -> tuple[Tensor, Tensor]:
    """What is right for `loss_of`."""
    return judge(h, DIRECTIONS[: h.shape[-1]], **FEW)


def assert_agrees(h: Tensor, count: int = COUNT, bound: float | None = None, **options: Any) -> None:
    leaf, directions = h.detach().requires_grad_(), directions_of(h.shape[-1], count).to(DEVICE)
    loss = sigreg(leaf, directions=directions, backend="triton", **options)
    right, gradient = judge(h, directions, **options)
    of_loss, of_gradient = bounds(h.dtype) if bound is None else (bound, bound)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert relative(loss, right) <= of_loss
    scale = h.numel()  # as large as a loss scale: float16 would lose the small entries
    (ours,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, scale))
    assert ours.dtype == h.dtype
    assert relative(ours, scale * gradient) <= of_gradient


@pytest.mark.usefixtures("guarded")
class TestNumbers:
    @pytest.mark.parametrize("shape", [*SHAPES, *later(*((shape,) for shape in LARGER))])
    def test_shapes(self, shape):
        assert_agrees(random(*shape[:3]), shape[3])

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("shape", [(17, 1, 33, 20), *later(*((shape,) for shape in LARGER[:3]))])
    def test_half_precision(self, shape, dtype):
        assert_agrees(random(*shape[:3], dtype=dtype), shape[3])

    @pytest.mark.usefixtures("precision")
    def test_tf32(self):
        assert_agrees(random(17, 1, 33), **FEW)

    @pytest.mark.parametrize(
        "name", ["eb_jepa", "fewest symmetric", *later(("paper",), ("fewest",), ("three",), ("many",))]
    )
    def test_conventions(self, name):
        assert_agrees(random(9, 2, 5), **CONVENTIONS[name])

    @pytest.mark.parametrize(
        "layout", ["(N, d, T)", "every third sample", "windows that overlap", *later(*((name,) for name in LAYOUTS))]
    )
    def test_strides(self, layout):
        assert_agrees(LAYOUTS[layout](random(9, 2, 11)), 20, **FEW)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_the_gradient_lies_as_its_tensor(self, dtype):
        h = random(6, 3, 20, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(h), h)
        assert gradient.stride() == h.stride()

    @pytest.mark.parametrize(("samples", "panels"), [(1, 12), *later((70, 3), (100, 2), (10**6, 1))])
    def test_panels(self, samples, panels, monkeypatch):
        """Some samples at a time, one time step at a time, two, all. Half of h's bytes are those of 14."""
        monkeypatch.setattr(kernels, "PANEL", samples * 48 * 4)
        h = random(45, 3, 10)
        assert len(list(kernels._panels(h, 48 * 4))) == panels
        assert_agrees(h, 40, **FEW)

    def test_other_layouts_of_directions(self):
        h, directions = random(9, 1, 20), DIRECTIONS.mT.contiguous().mT
        assert torch.equal(sigreg(h, directions=directions, backend="triton", **FEW), loss_of(h))

    def test_large_values(self):
        """As on a CPU: projections of size 1e3 have 3e-5 in their last digits. Beyond, it stays finite."""
        assert_agrees(random(40, 1, 9) * 1e3, bound=1e-3, **FEW)

    @pytest.mark.parametrize(("scale", "d"), [(0.0, 1), (1e30, 9), *later((0.0, 9), (1e-30, 1), (1e8, 9), (1e30, 1))])
    def test_finite(self, scale, d):
        leaf = (random(8, 1, d) * scale).requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
        if scale == 0:  # all samples in one point: the gradient is zero by symmetry
            assert relative(loss, judged(leaf)[0]) <= tolerances.FLOAT32
            assert leaf.grad.abs().max() == 0

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
    @pytest.mark.parametrize(
        ("value", "dtype"),
        [
            *[(float("nan"), torch.float16), (-float("inf"), torch.float32)],
            *later((float("nan"), torch.float32), (float("inf"), torch.float32), (float("inf"), torch.bfloat16)),
        ],
    )
    def test_nan_and_inf_are_never_hidden(self, value, dtype):
        h = random(8, 2, 6, dtype=dtype)
        h[1, 1, 0] = value
        leaf = h.requires_grad_()
        loss = loss_of(leaf)
        loss.backward()
        assert loss.isnan()
        assert leaf.grad[:, 1].isnan().all(), "the time step that has it"
        assert leaf.grad[:, 0].isfinite().all(), "other time steps are independent"

    @pytest.mark.parametrize("n", [300, *later((20_000,))])
    def test_sums(self, n):
        """D is a small difference of large sums: with phi in one float32 number it would be off by 3e-8 N."""
        h, knots, settings = random(n, 1, 2), kernels.Knots(2, 0.7, half=False), Settings(3, 1.4)
        _, (sums,) = kernels.forward([h], DIRECTIONS[:2].float(), knots, 1.0)
        assert relative(sums, projections.sums_of(h.double(), DIRECTIONS[:2], settings, False)) <= 1e-6


@pytest.mark.parametrize("name", ["lightly", *later(("eb_jepa",), ("many",))])
@pytest.mark.parametrize("size", [1e-3, 30.0, *later((1.0,), (1e3,), (1e6,))])
def test_sines_and_cosines_of_any_size(size, name):
    """One sample, which is 1, and directions of one number: the sums are sines and cosines.

    The interpreter has no fused operations; on a device split operands of that size have lost as much.
    """
    settings = Settings(**CONVENTIONS[name])
    grid, a = settings.grid(DEVICE), random(1, 50) * size
    knots = kernels.Knots(settings.above, settings.step, settings.half)
    _, (sums,) = kernels.forward([torch.ones(1, 1, 1, device=DEVICE)], a, knots, 1.0)
    sums, angles = sums[0].double(), grid[0][:, None] * a.double()
    bound = 3e-6 + 2e-6 * size
    assert (sums[0] + grid[1][:, None] - angles.cos()).abs().max() <= bound
    assert (sums[1] - angles.sin()).abs().max() <= bound
    if size == 1e-3:  # small sines keep their digits
        assert ((sums[1] - angles.sin()) / angles.sin()).abs().max() <= 3e-6


class TestSurroundings:
    def test_a_sequence_is_its_concatenation(self):
        parts = [placed(random(6, 2, 5, seed=1), (1, 0, 2)), random(6, 5, seed=2), random(6, 1, 2, 5, seed=3)]
        leaves = [parts[0].requires_grad_(), parts[1], parts[2].requires_grad_()]
        loss = loss_of(leaves)
        right, gradient = judged(torch.cat([p.detach().reshape(6, -1, 5) for p in parts], dim=1))
        assert relative(loss, right) <= tolerances.TF32X3
        loss.backward()
        assert parts[1].grad is None
        for leaf, expected in ((leaves[0], gradient[:, :2]), (leaves[2], gradient[:, 3:])):
            assert relative(leaf.grad.reshape(expected.shape), expected) <= tolerances.TF32X3

    def test_again_and_twice_the_same_bits(self):
        leaf = random(70, 1, 5).requires_grad_()
        losses = [loss_of(leaf) for _ in range(2)]
        found = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (*losses, losses[0])]
        assert torch.equal(*losses)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_double_backward(self):
        leaf = random(5, 2, 4).requires_grad_()
        (first,) = torch.autograd.grad(loss_of(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        x = leaf.detach().double().requires_grad_()
        (first,) = torch.autograd.grad(
            sigreg(x, directions=DIRECTIONS[:4], backend="reference", **FEW), x, create_graph=True
        )
        assert relative(second, torch.autograd.grad(first.square().sum(), x)[0]) <= tolerances.FLOAT32

    def test_no_gradient_is_made_that_nobody_wants(self, monkeypatch):
        calls, backward = [], kernels.backward
        monkeypatch.setattr(kernels, "backward", lambda *given: calls.append(0) or backward(*given))
        leaf = random(*SHAPE).requires_grad_()
        with torch.no_grad():
            assert not loss_of(leaf).requires_grad
        loss = loss_of([leaf, random(*SHAPE, seed=1)])
        assert calls == []
        loss.backward()
        assert len(calls) == 1

    @pytest.mark.parametrize("shape", later((SHAPE,)))
    def test_activation_checkpointing(self, shape):
        leaf = random(*shape).requires_grad_()
        torch.utils.checkpoint.checkpoint(loss_of, leaf, use_reentrant=False).backward()
        assert relative(leaf.grad, judged(leaf)[1]) <= tolerances.TF32X3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_changes_no_bit(self, dtype):
        plain, under = (random(*SHAPE, dtype=dtype).requires_grad_() for _ in range(2))
        loss_of(plain).backward()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = loss_of(under)
            loss.backward()
        assert loss.dtype == torch.float32
        assert torch.equal(under.grad, plain.grad)

    def test_what_it_cannot_serve(self):
        with pytest.raises(ValueError, match=r"backend='triton': h is float64"):
            loss_of(random(*SHAPE, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"backend='triton': .*torch.func"):
            torch.func.grad(loss_of)(random(*SHAPE))
        with pytest.raises(ValueError, match=r"the last dimension's must be 1"):
            ops.sigreg_operator([random(*SHAPE).mT], DIRECTIONS[:2].float(), 16, 0.2, False, 10)

    def test_module(self):
        h, found = random(*SHAPE), []
        for backend in ("triton", "torch"):
            module = SIGRegLoss(directions=COUNT, backend=backend, **FEW).to(DEVICE)
            found.append(torch.stack([module(h) for _ in range(2)]))
        assert relative(*found) <= tolerances.TF32X3

    @pytest.mark.parametrize("half", later((True,), (False,)))
    def test_opcheck(self, half):
        hs = [random(5, 1, 9), placed(random(5, 2, 9, seed=1), (1, 0, 2))]
        arguments = (hs, DIRECTIONS[:9].float(), 2, 0.7, half, 10)
        assert set(torch.library.opcheck(torch.ops.vjvcr.sigreg.default, arguments).values()) == {"SUCCESS"}
        sums = ops.sigreg_operator(*arguments)[1]
        arguments = (*arguments[:2], sums, torch.tensor(2.0, device=DEVICE), *arguments[2:5], 2, 10)
        assert set(torch.library.opcheck(torch.ops.vjvcr.sigreg_backward.default, arguments).values()) == {"SUCCESS"}

    @pytest.mark.parametrize("settings", [Settings(5), Settings(4, 2.0, True), Settings(5, 2.0, True, False)])
    def test_the_operator_by_itself_can_be_differentiated(self, settings):
        """In graphs, torch.export's too, it has no Python around it."""
        hs = [random(*SHAPE).requires_grad_(), random(*SHAPE, seed=1), random(*SHAPE, seed=2).requires_grad_()]
        divisor = projections.divisor_of(settings, len(hs[0]), 3 * SHAPE[1] * COUNT)
        numbers = settings.above, settings.step, settings.half, divisor
        loss, _ = torch.ops.vjvcr.sigreg(hs, DIRECTIONS.float(), *numbers)
        right = judge(torch.cat(hs, dim=1), DIRECTIONS, **settings._asdict())[1].split(SHAPE[1], dim=1)
        for once in (False, True):
            found = torch.autograd.grad(loss, hs[::2], retain_graph=True, create_graph=not once)
            for gradient, expected in zip(found, right[::2], strict=True):
                assert relative(gradient, expected) <= bounds(torch.float32)[1]

    def test_only_who_must_see_operations_gets_the_operators(self, monkeypatch):
        leaf, mode = random(*SHAPE).requires_grad_(), Watched()
        with mode:
            loss_of(leaf).backward()
        assert {"sigreg", "sigreg_backward"} <= set(mode.names)
        monkeypatch.setattr(ops, "sigreg_operator", None)
        monkeypatch.setattr(ops, "sigreg_backward_operator", None)
        loss_of(leaf).backward()

    def test_a_step_makes_few_launches(self, monkeypatch):
        names, launched = [], launch.Kernel.launch
        monkeypatch.setattr(
            launch.Kernel, "launch", lambda self, *given, **more: names.append(self) or launched(self, *given, **more)
        )
        loss_of(random(*SHAPE).requires_grad_()).backward()
        assert [kernel.jit.fn.__name__ for kernel in names] == ["_sums", "_finish", "_loss", "_slopes", "_product"]


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize("backend", later(("aot_eager_decomp_partition",), ("inductor",)))
    def test_whole_graph(self, backend):
        def step(x: Tensor, y: Tensor) -> Tensor:
            return loss_of([(x * 2).permute(2, 0, 1), y.sin().transpose(0, 1)])

        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
            x, y = random(2, 20, 6).requires_grad_(), random(3, 6, 20, seed=1).requires_grad_()
            loss = function(x, y)
            results.append((loss, *torch.autograd.grad(loss, [x, y])))
        assert all(relative(b, a) <= tolerances.COMPILED for a, b in zip(*results, strict=True))

    def test_any_batch_size_is_one_graph(self):
        compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
        for i, n in enumerate((6, 8, 11)):
            leaf = random(n, 2, 20).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                compiled(leaf).backward()
            assert relative(leaf.grad, judged(leaf)[1]) <= tolerances.TF32X3

    @pytest.mark.parametrize("shape", later((SHAPE,)))
    def test_double_backward_is_refused(self, shape):
        leaf = random(*shape).requires_grad_()
        loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.square().sum(), leaf)

    @pytest.mark.parametrize("shape", later((SHAPE,)))
    def test_without_gradients_under_autocast(self, shape):
        h = random(*shape, dtype=torch.bfloat16)
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            assert relative(compiled(h), loss_of(h)) <= tolerances.COMPILED


def _processes(rank: int, world: int) -> tuple[Tensor, Tensor]:
    h = test_sigreg.random(9, 2, 5).split([4, 5])[rank].requires_grad_()
    loss = sigreg(h, directions=directions_of(5, COUNT), group=dist.group.WORLD, backend="triton")
    loss.backward()
    return loss.detach(), h.grad / world


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED or not dist.is_available(), reason="two processes of the interpreter")
def test_several_processes_are_like_one(tmp_path: Path) -> None:
    found = in_processes(_processes, 2, tmp_path)
    right, gradient = judge(test_sigreg.random(9, 2, 5), directions_of(5, COUNT))
    assert all(relative(loss, right) <= tolerances.TF32X3 for loss, _ in found)
    assert relative(torch.cat([of_one for _, of_one in found]), gradient) <= tolerances.TF32X3


# -- On the device --------------------------------------------------------------------------------------------------


def step(h: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    loss = sigreg(h, seed=1, backend="triton", **options)
    return loss.detach(), torch.autograd.grad(loss, h)[0]


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 is set: kernels run on CPU tensors")
class TestCuda:
    @pytest.mark.usefixtures("precision")
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    @pytest.mark.parametrize(
        "shape", [(256, 2, 512, 1024), (128, 1, 512, 1024), (300, 2, 2048, 256), (8192, 1, 64, 65)]
    )
    def test_shapes(self, shape, dtype):
        assert_agrees(random(*shape[:3], dtype=dtype), shape[3])

    def test_auto_chooses_it(self):
        h = random(*SHAPE)
        assert torch.equal(sigreg(h, directions=DIRECTIONS, **FEW), loss_of(h))

    def test_graph_capture(self):
        """Captured once, replayed with other numbers."""
        h = random(256, 2, 64).requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(h)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, gradient = step(h)
        directions = projections.drawn(1, 64, 1024, DEVICE).double()
        for seed in (1, 2):
            with torch.no_grad():
                h.copy_(random(256, 2, 64, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            expected = judge(h, directions)
            assert relative(loss, expected[0]) <= tolerances.TF32X3
            assert relative(gradient, expected[1]) <= tolerances.TF32X3

    def test_never_waits_for_the_device(self):
        h = random(256, 2, 64).requires_grad_()
        step(h)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(h)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_peak_memory(self, dtype):
        """At the shape of CATER, 131 MB in float32."""
        h = torch.randn(160, 100, 2048, dtype=dtype, device=DEVICE, requires_grad=True)
        step(h)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(h)
        torch.cuda.synchronize()
        above = torch.cuda.max_memory_allocated() - before - h.nbytes
        assert 0 <= above <= tolerances.SIGREG_MEMORY_COPIES * h.nbytes

    def test_more_elements_than_32_bits_count(self):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 40 << 30:
            pytest.skip("less than 40 GiB of GPU memory free")
        n, steps, d = (1 << 20) + 1, 32, 64
        h = torch.randn(n, steps, d, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        loss, gradient = step(h, directions=64)
        for t in (0, steps - 1):
            one = h[:, t].detach().requires_grad_()
            assert relative(gradient[:, t] * steps, step(one, directions=64)[1]) <= tolerances.BFLOAT16
        assert loss.isfinite()
