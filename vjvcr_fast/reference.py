"""Every equation of VJ-VCR (arXiv 2412.10925) in plain PyTorch: the single source of truth.

Everything else in this package is tested against this file in float64, and timed against it. The code is written to be
read, and to be a fair baseline: it is vectorised over time steps, computes nothing twice, and leaves the gradient to
autograd. It imports torch only.

Shapes, with N videos, T time steps and d features:

    h        (N, T, d)           representations of frames
    h_x      (N, T_x, d)         of the frames that are given
    h_y      (N, T_y, d)         of the frames that are to be predicted
    frames   (N, T, C, H, W)     in [0, 1]

Every function returns the dtype of its input.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# -- Variance-covariance regularisation: equations (1) to (4) -------------------------------------------------------


def variance_hinge(h: Tensor, threshold: float = 1.0, eps: float = 1e-4) -> Tensor:
    """Equation (1): 1/(T d) sum_{t,k} max(0, threshold - sqrt(Var(h[:, t, k]) + eps)).

    h: (N, T, d), N >= 2. threshold: the paper's tau. Var is the unbiased variance over the batch, with divisor N - 1.
    The paper does not give eps; 1e-4 is VICReg's. Returns a scalar.
    """
    return _hinge(h.var(dim=0, correction=1), threshold, eps)


def covariance(h: Tensor) -> Tensor:
    """Equation (3): the covariance over the batch at every time step, with divisor N - 1.

    h: (N, T, d), N >= 2. Returns (T, d, d).
    """
    z = (h - h.mean(dim=0)).transpose(0, 1)
    return z.mT @ z / (h.shape[0] - 1)


def covariance_penalty(h: Tensor) -> Tensor:
    """Equation (2): 1/(T d) sum_t sum_{i != j} Cov(h[:, t, :])_ij^2.

    h: (N, T, d), N >= 2. Returns a scalar.
    """
    return _off_diagonal_squares(covariance(h))


def vcr(
    h: Tensor,
    alpha: float,
    beta: float,
    threshold: float = 1.0,
    eps: float = 1e-4,
    over: str = "samples",
    covariance_divisor: str = "d",
) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (4): alpha * l_var + beta * l_cov, with `variance_hinge` for l_var and `covariance_penalty` for l_cov.

    The variances are taken from the diagonal of the covariance. h: (N, T, d).
    over: what the variance is over. "samples": the N samples at each time step, as in the paper; "time": the T time
    steps of each sample; "both": all N T rows. It needs at least two of them.
    covariance_divisor: "d", or "d(d-1)", which makes l_cov the mean over off-diagonal entries.
    Returns the scalars (loss, variance, covariance); the last two are l_var and l_cov, without weights.
    """
    d = h.shape[-1]
    cov = covariance({"samples": h, "time": h.transpose(0, 1), "both": h.reshape(-1, 1, d)}[over])
    variance, penalty = _hinge(cov.diagonal(dim1=1, dim2=2), threshold, eps), _off_diagonal_squares(cov)
    penalty = penalty / {"d": 1, "d(d-1)": max(d - 1, 1)}[covariance_divisor]
    return alpha * variance + beta * penalty, variance, penalty


def _hinge(variances: Tensor, threshold: float, eps: float) -> Tensor:
    """variances: (T, d). Returns the scalar of equation (1)."""
    return torch.relu(threshold - torch.sqrt(variances + eps)).mean()


def _off_diagonal_squares(cov: Tensor) -> Tensor:
    """1/(T d) times the sum of the squared off-diagonal entries of cov (T, d, d)."""
    diagonal = torch.eye(cov.shape[-1], dtype=torch.bool, device=cov.device)
    return cov.masked_fill(diagonal, 0).square().sum() / (cov.shape[0] * cov.shape[1])


# -- SIGReg ---------------------------------------------------------------------------------------------------------


