"""Drop-in losses: variance hinge, covariance penalty, their weighted sum (VCR), VICReg, and SIGReg.

vcr.py has the public functions, vicreg.py VICReg, lejepa.py SIGReg. backends.py decides which code computes a loss:
analytic.py and projections.py (plain PyTorch; formulas and gradients of VCR and of SIGReg), ops.py (the Triton kernels
as operators), cpu.py (a compiled operator) or reference.py. distributed.py computes the loss of a batch that is spread
over several processes. attainable.py tells how far VCR can lift features.
"""

from vjvcr_fast.losses.attainable import attainable_std
from vjvcr_fast.losses.lejepa import SIGRegLoss, sigreg
from vjvcr_fast.losses.vcr import (
    Form,
    Made,
    Representations,
    Samples,
    VCRLoss,
    VCRTerms,
    covariance_penalty,
    variance_hinge,
    vcr_loss,
)
from vjvcr_fast.losses.vicreg import VICRegLoss, VICRegTerms

__all__ = [
    "Form",
    "Made",
    "Representations",
    "SIGRegLoss",
    "Samples",
    "VCRLoss",
    "VCRTerms",
    "VICRegLoss",
    "VICRegTerms",
    "attainable_std",
    "covariance_penalty",
    "sigreg",
    "variance_hinge",
    "vcr_loss",
]
