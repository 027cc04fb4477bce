"""The compiled operators of csrc/, which infer z*. Importing this module loads them, if they were built, as
`torch.ops.vjvcr`.

All tensors are contiguous, on one device, and all float32 or all float64. Tensors that do not fit raise a RuntimeError.
N is the number of samples, m the number of components of z, H the width of the hidden layers.

proximal_step(z, v, gradient, step, momentum, weight, lower, upper) -> ()
    In place, in one pass, on a CPU or a GPU. z, v, gradient: (N, ...); step, momentum: (N,).

        z <- clamp(soft_threshold(v - step gradient, step weight), lower, upper)
        v <- clamp(z + momentum (z - its old value), lower, upper); if weight > 0, zero unless it has the sign of z

    A sample whose step is 0 stays as it is.

fista_mlp(z0, p, w1z, w2, b2, gram, u0, r, start, scale, weight, lower, upper, momentum, backtracking, lr, tolerance,
          steps, bf16) -> (z, energy, step, steps, lost)
    All steps of FISTA for an MLP predictor from z0 (N, m), as the loop in vjvcr_fast/latents/descent.py makes them. The
    other tensors are those of `latents.ExpandedMLPEnergy`; gram is G. A negative momentum stands for FISTA's own. bf16:
    products in bfloat16, on a GPU only. Returns z (N, m) and, (N,) each: energies with the penalty, the last step
    sizes, steps taken (int64), and whether the last trial was not finite (bool). On a GPU it needs compute capability
    9.0 and float32; `plan` says which sizes it serves.

newton_mlp(z0, p, w1z, w2, b2, gram, u0, r, start, B, scale, weight, low, tolerance, steps, sweeps, settled, damped,
           least, most) -> (z, energy, step, steps, lost)
    All steps of `reference.proximal_newton` for an MLP predictor, on a CPU only. B: (m, m), the first one, for all
    samples. Returns the same as fista_mlp; step is 1 / b.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import torch


def _load() -> str | None:
    """Loads the operators. Returns None, or why there are none."""
    found = sorted(Path(__file__).parent.glob("_operators*.so"))
    if not found:
        return "not built: install where torch and a C++ compiler are, with pip's --no-build-isolation"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"built for another torch: {str(error).splitlines()[0]}"
    return None


MISSING = _load()
_HAS_CUDA = False

if MISSING is None:
    _HAS_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("vjvcr::fista_mlp", "CUDA")

    @torch.library.register_fake("vjvcr::proximal_step")
    def _(z, v, gradient, step, momentum, weight, lower, upper):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("vjvcr::newton_mlp")
    @torch.library.register_fake("vjvcr::fista_mlp")
    def _(z0, p, w1z, w2, b2, gram, u0, r, start, *options, **named):  # type: ignore[no-untyped-def]
        steps, lost = (start.new_empty(start.shape, dtype=dtype) for dtype in (torch.int64, torch.bool))
        return torch.empty_like(z0), torch.empty_like(start), torch.empty_like(start), steps, lost


def serves(tensor: torch.Tensor) -> bool:
    """True if there are operators for tensors of this device and dtype. `serves_fista` also looks at their sizes."""
    if MISSING is not None or tensor.dtype not in (torch.float32, torch.float64):
        return False
    if tensor.device.type == "cpu":
        return True
    return tensor.is_cuda and _HAS_CUDA and torch.cuda.get_device_capability(tensor.get_device())[0] in (8, 9)


def serves_fista(z: torch.Tensor, hidden: int, bf16: bool) -> bool:
    """True if `fista_mlp` can infer z (N, m) through hidden layers of this width."""
    if not serves(z) or not z.is_cuda:
        return serves(z)
    if z.dtype != torch.float32 or torch.cuda.get_device_capability(z.get_device())[0] != 9:
        return False
    if torch.compiler.is_compiling():  # the compiler cannot look into `plan`; these sizes always fit
        return hidden <= 1024 and z.shape[1] <= 128
    return bool(_plan(hidden, len(z), z.shape[1], bf16, z.get_device()))


def plan(
    hidden: int, n: int = 256, latent: int = 20, bf16: bool = True, device: int | None = None
) -> dict[str, Any] | None:
    """How `fista_mlp` would be launched on a GPU.

    device: which GPU; None is the current one, or an H100 if there is no GPU.

    Returns cluster (blocks that share `samples` samples), clusters (how many), samples, resident (the fraction of the
    weights that stays in shared memory) and shared_bytes (of a block). Returns {} if it does not serve these sizes or
    this GPU, and None if the build had no pybind11, so that we cannot know.
    """
    try:
        module = importlib.import_module("vjvcr_fast._native")
    except ImportError:
        return None
    multiprocessors, shared = 132, 227 << 10
    if torch.cuda.is_available():
        found: Any = torch.cuda.get_device_properties(device)
        if found.major != 9:
            return {}
        multiprocessors, shared = found.multi_processor_count, found.shared_memory_per_block_optin
    return module.launch_plan(n, hidden, latent, bf16, multiprocessors, shared)


_plan = functools.cache(plan)


def explain_plan() -> str:
    """How fista_mlp would be launched here: a line for `vjvcr-fast info`."""
    here = torch.cuda.is_available()
    if here and (capability := torch.cuda.get_device_capability())[0] != 9:
        return f"not served: this GPU has compute capability {'.'.join(map(str, capability))}, 9.0 is needed"
    words = []
    for hidden in (256, 512, 1024):
        found = plan(hidden)
        if not found:
            return "not served" if found == {} else "not known: pybind11 was not there when the operators were built"
        layout = f"{found['clusters']} clusters of {found['cluster']} blocks, {found['samples']} samples each"
        words.append(f"hidden {hidden}: {layout}, {found['resident']:.0%} of the weights on the chip")
    return f"{'this GPU' if here else 'an H100'}, N = 256, bf16: {'; '.join(words)}"


def explain() -> str:
    """What was built: a line for `vjvcr-fast info`."""
    if MISSING is not None:
        return MISSING
    try:
        architectures = importlib.import_module("vjvcr_fast._native").architectures
    except ImportError:
        return "CPU; what else was built is not known: pybind11 was not there"
    return f"CPU, CUDA for {architectures}" if architectures else "CPU; no nvcc when they were built"
