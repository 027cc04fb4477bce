"""Which backend is chosen for which tensor. The machines are simulated: GPUs, an AMD build, no Triton, no operators."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vjvcr_fast import native
from vjvcr_fast.losses import VCRLoss, backends, covariance_penalty, variance_hinge, vcr_loss

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch) -> None:
    """A machine with Triton, the compiled operators and an H100."""
    monkeypatch.setattr(native, "MISSING", None)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(backends, "_INSTALLED", True)
    monkeypatch.setattr(backends, "_INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def without_operators(monkeypatch) -> None:
    monkeypatch.setattr(native, "MISSING", "not built: no compiler")


def without_triton(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_INSTALLED", False)


def old_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


def amd(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


def interpreter(monkeypatch) -> None:
    monkeypatch.setattr(backends, "_INTERPRETED", True)


OBSTACLES = [
    (without_triton, r"triton is not installed \(pip install 'vjvcr_fast\[triton\]'\)"),
    (old_gpu, r"cuda:0 is older than compute capability 8\.0"),
    (amd, r"built for AMD GPUs"),
    (interpreter, r"TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors"),
]


def tensor(device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A stand-in for a tensor on a device that may not be there, with what `resolve` reads."""
    return SimpleNamespace(device=device, dtype=dtype, is_cuda=device.type == "cuda")  # type: ignore[return-value]


class TestResolve:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_a_gpu_takes_the_kernels(self, dtype):
        assert backends.against_triton(CUDA, dtype) is None
        assert backends.resolve("auto", tensor(CUDA, dtype)) == "triton"
        assert backends.resolve("triton", tensor(CUDA, dtype)) == "triton"

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
    def test_from_compute_capability_8_on(self, capability, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert backends.resolve("auto", tensor(CUDA)) == "triton"

    @pytest.mark.parametrize(("obstacle", "message"), OBSTACLES)
    def test_where_it_cannot_auto_falls_back_and_triton_says_why(self, obstacle, message, monkeypatch):
        obstacle(monkeypatch)
        assert backends.resolve("auto", tensor(CUDA)) == "torch"
        with pytest.raises(ValueError, match=f"backend='triton': .*{message}"):
            backends.resolve("triton", tensor(CUDA))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_a_cpu_takes_the_operator(self, dtype):
        assert backends.resolve("auto", tensor(CPU, dtype)) == "native"
        assert backends.resolve("native", tensor(CPU, dtype)) == "native"

    def test_without_operators(self, monkeypatch):
        without_operators(monkeypatch)
        assert backends.resolve("auto", tensor(CPU)) == "torch"
        with pytest.raises(ValueError, match=r"^backend='native': the operators are not built: no compiler$"):
            backends.resolve("native", tensor(CPU))

    def test_transforms_take_plain_operations(self):
        chosen = []
        torch.func.vmap(lambda h: chosen.append(backends.resolve("auto", tensor(CPU))) or h)(torch.ones(2, 3))
        assert chosen == ["torch"]

    @pytest.mark.parametrize("device", ["cuda", "mps", "meta"])
    def test_the_operator_is_for_cpus(self, device):
        with pytest.raises(ValueError, match=rf"backend='native': h is on {device}: a CPU tensor is needed"):
            backends.resolve("native", tensor(torch.device(device)))

    @pytest.mark.parametrize(("device", "chosen"), [(CPU, "native"), (CUDA, "torch")])
    def test_float64(self, device, chosen):
        assert backends.resolve("auto", tensor(device, torch.float64)) == chosen
        with pytest.raises(ValueError, match=r"backend='triton': h is float64"):
            backends.resolve("triton", tensor(device, torch.float64))

    @pytest.mark.parametrize(("device", "chosen"), [("cpu", "native"), ("mps", "torch"), ("meta", "torch")])
    def test_other_devices(self, device, chosen):
        h = tensor(torch.device(device))
        assert backends.resolve("auto", h) == chosen
        with pytest.raises(ValueError, match=rf"h is on {device}: a CUDA tensor is needed \(TRITON_INTERPRET=1 "):
            backends.resolve("triton", h)

    def test_the_interpreter_is_never_chosen(self, monkeypatch):
        """The interpreter is for tests and is slower than plain operations."""
        interpreter(monkeypatch)
        assert backends.resolve("auto", tensor(CPU)) == "native"
        assert backends.resolve("triton", tensor(CPU)) == "triton"
        with pytest.raises(ValueError, match="float64"):
            backends.resolve("triton", tensor(CPU, torch.float64))

    @pytest.mark.parametrize("backend", ["torch", "reference"])
    @pytest.mark.parametrize("device", [CPU, CUDA])
    def test_a_name_is_an_order(self, backend, device):
        assert backends.resolve(backend, tensor(device)) == backend

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"backend='cuda': choose one of auto, native, torch, triton, reference"):
            backends.resolve("cuda", tensor(CUDA))


class TestLosses:
    """On CPU tensors."""

    @pytest.mark.parametrize(
        "function",
        [
            lambda h: vcr_loss(h, alpha=1.0, beta=1.0, backend="triton"),
            lambda h: VCRLoss(1.0, 1.0, backend="triton")(h),
            lambda h: variance_hinge(h, backend="triton"),
            lambda h: covariance_penalty(h, backend="triton"),
        ],
    )
    def test_triton_raises_where_it_cannot_serve(self, function):
        with pytest.raises(ValueError, match=r"backend='triton': h is on cpu"):
            function(torch.randn(4, 3))
        with pytest.raises(ValueError, match=r"backend='triton': h is float64"):
            function(torch.randn(4, 3, dtype=torch.float64))

    def test_auto_on_a_cpu(self, monkeypatch):
        interpreter(monkeypatch)
        h, chosen = torch.randn(4, 3), "native"
        if not hasattr(torch.ops.vjvcr, "vcr_cpu"):
            without_operators(monkeypatch)
            chosen = "torch"
        terms = [vcr_loss(h, alpha=1.0, beta=1.0, backend=backend) for backend in ("auto", chosen)]
        assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))


class TestExplain:
    def test_a_gpu(self, monkeypatch):
        cpu, cuda = "native (a compiled operator, for avx2)", "triton (fused kernels)"
        assert backends.explain() == {"cpu": cpu, "cuda": cuda}
        without_operators(monkeypatch)
        cpu = "torch (plain torch operations): the operators are not built: no compiler"
        assert backends.explain() == {"cpu": cpu, "cuda": cuda}

    @pytest.mark.parametrize(("obstacle", "message"), OBSTACLES)
    def test_why_not(self, obstacle, message, monkeypatch):
        obstacle(monkeypatch)
        assert re.match(rf"torch \(plain torch operations\): .*{message}", backends.explain()["cuda"])

    @pytest.mark.parametrize(("cuda", "message"), [(None, "this torch has no CUDA"), ("13.0", "none visible")])
    def test_no_gpu(self, cuda, message, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert backends.explain()["cuda"] == f"no CUDA device ({message})"
