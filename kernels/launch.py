"""How kernels are launched: tile sizes, the precision of products, how a long sum is split, and at what cost for the
host.

Every kernel has one configuration per precision and tile size. It follows from the shape alone: nothing is timed, so
the first call is as fast as the kernel compiles, and every process adds in the same order.
"""

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# How the operands of a product are rounded: to bfloat16, to TF32, or split into two TF32 numbers each. In the split
# mode the three larger of the four products are added, which keeps float32's accuracy.
Mode = Literal["bf16", "tf32", "tf32x3"]

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Config(NamedTuple):
    """How a kernel is compiled: warps of 32 threads, pipeline stages, and tile sizes by their names in the kernel.

    blocks: how many thread blocks a multiprocessor holds; `split` plans with them, and tests/kernels/test_aot.py
        compares them with what the compiler leaves room for.
    unaligned: the same for a d that is no multiple of 16, whose addresses take more registers; None: as many.
    """

    warps: int
    stages: int
    blocks: int
    tiles: dict[str, int]
    unaligned: int | None = None

    def planned(self, d: int) -> int:
        """The blocks of a multiprocessor for d features."""
        return self.blocks if d % 16 == 0 or self.unaligned is None else self.unaligned


def mode_of(h: Tensor) -> Mode:
    """How products of h are rounded. bfloat16 stays bfloat16. float16 becomes TF32, which has as many digits and more
    range. float32 follows torch's setting for matrix products on CUDA: full accuracy unless TF32 is allowed."""
    if h.dtype == torch.bfloat16:
        # The interpreter cannot compute in bfloat16.
        return "tf32" if INTERPRETED else "bf16"
    return "tf32" if h.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def operand_dtype(mode: Mode) -> torch.dtype:
    """The dtype of a matrix that is stored to be multiplied."""
    return torch.bfloat16 if mode == "bf16" else torch.float32


def precision(mode: Mode) -> dict[str, object]:
    """A kernel's constants for the mode: DTYPE of the operands, PRECISION of float32 operands."""
    return {"DTYPE": tl.bfloat16, "PRECISION": "tf32"} if mode == "bf16" else {"DTYPE": tl.float32, "PRECISION": mode}


def sizes(h: Tensor) -> dict[str, int]:
    """A kernel's arguments for the shape and the strides of h (N, T, d), whose features lie side by side."""
    n, steps, d = h.shape
    return {"stride_n": h.stride(0), "stride_t": h.stride(1), "n": n, "steps": steps, "d": d}


# Sizes that no address's alignment depends on. They are not compiled in, so that another batch size or clip length runs
# the same binary.
COUNTS = ["n", "steps", "parts", "sample_parts", "rows", "size", "hinge_count", "norm_count"]
ALIGNED = 32  # float32 numbers: buffers begin at multiples of a cache line, 128 bytes
MOST_KEYS = 4096  # of a kernel, which then forgets them all: lengths that always differ would pile up


