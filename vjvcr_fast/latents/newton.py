"""The proximal quasi-Newton method of `reference.proximal_newton`, for N problems of m variables at once.

For energies that are nearly quadratic in z over the distance that z moves, as those of a trained MLP predictor, whose
ReLUs then seldom switch: a few evaluations take the place of FISTA's fifty. It keeps an m x m matrix a sample, so m is
to be small. On a CPU, where they were built, operators make the steps: `newton_mlp` all of them, for an MLP predictor,
whose samples leave once they are frozen; `newton_trial` and `newton_update` a step's two parts, for any energy. Else
the same is done in torch operations, a launch for every coordinate of every sweep: on a GPU far slower than FISTA.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import native
from vjvcr_fast.reference import DAMPED, SCALES, SETTLED, SWEEPS, soft_threshold, with_ridge

CONSTANTS = (SWEEPS, SETTLED, DAMPED, *SCALES)  # of the operators

# z (N, m) -> energies with the penalty (N, 1), gradients without (N, m).
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class State(NamedTuple):
    """Of every sample; the steps write into it."""

    z: Tensor  # (N, m)
    energy: Tensor  # (N, 1), as all that follow but for gradient (N, m) and B (N, m, m)
    gradient: Tensor
    B: Tensor
    damping: Tensor  # b
    active: Tensor  # not frozen
    lost: Tensor  # the last trial was not finite
    steps: Tensor


def serves(tensor: Tensor) -> bool:
    """Whether operators make the steps for tensors like this one."""
    return tensor.device.type == "cpu" and native.serves(tensor)


def minimise(
    evaluate: Evaluate,
    z0: Tensor,
    curvature: Tensor,
    weight: float,
    low: float,
    tolerance: float,
    steps: int,
) -> State:
    """z0: (N, m), at least `low`. curvature: (m, m), the first B of all samples."""
    n, m = z0.shape
    value, gradient = evaluate(z0)
    ones = torch.ones_like(value)
    B = with_ridge(curvature).expand(n, m, m).contiguous()
    state = State(z0.clone(), value, gradient.contiguous(), B, ones, ones > 0, ones < 0, torch.zeros_like(ones).long())
    for _ in range(steps):
        _step(evaluate, state, weight, low, tolerance)
    return state


def _step(evaluate: Evaluate, state: State, weight: float, low: float, tolerance: float) -> None:
    operators = serves(state.z)
    z, _, gradient, B, damping, active, *_ = state
    if operators:
        v = z.clone()
        torch.ops.vjvcr.newton_trial(v, gradient, B, damping, active, weight, low, SWEEPS, SETTLED)
    else:
        v = trial(z, gradient, damping[:, :, None] * B, weight, low)
    value, gradient_v = evaluate(v)
    if operators:
        met = value.contiguous(), gradient_v.contiguous()
        torch.ops.vjvcr.newton_update(*state, v, *met, weight, tolerance, DAMPED, *SCALES)
    else:
        update(state, v, value, gradient_v, weight, tolerance)


def trial(z: Tensor, gradient: Tensor, B: Tensor, weight: float, low: float) -> Tensor:
    """`reference.model_minimum` of every sample. z, gradient: (N, m). B: (N, m, m). Returns v (N, m)."""
    v, slope, moving = z.clone(), gradient, torch.ones_like(z[:, 0], dtype=torch.bool)
    for _ in range(SWEEPS):
        most = torch.zeros_like(z[:, 0])
        for k in range(z.shape[1]):
            diagonal = B[:, k, k]
            new = soft_threshold(v[:, k] - slope[:, k] / diagonal, weight / diagonal).clamp(min=low)
            change = torch.where(moving, new - v[:, k], 0)
            most = torch.maximum(most, change.abs())
            slope = slope + B[:, k] * change[:, None]
            v[:, k] = torch.where(moving, new, v[:, k])
        moving = moving & ~(most <= SETTLED * v.abs().amax(dim=1))
    return v


def update(state: State, v: Tensor, value: Tensor, gradient_v: Tensor, weight: float, tolerance: float) -> None:
    """What a trial v of energy `value` (N, 1), with its penalty, and gradient (N, m) changes, in place."""
    z, energy, gradient, B, damping, active, lost, steps = state
    s, y = v - z, gradient_v - gradient
    Bs = (B @ s[:, :, None]).squeeze(2)
    bent, expected = ((s * other).sum(dim=1, keepdim=True) for other in (y, Bs))
    finite = value.isfinite() & bent.isfinite()
    accepted = finite & (value <= energy)
    linear = (gradient * s + weight * (v.abs() - z.abs())).sum(dim=1, keepdim=True)
    calibrated = (steps > 0) | (v == z).all(dim=1, keepdim=True)  # before it the model's promise means little
    done = calibrated & (-linear - damping * expected / 2 <= tolerance * energy.abs())

    first = (steps == 0) & (bent > 0) & (expected > 0)
    scale = torch.where(first, (bent / expected).clamp(*SCALES), 1)
    Bs, expected = scale * Bs, scale * expected
    share = torch.where(bent >= DAMPED * expected, 1, (1 - DAMPED) * expected / (expected - bent))
    y = share * y + (1 - share) * Bs
    met = (s * y).sum(dim=1, keepdim=True)
    new = scale[:, :, None] * B - (Bs / expected)[:, :, None] * Bs[:, None] + (y / met)[:, :, None] * y[:, None]
    usable = active & finite & (expected > 0) & (met > 0) & new.flatten(1).isfinite().all(dim=1, keepdim=True)

    taken = accepted & active
    B.copy_(torch.where(usable[:, :, None], new, B))
    damping.copy_(torch.where(active, torch.where(accepted, (damping / 2).clamp_min(1), 2 * damping), damping))
    z.copy_(torch.where(taken, v, z))
    energy.copy_(torch.where(taken, value, energy))
    gradient.copy_(torch.where(taken, gradient_v, gradient))
    lost.copy_(torch.where(active, ~finite, lost))
    steps.add_(active)
    active.logical_and_(~done)
