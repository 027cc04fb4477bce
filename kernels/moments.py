"""Moments over the batch, the hinge and its gradient, and the three scalars of a loss.

    s_k = sum_n (h_nk - mean_k)^2,   sigma_k = sqrt(s_k / (N-1) + eps),   hinge_k = max(0, threshold - sigma_k)

Means are kept relative to the first sample of their time step, h[0, t, k]: what is summed is then of the size of sigma
even where the mean is 1e4 sigma. Parts of the batch are joined by the rule of Chan, Golub and LeVeque (1983), in which
nothing cancels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.launch import config, enough_parts, entry, launch, shape_class


class Weights(NamedTuple):
    """Of the loss: alpha * variance + beta * covariance, with the hinge's threshold and eps. `variance` and
    `covariance` say which terms are computed."""

    alpha: float
    beta: float
    threshold: float
    eps: float
    variance: bool = True
    covariance: bool = True


class Moments(NamedTuple):
    """means (from the first sample) and squares s, (T, d); sums of hinges and of s^2 of blocks of features, flat."""

    means: Tensor
    squares: Tensor
    hinges: Tensor
    fourths: Tensor


class Incoming(NamedTuple):
    """dL/dloss, dL/dvariance, dL/dcovariance: scalars, None for zero."""

    loss: Tensor | None
    variance: Tensor | None
    covariance: Tensor | None


MERGED = 256  # features a program joins
AT_ONCE = tl.constexpr(8)  # parts that are loaded before the first is needed: one after the other they would wait


# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def joined(mean, square, count, other_mean, other_square, more):
    """Mean, sum of squares about it, and count of two sets of samples together."""
    total = count + more
    delta = other_mean - mean
    return mean + delta * (more / total), square + other_square + delta * delta * (count * more / total), total


@triton.jit
def hinge_of(square, n, threshold, eps):
    """max(0, threshold - sigma)."""
    sigma = tl.sqrt_rn(square / (n - 1) + eps)
    return tl.maximum(threshold - sigma, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def hinge_slope(square, n, threshold, eps):
    """[sigma < threshold] / sigma."""
    sigma = tl.sqrt_rn(square / (n - 1) + eps)
    return tl.where(sigma >= threshold, 0.0, 1.0 / sigma)  # this way round NaN stays NaN


@triton.jit
def coefficient(g_loss, g_term, weight, scale):
    """scale * (weight * dL/dloss + dL/dterm); a pointer that is None counts as zero."""
    total = 0.0
    if g_loss is not None:
        total += tl.load(g_loss).to(tl.float32) * weight
    if g_term is not None:
        total += tl.load(g_term).to(tl.float32)
    return total * scale


@triton.jit
def upper(p):
    """(i, j), i <= j, of the p-th tile of a matrix on or above the diagonal, column by column."""
    j = ((tl.sqrt_rn(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    return p - j * (j + 1) // 2, j


@triton.jit
def parts_of(start, cols, inside, t, parts, rows, n, steps, d):
    """The next AT_ONCE parts of a time step: where they have `cols`, (AT_ONCE, features), which are there, and of how
    many samples each is."""
    part = start + tl.arange(0, AT_ONCE)
    at = (part.to(tl.int64) * steps + t)[:, None] * d + cols[None, :]
    return at, (part < parts)[:, None] & inside[None, :], tl.minimum(n - part * rows, rows).to(tl.float32)


@triton.jit
def mean_of_parts(part_means, cols, inside, t, parts, rows, n, steps, d, BD: tl.constexpr):
    """Means of BD features over all samples, from those of parts of `rows` samples."""
    mean = tl.zeros((BD,), tl.float32)
    for start in range(0, parts, AT_ONCE):
        at, mask, count = parts_of(start, cols, inside, t, parts, rows, n, steps, d)
        mean += tl.sum((count / n)[:, None] * tl.load(part_means + at, mask=mask, other=0.0), axis=0)
    return mean


@triton.jit
def merge(
    part_means, part_squares, means, squares, hinges, fourths, t, block, blocks, parts, rows, n, steps, d, threshold,
    eps, BD: tl.constexpr,
):  # fmt: skip
    """Joins `parts` parts of `rows` samples each, for BD features of one time step: their means and s, and the block's
    sums of hinges and of s^2. Bytes: 8 parts + 8 a feature, and 4 parts again from the cache."""
    cols = block * BD + tl.arange(0, BD)
    inside = cols < d
    mean = mean_of_parts(part_means, cols, inside, t, parts, rows, n, steps, d, BD)
    square = tl.zeros((BD,), tl.float32)
    for start in range(0, parts, AT_ONCE):
        at, mask, count = parts_of(start, cols, inside, t, parts, rows, n, steps, d)
        off = tl.where(mask, tl.load(part_means + at, mask=mask, other=0.0) - mean[None, :], 0.0)
        square += tl.sum(tl.load(part_squares + at, mask=mask, other=0.0) + count[:, None] * off * off, axis=0)
    to = t.to(tl.int64) * d + cols
    tl.store(means + to, mean, mask=inside)
    tl.store(squares + to, square, mask=inside)
    tl.store(hinges + t * blocks + block, tl.sum(tl.where(inside, hinge_of(square, n, threshold, eps), 0.0)))
    tl.store(fourths + t * blocks + block, tl.sum(square * square))


@entry
def _moments(
    h, part_means, part_squares, stride_n, stride_t, n, steps, d, rows, BN: tl.constexpr, BD: tl.constexpr,
    SHAPE,
):  # fmt: skip
    """Means and s of BD features over `rows` samples of one time step. Bytes: h once."""
    blocks = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BD + tl.arange(0, BD)
    t = (pid // blocks) % steps
    part = pid // (blocks * steps)
    inside = cols < d
    base = h + t.to(tl.int64) * stride_t + cols
    shift = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros((BD,), tl.float32)
    square = tl.zeros((BD,), tl.float32)
    count = 0.0
    last = tl.minimum(part * rows + rows, n)
    for start in range(part * rows, last, BN):
        at = start + tl.arange(0, BN)
        mask = (at < last)[:, None] & inside[None, :]
        x = tl.load(base[None, :] + at.to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - shift[None, :], 0.0)
        more = tl.minimum(last - start, BN).to(tl.float32)
        chunk = tl.sum(x, axis=0) / more
        z = tl.where(mask, x - chunk[None, :], 0.0)
        mean, square, count = joined(mean, square, count, chunk, tl.sum(z * z, axis=0), more)
    to = (part * steps + t).to(tl.int64) * d + cols
    tl.store(part_means + to, mean, mask=inside)
    tl.store(part_squares + to, square, mask=inside)


@entry
def _merge(
    part_means, part_squares, means, squares, hinges, fourths, parts, rows, n, steps, d, threshold, eps,
    BD: tl.constexpr,
):  # fmt: skip
    """`merge` alone."""
    blocks = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    merge(
        part_means, part_squares, means, squares, hinges, fourths, pid // blocks, pid % blocks, blocks, parts, rows, n,
        steps, d, threshold, eps, BD,
    )  # fmt: skip


@entry
def _hinge_gradient(
    h, means, squares, out, g_loss, g_variance, stride_n, stride_t, out_n, out_t, n, steps, d, alpha,
    threshold, eps, scale, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dZ = -a Z diag([sigma < threshold] / sigma), a = dL/dvariance / (T d (N-1)). Bytes: h once, the gradient once."""
    blocks, chunks = tl.cdiv(d, BD), tl.cdiv(n, BN)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BD + tl.arange(0, BD)
    rows = (pid // blocks) % chunks * BN + tl.arange(0, BN)
    t = (pid // (blocks * chunks)).to(tl.int64)
    inside = cols < d
    mask = (rows < n)[:, None] & inside[None, :]
    base = h + t * stride_t + cols
    at = t * d + cols
    shift = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + at, mask=inside, other=0.0)
    x = tl.load(base[None, :] + rows.to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    slope = hinge_slope(tl.load(squares + at, mask=inside, other=1.0), n, threshold, eps)
    slope *= -coefficient(g_loss, g_variance, alpha, scale)
    to = out + t * out_t + rows.to(tl.int64)[:, None] * out_n + cols[None, :]
    tl.store(to, ((x - shift[None, :] - mean[None, :]) * slope[None, :]).to(out.dtype.element_ty), mask=mask)


@entry
def _combine(
    loss, variance_term, covariance_term, hinges, fourths, norms, hinge_count, norm_count, alpha, beta, scale,
    square_scale, GRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(loss, variance, covariance) of sums over blocks, added in float64 in a fixed order. A pointer that is None
    stands for a term that is not asked for. scale: 1 / (T d); square_scale: 1 / (T d (N-1)^2)."""
    at = tl.arange(0, BLOCK)
    hinge = tl.zeros((BLOCK,), tl.float64)
    norm = tl.zeros((BLOCK,), tl.float64)
    if hinges is not None:
        for start in range(0, hinge_count, BLOCK):
            hinge += tl.load(hinges + start + at, mask=start + at < hinge_count, other=0.0).to(tl.float64)
    if norms is not None:
        for start in range(0, norm_count, BLOCK):
            norm += tl.load(norms + start + at, mask=start + at < norm_count, other=0.0).to(tl.float64)
        if GRAM:
            for start in range(0, hinge_count, BLOCK):
                norm -= tl.load(fourths + start + at, mask=start + at < hinge_count, other=0.0).to(tl.float64)
    variance = tl.sum(hinge) * scale
    covariance = tl.sum(norm) * square_scale
    tl.store(loss, (alpha * variance + beta * covariance).to(tl.float32))
    tl.store(variance_term, variance.to(tl.float32))
    tl.store(covariance_term, covariance.to(tl.float32))


@entry
def _scale(tensor, factor, elements, BLOCK: tl.constexpr):
    """tensor *= factor in place. Bytes: the tensor twice; none where factor is one."""
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(tensor + at, mask=at < elements, other=0.0)
        tl.store(tensor + at, (x.to(tl.float32) * by).to(tensor.dtype.element_ty), mask=at < elements)


# -- Launchers ------------------------------------------------------------------------------------------------------

MOMENTS = [config(4, 3, 4, BN=32, BD=128), config(4, 3, 4, BN=128, BD=32)]
HINGE_GRADIENT = [config(4, 1, 4, BN=32, BD=128)]
MERGE = [config(4, 1, 8, BD=MERGED)]
COMBINE = [config(4, 1, 1, BLOCK=512)]
SCALE = [config(4, 1, 8, BLOCK=4096)]


def moments(h: Tensor, weights: Weights) -> Moments:
    """Of h (N, T, d)."""
    n, steps, d = h.shape
    programs, cost = steps * triton.cdiv(d, 128), 8 / (n * h.element_size())
    parts = enough_parts(programs, n, 512, h.device, MOMENTS[0].blocks, cost)
    rows = triton.cdiv(n, parts)
    parts = triton.cdiv(n, rows)
    part_means = torch.empty(parts, steps, d, device=h.device)
    part_squares = torch.empty_like(part_means)
    found = empty_moments(h)
    launch(
        _moments, MOMENTS, lambda meta: parts * steps * triton.cdiv(d, meta["BD"]),
        h, part_means, part_squares, *h.stride()[:2], n, steps, d, rows, SHAPE=shape_class(n, steps, d),
    )  # fmt: skip
    launch(
        _merge, MERGE, lambda meta: steps * triton.cdiv(d, meta["BD"]),
        part_means, part_squares, *found, parts, rows, n, steps, d, weights.threshold, weights.eps,
    )  # fmt: skip
    return found


def empty_moments(h: Tensor) -> Moments:
    """To be filled by `merge`, of h (N, T, d)."""
    _, steps, d = h.shape
    means = torch.empty(steps, d, device=h.device)
    hinges = torch.empty(steps * triton.cdiv(d, MERGED), device=h.device)
    return Moments(means, torch.empty_like(means), hinges, torch.empty_like(hinges))


def hinge_gradient(
    h: Tensor, means: Tensor, squares: Tensor, out: Tensor, incoming: Incoming, weights: Weights, count: int
) -> None:
    """Into out, (N, T, d) of any strides. count: T d of all tensors of the loss."""
    n, steps, d = h.shape
    launch(
        _hinge_gradient, HINGE_GRADIENT,
        lambda meta: steps * triton.cdiv(d, meta["BD"]) * triton.cdiv(n, meta["BN"]),
        h, means, squares, out, incoming.loss, incoming.variance, *h.stride()[:2], *out.stride()[:2], n, steps, d,
        weights.alpha, weights.threshold, weights.eps, 1 / (count * (n - 1)),
    )  # fmt: skip


def combine(
    moments: list[Moments], norms: list[Tensor], weights: Weights, gram: bool, n: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The scalars (loss, variance, covariance), float32, of all tensors of the loss."""
    hinges, fourths = _flat([m.hinges for m in moments]), _flat([m.fourths for m in moments])
    norm = _flat(norms) if weights.covariance else None
    loss, variance, covariance = (torch.empty((), device=hinges.device) for _ in range(3))
    launch(
        _combine, COMBINE, lambda meta: 1,
        loss, variance, covariance, hinges if weights.variance else None, fourths, norm, hinges.numel(),
        0 if norm is None else norm.numel(), weights.alpha, weights.beta, 1 / count, 1 / (count * (n - 1) ** 2),
        GRAM=gram,
    )  # fmt: skip
    return loss, variance, covariance


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor, a scalar; tensor without holes or overlaps."""
    elements = tensor.numel()
    launch(_scale, SCALE, lambda meta: triton.cdiv(elements, meta["BLOCK"]), tensor, factor, elements)


def _flat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
