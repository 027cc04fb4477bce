"""Which backend serves a tensor, and why not the others."""

from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "reference"]
BACKENDS = get_args(Backend)


def resolve(backend: str, h: Tensor) -> str:
    """The backend that serves h: "torch" (analytic gradient, vjvcr_fast.analytic) or "reference" (autograd).

    Raises ValueError for a name that is not in BACKENDS.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    return "torch" if backend == "auto" else backend


def explain() -> dict[str, str]:
    """What `auto` chooses for tensors of each device, with the reason, for `vjvcr-fast info`."""
    cuda = (
        "torch (plain torch operations; there are no kernels of ours for CUDA yet)"
        if torch.cuda.is_available()
        else f"no CUDA device ({'this torch has no CUDA' if torch.version.cuda is None else 'none visible'})"
    )
    return {"cpu": "torch (analytic gradient in cache-sized blocks)", "cuda": cuda}
