"""sigreg beyond the numbers of test_sigreg.py: errors, autocast, the compiler, operators, memory."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tolerances
import torch
import torch.utils.checkpoint
import ways
from test_losses_interfaces import Recorder
from test_sigreg import CONVENTIONS, directions_of, judge, random
from tolerances import relative
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vjvcr_fast import native, reference
from vjvcr_fast.losses import SIGRegLoss, projections, sigreg

SHAPE, COUNT = (6, 3, 20), 40
DIRECTIONS = directions_of(SHAPE[2], COUNT)
H = random(*SHAPE)
NEEDS_OPERATOR = pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")


def loss_of(h: Tensor) -> Tensor:
    return sigreg(h, directions=DIRECTIONS)


class TestErrors:
    @pytest.mark.parametrize(
        ("h", "error", "message"),
        [
            (torch.randn(5), ValueError, r"shape \(5,\) and dtype torch.float32"),
            (torch.ones(0, 20), ValueError, r"shape \(0, 20\).*: N >= 1 is needed$"),
            (torch.ones(4, 3, dtype=torch.int64), TypeError, r"shape \(4, 3\) and dtype torch.int64"),
            ([], ValueError, "empty sequence"),
            ([torch.ones(4, 3), torch.ones(5, 3)], ValueError, r"h\[1\] has shape \(5, 3\).*\(4, 3\)"),
        ],
    )
    def test_input(self, h, error, message):
        with pytest.raises(error, match=message):
            sigreg(h, seed=0)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({}, ValueError, "^directions=1024: to draw them, give seed"),
            ({"seed": 1, "generator": torch.Generator()}, ValueError, "^directions=1024: to draw them, give seed"),
            ({"seed": 1, "directions": DIRECTIONS}, ValueError, "^directions is a tensor.*leave out seed"),
            ({"seed": 1, "directions": 0}, ValueError, "^directions=0: at least 1"),
            ({"seed": 1, "directions": 3.0}, TypeError, "^directions=3.0: a whole number"),
            ({"seed": 1.0}, TypeError, "^seed=1.0: a whole number"),
            ({"seed": torch.zeros(2, dtype=torch.int64)}, TypeError, r"^seed has shape \(2,\) .* one int64"),
            ({"seed": torch.zeros(())}, TypeError, "^seed has .* torch.float32: one int64"),
            ({"directions": DIRECTIONS.mT}, ValueError, r"^directions has shape \(40, 20\).*\(20, at least 1\) on cpu"),
            ({"directions": DIRECTIONS.long()}, TypeError, "^directions has .* real numbers"),
            ({"directions": DIRECTIONS.clone().requires_grad_()}, TypeError, "^directions has .* requires a gradient"),
            ({"directions": DIRECTIONS.to("meta")}, ValueError, "^directions has .* on meta: .* on cpu is needed"),
            ({"seed": 1, "knots": 1}, ValueError, "^knots=1: at least 2"),
            ({"seed": 1, "knots": True}, TypeError, "^knots=True: a whole number"),
            ({"seed": 1, "limit": 0.0}, ValueError, "^limit=0.0: must be positive"),
            ({"seed": 1, "limit": float("nan")}, ValueError, "^limit=nan"),
            ({"seed": 1, "backend": "triton"}, ValueError, "^backend='triton'"),
            ({"seed": 1, "backend": "cuda"}, ValueError, "^backend='cuda': choose one of"),
            ({"seed": 1, "group": "world"}, ValueError, "^group: "),
        ],
    )
    def test_arguments(self, options, error, message):
        with pytest.raises(error, match=message):
            sigreg(H, **options)

    @pytest.mark.parametrize("options", [{"directions": 0}, {"knots": 1}, {"limit": -1.0}])
    def test_modules_refuse_at_once(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            SIGRegLoss(**options)


class TestInterfaces:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("way", ways.WAYS)
    def test_autocast_computes_in_float32(self, dtype, way, monkeypatch):
        ways.take(way, monkeypatch)
        plain, under = (random(*SHAPE, dtype=dtype).requires_grad_() for _ in range(2))
        loss_of(plain).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(under)
            loss.backward()
        assert loss.dtype == torch.float32
        assert torch.equal(under.grad, plain.grad)

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, context):
        h = random(*SHAPE).requires_grad_()
        with context():
            loss = loss_of(h)
        assert not loss.requires_grad
        assert relative(loss, loss_of(h)) <= tolerances.FLOAT32

    def test_functional_gradients(self):
        assert relative(torch.func.grad(loss_of)(H), judge(H, DIRECTIONS)[1]) <= tolerances.FLOAT32
        x = random(3, 2, 20, dtype=torch.float64)
        each = torch.func.vmap(torch.func.grad(loss_of))(torch.stack([x, x + 1]))
        assert relative(each[1], judge(x + 1, DIRECTIONS)[1]) <= tolerances.FLOAT64

        def squared(f: Any) -> Any:
            return lambda x: torch.func.grad(f)(x).square().sum()

        right = torch.func.grad(squared(lambda x: reference.sigreg(x, DIRECTIONS)))(x)
        assert relative(torch.func.grad(squared(loss_of))(x), right) <= tolerances.FLOAT64

    @pytest.mark.parametrize("shape", [SHAPE, (300, 5, 20)])
    @pytest.mark.parametrize("way", ways.WAYS)
    def test_activation_checkpointing(self, shape, way, monkeypatch):
        ways.take(way, monkeypatch)
        leaf = random(*shape).requires_grad_()
        torch.utils.checkpoint.checkpoint(loss_of, leaf, use_reentrant=False).backward()
        assert relative(leaf.grad, judge(leaf, DIRECTIONS)[1]) <= tolerances.FLOAT32

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("way", ways.WAYS)
    def test_half_precision_gradients_are_rounded_once(self, dtype, way, monkeypatch):
        ways.take(way, monkeypatch)
        leaf = random(64, 8, 128).to(dtype).requires_grad_()
        directions = directions_of(128, COUNT)
        scale = 1.0 + 1.9 * torch.finfo(dtype).eps  # in the middle of two numbers
        (scale * sigreg(leaf, directions=directions)).backward()
        right = scale * judge(leaf, directions)[1]
        assert abs((leaf.grad.double() * right).sum() / right.square().sum() - 1) <= 0.02 * torch.finfo(dtype).eps

    def test_nothing_waits_for_the_device(self, monkeypatch):
        """Also with a counter on the device. Tensors without data take the same path as on a GPU."""
        h, module = random(*SHAPE).requires_grad_(), SIGRegLoss(directions=COUNT)
        for way in ways.WAYS:
            ways.take(way, monkeypatch)
            with Recorder() as recorder:
                module(h).backward()
            assert not {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"} & set(recorder.names)
        leaf = torch.empty(SHAPE, device="meta", requires_grad=True)
        module.to("meta")([leaf, leaf]).backward()
        assert leaf.grad.shape == SHAPE


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("name", "operator", "backend"),
        [
            pytest.param("lightly", True, "aot_eager_decomp_partition", marks=NEEDS_OPERATOR),
            ("eb_jepa", False, "aot_eager_decomp_partition"),
            pytest.param("lightly", True, "inductor", marks=[NEEDS_OPERATOR, pytest.mark.slow]),
            pytest.param("lightly", False, "inductor", marks=pytest.mark.slow),
            pytest.param("eb_jepa", False, "inductor", marks=pytest.mark.slow),
        ],
    )
    def test_whole_graph(self, name, operator, backend, monkeypatch):
        """A module that counts its calls, and a sequence."""
        if not operator:
            monkeypatch.setattr(native, "MISSING", "not wanted here")
        results = []
        for compiled in (False, True):
            module = SIGRegLoss(directions=COUNT, **CONVENTIONS[name])
            function = torch.compile(module, fullgraph=True, backend=backend) if compiled else module
            for _ in range(2):
                leaves = [random(*SHAPE).requires_grad_(), random(*SHAPE, seed=1).requires_grad_()]
                loss = function(leaves)
                loss.backward()
                results.append((loss, torch.cat([leaf.grad for leaf in leaves])))
            assert module.step == 2
        for ours, plain in zip(results[2:], results[:2], strict=True):
            assert all(relative(a, b) <= tolerances.COMPILED for a, b in zip(ours, plain, strict=True))

    @pytest.mark.parametrize(
        "operator", [pytest.param(True, marks=NEEDS_OPERATOR), pytest.param(False, marks=pytest.mark.slow)]
    )
    def test_any_batch_size_is_one_graph(self, operator, monkeypatch):
        if not operator:
            monkeypatch.setattr(native, "MISSING", "not wanted here")
        compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
        for i, n in enumerate((6, 8, 11)):
            leaf = random(n, 3, 20).requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                compiled(leaf).backward()
            assert relative(leaf.grad, judge(leaf, DIRECTIONS)[1]) <= tolerances.COMPILED

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_seeds_that_change_are_one_graph(self, backend):
        """Or two: at first the compiler takes a number for a constant. Of numbers it knows those of int64."""
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(
            lambda h, seed: sigreg(h, seed=seed, directions=COUNT), backend=counter, fullgraph=True
        )
        for seed in (0, 5, -3, 2**62):
            assert relative(compiled(H, seed), sigreg(H, seed=seed, directions=COUNT)) <= tolerances.COMPILED
        assert counter.frame_count <= 2
        for seed in (7, 8, 9):
            found = compiled(H, torch.tensor(seed))
            assert relative(found, sigreg(H, seed=seed, directions=COUNT)) <= tolerances.COMPILED
        assert counter.frame_count <= 3

    def test_double_backward_is_refused(self):
        leaf = random(*SHAPE).requires_grad_()
        loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.square().sum(), leaf)

    def test_without_gradients_under_autocast(self):
        h = random(*SHAPE, dtype=torch.bfloat16)
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(compiled(h), loss_of(h)) <= tolerances.COMPILED


@NEEDS_OPERATOR
class TestOperator:
    @pytest.fixture
    def calls(self, monkeypatch) -> list[str]:
        """The operators that were called."""
        found: list[str] = []
        operators = torch.ops.vjvcr

        def recorded(name: str):
            operator = getattr(operators, name)
            return lambda *arguments: found.append(name.removeprefix("sigreg_")) or operator(*arguments)

        names = ("sigreg_cpu", "sigreg_sums_cpu", "sigreg_gradient_cpu")
        monkeypatch.setattr(torch.ops, "vjvcr", SimpleNamespace(**{name: recorded(name) for name in names}))
        return found

    def test_the_gradient_comes_with_the_loss(self, calls):
        h_x, h_y = random(*SHAPE), random(*SHAPE, seed=1).requires_grad_()
        loss = sigreg([h_x, h_y], directions=DIRECTIONS)
        (3 * loss).backward(retain_graph=True)
        assert calls == ["sums_cpu", "cpu"]
        loss.backward()
        assert calls[2:] == ["sums_cpu", "cpu"], "given away once"
        right = judge(torch.cat([h_x, h_y.detach()], dim=1), DIRECTIONS)[1][:, SHAPE[1] :]
        assert relative(h_y.grad, 4 * right) <= tolerances.FLOAT32

    def test_no_gradient_that_nobody_asked_for(self, calls):
        leaf = random(*SHAPE).requires_grad_()
        with torch.no_grad():
            loss_of(leaf)
        loss_of(leaf.detach())
        loss_of(leaf.bfloat16())
        assert calls == ["sums_cpu"] * 3
        half = leaf.detach().bfloat16().requires_grad_()
        sigreg([half, leaf.detach().bfloat16()], directions=DIRECTIONS).backward()
        assert calls[3:] == ["sums_cpu", "sums_cpu", "gradient_cpu"]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("adjacent", [True, False])
    def test_opcheck(self, dtype, adjacent):
        h, directions = random(*SHAPE, dtype=dtype), DIRECTIONS.to(torch.promote_types(dtype, torch.float32))
        h = h if adjacent else h.mT.contiguous().mT
        grid = projections.Settings().grid(h.device)
        operators, options = torch.ops.vjvcr, (h, directions, grid, False)
        if h.dtype == directions.dtype:
            torch.library.opcheck(operators.sigreg_cpu.default, (*options, 0.1))
        torch.library.opcheck(operators.sigreg_sums_cpu.default, options)
        sums = operators.sigreg_sums_cpu(*options)
        torch.library.opcheck(operators.sigreg_gradient_cpu.default, (*options, sums))
        torch.library.opcheck(operators.sigreg_directions_cpu.default, (torch.tensor(3), 5, 7))

    def test_tensors_that_do_not_fit(self):
        operators, grid = torch.ops.vjvcr, projections.Settings().grid(H.device)
        a = DIRECTIONS.float()
        for h, directions, knots in (
            (H[0], a, grid), (H[:0], a, grid), (H.long(), a, grid), (H, a.double(), grid), (H, a.mT, grid),
            (H, a[:, :0], grid), (H, a, grid[:2]), (H, a, grid.float()), (H.half(), a, grid),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="sigreg"):
                operators.sigreg_cpu(h, directions, knots, False, 1.0)
        with pytest.raises(RuntimeError, match="factors must be"):
            operators.sigreg_gradient_cpu(H, a, grid, False, torch.ones(3, 2, 15, 40))
        with pytest.raises(RuntimeError, match="key must be"):
            operators.sigreg_directions_cpu(torch.ones(()), 3, 4)

    @pytest.mark.parametrize("shape", [(160, 5, 100, 300), (300, 1, 40, 1000), (1000, 1, 65, 33), (50, 7, 300, 70)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_threads_change_no_bit(self, shape, dtype):
        """Steps for some threads, the rest shared out within a step."""
        before, results, *shape, count = torch.get_num_threads(), [], *shape
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                leaf = random(*shape, dtype=dtype).requires_grad_()
                loss = sigreg(leaf, directions=count, seed=3)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))

    def test_both_ways_of_the_gradient_agree(self):
        """With the loss, and from the factors of its sums."""
        h, a, settings = random(100, 2, 300), directions_of(300, 290).float(), projections.Settings()
        grid = settings.grid(h.device)
        _, at_once = torch.ops.vjvcr.sigreg_cpu(h, a, grid, False, 0.01)
        factors = projections.coefficients(projections.sums_of(h, a, settings, True), grid, 0.02)
        assert relative(torch.ops.vjvcr.sigreg_gradient_cpu(h, a, grid, False, factors), at_once) <= 1e-6


_MEMORY = """
import sys, torch
from vjvcr_fast.losses import sigreg

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

