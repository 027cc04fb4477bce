"""Which backend computes the loss of a tensor, and why the others cannot."""

import importlib.util
import math
import os
import reprlib
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vjvcr_fast import native

Backend = Literal["auto", "native", "torch", "triton", "reference"]
BACKENDS = get_args(Backend)

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LARGEST = sys.float_info.max
OLDEST = (8, 0)  # the lowest compute capability for which the kernels are written and compiled


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError if the argument `name` has a value that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def check_number(name: str, value: Any) -> Any:
    """`value` of the argument `name`, as a float or int. A tensor of one element stays a tensor: to read it would wait.

    Raises TypeError if it is no real number or requires a gradient, ValueError if it is not finite.
    """
    if (type(value) is float or type(value) is int) and -_LARGEST <= value <= _LARGEST:  # in every call
        return value
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise TypeError(
                f"{name} is a tensor that requires a gradient, and would get none: a number is needed. To learn "
                "weights, weigh the terms: loss = alpha * terms.variance + beta * terms.covariance"
            )
        if value.numel() != 1 or value.is_complex():
            raise TypeError(f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: a finite number is needed")
        return value.reshape(())
    try:
        finite = math.isfinite(value)
    except OverflowError:  # a large int
        finite = False
    except (TypeError, ValueError):
        raise TypeError(f"{name}={reprlib.repr(value)}: a finite number is needed") from None
    if not finite:
        raise ValueError(f"{name}={reprlib.repr(value)}: a finite number is needed")
    return float(value)


def resolve(backend: str, h: Tensor) -> str:
    """The backend for h: "native" (a compiled CPU operator, cpu.py), "triton" (fused kernels, vjvcr_fast.kernels),
    "torch" (plain operations with an analytic gradient, analytic.py) or "reference" (reference.py and autograd).

    Raises ValueError if `backend` is not one of BACKENDS, or does not support h.
    """
    check_choice("backend", backend, BACKENDS)
    if backend in ("torch", "reference"):
        return backend
    if backend == "auto":
        backend = "triton" if h.is_cuda else "native"
        if h.device.type == "cpu":
            native.tell_missing()
        return backend if _against(backend, h) is None else "torch"
    if (obstacle := _against(backend, h)) is not None:
        raise ValueError(f"backend={backend!r}: {obstacle}")
    return backend


def _against(backend: str, h: Tensor) -> str | None:
    """The reason why "native" or "triton" cannot take h; None if it can."""
    obstacle = against_native(h.device) if backend == "native" else against_triton(h.device, h.dtype)
    if obstacle is None and transformed():
        obstacle = "transforms of torch.func and forward-mode AD cannot follow what it computes"
    return obstacle


def transformed() -> bool:
    """True inside a transform of torch.func or a level of forward-mode AD, which can follow plain operations alone."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def against_native(device: torch.device) -> str | None:
    """The reason why the compiled operator cannot take a tensor of this device; None if it can."""
    if native.MISSING is not None:
        return f"the operators are {native.MISSING}"
    return None if device.type == "cpu" else f"h is on {device}: a CPU tensor is needed"


def against_triton(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """The reason why the Triton kernels cannot take a tensor of this device and dtype; None if they can."""
    if not _INSTALLED:
        return "triton is not installed (pip install 'vjvcr_fast[triton]')"
    if dtype == torch.float64:
        return "h is float64, which the kernels do not support"
    if _INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors"
    if device.type != "cuda":
        return f"h is on {device}: a CUDA tensor is needed (TRITON_INTERPRET=1 runs kernels on a CPU, slowly)"
    if torch.version.cuda is None:
        return "this torch is built for AMD GPUs, on which the kernels have not been tried"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"{device} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    return None


def explain() -> dict[str, str]:
    """What "auto" chooses on a CPU and on a CUDA GPU, with the reason. `vjvcr-fast info` shows it."""
    if torch.cuda.is_available():
        obstacle = against_triton(torch.device("cuda", torch.cuda.current_device()))
        cuda = "triton (fused kernels)" if obstacle is None else f"torch (plain torch operations): {obstacle}"
    else:
        cuda = f"no CUDA device ({'this torch has no CUDA' if torch.version.cuda is None else 'none visible'})"
    obstacle = against_native(torch.device("cpu"))
    cpu = f"torch (plain torch operations): {obstacle}"
    if obstacle is None:
        cpu = f"native (a compiled operator, for {native.instruction_set()})"
    return {"cpu": cpu, "cuda": cuda}
