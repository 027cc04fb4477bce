"""vjvcr_fast: VJ-VCR (arXiv 2412.10925) and its variance-covariance losses, exact and fast.

The losses are in `vjvcr_fast.losses`. Every equation is written plainly in `vjvcr_fast.reference`. `load` loads the
model of a trained run.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjvcr_fast.runs import Trained

__version__ = "0.1.0"


def load(run: Any, device: str = "auto") -> "Trained":
    """Loads a trained model, which has methods encode(frames) and predict(x): of a run's folder, of one that
    `save_pretrained` wrote, or of a repository "user/repo" on the Hugging Face Hub. See `vjvcr_fast.runs.load`."""
    from vjvcr_fast.runs import load as load_trained

    return load_trained(run, device)
