"""The compiled operators (csrc/): loaded once, on import, where they were built.

`torch.ops.vjvcr.proximal_step(z, v, gradient, step, momentum, weight, lower, upper)` makes in place, in one pass,

    z <- clamp(soft_threshold(v - step gradient, step weight), lower, upper),   v <- z + momentum (z - its old value)

for z, v, gradient (N, ...) and step, momentum (N,), contiguous, all float32 or all float64, on one device. A sample
whose step is zero is left as it is. Raises RuntimeError for tensors that do not fit.
"""

import importlib
from pathlib import Path

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

if MISSING is None:

    @torch.library.register_fake("vjvcr::proximal_step")
    def _(z, v, gradient, step, momentum, weight, lower, upper):  # type: ignore[no-untyped-def]
        return None


def explain() -> str:
    """What was built, for `vjvcr-fast info`."""
    if MISSING is not None:
        return MISSING
    try:
        architectures = importlib.import_module("vjvcr_fast._native").architectures
    except ImportError:
        return "CPU; what else was built is not known: pybind11 was not there"
    return f"CPU, CUDA for {architectures}" if architectures else "CPU; no nvcc when they were built"
