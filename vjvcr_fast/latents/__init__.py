"""Inference of the latent, equation (6): z* = argmin_z E(x, y, z), one independent problem per sample.

kinds.py has the three latents, descent.py FISTA and gradient descent, energies.py closed forms of E. How training uses
z*, calibrates the L1 weight and revives unused heads is in training/calibration.py.
"""

from vjvcr_fast.latents.descent import LatentResult, NonFiniteEnergyError, StepRule
from vjvcr_fast.latents.energies import ExpandedMLPEnergy, HeadEnergy, LatentEnergy, MLPEnergy
from vjvcr_fast.latents.kinds import ContinuousLatent, DiscreteLatent, Latent, LatentModel, Method, SparseLatent

__all__ = [
    "ContinuousLatent",
    "DiscreteLatent",
    "ExpandedMLPEnergy",
    "HeadEnergy",
    "Latent",
    "LatentEnergy",
    "LatentModel",
    "LatentResult",
    "MLPEnergy",
    "Method",
    "NonFiniteEnergyError",
    "SparseLatent",
    "StepRule",
]