def sigreg(
    h: Tensor,
    directions: Tensor,
    knots: int = 17,
    limit: float = 3.0,
    symmetric: bool = False,
    scale_by_n: bool = True,
) -> Tensor:
    """SIGReg of LeJEPA (Balestriero and LeCun 2025, arXiv 2511.08544): the Epps-Pulley statistic of projections.

    For each time step, with the empirical characteristic function of the samples along a direction a,

        N sum_j w_j |1/N sum_n exp(i t_j <h_n, a>) - phi_j|^2,   phi_j = exp(-t_j^2 / 2)

    averaged over directions and time steps. The knots t_j are equispaced on [0, limit]; w_j is phi_j times the weight
    of the trapezoidal rule, twice, because the integral is over [-limit, limit] and its integrand is even.

    h: (N, T, d). directions: (d, K), of unit length. symmetric: the knots are on [-limit, limit] instead. scale_by_n:
    with the factor N. Returns a scalar.
    """
    t = torch.linspace(-limit if symmetric else 0.0, limit, knots, dtype=h.dtype, device=h.device)
    phi = torch.exp(-t.square() / 2)
    width = (t[1] - t[0]) * (1 if symmetric else 2)
    weights = width * phi
    weights[0], weights[-1] = weights[0] / 2, weights[-1] / 2
    angles = (h.transpose(0, 1) @ directions).unsqueeze(-1) * t
    errors = (angles.cos().mean(dim=1) - phi).square() + angles.sin().mean(dim=1).square()
    return (errors @ weights).mean() * (h.shape[0] if scale_by_n else 1)


# -- Energies: equations (5) to (7) ---------------------------------------------------------------------------------


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """D of equations (5) and (7): the mean squared error over all elements.

    prediction, target: of the same shape. Returns a scalar.
    """
    return (prediction - target).square().mean()


