"""The covariance penalty of a batch that is smaller than its features, through the Gram matrix: N <= 1024.

For one time step with Z (N, d), centred over the batch, and K = ZZ' (N, N):

    sum_{i != j} C_ij^2 = (||K||^2 - sum_k s_k^2) / (N-1)^2
    dZ = b (K Z - Z diag(s)) - a Z diag([sigma < threshold] / sigma)

    a = dL/dvariance / (T d (N-1)),   b = 4 dL/dcovariance / (T d (N-1)^2)

Three launches. The first reads h once, each program a part of the features, and writes their part of K and their
moments: up to 160 samples `_whole`, in which a program sees all samples and centres them before it multiplies; beyond
it `_tiles`, in which a program sees two panels of samples, subtracts the time step's first sample, and leaves it to
the second launch to centre K by its sums over rows and columns. That one, `_finish`, adds the parts of K, centres and
squares. The third, `_gradient`, is one product with the rest in its epilogue; it goes through time backwards, so that
it starts on what the forward pass left in the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.launch import (
    SUMMED,
    Config,
    Mode,
    architecture,
    config,
    enough_parts,
    entry,
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
    upper,
)

MOST_SAMPLES = 1024  # beyond it the library's product of N x N matrices is the better one

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def _shifted(base, rows, cols, stride_n, shift, mask):
    """Samples less the first one, float32; zero outside the mask."""
    x = tl.load(base + rows.to(tl.int64)[:, None] * stride_n + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - shift[None, :], 0.0)


@triton.jit
def _store(part_products, rows, cols, n, pitch, tile):
    """A tile of one part of K, zero beyond n."""
    to = part_products + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    tl.store(to, tile, mask=(rows < n)[:, None] & (cols < pitch)[None, :])


@entry
def _whole(
    h, part_products, means, squares, stride_n, stride_t, n, steps, d, pitch, width, parts,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    SHAPE,
):  # fmt: skip
    """K of all n <= BN + BM samples over `width` features of one time step, whose mean and s are written.
    Bytes: h once; 4 an entry of K's upper triangle."""
    pid = tl.program_id(0)
    t, part = pid // parts, pid % parts
    base = h + t.to(tl.int64) * stride_t
    rows = tl.arange(0, BN)
    product = tl.zeros((BN, BN), tl.float32)
    if BM:
        more = BN + tl.arange(0, BM)
        beside = tl.zeros((BN, BM), tl.float32)
        below = tl.zeros((BM, BM), tl.float32)
    last = tl.minimum(part * width + width, d)
    for k in range(part * width, last, BK):
        cols = k + tl.arange(0, BK)
        inside = cols < last
        shift = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
        mask = (rows < n)[:, None] & inside[None, :]
        z = _shifted(base, rows, cols, stride_n, shift, mask)
        mean = tl.sum(z, axis=0)
        if BM:
            mask_more = (more < n)[:, None] & inside[None, :]
            z_more = _shifted(base, more, cols, stride_n, shift, mask_more)
            mean += tl.sum(z_more, axis=0)
        mean = mean / n
        z = tl.where(mask, z - mean[None, :], 0.0)
        square = tl.sum(z * z, axis=0)
        left = z.to(DTYPE)
        product = tl.dot(left, tl.trans(left), product, input_precision=PRECISION)
        if BM:
            z_more = tl.where(mask_more, z_more - mean[None, :], 0.0)
            square += tl.sum(z_more * z_more, axis=0)
            right = z_more.to(DTYPE)
            beside = tl.dot(left, tl.trans(right), beside, input_precision=PRECISION)
            below = tl.dot(right, tl.trans(right), below, input_precision=PRECISION)
        to = t.to(tl.int64) * d + cols
        tl.store(means + to, mean, mask=inside)
        tl.store(squares + to, square, mask=inside)
    part_products += (part * steps + t).to(tl.int64) * n * pitch
    _store(part_products, rows, rows, n, pitch, product)
    if BM:
        _store(part_products, rows, more, n, pitch, beside)
        _store(part_products, more, more, n, pitch, below)


