"""The compiled operators of csrc/, which infer z* and, on a CPU, compute the VCR loss. Importing this module loads
them, if they were built, as `torch.ops.vjvcr`.

All tensors are contiguous, on one device, and all float32 or all float64. Only the losses, VCR and SIGReg, take any
strides and, besides, float16 and bfloat16. Tensors that do not fit raise a RuntimeError.
N is the number of samples, m the number of components of z, H the width of the hidden layers.
On a CPU the environment variable VJVCR_CPU chooses an instruction set, baseline, avx2 or avx512, for the losses,
fista_mlp and newton_mlp.

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
    sizes, steps taken (int64), and whether the last trial was not finite (bool). On a CPU a sample's results do not
    depend, to the bit, on the other samples nor on the number of threads. On a GPU it needs compute capability 9.0 and
    float32; `plan` says which sizes it serves.

vcr_cpu(hs, alpha, beta, threshold, eps, gram, variance, covariance, made) -> (loss, variance, covariance, gradients)
vcr_cpu_backward(hs, g_loss, g_variance, g_covariance, alpha, ..., covariance, made) -> gradients
    The VCR loss of (N, T, d) tensors on a CPU, of any dtype and strides, and the gradients of the loss, or of its three
    terms for the incoming gradients, of the tensors that are `made`. The others' are empty. alpha, ..., covariance: see
    `losses.analytic.Settings`.

sigreg_cpu(h, directions, grid, half, scale) -> (loss, gradient)
sigreg_sums_cpu(h, directions, grid, half) -> sums
sigreg_gradient_cpu(h, directions, grid, half, factors) -> gradient
sigreg_directions_cpu(key, d, count) -> directions
    SIGReg of one (N, T, d) tensor on a CPU, of any dtype and strides: `losses.projections` says what the sums and the
    factors are, (T, 2, J, K) each. directions: (d, K), float64 if h is and else float32. grid, half: those of
    `Settings`. The first operator, which takes float32 and float64, makes the loss (float64) and its gradient together.
    The last one draws directions from a key, an int64 of one element.

newton_mlp(z0, p, w1z, w2, b2, gram, u0, r, start, B, scale, weight, low, tolerance, steps, sweeps, settled, damped,
           least, most) -> (z, energy, step, steps, lost)
    All steps of `reference.proximal_newton` for an MLP predictor, on a CPU only. B: (m, m), the first one, for all
    samples. Returns the same as fista_mlp; step is 1 / b.

architectures() -> str
    For which GPUs nvcc compiled the operators: "sm_80" is machine code for 8.0 and later 8.x, "sm_90a" for 9.0 alone,
    "compute_80" is PTX, which the driver compiles for 8.0 and everything newer. Empty if the build had no nvcc.

fista_plan(n, hidden, latent, bf16, device) -> (plan, refusal)
    The plan as numbers: cluster, clusters, at_once, samples, resident fragments, fragments, shared_bytes; `plan` says
    what they are. device: a GPU's index; -1 stands for an H100. refusal: why the list is empty.

In a CUDA graph: on a GPU, call fista_mlp and proximal_step once with the same sizes and dtype before the capture. The
first call loads kernels, and fista_mlp's also asks CUDA how many clusters run at once, which a capture does not allow;
a first call inside one raises a RuntimeError that says so.
"""

import functools
import multiprocessing
import os
import sys
import warnings
from typing import Any

import torch

from vjvcr_fast import native_build


def _load() -> str | None:
    """Loads the operators. Returns None, or why there are none and what to do."""
    if sys.platform != "linux":
        return f"for Linux, and this is {sys.platform}"
    reason = f"not built: {native_build.COMMAND}"
    for library in native_build.libraries():
        try:
            torch.ops.load_library(library)
        except OSError as error:
            reason = f"built for another torch ({str(error).splitlines()[0]}): {native_build.COMMAND}"
            continue
        older = f"built from older sources: {native_build.COMMAND}"
        return None if hasattr(torch.ops.vjvcr, "sigreg_cpu") else older
    return reason


