"""The covariance penalty of a batch that is smaller than its features, through the Gram matrix: N <= 1024.

For one time step with Z (N, d), centred over the batch, and K = ZZ' (N, N):

    sum_{i != j} C_ij^2 = (||K||^2 - sum_k s_k^2) / (N-1)^2
    dZ = b (K Z - Z diag(s)) - a Z diag([sigma < threshold] / sigma)

    a = dL/dvariance / (T d (N-1)),   b = 4 dL/dcovariance / (T d (N-1)^2)

`_gram` reads h once: it subtracts the time step's first sample, multiplies tiles on and above the diagonal over its
part of the features, and keeps the moments of the samples it passes. `_finish` adds the parts, centres K twice (the
rows' mean, the columns' mean), squares it, and joins the moments. `_gradient` is one product with the rest in its
epilogue; it goes through time backwards, so that it starts on what the forward pass left in the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.launch import (
    Config,
    Mode,
    config,
    enough_parts,
    launch,
    mode_of,
    operand_dtype,
    precision,
    shape_class,
)
from vjvcr_fast.kernels.moments import (
    MERGED,
    Incoming,
    Moments,
    Weights,
    coefficient,
    empty_moments,
    hinge_slope,
    merge,
)

MOST_SAMPLES = 1024  # beyond it the library's product of N x N matrices is the better one

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def _upper(p):
    """(i, j), i <= j, of the p-th tile on or above the diagonal, column by column."""
    j = ((tl.sqrt_rn(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    return p - j * (j + 1) // 2, j


@triton.jit
def _gram(
    h, tiles, sums, part_means, part_squares, stride_n, stride_t, stride_d, n, steps, d, width, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of XX' over `width` features of one time step, X = h less its first sample, with its sums by row and
    column; programs on the diagonal also write mean and s of their BN samples.

    Bytes: h once from memory, (panels + 1) / 2 times more from the cache; BN^2 (1 + 1/BN) x 4 a tile.
    """
    panels = tl.cdiv(n, BN)
    pairs = panels * (panels + 1) // 2
    pid = tl.program_id(0)
    pair = pid % pairs
    i, j = _upper(pair)
    t = (pid // pairs) % steps
    part = pid // (pairs * steps)
    rows_i, rows_j = i * BN + tl.arange(0, BN), j * BN + tl.arange(0, BN)
    base = h + t.to(tl.int64) * stride_t
    at_i = base + rows_i.to(tl.int64)[:, None] * stride_n
    at_j = base + rows_j.to(tl.int64)[:, None] * stride_n
    count = tl.minimum(n - i * BN, BN).to(tl.float32)
    last = tl.minimum(part * width + width, d)
    product = tl.zeros((BN, BN), tl.float32)
    for k in range(part * width, last, BK):
        cols = k + tl.arange(0, BK)
        inside = cols < last
        offset = cols.to(tl.int64) * stride_d
        mask_i, mask_j = (rows_i < n)[:, None] & inside[None, :], (rows_j < n)[:, None] & inside[None, :]
        shift = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32)
        x_i = tl.load(at_i + offset[None, :], mask=mask_i, other=0.0).to(tl.float32)
        x_j = tl.load(at_j + offset[None, :], mask=mask_j, other=0.0).to(tl.float32)
        x_i = tl.where(mask_i, x_i - shift[None, :], 0.0)
        x_j = tl.where(mask_j, x_j - shift[None, :], 0.0)
        product = tl.dot(x_i.to(DTYPE), tl.trans(x_j.to(DTYPE)), product, input_precision=PRECISION)
        if i == j:
            mean = tl.sum(x_i, axis=0) / count
            z = tl.where(mask_i, x_i - mean[None, :], 0.0)
            to = (i * steps + t).to(tl.int64) * d + cols
            tl.store(part_means + to, mean, mask=inside)
            tl.store(part_squares + to, tl.sum(z * z, axis=0), mask=inside)
    inner = tl.arange(0, BN)
    slot = (part * steps + t).to(tl.int64)
    tl.store(tiles + (slot * pairs + pair) * BN * BN + inner[:, None] * BN + inner[None, :], product)
    to = sums + slot * panels * panels * BN + inner
    tl.store(to + (i * panels + j) * BN, tl.sum(product, axis=1))
    if i != j:
        tl.store(to + (j * panels + i) * BN, tl.sum(product, axis=0))