@entry
def _tiles(
    h, part_products, sums, part_means, part_squares, stride_n, stride_t, n, steps, d, pitch, width,
    BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, SHAPE,
):  # fmt: skip
    """Tile (i, j) of XX' over `width` features of one time step, X = h less its first sample, with its sums by row and
    column; programs on the diagonal also write mean and s of their BN samples.

    Bytes: h once from memory, N / BN times more from the cache; 4 an entry of K's upper triangle.
    """
    panels = tl.cdiv(n, BN)
    pairs = panels * (panels + 1) // 2
    pid = tl.program_id(0)
    pair = pid % pairs
    i, j = upper(pair)
    t = (pid // pairs) % steps
    part = pid // (pairs * steps)
    rows_i, rows_j = i * BN + tl.arange(0, BN), j * BN + tl.arange(0, BN)
    base = h + t.to(tl.int64) * stride_t
    count = tl.minimum(n - i * BN, BN).to(tl.float32)
    last = tl.minimum(part * width + width, d)
    product = tl.zeros((BN, BN), tl.float32)
    for k in range(part * width, last, BK):
        cols = k + tl.arange(0, BK)
        inside = cols < last
        mask_i, mask_j = (rows_i < n)[:, None] & inside[None, :], (rows_j < n)[:, None] & inside[None, :]
        shift = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
        x_i = _shifted(base, rows_i, cols, stride_n, shift, mask_i)
        x_j = _shifted(base, rows_j, cols, stride_n, shift, mask_j)
        product = tl.dot(x_i.to(DTYPE), tl.trans(x_j.to(DTYPE)), product, input_precision=PRECISION)
        if i == j:
            mean = tl.sum(x_i, axis=0) / count
            z = tl.where(mask_i, x_i - mean[None, :], 0.0)
            to = (i * steps + t).to(tl.int64) * d + cols
            tl.store(part_means + to, mean, mask=inside)
            tl.store(part_squares + to, tl.sum(z * z, axis=0), mask=inside)
    slot = (part * steps + t).to(tl.int64)
    _store(part_products + slot * n * pitch, rows_i, rows_j, n, pitch, product)
    to_sums = sums + slot * panels * panels * BN + tl.arange(0, BN)
    tl.store(to_sums + (i * panels + j) * BN, tl.sum(product, axis=1))
    if i != j:
        tl.store(to_sums + (j * panels + i) * BN, tl.sum(product, axis=0))


@entry
def _finish(
    part_products, sums, product, norms, part_means, part_squares, means, squares, hinges, fourths, parts, rows, n,
    steps, d, pitch, threshold, eps, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Tile (i, j) of K from its parts, both triangles, and the sum of squares that it stands for; with the sums of rows
    that `_tiles` made, K = JXX'J, J = 1 - 11'/N. Programs beyond the tiles `merge` the moments of panels of `rows`
    samples, a block of BD features each. Bytes: 4 parts + 8 an entry."""
    panels = tl.cdiv(n, BN)
    pairs = panels * (panels + 1) // 2
    pid = tl.program_id(0)
    if pid < steps * pairs:
        t, pair = pid // pairs, pid % pairs
        i, j = upper(pair)
        inner = tl.arange(0, BN)
        rows_i, rows_j = i * BN + inner, j * BN + inner
        mask = (rows_i < n)[:, None] & (rows_j < pitch)[None, :]
        at = rows_i.to(tl.int64)[:, None] * pitch + rows_j[None, :]
        tile = tl.zeros((BN, BN), tl.float32)
        for part in range(parts):
            tile += tl.load(part_products + (part * steps + t).to(tl.int64) * n * pitch + at, mask=mask, other=0.0)
        if sums is not None:
            row_sum_i = tl.zeros((BN,), tl.float32)
            row_sum_j = tl.zeros((BN,), tl.float32)
            total = 0.0
            for part in range(parts):
                slot = (part * steps + t).to(tl.int64)
                for a in range(panels):
                    row_sums = tl.zeros((BN,), tl.float32)
                    for b in range(panels):
                        row_sums += tl.load(sums + (slot * panels * panels + a * panels + b) * BN + inner)
                    total += tl.sum(row_sums)
                    row_sum_i += tl.where(a == i, row_sums, 0.0)
                    row_sum_j += tl.where(a == j, row_sums, 0.0)
            tile += total / n / n - (row_sum_i / n)[:, None] - (row_sum_j / n)[None, :]
            tile = tl.where((rows_i < n)[:, None] & (rows_j < n)[None, :], tile, 0.0)
        tl.store(norms + pid, tl.sum(tile * tile) * tl.where(i == j, 1.0, 2.0))
        to = product + t.to(tl.int64) * n * pitch
        tile = tile.to(product.dtype.element_ty)
        tl.store(to + at, tile, mask=mask)
        mask = (rows_i < n)[:, None] & (rows_j < n)[None, :] & (i != j)
        tl.store(to + rows_j.to(tl.int64)[None, :] * pitch + rows_i[:, None], tile, mask=mask)
    else:
        blocks = tl.cdiv(d, BD)
        pid -= steps * pairs
        merge(
            part_means, part_squares, means, squares, hinges, fourths, pid // blocks, pid % blocks, blocks,
            tl.cdiv(n, rows), rows, n, steps, d, threshold, eps, BD,
        )  # fmt: skip


@entry
def _gradient(
    h, product, means, squares, out, g_loss, g_variance, g_covariance, stride_n, stride_t, out_n, out_t, n, steps, d,
    pitch, alpha, beta, threshold, eps, hinge_scale, penalty_scale, BC: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, HINGE: tl.constexpr, SHAPE,
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
    base = h + t * stride_t + cols
    at = t * d + cols
    shift = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + at, mask=inside, other=0.0)
    product += t * n * pitch
    gradient = tl.zeros((BC, BN), tl.float32)
    for k in range(0, n, BK):
        ks = k + tl.arange(0, BK)
        mask = inside[:, None] & (ks < n)[None, :]
        x = tl.load(base[:, None] + ks.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0).to(tl.float32)
        z = tl.where(mask, x - shift[:, None] - mean[:, None], 0.0)
        mask = (rows < n)[:, None] & (ks < pitch)[None, :]
        K = tl.load(product + rows.to(tl.int64)[:, None] * pitch + ks[None, :], mask=mask, other=0.0)
        gradient = tl.dot(z.to(DTYPE), tl.trans(K), gradient, input_precision=PRECISION)
    b = coefficient(g_loss, g_covariance, beta, penalty_scale)
    s = tl.load(squares + at, mask=inside, other=1.0)
    diagonal = b * s
    if HINGE:
        diagonal += coefficient(g_loss, g_variance, alpha, hinge_scale) * hinge_slope(s, n, threshold, eps)
    mask = inside[:, None] & (rows < n)[None, :]
    x = tl.load(base[:, None] + rows.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0).to(tl.float32)
    gradient = b * gradient - diagonal[:, None] * (x - shift[:, None] - mean[:, None])
    to = out + t * out_t + cols[:, None] + rows.to(tl.int64)[None, :] * out_n
    tl.store(to, gradient.to(out.dtype.element_ty), mask=mask)


# -- Launchers ------------------------------------------------------------------------------------------------------


class Gram(NamedTuple):
    """K (T, N, pitch(N)), zero beyond its N columns, in the dtype its product with Z is made in; the moments; and the
    sums of K^2 of tiles, flat."""

    product: Tensor
    moments: Moments
    norms: Tensor


_MODES: tuple[Mode, ...] = ("bf16", "tf32", "tf32x3")
# Samples of `_whole`'s two panels: the first pair that holds all.
PANELS = [(16, 0), (32, 0), (64, 0), (64, 32), (64, 64), (128, 32)]
WHOLE: dict[tuple[Mode, tuple[int, int]], list[Config]] = {
    **{(mode, (16, 0)): [config(4, 3, 2, BK=32)] for mode in _MODES},
    **{(mode, (32, 0)): [config(4, 2, 2, BK=32)] for mode in _MODES},
    ("bf16", (64, 0)): [config(4, 3, 2, BK=64)],
    ("tf32", (64, 0)): [config(4, 3, 2, BK=64)],
    ("tf32x3", (64, 0)): [config(4, 2, 2, BK=32)],
    ("bf16", (64, 32)): [config(8, 3, 1, BK=32), config(8, 3, 1, BK=64)],
    ("tf32", (64, 32)): [config(8, 2, 1, BK=32), config(8, 3, 1, BK=64, archs=(90,))],
    ("tf32x3", (64, 32)): [config(4, 2, 2, BK=16, archs=(90,)), config(8, 3, 1, BK=16, archs=(90,))],
    ("bf16", (64, 64)): [config(8, 3, 1, BK=32), config(4, 2, 2, BK=32)],
    ("tf32", (64, 64)): [config(8, 2, 1, BK=32), config(8, 3, 1, BK=64, archs=(90,))],
    ("tf32x3", (64, 64)): [config(8, 3, 1, BK=16, archs=(90,)), config(8, 2, 1, BK=16, archs=(90,))],
    ("bf16", (128, 32)): [config(8, 3, 1, BK=32), config(8, 2, 1, BK=16)],
    ("tf32", (128, 32)): [config(8, 2, 1, BK=16), config(8, 3, 1, BK=32, archs=(90,))],
    ("tf32x3", (128, 32)): [config(8, 2, 1, BK=16, archs=(90,))],
}
TILE = 128  # samples of a panel of `_tiles`
TILES: dict[tuple[Mode, int], list[Config]] = {
    ("bf16", TILE): [config(8, 3, 1, BK=32), config(8, 4, 1, BK=32)],
    ("tf32", TILE): [config(8, 2, 1, BK=32), config(8, 3, 1, BK=32, archs=(90,))],
    ("tf32x3", TILE): [config(8, 3, 1, BK=16, archs=(90,))],
    ("tf32x3", 64): [config(4, 3, 2, BK=16, archs=(80,)), config(8, 3, 1, BK=32, archs=(80,))],
}
FINISH: dict[int, list[Config]] = {
    bn: [config(8 if bn == 128 else 4, 1, 1, BN=bn, BD=MERGED)] for bn in (16, 32, 64, TILE)
}
GRADIENT: dict[tuple[Mode, int], list[Config]] = {
    **{(mode, bn): [config(4, 2, 2, BC=64, BN=bn, BK=32)] for mode in _MODES for bn in (16, 32)},
    **{
        (mode, 64): [config(8, 3, 1, BC=128, BN=64, BK=32), config(8, 3, 1, aligned=True, BC=128, BN=128, BK=16)]
        for mode in _MODES
    },
    **{
        (mode, 128): [config(8, 3, 1, BC=64, BN=128, BK=32), config(8, 3, 1, aligned=True, BC=128, BN=128, BK=16)]
        for mode in _MODES
    },
}


def gram(h: Tensor, weights: Weights) -> Gram:
    """Of h (N, T, d), N <= MOST_SAMPLES."""
    n, steps, d = h.shape
    mode = mode_of(h)
    # Before Hopper larger tiles of split operands do not fit the registers.
    narrow = mode == "tf32x3" and architecture(h.device) < 90
    panels = next((p for p in (PANELS[:3] if narrow else PANELS) if n <= sum(p)), None)
    tile = min(panels[0], 64) if panels else 64 if narrow else TILE
    pairs = _pairs(n, tile)
    table = WHOLE[mode, panels] if panels else TILES[mode, tile]
    # A part of K, its upper half in float32, over the samples, which every pair of tiles reads.
    cost = 2 * n / (d * h.element_size())
    parts = enough_parts(steps if panels else steps * pairs, d, 128, h.device, table[0].blocks, cost)
    if mode == "tf32x3":
        parts = max(parts, triton.cdiv(d, SUMMED))
    width = 64 * triton.cdiv(d, 64 * parts)
    parts = triton.cdiv(d, width)
    rows = n if panels else tile
    part_products = torch.empty(parts, steps, n, pitch(n), device=h.device)
    part_means = torch.empty(triton.cdiv(n, rows), steps, d, device=h.device)
    part_squares = torch.empty_like(part_means)
    sums = None if panels else torch.empty(parts, steps, triton.cdiv(n, tile) ** 2, tile, device=h.device)
    common: dict[str, object] = {**precision(mode), "SHAPE": shape_class(n, steps, d)}
    if panels:
        launch(
            _whole, table, lambda meta: steps * parts,
            h, part_products, part_means, part_squares, *h.stride()[:2], n, steps, d, pitch(n), width, parts,
            BN=panels[0], BM=panels[1], **common,
        )  # fmt: skip
    else:
        launch(
            _tiles, table, lambda meta: steps * parts * pairs,
            h, part_products, sums, part_means, part_squares, *h.stride()[:2], n, steps, d, pitch(n), width, BN=tile,
            **common,
        )  # fmt: skip
    product = torch.empty(steps, n, pitch(n), dtype=operand_dtype(mode), device=h.device)
    norms = torch.empty(steps * pairs, device=h.device)
    moments = empty_moments(h)
    launch(
        _finish, FINISH[tile], lambda meta: steps * (pairs + triton.cdiv(d, meta["BD"])),
        part_products, sums, product, norms, part_means, part_squares, *moments, parts, rows, n, steps, d, pitch(n),
        weights.threshold, weights.eps,
    )  # fmt: skip
    return Gram(product, moments, norms)


def pitch(n: int) -> int:
    """From row to row of K: rows that begin at multiples of 16 are read 16 bytes at a time whatever n is."""
    return 16 * ((n + 15) // 16)


def _pairs(n: int, tile: int) -> int:
    """Tiles on and above the diagonal of K."""
    panels = triton.cdiv(n, tile)
    return panels * (panels + 1) // 2


def _panel(n: int) -> int:
    """Samples of a block of the gradient."""
    return 16 if n <= 16 else 32 if n <= 32 else 64 if n <= 192 else 128


def gradient(
    h: Tensor, product: Tensor, means: Tensor, squares: Tensor, out: Tensor, incoming: Incoming, weights: Weights,
    count: int,
) -> None:  # fmt: skip
    """dL/dh into out, (N, T, d) of any strides. count: T d of all tensors of the loss."""
    n, steps, d = h.shape
    mode: Mode = "bf16" if product.dtype == torch.bfloat16 else mode_of(h)
    launch(
        _gradient, GRADIENT[mode, _panel(n)],
        lambda meta: steps * triton.cdiv(d, meta["BC"]) * triton.cdiv(n, meta["BN"]),
        h, product, means, squares, out, *incoming, *h.stride()[:2], *out.stride()[:2], n, steps, d, pitch(n),
        weights.alpha, weights.beta, weights.threshold, weights.eps, 1 / (count * (n - 1)),
        4 / (count * (n - 1) ** 2),
        **precision(mode), HINGE=weights.variance, SHAPE=shape_class(n, steps, d),
    )  # fmt: skip