MISSING = _load()
ARCHITECTURES = ""  # the operator's result


def tell_missing() -> None:
    """Warns that the operators are missing, where one would have served: once, in one process of a job, on Linux. In a
    graph of torch.compile it does nothing."""
    if MISSING is not None and not torch.compiler.is_compiling():
        _warn(MISSING)


@functools.cache
def _warn(missing: str) -> None:
    first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
    if first and sys.platform == "linux":
        text = f"vjvcr_fast: the compiled operators are {missing}. Until then plain torch operations serve, more slowly"
        warnings.warn(text, stacklevel=2)


if MISSING is None:
    ARCHITECTURES = torch.ops.vjvcr.architectures()

    @torch.library.register_fake("vjvcr::proximal_step")
    def _(z, v, gradient, step, momentum, weight, lower, upper):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("vjvcr::vcr_cpu")
    def _(hs, *options):  # type: ignore[no-untyped-def]
        dtype = torch.float64 if hs[0].dtype == torch.float64 else torch.float32
        return *(hs[0].new_empty((), dtype=dtype) for _ in range(3)), _gradients(hs, options[-1])

    @torch.library.register_fake("vjvcr::vcr_cpu_backward")
    def _(hs, *options):  # type: ignore[no-untyped-def]
        return _gradients(hs, options[-1])

    def _gradients(hs, made):  # type: ignore[no-untyped-def]
        return [torch.empty_like(h) if make else h.new_empty(0) for h, make in zip(hs, made, strict=True)]

    @torch.library.register_fake("vjvcr::sigreg_cpu")
    def _(h, directions, grid, half, scale):  # type: ignore[no-untyped-def]
        return grid.new_empty(()), _adjacent(h)

    @torch.library.register_fake("vjvcr::sigreg_sums_cpu")
    def _(h, directions, grid, half):  # type: ignore[no-untyped-def]
        return directions.new_empty((h.shape[1], 2, grid.shape[1], directions.shape[1]))

    @torch.library.register_fake("vjvcr::sigreg_gradient_cpu")
    def _(h, *others):  # type: ignore[no-untyped-def]
        return _adjacent(h)

    @torch.library.register_fake("vjvcr::sigreg_directions_cpu")
    def _(key, d, count):  # type: ignore[no-untyped-def]
        return key.new_empty((d, count), dtype=torch.float32)

    def _adjacent(h):  # type: ignore[no-untyped-def]
        like = torch.empty_like(h)
        return like if h.shape[2] == 1 or like.stride(2) == 1 else h.new_empty(h.shape)

    @torch.library.register_fake("vjvcr::newton_mlp")
    @torch.library.register_fake("vjvcr::fista_mlp")
    def _(z0, p, w1z, w2, b2, gram, u0, r, start, *options, **named):  # type: ignore[no-untyped-def]
        steps, lost = (start.new_empty(start.shape, dtype=dtype) for dtype in (torch.int64, torch.bool))
        return torch.empty_like(z0), torch.empty_like(start), torch.empty_like(start), steps, lost


def runs(code: str, capability: tuple[int, int]) -> bool:
    """True if this code, one of ARCHITECTURES, runs on a GPU of this compute capability."""
    kind, number = code.split("_")
    compiled_for = divmod(int(number.rstrip("a")), 10)
    if number.endswith("a"):  # uses what only this capability has
        return capability == compiled_for
    return capability >= compiled_for and (kind == "compute" or capability[0] == compiled_for[0])


def _refusal(device: int | None, fista: bool = False) -> str | None:
    """Why the operators, or fista_mlp, do not serve a GPU; None if they do. fista_mlp's kernels are empty in code for
    GPUs older than 9.0."""
    if not ARCHITECTURES:
        return "the operators were not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    this = "this GPU has compute capability {}.{}".format(*capability)
    if fista and capability != (9, 0):
        return f"{this}, fista_mlp needs 9.0"
    for code in ARCHITECTURES.split():
        if runs(code, capability) and ("_90" in code or not fista):
            return None
    return f"{this}, the operators were built for {ARCHITECTURES}"