n, steps, d, dtype, backend = *map(int, sys.argv[1:4]), getattr(torch, sys.argv[4]), sys.argv[5]
small = torch.randn(8, 2, d).to(dtype).requires_grad_()
sigreg(small, seed=0, backend=backend).backward()  # libraries load
h = torch.empty(n, steps, d, dtype=dtype).normal_().requires_grad_()
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark restarts here
before = status("VmRSS")
sigreg(h, seed=1, backend=backend).backward()
directions = 4 * 1024 * d * (3 if backend == "native" else 1)
print((status("VmHWM") - before - directions) / h.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("shape", "dtype", "backend"),
    [
        ((256, 30, 512), "float32", "native"),
        ((256, 60, 512), "bfloat16", "native"),
        pytest.param((8192, 1, 512), "float32", "native", marks=pytest.mark.slow),
        pytest.param((256, 60, 512), "float32", "torch", marks=pytest.mark.slow),
    ],
)
def test_peak_memory(shape, dtype, backend):
    """Measured in a process of its own, beyond h and the directions (which the operator has three times)."""
    if backend == "native" and native.MISSING is not None:
        pytest.skip(native.MISSING)
    arguments = [sys.executable, "-c", _MEMORY, *map(str, shape), dtype, backend]
    root = Path(projections.__file__).parents[2]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert 0.8 <= float(done.stdout) <= 1 + tolerances.SIGREG_MEMORY_COPIES, "the gradient is one copy"
