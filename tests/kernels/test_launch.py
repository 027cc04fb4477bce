"""How kernels are launched, without a GPU: `aot.pretend` takes the driver's place and lists what it is given."""

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from vjvcr_fast.losses import backends, ops, vcr_loss

pytest.importorskip("triton", reason="the kernels need triton: pip install 'vjvcr_fast[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: the interpreter launches nothing", allow_module_level=True)

import aot
from vjvcr_fast.kernels import launch
from vjvcr_fast.kernels.finish import COMBINE, _combine
from vjvcr_fast.kernels.launch import ALIGNED, Kernel, workspace
from vjvcr_fast.kernels.moments import MOMENTS, _moments


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was launched on a GPU that is not there, where nothing was launched before."""
    monkeypatch.setattr(aot.driver, "_active", None)
    aot.pretend()
    for kernel in (_moments, _combine):
        monkeypatch.setattr(kernel, "_binaries", {})
    yield aot.driver.active.launched
    for kernel in (_moments, _combine):  # Triton 3.9 unloads them by the driver that is active then
        kernel.jit.device_caches.pop(aot.driver.active.at.arch, None)


def of_moments(h: Tensor, n: int = 40, d: int = 33, **other: int) -> dict[str, Any]:
    """Arguments of `_moments`, as a launcher would give them."""
    means, squares = torch.empty(2, 640).unbind()
    sizes = {"stride_n": 3 * d, "stride_t": d, "n": n, "steps": 3, "d": d, "rows": 64}
    return {"h": h, "part_means": means, "part_squares": squares, **(sizes | other)}


MEMORY = torch.empty(4096)
VARIANTS = {
    "as ever": lambda: of_moments(MEMORY),
    "another batch size": lambda: of_moments(MEMORY, n=41),
    "a multiple of 16": lambda: of_moments(MEMORY, d=48),
    "one feature": lambda: of_moments(MEMORY, d=1),
    "half precision": lambda: of_moments(MEMORY.bfloat16()),
    "not aligned": lambda: of_moments(MEMORY[1:]),
    "far apart": lambda: of_moments(MEMORY, stride_n=1 << 40),
}


def test_the_same_as_triton(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variant gets the binary and the arguments that Triton's own launch gives it, the first time and again."""
    find, sought = Kernel._find, []
    monkeypatch.setattr(Kernel, "_find", lambda *given: sought.append(given) or find(*given))
    functions = {}
    for name in [*VARIANTS, *reversed(VARIANTS)]:
        arguments = VARIANTS[name]()
        _moments.launch(MOMENTS, 7, **arguments)
        options = {"num_warps": MOMENTS.warps, "num_stages": MOMENTS.stages}
        _moments.jit[(7,)](**arguments, **MOMENTS.tiles, **options)
        ours, tritons = launched[-2:]
        theirs = [value.data_ptr() if isinstance(value, Tensor) else value for value in tritons]
        assert [*ours[:6], *ours[9:]] == [*theirs[:6], *theirs[9:]], f"{name}: between are hooks of profilers"
        assert functions.setdefault(name, ours[4]) == ours[4]
    assert len(sought) == len(VARIANTS), "once each"
    assert functions["as ever"] == functions["another batch size"]
    assert len(set(functions.values())) == len(VARIANTS) - 1


def test_floats_are_not_compiled_in(launched: list[Any]) -> None:
    for alpha in (1.0, 16.0, 0.3):
        tensors = {name: torch.empty(1) for name in ("loss", "variance_term", "covariance_term", "hinges", "norms")}
        numbers = {"hinge_count": 1, "norm_count": 1, "alpha": alpha, "beta": 1.0, "scale": 1.0, "square_scale": 1.0}
        _combine.launch(COMBINE, 1, **tensors, **numbers)
        assert alpha in launched[-1]
    assert len(_combine._binaries) == 1


def test_sizes_that_always_differ_are_forgotten(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_KEYS", 3)
    for n in range(40, 50):
        _moments.launch(MOMENTS, 1, **of_moments(MEMORY, n=n))
        assert len(_moments._binaries) <= 3
    assert len({given[4] for given in launched}) == 1


class TestCapture:
    """While a CUDA graph is captured nothing can be loaded."""

    @pytest.fixture
    def capturing(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    @pytest.mark.usefixtures("capturing")
    def test_what_is_not_loaded_says_so(self, launched: list[Any]) -> None:
        with pytest.raises(RuntimeError, match=r"kernel _moments for .*n=40, .*d=33, .*is captured: call the loss"):
            _moments.launch(MOMENTS, 1, **of_moments(MEMORY))
        assert launched == []
        assert _moments._binaries == {}

    def test_what_is_loaded_runs(self, launched: list[Any], request: pytest.FixtureRequest) -> None:
        _moments.launch(MOMENTS, 1, **of_moments(MEMORY))
        request.getfixturevalue("capturing")
        for n in (40, 41):  # the second has the binary of the first
            _moments.launch(MOMENTS, 1, **of_moments(MEMORY, n=n))
        assert len(launched) == 3
        with pytest.raises(RuntimeError, match="d=48"):
            _moments.launch(MOMENTS, 1, **of_moments(MEMORY, d=48))


def test_a_workspace_is_one_allocation() -> None:
    sizes = [1, 32, 33, 0, 100]
    buffers = workspace(torch.device("cpu"), *sizes)
    assert [buffer.numel() for buffer in buffers] == sizes
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 1
    ends = [(buffer.storage_offset(), buffer.storage_offset() + buffer.numel()) for buffer in buffers]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert all(start % ALIGNED == 0 for start, _ in ends)


def test_a_step_makes_few_launches_and_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loss and its gradient: two workspaces, product and moments for backward, three scalars, the gradient."""
    monkeypatch.setattr(backends, "against_triton", lambda device, dtype: None)
    made = []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *given, make=make, **how: made.append(make(*given, **how)) or made[-1])
    for shape, first in (((256, 15, 512), "_tiles"), ((160, 100, 2048), "_whole"), ((4096, 1, 64), "_covariance")):
        h = torch.zeros(shape, device="meta", requires_grad=True)
        made.clear()
        with aot.recording(90) as launches:
            vcr_loss(h, alpha=25.0, beta=1.0, backend="triton").loss.backward()
        assert [one.kernel.__name__ for one in launches] == [first, "_finish", "_combine", "_gradient"]
        assert len(made) == 8
        assert h.grad.shape == shape


def test_the_device_is_changed_only_if_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice(Tensor):
        is_cuda, device = True, torch.device("cuda", 1)

        def get_device(self) -> int:
            return 1

    h = torch.empty(1).as_subclass(OnDevice)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert isinstance(ops._device_of(h), torch.cuda.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert not isinstance(ops._device_of(h), torch.cuda.device)
    assert not isinstance(ops._device_of(torch.empty(1)), torch.cuda.device)
