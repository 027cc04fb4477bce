"""vjvcr_fast: VJ-VCR (arXiv 2412.10925) and the variance-covariance losses it rests on, exact and fast.

The drop-in losses are in `vjvcr_fast.losses`; every equation, written plainly, is in `vjvcr_fast.reference`.
"""

__version__ = "0.1.0"
