"""The end of forward in all forms: joins the parts and adds up the three scalars of the loss.

Forward is three launches on one stream. The first (gram._whole, gram._tiles, covariance._covariance or _moments) finds
the moments and products of parts, `_finish` joins them, `_combine` adds up the scalars. These buffers lie in between.
S is N in Gram form and d in covariance form; a part is some features in Gram form and some samples in covariance form.

| buffer | shape, float32 | written by | read by | safe because |
|---|---|---|---|---|
| part_products | parts, T, S, pitch | the first | `_finish` | both use tiles on and above the diagonal only |
| sums | T, panels, parts * panels, tile | gram._tiles | `_finish` | each tile writes its rows and its columns once |
| part_means, part_squares | sample parts, T, d | the first | `_finish` | each entry has one writer |
| product, moments | see `Kept` | `_finish` | backward | one writer for a tile and its mirror image |
| hinges, norms | one number per program | `_finish` | `_combine` | each program writes its own |

A kernel that reads a buffer is launched after the one that writes it. Sums run in a fixed order, without atomics or
counters, so results repeat bit by bit.

Means are kept relative to the first sample of their time step, h[0, t, k], so that what is summed is of the size of
sigma. Parts of the batch are joined by the rule of Chan, Golub and LeVeque (1983), in which nothing cancels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.launch import Config, Kernel, ceil_div, workspace


class Weights(NamedTuple):
    """The loss is alpha * variance + beta * covariance, with the hinge's threshold and eps. `variance` and `covariance`
    say which terms are computed."""

    alpha: float
    beta: float
    threshold: float
    eps: float
    variance: bool = True
    covariance: bool = True


class Kept(NamedTuple):
    """What backward needs of h (N, T, d).

    moments: means, relative to the first sample of each time step, and squares, s: (2, T, d) float32.
    product: K (T, N, pitch) or A (T, d, d), in the dtype it is multiplied in; None without a penalty.
    """

    moments: Tensor
    product: Tensor | None = None


class Parts(NamedTuple):
    """What the first kernel found about parts of h, for `_finish`, flat. The table above has the shapes.

    sample_parts: of the means and squares, `rows` samples each. parts: of the product, which has `size` rows.
    """

    part_means: Tensor
    part_squares: Tensor
    sample_parts: int
    rows: int
    part_products: Tensor | None = None
    sums: Tensor | None = None
    parts: int = 0
    size: int = 0
    pitch: int = 0


class Forward(NamedTuple):
    """What forward finds for one tensor. hinges, norms: sums of hinges and of the penalty's terms, flat."""

    kept: Kept
    hinges: Tensor
    norms: Tensor


MERGED = 256  # features whose parts a program joins
AT_ONCE = tl.constexpr(8)  # parts that are loaded together, so that their loads do not wait for each other


# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def upper(p):
    """(i, j), i <= j, of the p-th tile on or above the diagonal of a matrix, column by column."""
    j = ((tl.sqrt_rn(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    return p - j * (j + 1) // 2, j


@triton.jit
def _parts(start, feature, inside, stride, parts, rows, n):
    """The next AT_ONCE parts of `rows` samples: offsets of their features (AT_ONCE, features), their mask, and how many
    samples each part has. stride: from part to part."""
    part = start + tl.arange(0, AT_ONCE)
    at = part[:, None] * stride + feature[None, :]
    return at, (part < parts)[:, None] & inside[None, :], tl.minimum(n - part * rows, rows).to(tl.float32)


@triton.jit
def _mean(part_means, feature, inside, stride, parts, rows, n):
    """The means of features over all samples, from those of the parts."""
    mean = tl.zeros(feature.shape, tl.float32)
    for start in range(0, parts, AT_ONCE):
        at, mask, count = _parts(start, feature, inside, stride, parts, rows, n)
        mean += tl.sum((count / n)[:, None] * tl.load(part_means + at, mask=mask, other=0.0), axis=0)
    return mean


@triton.jit
def _off(part_means, at, mask, mean):
    """How far the parts' means are from the mean of all."""
    return tl.where(mask, tl.load(part_means + at, mask=mask, other=0.0) - mean[None, :], 0.0)


@triton.jit
def _moments_of_parts(part_means, part_squares, feature, inside, stride, parts, rows, n):
    """Mean and s of features over all samples, from those of the parts."""
    mean = _mean(part_means, feature, inside, stride, parts, rows, n)
    square = tl.zeros(feature.shape, tl.float32)
    for start in range(0, parts, AT_ONCE):
        at, mask, count = _parts(start, feature, inside, stride, parts, rows, n)
        off = _off(part_means, at, mask, mean)
        square += tl.sum(tl.load(part_squares + at, mask=mask, other=0.0) + count[:, None] * off * off, axis=0)
    return mean, square


@Kernel
def _finish(
    part_means, part_squares, part_products, sums, moments, product, hinges, norms, parts, sample_parts, rows, n, steps,
    d, size, pitch, threshold, eps, GRAM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The end of forward. The first programs make the product, a tile each; the others join the moments.

    Product, if there is one: tile (i, j), i <= j, of K or A, and its mirror image; and the sum of their squares. In
    Gram form parts are added. With `sums`, the sums of XX' by row, K = JXX'J for J = 1 - 11'/N. In covariance form
    parts are centred over their own samples, which leaves out count * off_i off_j, where `off` is how far their means
    are from those of all samples. A's diagonal is zero.

    Moments: mean and s of BD features from parts of `rows` samples, and their sum of hinges; in Gram form also minus
    their sum of s^2, the diagonal that the penalty leaves out (gram.py).

    Bytes: 4 parts + 8 an entry of the product's upper half; 12 sample_parts + 8 a feature.
    """
    pid = tl.program_id(0)
    stride = tl.cast(steps, tl.int64) * d
    tiles = tl.cdiv(size, BT)
    pairs = tiles * (tiles + 1) // 2
    if pid < steps * pairs:
        if part_products is not None:
            at_once: tl.constexpr = 1 if GRAM else AT_ONCE
            t = pid // pairs
            i, j = upper(pid % pairs)
            inner = tl.arange(0, BT)
            r, c = i * BT + inner, j * BT + inner
            inside_r, inside_c = r < size, c < size
            at = r.to(tl.int64)[:, None] * pitch + c[None, :]
            mask = inside_r[:, None] & (c < pitch)[None, :]
            if not GRAM:
                feature_r, feature_c = t.to(tl.int64) * d + r, t.to(tl.int64) * d + c
                mean_r = _mean(part_means, feature_r, inside_r, stride, parts, rows, n)
                mean_c = _mean(part_means, feature_c, inside_c, stride, parts, rows, n)
            tile = tl.zeros((BT, BT), tl.float32)
            for start in range(0, parts, at_once):
                part = start + tl.arange(0, at_once)
                slot = (part.to(tl.int64) * steps + t)[:, None, None] * size * pitch
                there = (part < parts)[:, None, None] & mask[None, :, :]
                products = tl.load(part_products + slot + at[None, :, :], mask=there, other=0.0)
                if not GRAM:
                    at_r, mask_r, count = _parts(start, feature_r, inside_r, stride, parts, rows, n)
                    at_c, mask_c, count = _parts(start, feature_c, inside_c, stride, parts, rows, n)
                    off_r = _off(part_means, at_r, mask_r, mean_r)
                    off_c = _off(part_means, at_c, mask_c, mean_c)
                    products += (count[:, None] * off_r)[:, :, None] * off_c[:, None, :]
                tile += tl.sum(products, axis=0)
            if sums is not None:
                row_sum_i = tl.zeros((BT,), tl.float32)
                row_sum_j = tl.zeros((BT,), tl.float32)
                total = 0.0
                for a in range(tiles):
                    row_sum = tl.zeros((BT,), tl.float32)
                    for b in range(parts * tiles):
                        row_sum += tl.load(sums + ((t * tiles + a).to(tl.int64) * parts * tiles + b) * BT + inner)
                    total += tl.sum(row_sum)
                    row_sum_i += tl.where(a == i, row_sum, 0.0)
                    row_sum_j += tl.where(a == j, row_sum, 0.0)
                tile += total / n / n - (row_sum_i / n)[:, None] - (row_sum_j / n)[None, :]
            if not GRAM:
                tile = tl.where(r[:, None] == c[None, :], tile * 0.0, tile)  # NaN stays NaN
            tile = tl.where(inside_r[:, None] & inside_c[None, :], tile, 0.0)
            tl.store(norms + pid, tl.sum(tile * tile) * tl.where(i == j, 1.0, 2.0))
            to = product + t.to(tl.int64) * size * pitch
            tile = tile.to(product.dtype.element_ty)
            tl.store(to + at, tile, mask=mask)
            mirrored = inside_r[:, None] & inside_c[None, :] & (i != j)
            tl.store(to + c.to(tl.int64)[None, :] * pitch + r[:, None], tile, mask=mirrored)
    else:
        blocks = tl.cdiv(d, BD)
        block = pid - steps * pairs
        t = block // blocks
        cols = block % blocks * BD + tl.arange(0, BD)
        inside = cols < d
        feature = t.to(tl.int64) * d + cols
        mean, square = _moments_of_parts(part_means, part_squares, feature, inside, stride, sample_parts, rows, n)
        tl.store(moments + feature, mean, mask=inside)
        tl.store(moments + stride + feature, square, mask=inside)
        sigma = tl.sqrt_rn(square / (n - 1) + eps)
        hinge = tl.maximum(threshold - sigma, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(hinges + block, tl.sum(tl.where(inside, hinge, 0.0)))
        if GRAM:
            tl.store(norms + pid, -tl.sum(square * square))


@triton.jit
def total(values, count, BLOCK: tl.constexpr):
    """The sum of `count` float32 numbers in float64, in a fixed order."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(values + start + at, mask=start + at < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@Kernel
def _combine(
    loss, variance_term, covariance_term, hinges, norms, hinge_count, norm_count, alpha, beta, scale, square_scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The scalars (loss, variance, covariance) from the sums that programs left. A count of zero leaves a term out.
    scale: 1 / (T d); square_scale: 1 / (T d (N-1)^2). Bytes: 4 a sum."""
    variance = total(hinges, hinge_count, BLOCK) * scale
    covariance = total(norms, norm_count, BLOCK) * square_scale
    tl.store(loss, (alpha * variance + beta * covariance).to(tl.float32))
    tl.store(variance_term, variance.to(tl.float32))
    tl.store(covariance_term, covariance.to(tl.float32))


# -- Launchers ------------------------------------------------------------------------------------------------------

# By the rows and columns of a tile of the product.
FINISH = {tile: Config(8 if tile == 128 else 4, 1, 1, {"BT": tile, "BD": MERGED}) for tile in (16, 32, 64, 128)}
COMBINE = Config(4, 1, 1, {"BLOCK": 512})


def finish(
    h: Tensor, weights: Weights, parts: Parts, gram: bool = False, tile: int = 16, dtype: torch.dtype = torch.float32
) -> Forward:
    """Joins the parts of h (N, T, d). tile: the rows and columns of the product that a program makes, in `dtype`."""
    n, steps, d = h.shape
    tiles, blocks = ceil_div(parts.size, tile), ceil_div(d, MERGED)
    pairs = tiles * (tiles + 1) // 2
    moments, product = torch.empty(2, steps, d, dtype=torch.float32, device=h.device), None
    if parts.size:
        product = torch.empty(steps, parts.size, parts.pitch, dtype=dtype, device=h.device)
    hinges, norms = workspace(h.device, steps * blocks, steps * (pairs + blocks if gram else pairs))
    _finish.launch(
        FINISH[tile], steps * (pairs + blocks),
        **parts._asdict(), moments=moments, product=product, hinges=hinges, norms=norms, n=n, steps=steps, d=d,
        threshold=weights.threshold, eps=weights.eps, GRAM=gram,
    )  # fmt: skip
    kept = Kept(moments, product)
    return Forward(kept, hinges, norms)


def combine(found: list[Forward], weights: Weights, n: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scalars (loss, variance, covariance), float32, of all tensors of the loss. count: T d of all tensors."""
    hinges, norms = (_flat([getattr(one, name) for one in found]) for name in ("hinges", "norms"))
    loss, variance, covariance = (torch.empty((), dtype=torch.float32, device=hinges.device) for _ in range(3))
    _combine.launch(
        COMBINE, 1,
        loss=loss, variance_term=variance, covariance_term=covariance, hinges=hinges, norms=norms,
        hinge_count=hinges.numel() if weights.variance else 0, norm_count=norms.numel() if weights.covariance else 0,
        alpha=weights.alpha, beta=weights.beta, scale=1 / count, square_scale=1 / (count * (n - 1) ** 2),
    )  # fmt: skip
    return loss, variance, covariance


def _flat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
