"""vjvcr_fast: VJ-VCR (arXiv 2412.10925) and the variance-covariance losses it rests on, exact and fast.

The drop-in losses are in `vjvcr_fast.losses`; every equation, written plainly, is in `vjvcr_fast.reference`. `load`
gives the model of a trained run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjvcr_fast.runs import Trained

__version__ = "0.1.0"


def load(run: Any, device: str = "auto") -> "Trained":
    """The trained model of a run's folder, by `vjvcr_fast.runs.load`: encode(frames), predict(x)."""
    from vjvcr_fast.runs import load as load_trained

    return load_trained(run, device)
