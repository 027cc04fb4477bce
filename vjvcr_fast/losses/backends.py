"""Which backend serves a tensor, and why not the others."""

import importlib.util
import os
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton", "reference"]
BACKENDS = get_args(Backend)

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (8, 0)  # compute capability that the kernels are written and compiled for


def resolve(backend: str, h: Tensor) -> str:
    """The backend that serves h: "triton" (fused kernels, vjvcr_fast.kernels), "torch" (analytic gradient in plain
    operations, vjvcr_fast.losses.analytic) or "reference" (autograd).

    Raises ValueError for a name that is not in BACKENDS, and for "triton" where it cannot serve h.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend in ("torch", "reference"):
        return backend
    obstacle = against_triton(h.device, h.dtype) or _against_transforms()
    if backend == "auto":
        return "triton" if h.is_cuda and obstacle is None else "torch"
    if obstacle is not None:
        raise ValueError(f"backend='triton': {obstacle}")
    return "triton"


def against_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernels cannot serve a tensor like this one; None where they can."""
    if not _INSTALLED:
        return "triton is not installed (pip install 'vjvcr_fast[triton]')"
    if dtype == torch.float64:
        return "h is float64, which the kernels do not compute in"
    if _INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors"
    if device.type != "cuda":
        return f"h is on {device}: a CUDA tensor is needed (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
    if torch.version.cuda is None:
        return "this torch is built for AMD GPUs, where the kernels have not been tried"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{device} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def _against_transforms() -> str | None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "torch.func transforms do not go through custom operators with a gradient"
    return None


def explain() -> dict[str, str]:
    """What `auto` chooses for tensors of each device, with the reason, for `vjvcr-fast info`."""
    if torch.cuda.is_available():
        obstacle = against_triton(torch.device("cuda", torch.cuda.current_device()))
        cuda = "triton (fused kernels)" if obstacle is None else f"torch (plain torch operations): {obstacle}"
    else:
        cuda = f"no CUDA device ({'this torch has no CUDA' if torch.version.cuda is None else 'none visible'})"
    return {"cpu": "torch (analytic gradient in cache-sized blocks)", "cuda": cuda}
