"""The drop-in losses: variance hinge, covariance penalty, their sum (VCR) and VICReg."""

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
from vjvcr_fast.losses.vicreg import VICRegLoss

__all__ = [
    "Form",
    "Made",
    "Representations",
    "Samples",
    "VCRLoss",
    "VCRTerms",
    "VICRegLoss",
    "covariance_penalty",
    "variance_hinge",
    "vcr_loss",
]