@triton.jit
def _centre(tiles, sums, product, norms, t, pair, parts, n, steps, BN: tl.constexpr):
    """Tile (i, j) of K = JXX'J, J = 1 - 11'/N, from the parts of XX' and their sums; both triangles are written, and
    the sum of squares that the tile stands for. Bytes: 4 parts + 8 an entry."""
    panels = tl.cdiv(n, BN)
    pairs = panels * (panels + 1) // 2
    i, j = _upper(pair)
    inner = tl.arange(0, BN)
    tile = tl.zeros((BN, BN), tl.float32)
    row_sum_i = tl.zeros((BN,), tl.float32)
    row_sum_j = tl.zeros((BN,), tl.float32)
    total = 0.0
    for part in range(parts):
        slot = (part * steps + t).to(tl.int64)
        tile += tl.load(tiles + (slot * pairs + pair) * BN * BN + inner[:, None] * BN + inner[None, :])
        for a in range(panels):
            row_sums = tl.zeros((BN,), tl.float32)
            for b in range(panels):
                row_sums += tl.load(sums + (slot * panels * panels + a * panels + b) * BN + inner)
            total += tl.sum(row_sums)
            row_sum_i += tl.where(a == i, row_sums, 0.0)
            row_sum_j += tl.where(a == j, row_sums, 0.0)
    rows_i, rows_j = i * BN + inner, j * BN + inner
    mask = (rows_i < n)[:, None] & (rows_j < n)[None, :]
    tile += total / n / n - (row_sum_i / n)[:, None] - (row_sum_j / n)[None, :]
    tile = tl.where(mask, tile, 0.0)
    tl.store(norms + t * pairs + pair, tl.sum(tile * tile) * tl.where(i == j, 1.0, 2.0))
    to = product + t.to(tl.int64) * n * n
    tile = tile.to(product.dtype.element_ty)
    tl.store(to + rows_i.to(tl.int64)[:, None] * n + rows_j[None, :], tile, mask=mask)
    tl.store(to + rows_j.to(tl.int64)[None, :] * n + rows_i[:, None], tile, mask=mask & (i != j))


