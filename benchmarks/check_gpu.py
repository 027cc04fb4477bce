"""Whether this interpreter has what `make gpu` needs, which fetches nothing: exit status 1 and the reason if not."""

import importlib.metadata
import importlib.util
import sys

NEEDED = ("torch", "triton", "setuptools", "pip", "pytest", "pytest_benchmark", "hypothesis", "numpy")
SETUPTOOLS = 77  # the first that reads pyproject.toml's licence


def obstacle() -> str | None:
    """What is in the way; None if nothing is."""
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