class Kernel:
    """triton.jit for a kernel that the host launches. It finds the binary for given arguments by their values.

    Triton's own launch describes each argument and looks the descriptions up, which takes more than twice the time.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.jit = triton.jit(function, do_not_specialize=COUNTS)
        self._binaries: dict[tuple[object, ...], Any] = {}
        self._order: _Order | None = None

    def launch(self, config: Config, programs: int, **arguments: Any) -> None:
        """Starts `programs` programs, with the configuration's tile sizes beside the arguments, on the device of the
        tensors among them. It must be the current one.

        Raises RuntimeError while a CUDA graph is captured, if the binary is not loaded yet.
        """
        arguments |= config.tiles
        if INTERPRETED:
            self.jit[(programs,)](**arguments)
            return
        if self._order is None:
            self._order = _Order.of(self.jit.arg_names, arguments)
        tensors, numbers = self._order.tensors(arguments), self._order.numbers(arguments)
        # The driver looks up whose memory a tensor is, but takes a number as it is.
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        # All that Triton compiles for, and more: it rounds sizes to "1", "a multiple of 16" or "another".
        key = (
            config.warps, config.stages, tensors[0].get_device(), numbers,
            *[None if tensor is None else tensor.dtype for tensor in tensors],
            *[None if address is None else address % 16 for address in addresses],
        )  # fmt: skip
        binary = self._binaries.get(key)
        if binary is None:
            binary = self._find(config, programs, arguments)
            if len(self._binaries) >= MOST_KEYS:
                self._binaries.clear()
            self._binaries[key] = binary
        binary[programs, 1, 1](*addresses, *self._order.others(arguments))

    def _find(self, config: Config, programs: int, arguments: dict[str, Any]) -> Any:
        """What Triton would launch; compiled if need be, but not loaded."""
        options = {"num_warps": config.warps, "num_stages": config.stages}
        binary = self.jit.warmup(**arguments, **options, grid=(programs,))
        if binary.module is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            sizes = ", ".join(f"{name}={value}" for name, value in arguments.items() if type(value) is int)
            raise RuntimeError(
                f"the kernel {self.jit.__name__} for {sizes} is not loaded, and nothing can be loaded while a CUDA "
                "graph is captured: call the loss and its backward once before, with the same dtype, sizes and strides"
            )
        return binary


class _Order(NamedTuple):
    """Functions that pick from a kernel's arguments, in its order: the tensors, which come first and may be None; the
    others; and of these what is no float, since floats are never compiled in."""

    tensors: Callable[[dict[str, Any]], tuple[Any, ...]]
    others: Callable[[dict[str, Any]], tuple[Any, ...]]
    numbers: Callable[[dict[str, Any]], tuple[Any, ...]]

    @classmethod
    def of(cls, names: list[str], arguments: dict[str, Any]) -> "_Order":
        first = next(i for i, name in enumerate(names) if isinstance(arguments[name], int | float))
        assert not any(isinstance(arguments[name], Tensor) for name in names[first:]), "tensors come first"
        numbers = [name for name in names[first:] if not isinstance(arguments[name], float)]
        return cls(itemgetter(*names[:first]), itemgetter(*names[first:]), itemgetter(*numbers))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv takes microseconds on the host."""
    return -(-a // b)


def workspace(device: torch.device, *sizes: int) -> Sequence[Tensor]:
    """An empty flat float32 tensor of each size, all in one allocation, since each takes the host some microseconds."""
    pieces = [piece for size in sizes for piece in (size, -size % ALIGNED)]
    return torch.empty(sum(pieces), dtype=torch.float32, device=device).split_with_sizes(pieces)[::2]


@functools.cache
def architecture(device: torch.device) -> int:
    """The GPU's compute capability as a number: 80, 90, ...; 90 where there is no GPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU. Under the interpreter 4, so that small shapes are split there too; else those of an H100."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if INTERPRETED else 132


@functools.lru_cache(maxsize=1024)
def split(
    device: torch.device, blocks: int, programs: int, length: int, least: int, cost: float, unit: int = 1
) -> tuple[int, int]:
    """How to split a sum of `length` terms among programs that run at once: (terms in a part, parts).

    Each part is summed by `programs` programs, `blocks` of which share a multiprocessor. More parts fill the last wave
    of programs better, but each costs memory traffic. A part has at least `least` terms and a multiple of `unit`.

    cost: the bytes that one part writes and reads again, over those of the whole input, halved, since parts stay in
        the cache.
    """
    slots = blocks * _multiprocessors(device)
    # Four waves at most: the emptiness of the last one then costs little.
    most = min(ceil_div(length, least), ceil_div(4 * slots, programs))
    parts = min(
        range(1, most + 1),
        key=lambda parts: ceil_div(programs * parts, slots) * slots / (programs * parts) + cost * parts,
    )
    size = unit * ceil_div(length, unit * parts)
    return size, ceil_div(length, size)
