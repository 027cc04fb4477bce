"""Checks that this interpreter has what `make gpu` needs, which installs nothing. If not, says why and exits with 1."""

import importlib.metadata
import importlib.util
import sys

NEEDED = ("torch", "triton", "setuptools", "pip", "pytest", "pytest_benchmark", "hypothesis", "numpy")
SETUPTOOLS = 77  # the first version that reads the licence in pyproject.toml


def obstacle() -> str | None:
    """The reason why `make gpu` cannot run here, or None."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}; `make gpu` uses what is installed there"
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < SETUPTOOLS:
        return f"{sys.executable} has setuptools {version}: {SETUPTOOLS} or newer is needed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return None


if __name__ == "__main__":
    reason = obstacle()
    sys.exit(reason and f"make gpu: {reason}")
