"""The compiled operators (csrc/): loaded once, on import, where they were built; `torch.ops.vjvcr` has them.

All take contiguous tensors, all float32 or all float64, on one device, and raise RuntimeError for those that do not
fit. vjvcr_fast/latents/descent.py tells what the names stand for; its loop in plain torch is their specification.

proximal_step(z, v, gradient, step, momentum, weight, lower, upper) -> (): in place, in one pass, for z, v, gradient
(N, ...) and step, momentum (N,),

    z <- clamp(soft_threshold(v - step gradient, step weight), lower, upper)
    v <- clamp(z + momentum (z - its old value), lower, upper), with weight > 0 zero where that has not z's sign.

A sample whose step is zero is left as it is.

fista_mlp(z0, p, w1z, w2, b2, gram, u0, r, start, scale, weight, lower, upper, momentum, backtracking, lr, tolerance,
steps, bf16) -> (z, energy, step, steps, lost): all steps of the inference for an MLP predictor, about z0 (N, m), from
`latents.ExpandedMLPEnergy` (gram is G). momentum: negative for FISTA's own. bf16: on a GPU, products of bfloat16
operands. Returns z (N, m), energies with the penalty, last step sizes, steps taken (int64) and whether the last trial
was not finite (bool), (N,) each. On a GPU
float32 alone, in the sizes that `plan` serves, one launch for all steps.

discrete_argmin(u, w3, b3, target) -> (energies, index): the mean over M of (W3_k u + b3_k - target)^2, (N, k), and the
first least of those that are not NaN or infinite, (N,) int64, 0 without any; for u (N, H), w3 (k, M, H), b3 (k, M),
target (N, M). No prediction is held as a whole.

newton_trial(v, gradient, B, damping, active, weight, low, sweeps, settled) -> (): v, z at first, becomes the trial
`newton.trial` of the samples that are active. newton_update(*newton.State, v, value, gradient_v, weight, tolerance,
damped, least, most) -> (): `newton.update`, in place. newton_mlp(z0, p, w1z, w2, b2, gram, u0, r, start, B, scale,
weight, low, tolerance, steps, sweeps, settled, damped, least, most) -> (z, energy, damping, steps, lost): all steps for
an MLP predictor, as `fista_mlp`, from the first B (m, m) of all samples. All three on a CPU alone.
"""

import functools
import importlib
from pathlib import Path
from typing import Any

import torch


def _load() -> str | None:
    """Why there are no operators; None where there are."""
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
    def _(z0, p, w1z, w2, b2, gram, u0, r, start, *options):  # type: ignore[no-untyped-def]
        steps, lost = (start.new_empty(start.shape, dtype=dtype) for dtype in (torch.int64, torch.bool))
        return torch.empty_like(z0), torch.empty_like(start), torch.empty_like(start), steps, lost

    @torch.library.register_fake("vjvcr::newton_trial")
    def _(v, gradient, B, damping, active, weight, low, sweeps, settled):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("vjvcr::newton_update")
    def _(*tensors_and_options):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("vjvcr::discrete_argmin")
    def _(u, w3, b3, target):  # type: ignore[no-untyped-def]
        return u.new_empty(len(u), len(w3)), u.new_empty(len(u), dtype=torch.int64)


def serves(tensor: torch.Tensor) -> bool:
    """Whether there are operators for tensors of its device and dtype."""
    if MISSING is not None or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return tensor.device.type == "cpu" or (tensor.is_cuda and _HAS_CUDA)


def plan(
    hidden: int, n: int = 256, latent: int = 20, bf16: bool = True, device: int | None = None
) -> dict[str, Any] | None:
    """How `fista_mlp` would be launched on that GPU, the current one by default, or on an H100 where there is none.

    cluster: blocks that share `samples` samples; clusters: how many; resident: the part of the weights that stays in
    shared memory; shared_bytes: of a block. Empty where it does not serve, None where pybind11 was not there.
    """
    try:
        module = importlib.import_module("vjvcr_fast._native")
    except ImportError:
        return None
    architecture, multiprocessors, shared = 90, 132, 227 << 10
    if torch.cuda.is_available():
        found: Any = torch.cuda.get_device_properties(device)
        architecture, multiprocessors = {8: 80, 9: 90}.get(found.major, 0), found.multi_processor_count
        shared = found.shared_memory_per_block_optin
    return module.launch_plan(n, hidden, latent, bf16, architecture, multiprocessors, shared)


def planned(hidden: int, n: int, latent: int, bf16: bool, device: int) -> bool:
    """Whether `fista_mlp` serves these sizes on that GPU."""
    if torch.compiler.is_compiling():  # which cannot look into `plan`: what has room in any of compute capability 9.0
        return torch.cuda.get_device_capability(device)[0] == 9 and hidden <= 1024 and latent <= 128
    return bool(_plan(hidden, n, latent, bf16, device))


_plan = functools.cache(plan)


def explain_plan() -> str:
    """One line for `vjvcr-fast info`."""
    words = []
    for hidden in (256, 512, 1024):
        found = plan(hidden)
        if not found:
            return "not served" if found == {} else "not known: pybind11 was not there when the operators were built"
        layout = f"{found['clusters']} clusters of {found['cluster']} blocks, {found['samples']} samples each"
        words.append(f"hidden {hidden}: {layout}, {found['resident']:.0%} of the weights on the chip")
    return f"{'this GPU' if torch.cuda.is_available() else 'an H100'}, N = 256, bf16: {'; '.join(words)}"


def explain() -> str:
    """What was built, for `vjvcr-fast info`."""
    if MISSING is not None:
        return MISSING
    try:
        architectures = importlib.import_module("vjvcr_fast._native").architectures
    except ImportError:
        return "CPU; what else was built is not known: pybind11 was not there"
    return f"CPU, CUDA for {architectures}" if architectures else "CPU; no nvcc when they were built"
