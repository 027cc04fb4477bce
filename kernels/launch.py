"""How kernels are launched: configurations with their occupancy plan, autotuning, precision, the device's size.

Which configuration is fastest depends on the shape, so most kernels have two or three: triton.autotune times them on
the first call of a shape class and keeps its choice, on disk too. Different ones add in different orders: under
torch.use_deterministic_algorithms the first is taken untimed, so that every process rounds alike. So it is where a
CUDA graph is captured, which cannot be timed: a pass before the capture makes the choice.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# How the operands of products are rounded: to bfloat16, to TF32, or split into two TF32 numbers each whose three
# larger products are added, which keeps float32's accuracy.
Mode = Literal["bf16", "tf32", "tf32x3"]

# Tensor cores truncate their sums, so a long sum is biased towards zero (Ootomo and Yokota 2022, arXiv 2203.03341).
# Products of split operands add no more than this many numbers there; what comes of it is added with rounding.
SUMMED = 512

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Config(NamedTuple):
    """Tile sizes by their names in the kernel, warps of 32 threads, pipeline stages.

    blocks: the plan how many thread blocks share a multiprocessor, which ahead-of-time compilation checks. archs: the
    architectures it is for. aligned: it is only for rows that are multiples of 16 long: the addresses of others, which
    are read one number at a time, would not fit the registers beside such a tile.
    """

    tiles: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 3
    blocks: int = 2
    archs: tuple[int, ...] = (80, 90)
    aligned: bool = False


def config(
    warps: int, stages: int, blocks: int, archs: tuple[int, ...] = (80, 90), aligned: bool = False, **tiles: int
) -> Config:
    return Config(tuple(tiles.items()), warps, stages, blocks, archs, aligned)


def mode_of(h: Tensor) -> Mode:
    """bfloat16 stays what it is; float16 has as many digits as TF32 and less range; float32 follows torch's setting
    for matrix products on CUDA ("highest" and unset: full accuracy)."""
    if h.dtype == torch.bfloat16:
        # The interpreter cannot compute in bfloat16.
        return "tf32" if INTERPRETED else "bf16"
    return "tf32" if h.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def operand_dtype(mode: Mode) -> torch.dtype:
    """Of matrices that are stored to be multiplied."""
    return torch.bfloat16 if mode == "bf16" else torch.float32


def precision(mode: Mode) -> dict[str, object]:
    """A kernel's constants for it: DTYPE of the operands, PRECISION of float32 ones."""
    return {"DTYPE": tl.bfloat16, "PRECISION": "tf32"} if mode == "bf16" else {"DTYPE": tl.float32, "PRECISION": mode}


def entry(function: Callable[..., None]) -> Any:
    """triton.jit for a kernel: a size on which no address's alignment depends is not compiled in, so that another batch
    or clip length runs the same binary."""
    return triton.jit(function, do_not_specialize=("n", "steps", "parts", "rows", "SHAPE"))


def shape_class(*sizes: int) -> int:
    """One number for all shapes whose sizes have the same binary logarithms: autotuning's key."""
    return functools.reduce(lambda key, size: 32 * key + max(size - 1, 0).bit_length(), sizes, 0)


class Launch(NamedTuple):
    """A launch that was recorded rather than made."""

    kernel: Any
    configs: tuple[Config, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


class _Recording(NamedTuple):
    launches: list[Launch]
    arch: int


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it launchers launch nothing and their launches are listed: what to compile ahead of time for GPUs of that
    architecture. Tensors may be on the meta device."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(launches, arch))
    try:
        yield launches
    finally:
        _recording.reset(token)


def launch(
    kernel: Any, configs: Sequence[Config], programs: Callable[[dict[str, Any]], int], *args: Any, **constants: Any
) -> None:
    """kernel[programs(tile sizes),](*args, **constants) in the fastest of `configs`. With several, the kernel
    takes the shape class as SHAPE."""
    configs = fitting(configs, args[0])
    recorded = _recording.get()
    if recorded is not None:
        recorded.launches.append(Launch(kernel, configs, args, constants))
        return
    chosen = configs[0]
    if len(configs) > 1 and not INTERPRETED and not torch.are_deterministic_algorithms_enabled():
        chosen = _fastest(kernel, configs, programs, args, constants)
    meta = dict(chosen.tiles) | constants
    kernel[(programs(meta),)](*args, **meta, num_warps=chosen.warps, num_stages=chosen.stages)


_choices: dict[tuple[Any, ...], Config] = {}
_tuning = threading.Lock()  # triton's autotuner keeps what it is timing in itself


def _fastest(
    kernel: Any,
    configs: tuple[Config, ...],
    programs: Callable[[dict[str, Any]], int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> Config:
    """Timed on these arguments the first time, which computes what a launch does; then as it was."""
    tensors = tuple(a.dtype for a in args if isinstance(a, Tensor))
    key = (kernel, configs, args[0].device, tensors, *constants.items())
    if key not in _choices:
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        with _tuning:
            # DTYPE, which no file can hold, follows from the tensors' dtypes.
            tuner = _autotuned(kernel, configs, tuple(k for k, v in constants.items() if isinstance(v, int | str)))
            tuner[lambda meta: (programs(meta),)](*args, **constants)
            best = tuner.best_config
            _choices[key] = next(
                c
                for c in configs
                if (dict(c.tiles), c.warps, c.stages) == (best.kwargs, best.num_warps, best.num_stages)
            )
    return _choices[key]


@functools.cache
def _autotuned(kernel: Any, configs: tuple[Config, ...], names: tuple[str, ...]) -> Any:
    """names: of the constants, whose values a choice is made for."""
    choices = [triton.Config(dict(c.tiles), num_warps=c.warps, num_stages=c.stages) for c in configs]
    return triton.autotune(choices, key=list(names), cache_results=True)(kernel)


def fitting(configs: Sequence[Config], tensor: Tensor) -> tuple[Config, ...]:
    """Those for the tensor's rows and device. Newer architectures take what the newest listed one does, but 120, which
    has no more shared memory than 86."""
    arch = 90 if 90 <= architecture(tensor.device) < 120 else 80
    aligned = tensor.ndim > 0 and tensor.shape[-1] % 16 == 0
    return tuple(c for c in configs if arch in c.archs and (aligned or not c.aligned))


def architecture(device: torch.device) -> int:
    """80, 90, ...; 90 where there is no GPU."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded.arch
    return _capability(device) if device.type == "cuda" else 90


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 under the interpreter, that small shapes are cut into parts there too; else those of an H100."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if INTERPRETED else 132


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Of the L2 cache; 32 KiB under the interpreter, that small shapes are cut into blocks there too."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 1 << 15 if INTERPRETED else 50 << 20


def enough_parts(programs: int, length: int, least: int, device: torch.device, blocks: int, cost: float) -> int:
    """Into how many parts to cut a sum of `length`, none shorter than `least`, each of `programs` programs of which
    `blocks` share a multiprocessor: programs that fill the last wave, against what a part costs.

    cost: of a part, which is written and read once more, over that of all that is read: bytes by bytes, halved, since
    parts stay in the cache.
    """
    return _enough_parts(programs, triton.cdiv(length, least), blocks * multiprocessors(device), cost)


@functools.cache
def _enough_parts(programs: int, most: int, slots: int, cost: float) -> int:
    most = min(most, triton.cdiv(4 * slots, programs))  # four waves: the last one's emptiness costs little
    return min(
        range(1, most + 1),
        key=lambda parts: triton.cdiv(programs * parts, slots) * slots / (programs * parts) + cost * parts,
    )
