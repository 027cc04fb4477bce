"""Checks that this interpreter has what the `make gpu-...` targets need, which install nothing.

    python benchmarks/check_gpu.py [PACKAGE ...]

If not, says why and exits with 1. PACKAGE: what one target needs beyond NEEDED.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("torch", "triton", "setuptools", "pip", "pytest", "numpy")
SETUPTOOLS = 77  # the first version that reads the licence in pyproject.toml


def obstacle(more: Sequence[str] = ()) -> str | None:
    """The reason why nothing can run here, or None."""
    missing = [name for name in (*NEEDED, *more) if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}; what is installed there is used, and nothing is fetched"
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < SETUPTOOLS:
        return f"{sys.executable} has setuptools {version}: {SETUPTOOLS} or newer is needed"
    import torch

    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return f"torch {torch.__version__}, {build}, sees no CUDA device"
    return None


if __name__ == "__main__":
    reason = obstacle(sys.argv[1:])
    sys.exit(reason and f"make gpu: {reason}")