def energy_vjvcr(
    h_x: Tensor,
    h_y: Tensor,
    predicted_h_y: Tensor,
    alpha: float,
    beta: float,
    gamma: float = 0.0,
    decoded: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """Equation (5): D(Pred(h_x, z), h_y) + l_vcr([h_x, h_y]) + gamma * D(Dec(Pred(h_x, z)), y).

    h_x: (N, T_x, d). h_y, predicted_h_y: (N, T_y, d). decoded, y: (N, T_y, C, H, W), needed if gamma is not 0.
    Gradients flow through both h_x and h_y. Returns a scalar. Raises ValueError if decoded or y is missing.
    """
    energy = distance(predicted_h_y, h_y) + vcr(torch.cat([h_x, h_y], dim=1), alpha, beta)[0]
    if gamma != 0.0:
        if decoded is None or y is None:
            raise ValueError(f"gamma={gamma} needs decoded and y")
        energy = energy + gamma * distance(decoded, y)
    return energy


def energy_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """The objective of equation (6) for each sample: the part of the energy that depends on its latent z.

    This is the mean squared error over all dimensions but the first. z* of a sample minimises it.
    prediction, target: (N, ...). Returns (N,).
    """
    return (prediction - target).square().flatten(1).mean(dim=1)


def energy_generative(
    decoded: Tensor,
    y: Tensor,
    h: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
) -> Tensor:
    """Equation (7): D(Dec(Pred(h_x, z)), y) + l_vcr([h_x, h_y]), without the second term if h is None.

    decoded, y: (N, T_y, C, H, W). h: [h_x, h_y], concatenated to (N, T_x + T_y, d), or None. Returns a scalar.
    """
    energy = distance(decoded, y)
    return energy if h is None else energy + vcr(h, alpha, beta)[0]


# -- Spectra --------------------------------------------------------------------------------------------------------


def singular_values(rows: Tensor) -> Tensor:
    """The singular values of a matrix of representations, largest first, as in figure 4. The matrix is not centred.

    rows: (M, d). Returns (min(M, d),).
    """
    return torch.linalg.svdvals(rows)


def cumulative_spectrum(singular: Tensor) -> Tensor:
    """The second panel of figure 4: the cumulative sum of singular values (not of their squares), divided by their sum.

    singular: (..., K), largest first. Returns the same shape.
    """
    return singular.cumsum(dim=-1) / singular.sum(dim=-1, keepdim=True)


def rank_me(rows: Tensor, eps: float = 1e-7) -> Tensor:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp(-sum_k p_k log p_k), p_k = sigma_k / sum_j sigma_j + eps.

    rows: (M, d), with singular values sigma. Returns a scalar between 1 and min(M, d), up to eps.
    """
    singular = singular_values(rows)
    p = singular / singular.sum() + eps
    return torch.exp(-(p * p.log()).sum())


# -- Sparse latents -------------------------------------------------------------------------------------------------


def soft_threshold(z: Tensor, threshold: float | Tensor) -> Tensor:
    """The proximal map of threshold * |z|_1: sign(z) * max(0, |z| - threshold), elementwise."""
    return torch.sign(z) * torch.relu(z.abs() - threshold)


def fista(
    smooth: Callable[[Tensor], Tensor],
    z0: Tensor,
    weight: float,
    step: float,
    steps: int,
) -> Tensor:
    """FISTA (Beck and Teboulle 2009) for min_z smooth(z) + weight * |z|_1, one independent problem per row.

    smooth maps (N, m) to per-sample energies (N,); z0: (N, m); step: 1 / L for a gradient with Lipschitz constant
    L. Returns z after `steps` iterations, (N, m), detached.
    """
    z = v = z0.detach()
    t = 1.0
    for _ in range(steps):
        point = v.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(smooth(point).sum(), point)
        z_next = soft_threshold(v - step * gradient, step * weight)
        t_next = (1.0 + (1.0 + 4.0 * t * t) ** 0.5) / 2.0
        v = z_next + (t - 1.0) / t_next * (z_next - z)
        z, t = z_next, t_next
    return z


def _penalised(smooth: Callable[[Tensor], Tensor], z: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """smooth(z) + weight * |z|_1, and the gradient of smooth alone."""
    point = z.detach().requires_grad_()
    value = smooth(point)
    (gradient,) = torch.autograd.grad(value, point)
    return value.detach() + weight * z.detach().abs().sum(), gradient


GROWTH_AT_FIRST, GROWTH, SHRINKAGE = 4.0, 1.01, 0.5  # of the step size, per step


def monotone_fista(
    smooth: Callable[[Tensor], Tensor],
    z0: Tensor,
    weight: float,
    step: float,
    steps: int,
    backtracking: bool = True,
    momentum: float | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, int]:
    """FISTA for min_z smooth(z) + weight * |z|_1 that never ends above its start: ONE problem, one evaluation a step.

    `vjvcr_fast.latents` does this for many problems at once. Unlike `fista`, it evaluates energy and gradient only at
    the extrapolated points v, and sets v to zero where it has not the sign of x, the proximal point. A point of higher
    energy is not taken and restarts the momentum (O'Donoghue and Candes 2015). With backtracking the step size stays
    just below the inverse of the curvature between one point and the next.

    smooth: z (m,) -> scalar. z0: (m,). step: 1/L, or with backtracking a first guess. momentum: None for FISTA's, a
    constant otherwise; 0 is ISTA. tolerance: it stops when |x - z| <= tolerance * max(|x|, |z|) and the step size has
    found its scale.

    Returns z (m,), detached, and the number of steps taken.
    """

    z = previous = z0.detach()
    energy, gradient = _penalised(smooth, z, weight)
    t, growth = 1.0, GROWTH_AT_FIRST
    for taken in range(1, steps + 1):
        t_next = (1.0 + (1.0 + 4.0 * t * t) ** 0.5) / 2.0
        b = (t - 1.0) / t_next if momentum is None else momentum if t > 1.0 else 0.0
        x = soft_threshold(z - step * gradient, step * weight)
        v = x + b * (x - previous)
        if weight > 0:
            v = torch.where(v * x > 0, v, 0.0)
        done = bool((x - z).norm() <= tolerance * max(x.norm(), z.norm()))

        energy_v, gradient_v = _penalised(smooth, v, weight)
        accepted = bool(energy_v <= energy)
        curvature = float((gradient_v - gradient) @ (v - z))
        room = float((v - z).square().sum()) / (curvature * step) if curvature > 0 else float("inf")
        if backtracking:
            done = (done and growth < GROWTH_AT_FIRST) or x.equal(z)  # if `step` is small, so is the first step
            if not accepted or room < GROWTH_AT_FIRST:
                growth = GROWTH
            step *= min(max(room, SHRINKAGE), growth if accepted else 1.0 if b > 0 else SHRINKAGE)
        elif not accepted and b == 0:
            done = True  # the same trial would fail again
        if accepted:
            z, previous, energy, gradient, t = v, x, energy_v, gradient_v, t_next
        else:
            t = 1.0
        if done:
            return z, taken
    return z, steps


RIDGE, SCALES = 0.01, (0.01, 100.0)  # what is added to the first B, and by which factors the first trial may scale it
DAMPED = 0.2  # the least curvature that an update of B accepts, relative to what B expected
SWEEPS, SETTLED = 20, 1e-3  # coordinate descent: at most so many sweeps, or until one changes v by less, relatively


def proximal_newton(
    smooth: Callable[[Tensor], Tensor],
    z0: Tensor,
    weight: float,
    curvature: Tensor,
    steps: int,
    tolerance: float = 0.0,
    low: float = -float("inf"),
) -> tuple[Tensor, int]:
    """A proximal quasi-Newton method (Lee, Sun and Saunders 2014) for min_z smooth(z) + weight * |z|_1, z >= low, that
    never ends above its start: ONE problem, one evaluation a step. The operator `newton_mlp` does it for many at once.

    A trial v minimises the model  g'(v - z) + b (v - z)'B (v - z) / 2 + weight |v|_1  by coordinate descent. B starts
    as `curvature` with RIDGE times its mean diagonal added. The first trial scales B to the curvature that it met; then
    every trial updates it (BFGS, damped so that it stays positive definite: Powell 1978). If a trial has a higher
    energy, it is not taken and b is doubled; otherwise b is halved, but not below 1.

    smooth: z (m,) -> scalar. z0: (m,). curvature: (m, m), positive semidefinite. tolerance: it stops after a trial for
    which the model promised to lower the energy by no more than this fraction, once B has been scaled.

    Returns z (m,), detached, and the number of steps taken.
    """

    z = z0.detach().clamp(min=low)
    energy, gradient = _penalised(smooth, z, weight)
    B, b = with_ridge(curvature.detach()), 1.0
    for taken in range(1, steps + 1):
        v = model_minimum(z, gradient, b * B, weight, low)
        energy_v, gradient_v = _penalised(smooth, v, weight)
        accepted = bool(energy_v <= energy)

        s, y = v - z, gradient_v - gradient
        bent, expected = float(s @ y), float(s @ B @ s)
        promised = -float(gradient @ s + weight * (v.abs().sum() - z.abs().sum())) - b * expected / 2
        done = promised <= tolerance * abs(float(energy)) and (taken > 1 or v.equal(z))
        if taken == 1 and bent > 0 and expected > 0:
            scale = min(max(bent / expected, SCALES[0]), SCALES[1])
            B, expected = scale * B, scale * expected
        if expected > 0:
            Bs = B @ s
            share = 1.0 if bent >= DAMPED * expected else (1.0 - DAMPED) * expected / (expected - bent)
            y = share * y + (1.0 - share) * Bs
            B = B - torch.outer(Bs, Bs) / expected + torch.outer(y, y) / (s @ y)
        if accepted:
            z, energy, gradient, b = v, energy_v, gradient_v, max(b / 2, 1.0)
        else:
            b = 2 * b
        if done:
            return z, taken
    return z, steps


def with_ridge(curvature: Tensor) -> Tensor:
    """curvature (m, m) + RIDGE * the mean of its diagonal * I; + I if that mean is not positive."""
    mean = curvature.diagonal().mean()
    return curvature + torch.where(mean > 0, RIDGE * mean, 1) * torch.eye(len(curvature)).to(curvature)


def model_minimum(z: Tensor, gradient: Tensor, B: Tensor, weight: float, low: float = -float("inf")) -> Tensor:
    """argmin_v gradient'(v - z) + (v - z)'B (v - z) / 2 + weight * |v|_1, v >= low, by coordinate descent from z."""
    v, slope = z.clone(), gradient.clone()
    for _ in range(SWEEPS):
        most = 0.0
        for k in range(len(z)):
            new = soft_threshold(v[k] - slope[k] / B[k, k], weight / B[k, k]).clamp(min=low)
            most = max(most, abs(float(new - v[k])))
            slope = slope + B[k] * (new - v[k])
            v[k] = new
        if most <= SETTLED * float(v.abs().max()):
            break
    return v