def instruction_set() -> str:
    """The instruction set that the CPU operators use here: "baseline", "avx2" or "avx512"."""
    return str(torch.ops.vjvcr.instruction_set())


def serves(tensor: torch.Tensor) -> bool:
    """True if there are operators for tensors of this device and dtype. `serves_fista` also looks at their sizes."""
    tell_missing()
    if MISSING is not None or tensor.dtype not in (torch.float32, torch.float64):
        return False
    return tensor.device.type == "cpu" or (tensor.is_cuda and _refusal(tensor.get_device()) is None)


def serves_fista(z: torch.Tensor, hidden: int, bf16: bool) -> bool:
    """True if `fista_mlp` can infer z (N, m) through hidden layers of this width. Raises: as `plan`."""
    if not z.is_cuda:
        return serves(z)
    tell_missing()
    if MISSING is not None or z.dtype != torch.float32 or _refusal(z.get_device(), fista=True) is not None:
        return False
    if torch.compiler.is_compiling():  # the compiler cannot look into `fista_plan`; these sizes always fit
        return hidden <= 1024 and z.shape[1] <= 128
    found, _ = torch.ops.vjvcr.fista_plan(len(z), hidden, z.shape[1], bf16, z.get_device())
    return bool(found)


def plan(hidden: int, n: int = 256, latent: int = 20, bf16: bool = True, device: int | None = None) -> dict[str, Any]:
    """How `fista_mlp` is launched on a GPU. The operator takes the same plan.

    device: which GPU; None is the current one, or an H100 if there is no GPU.

    Returns cluster (blocks that share `samples` samples), clusters (how many), at_once (how many of them the GPU runs
    at the same time), samples, resident (the fraction of the weights that stays in shared memory), shared_bytes (of a
    block), and refusal: None, or why fista_mlp does not serve. Then there is nothing else.

    Raises RuntimeError if these sizes are asked for first while a CUDA graph is captured.
    """
    here = torch.cuda.is_available()
    refusal = MISSING or (_refusal(device, fista=True) if here else None)
    if refusal:
        return {"refusal": refusal}
    at = -1 if not here else torch.cuda.current_device() if device is None else device
    found, refusal = torch.ops.vjvcr.fista_plan(n, hidden, latent, bf16, at)
    if refusal:
        return {"refusal": refusal}
    cluster, clusters, at_once, samples, resident, fragments, shared_bytes = found
    return {
        "cluster": cluster,
        "clusters": clusters,
        "at_once": at_once,
        "samples": samples,
        "resident": resident / fragments,
        "shared_bytes": shared_bytes,
        "refusal": None,
    }


def explain_plan() -> str:
    """How fista_mlp is launched here, or why it is not: a line for `vjvcr-fast info`."""
    words = []
    for hidden in (256, 512, 1024):
        found = plan(hidden)
        if found["refusal"]:
            return f"not served: {found['refusal']}"
        layout = "{clusters} clusters of {cluster} blocks ({at_once} run at once), {samples} samples each"
        words.append(f"hidden {hidden}: {layout.format_map(found)}, {found['resident']:.0%} of the weights on the chip")
    where = "this GPU" if torch.cuda.is_available() else "an H100"
    return f"{where}, N = 256, bf16: {'; '.join(words)}"


def explain() -> str:
    """What was built, or why this GPU is not served: a line for `vjvcr-fast info`."""
    if MISSING is not None:
        return MISSING
    if torch.cuda.is_available() and (why := _refusal(None)):
        return f"CPU only: {why}"
    return f"CPU, CUDA for {ARCHITECTURES}" if ARCHITECTURES else "CPU; not built for CUDA"