@triton.jit
def _finish(
    tiles, sums, product, norms, part_means, part_squares, means, squares, hinges, fourths, parts, n, steps, d,
    threshold, eps, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`_centre` on every tile and `merge` on every block of features: one launch for both."""
    panels = tl.cdiv(n, BN)
    pairs = panels * (panels + 1) // 2
    pid = tl.program_id(0)
    if pid < steps * pairs:
        _centre(tiles, sums, product, norms, pid // pairs, pid % pairs, parts, n, steps, BN)
    else:
        blocks = tl.cdiv(d, BD)
        pid -= steps * pairs
        merge(
            part_means, part_squares, means, squares, hinges, fourths, pid // blocks, pid % blocks, blocks, panels, BN,
            n, steps, d, threshold, eps, BD,
        )  # fmt: skip


@triton.jit
def _gradient(
    h, product, means, squares, out, g_loss, g_variance, g_covariance, stride_n, stride_t, stride_d, out_n, out_t,
    out_d, n, steps, d, alpha, beta, threshold, eps, hinge_scale, penalty_scale, BC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, HINGE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """dZ for BN samples and BC features of one time step, transposed: (Z'K)[BC, BN], so that the operand that needs
    arithmetic, Z, is the one that may lie in registers, and K goes to shared memory as it is.

    Bytes: h once from memory and N / BN times from the cache, K as often as there are blocks of features, the
    gradient once.
    """
    panels, blocks = tl.cdiv(n, BN), tl.cdiv(d, BC)
    pid = tl.program_id(0)
    t = (steps - 1 - pid // (panels * blocks)).to(tl.int64)
    cols = (pid // panels) % blocks * BC + tl.arange(0, BC)
    rows = (pid % panels) * BN + tl.arange(0, BN)
    inside = cols < d
    base = h + t * stride_t + cols.to(tl.int64) * stride_d
    at = t * d + cols
    shift = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + at, mask=inside, other=0.0)
    product += t * n * n
    gradient = tl.zeros((BC, BN), tl.float32)
    for k in range(0, n, BK):
        ks = k + tl.arange(0, BK)
        mask = inside[:, None] & (ks < n)[None, :]
        x = tl.load(base[:, None] + ks.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0).to(tl.float32)
        z = tl.where(mask, x - shift[:, None] - mean[:, None], 0.0)
        mask = (rows < n)[:, None] & (ks < n)[None, :]
        K = tl.load(product + rows.to(tl.int64)[:, None] * n + ks[None, :], mask=mask, other=0.0)
        gradient = tl.dot(z.to(DTYPE), tl.trans(K), gradient, input_precision=PRECISION)
    b = coefficient(g_loss, g_covariance, beta, penalty_scale)
    s = tl.load(squares + at, mask=inside, other=1.0)
    diagonal = b * s
    if HINGE:
        diagonal += coefficient(g_loss, g_variance, alpha, hinge_scale) * hinge_slope(s, n, threshold, eps)
    mask = inside[:, None] & (rows < n)[None, :]
    x = tl.load(base[:, None] + rows.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0).to(tl.float32)
    gradient = b * gradient - diagonal[:, None] * (x - shift[:, None] - mean[:, None])
    to = out + t * out_t + cols.to(tl.int64)[:, None] * out_d + rows.to(tl.int64)[None, :] * out_n
    tl.store(to, gradient.to(out.dtype.element_ty), mask=mask)


# -- Launchers ------------------------------------------------------------------------------------------------------


class Gram(NamedTuple):
    """K (T, N, N) in the dtype its product with Z is made in, the moments, and the sums of K^2 of tiles, flat."""

    product: Tensor
    moments: Moments
    norms: Tensor


def panel(n: int) -> int:
    """Samples of a tile of K."""
    return 16 if n <= 16 else 32 if n <= 32 else 64 if n <= 192 else 128


# By precision and panel. The operands of tf32x3 take twice the registers and shared memory.
GRAM: dict[tuple[Mode, int], list[Config]] = {
    **{(mode, bn): [config(4, 3, 2, BK=64)] for mode in ("bf16", "tf32") for bn in (16, 32)},
    **{("tf32x3", bn): [config(4, 3, 2, BK=32)] for bn in (16, 32)},
    ("bf16", 64): [config(4, 4, 2, BK=64), config(4, 3, 2, BK=128, archs=(90,))],
    ("bf16", 128): [config(8, 4, 2, BK=32), config(8, 3, 1, BK=64)],
    ("tf32", 64): [config(4, 4, 2, BK=32), config(4, 3, 2, BK=64, archs=(90,))],
    ("tf32", 128): [config(8, 3, 1, BK=32), config(8, 4, 1, BK=32, archs=(90,))],
    ("tf32x3", 64): [config(4, 3, 2, BK=32), config(8, 3, 1, BK=64, archs=(90,))],
    ("tf32x3", 128): [config(8, 3, 1, BK=32)],
}
FINISH: dict[int, list[Config]] = {
    bn: [config(8 if bn == 128 else 4, 1, 1, BN=bn, BD=MERGED)] for bn in (16, 32, 64, 128)
}
GRADIENT: dict[tuple[Mode, int], list[Config]] = {
    **{(mode, bn): [config(4, 3, 2, BC=64, BN=bn, BK=32)] for mode in ("bf16", "tf32", "tf32x3") for bn in (16, 32)},
    **{
        (mode, 64): [config(4, 3, 2, BC=128, BN=64, BK=32), config(8, 3, 1, BC=128, BN=128, BK=32)]
        for mode in ("bf16", "tf32", "tf32x3")
    },
    **{
        (mode, 128): [config(8, 3, 1, BC=128, BN=128, BK=32), config(8, 3, 1, BC=64, BN=256, BK=32)]
        for mode in ("bf16", "tf32", "tf32x3")
    },
}


def gram(h: Tensor, weights: Weights) -> Gram:
    """Of h (N, T, d), N <= MOST_SAMPLES."""
    n, steps, d = h.shape
    mode, bn = mode_of(h), panel(n)
    panels = triton.cdiv(n, bn)
    pairs = panels * (panels + 1) // 2
    parts = enough_parts(steps * pairs, d, 256, h.device)
    width = triton.cdiv(triton.cdiv(d, parts), 128) * 128  # whole blocks of features
    parts = triton.cdiv(d, width)
    tiles = torch.empty(parts, steps, pairs, bn, bn, device=h.device)
    sums = torch.empty(parts, steps, panels, panels, bn, device=h.device)
    part_means = torch.empty(panels, steps, d, device=h.device)
    part_squares = torch.empty_like(part_means)
    launch(
        _gram, GRAM[mode, bn], lambda meta: parts * steps * pairs,
        h, tiles, sums, part_means, part_squares, *h.stride(), n, steps, d, width, BN=bn, **precision(mode),
        SHAPE=shape_class(n, steps, d),
    )  # fmt: skip
    product = torch.empty(steps, n, n, dtype=operand_dtype(mode), device=h.device)
    norms = torch.empty(steps * pairs, device=h.device)
    moments = empty_moments(h)
    launch(
        _finish, FINISH[bn], lambda meta: steps * (pairs + triton.cdiv(d, meta["BD"])),
        tiles, sums, product, norms, part_means, part_squares, *moments, parts, n, steps, d, weights.threshold,
        weights.eps,
    )  # fmt: skip
    return Gram(product, moments, norms)


def gradient(
    h: Tensor, product: Tensor, means: Tensor, squares: Tensor, out: Tensor, incoming: Incoming, weights: Weights,
    count: int,
) -> None:  # fmt: skip
    """dL/dh into out, (N, T, d) of any strides. count: T d of all tensors of the loss."""
    n, steps, d = h.shape
    mode: Mode = "bf16" if product.dtype == torch.bfloat16 else mode_of(h)
    launch(
        _gradient, GRADIENT[mode, panel(n)],
        lambda meta: steps * triton.cdiv(d, meta["BC"]) * triton.cdiv(n, meta["BN"]),
        h, product, means, squares, out, *incoming, *h.stride(), *out.stride(), n, steps, d, weights.alpha,
        weights.beta, weights.threshold, weights.eps, 1 / (count * (n - 1)), 4 / (count * (n - 1) ** 2),
        **precision(mode), HINGE=weights.variance, SHAPE=shape_class(n, steps, d),
    )  # fmt: skip
