"""How kernels are launched: tile sizes, the precision of products, and how a long sum is split.

Every kernel has one configuration per precision and tile size. It follows from the shape alone: nothing is timed, so
the first call is as fast as the kernel compiles, and every process adds in the same order.
"""

import functools
from collections.abc import Callable
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

    blocks: how many thread blocks are meant to share a multiprocessor. tests/kernels/test_aot.py checks it.
    """

    warps: int
    stages: int
    blocks: int
    tiles: dict[str, int]


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


def entry(function: Callable[..., None]) -> Any:
    """triton.jit for a kernel. Sizes that no address's alignment depends on are not compiled in, so that another batch
    size or clip length runs the same binary."""
    counts = "n", "steps", "parts", "sample_parts", "rows", "size", "hinge_count", "norm_count"
    return triton.jit(function, do_not_specialize=counts)


def launch(kernel: Any, config: Config, programs: int, **arguments: Any) -> None:
    """Starts `programs` programs of the kernel, with the configuration's tile sizes beside the arguments."""
    kernel[(programs,)](**arguments, **config.tiles, num_warps=config.warps, num_stages=config.stages)


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
    most = min(triton.cdiv(length, least), triton.cdiv(4 * slots, programs))
    parts = min(
        range(1, most + 1),
        key=lambda parts: triton.cdiv(programs * parts, slots) * slots / (programs * parts) + cost * parts,
    )
    size = unit * triton.cdiv(length, unit * parts)
    return size, triton.cdiv(length, size)
