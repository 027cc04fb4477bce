"""The covariance penalty of a batch that is larger than its features: d <= 256 and N up to millions.

For one time step with Z (N, d), centred over the batch, and A = Z'Z without its diagonal (d, d):

    sum_{i != j} C_ij^2 = ||A||^2 / (N-1)^2
    dZ = b Z A - a Z diag([sigma < threshold] / sigma)

    a = dL/dvariance / (T d (N-1)),   b = 4 dL/dcovariance / (T d (N-1)^2)

`_covariance` reads h once. A program takes a part of the batch and subtracts the mean of its first samples, so that
its sums are of the size of sigma; where it ends it centres them. `_join` adds the parts, with what their means differ
by, masks the diagonal, and squares. `_gradient` is one product with the rest in its epilogue.
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
    config,
    enough_parts,
    entry,
    fitting,
    launch,
    mode_of,
    operand_dtype,
    precision,
    shape_class,
)
from vjvcr_fast.kernels.moments import (
    AT_ONCE,
    Incoming,
    Moments,
    Weights,
    coefficient,
    hinge_of,
    hinge_slope,
    mean_of_parts,
    parts_of,
    upper,
)

MOST_FEATURES = 256  # beyond it the library's product of d x d matrices is the better one
PANEL, SPLIT_PANEL = 128, 64  # features of A's panel at most; of split operands
JOINED = 16  # rows and columns of A that a program of `_join` makes
# Samples of a part whose products tensor cores sum, truncating, without splitting them: the bias grows with the length.
MOST_SUMMED = 32768

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def _shifted(base, start, every, last, stride_n, inside, first, shift, BK: tl.constexpr):
    """BK samples, from `start` on one in `every`, of the features at base (BD,), less `first` and `shift`; zero from
    `last` on."""
    rows = start + tl.arange(0, BK) * every
    mask = (rows < last)[:, None] & inside[None, :]
    x = tl.load(base[None, :] + rows.to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - first[None, :] - shift[None, :], 0.0)


@triton.jit
def _sums(
    base_i, base_j, start, last, stride_n, inside_i, inside_j, first_i, first_j, shift_i, shift_j, product, sums_i,
    sums_j, squares_i, BK: tl.constexpr, ONE_PANEL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to X_i'X_j, and elementwise to X_i, X_j and X_i^2, the samples start .. last."""
    for k in range(start, last, BK):
        x_i = _shifted(base_i, k, 1, last, stride_n, inside_i, first_i, shift_i, BK)
        x_j = x_i if ONE_PANEL else _shifted(base_j, k, 1, last, stride_n, inside_j, first_j, shift_j, BK)
        product = tl.dot(tl.trans(x_i.to(DTYPE)), x_j.to(DTYPE), product, input_precision=PRECISION)
        sums_i += x_i
        squares_i += x_i * x_i
        if not ONE_PANEL:
            sums_j += x_j
    return product, sums_i, sums_j, squares_i


@entry
def _covariance(
    h, part_products, part_means, part_squares, stride_n, stride_t, n, steps, d, rows, BD: tl.constexpr,
    BK: tl.constexpr, SPAN: tl.constexpr, ONE_PANEL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    SHAPE,
):  # fmt: skip
    """Panel (i, j), i <= j, BD features each, of Z'Z over `rows` samples of one time step, centred over those; programs
    on the diagonal also write the samples' mean, from the time step's first sample, and s.

    Bytes: h once from memory, and d / BD times more from the cache unless there is one panel; BD^2 x 4 a part.
    """
    panels = tl.cdiv(d, BD)
    pairs = panels * (panels + 1) // 2
    pid = tl.program_id(0)
    i, j = upper(pid % pairs)
    t = (pid // pairs) % steps
    part = pid // (pairs * steps)
    cols_i, cols_j = i * BD + tl.arange(0, BD), j * BD + tl.arange(0, BD)
    inside_i, inside_j = cols_i < d, cols_j < d
    base = h + t.to(tl.int64) * stride_t
    base_i, base_j = base + cols_i, base + cols_j
    start = part * rows
    last = tl.minimum(start + rows, n)
    # Sums stay of the size of sigma: from each sample goes the time step's first, and the mean of a few of the part's,
    # from all over it, since the batch may be sorted.
    few = tl.minimum(last - start, BK).to(tl.float32)
    every = tl.maximum((last - start) // BK, 1)
    zero = tl.zeros((BD,), tl.float32)
    first_i = tl.load(base_i, mask=inside_i, other=0.0).to(tl.float32)
    shift_i = tl.sum(_shifted(base_i, start, every, last, stride_n, inside_i, first_i, zero, BK), axis=0) / few
    first_j = tl.load(base_j, mask=inside_j, other=0.0).to(tl.float32)
    shift_j = tl.sum(_shifted(base_j, start, every, last, stride_n, inside_j, first_j, zero, BK), axis=0) / few

    product = tl.zeros((BD, BD), tl.float32)
    sums_i = tl.zeros((BK, BD), tl.float32)
    sums_j = tl.zeros((BK, BD), tl.float32)
    squares_i = tl.zeros((BK, BD), tl.float32)
    if SPAN:
        for begin in range(start, last, SPAN):
            block = tl.zeros((BD, BD), tl.float32)
            block, sums_i, sums_j, squares_i = _sums(
                base_i, base_j, begin, tl.minimum(begin + SPAN, last), stride_n, inside_i, inside_j, first_i, first_j,
                shift_i, shift_j, block, sums_i, sums_j, squares_i, BK, ONE_PANEL, DTYPE, PRECISION,
            )  # fmt: skip
            product += block
    else:
        product, sums_i, sums_j, squares_i = _sums(
            base_i, base_j, start, last, stride_n, inside_i, inside_j, first_i, first_j, shift_i, shift_j, product,
            sums_i, sums_j, squares_i, BK, ONE_PANEL, DTYPE, PRECISION,
        )  # fmt: skip
    count = (last - start).to(tl.float32)
    sum_i = tl.sum(sums_i, axis=0)
    sum_j = tl.sum(sums_i if ONE_PANEL else sums_j, axis=0)
    product -= sum_i[:, None] * (sum_j / count)[None, :]
    slot = (part * steps + t).to(tl.int64)
    to = part_products + slot * d * d + cols_i[:, None] * d + cols_j[None, :]
    tl.store(to, product, mask=inside_i[:, None] & inside_j[None, :])
    if i == j:
        at = slot * d + cols_i
        tl.store(part_means + at, shift_i + sum_i / count, mask=inside_i)
        tl.store(part_squares + at, tl.sum(squares_i, axis=0) - sum_i * (sum_i / count), mask=inside_i)


@entry
def _join(
    part_products, part_means, part_squares, product, means, squares, hinges, norms, parts, rows, n, steps, d,
    threshold, eps, panel, BR: tl.constexpr,
):  # fmt: skip
    """BR x BR of A, with the sum of its squares; programs of the first column also write their features' mean, s and
    sum of hinges. Panels of `panel` features below the diagonal are read from those above it. Bytes: 4 (parts + 1) an
    entry."""
    blocks = tl.cdiv(d, BR)
    pid = tl.program_id(0)
    t, block, beside = pid // (blocks * blocks), pid // blocks % blocks, pid % blocks
    r, c = block * BR + tl.arange(0, BR), beside * BR + tl.arange(0, BR)
    inside_r, inside_c = r < d, c < d
    mean_r = mean_of_parts(part_means, r, inside_r, t, parts, rows, n, steps, d, BR)
    mean_c = mean_of_parts(part_means, c, inside_c, t, parts, rows, n, steps, d, BR)
    below = (r // panel)[:, None] > (c // panel)[None, :]
    entry = tl.where(below, c[None, :] * d + r[:, None], r[:, None] * d + c[None, :])
    mask = inside_r[:, None] & inside_c[None, :]
    A = tl.zeros((BR, BR), tl.float32)
    square = tl.zeros((BR,), tl.float32)
    for start in range(0, parts, AT_ONCE):
        at_r, mask_r, count = parts_of(start, r, inside_r, t, parts, rows, n, steps, d)
        at_c, mask_c, count = parts_of(start, c, inside_c, t, parts, rows, n, steps, d)
        off_r = tl.where(mask_r, tl.load(part_means + at_r, mask=mask_r, other=0.0) - mean_r[None, :], 0.0)
        off_c = tl.where(mask_c, tl.load(part_means + at_c, mask=mask_c, other=0.0) - mean_c[None, :], 0.0)
        part = start + tl.arange(0, AT_ONCE)
        slot = (part.to(tl.int64) * steps + t)[:, None, None] * d * d
        there = (part < parts)[:, None, None] & mask[None, :, :]
        products = tl.load(part_products + slot + entry[None, :, :], mask=there, other=0.0)
        A += tl.sum(products + (count[:, None] * off_r)[:, :, None] * off_c[:, None, :], axis=0)
        square += tl.sum(
            tl.load(part_squares + at_r, mask=mask_r, other=0.0) + count[:, None] * off_r * off_r, axis=0
        )  # fmt: skip
    A = tl.where(r[:, None] == c[None, :], A * 0.0, A)  # NaN stays NaN
    A = tl.where(mask, A, 0.0)
    tl.store(norms + pid, tl.sum(A * A))
    to = product + t.to(tl.int64) * d * d + r[:, None] * d + c[None, :]
    tl.store(to, A.to(product.dtype.element_ty), mask=mask)
    if beside == 0:
        feature = t.to(tl.int64) * d + r
        tl.store(means + feature, mean_r, mask=inside_r)
        tl.store(squares + feature, square, mask=inside_r)
        hinge = tl.where(inside_r, hinge_of(square, n, threshold, eps), 0.0)
        tl.store(hinges + t * blocks + block, tl.sum(hinge))


@triton.jit
def _centred(base, at, cols, inside, means, mask):
    """Z at rows `at` and features `cols` of one time step."""
    shift = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + cols, mask=inside, other=0.0)
    x = tl.load(base + at + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - shift[None, :] - mean[None, :], 0.0)


@entry
def _gradient(
    h, product, means, squares, out, g_loss, g_variance, g_covariance, stride_n, stride_t, out_n, out_t, n, steps, d,
    alpha, beta, threshold, eps, hinge_scale, penalty_scale, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    ONE_PANEL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, HINGE: tl.constexpr, SHAPE,
):  # fmt: skip
    """dZ for BN samples and BC features of one time step: Z A. Bytes: h once from memory (d / BC times and once more
    from the cache, unless one panel holds all features), A from the cache, the gradient once."""
    blocks, chunks = tl.cdiv(d, BC), tl.cdiv(n, BN)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BC + tl.arange(0, BC)
    rows = (pid // blocks) % chunks * BN + tl.arange(0, BN)
    t = (pid // (blocks * chunks)).to(tl.int64)
    base = h + t * stride_t
    at = rows.to(tl.int64)[:, None] * stride_n
    means += t * d
    squares += t * d
    product += t * d * d
    inside = cols < d
    mask = (rows < n)[:, None] & inside[None, :]
    if ONE_PANEL:
        z = _centred(base, at, cols, inside, means, mask)
        A = tl.load(product + cols[:, None] * d + cols[None, :], mask=inside[:, None] & inside[None, :], other=0.0)
        gradient = tl.dot(z.to(DTYPE), tl.trans(A), input_precision=PRECISION)
    else:
        gradient = tl.zeros((BN, BC), tl.float32)
        for k in range(0, d, BK):
            ks = k + tl.arange(0, BK)
            z = _centred(base, at, ks, ks < d, means, (rows < n)[:, None] & (ks < d)[None, :])
            # A is symmetric: read by rows, used by columns.
            A = tl.load(product + cols[:, None] * d + ks[None, :], mask=inside[:, None] & (ks < d)[None, :], other=0.0)
            gradient = tl.dot(z.to(DTYPE), tl.trans(A), gradient, input_precision=PRECISION)
        z = _centred(base, at, cols, inside, means, mask)
    gradient *= coefficient(g_loss, g_covariance, beta, penalty_scale)
    if HINGE:
        slope = hinge_slope(tl.load(squares + cols, mask=inside, other=1.0), n, threshold, eps)
        gradient -= (slope * coefficient(g_loss, g_variance, alpha, hinge_scale))[None, :] * z
    to = out + t * out_t + rows.to(tl.int64)[:, None] * out_n + cols[None, :]
    tl.store(to, gradient.to(out.dtype.element_ty), mask=mask)


# -- Launchers ------------------------------------------------------------------------------------------------------


class Covariance(NamedTuple):
    """A (T, d, d) in the dtype its product with Z is made in, the moments, and sums of A^2 of rows, flat."""

    product: Tensor
    moments: Moments
    norms: Tensor


def serves(d: int) -> bool:
    """Two panels with their sums and, for a d that is no multiple of 16, their addresses do not fit the registers."""
    return d <= MOST_FEATURES and (d <= PANEL or d % 16 == 0)


def panel(d: int) -> int:
    """Features of a panel of A."""
    return min(max(triton.next_power_of_2(d), 16), PANEL)


_MODES: tuple[Mode, ...] = ("bf16", "tf32", "tf32x3")
COVARIANCE: dict[tuple[Mode, int], list[Config]] = {
    **{(mode, 16): [config(4, 3, 2, BK=64)] for mode in _MODES},
    **{(mode, 32): [config(4, 3, 2, BK=64)] for mode in ("bf16", "tf32")},
    ("tf32x3", 32): [config(8, 3, 1, BK=64)],
    ("bf16", 64): [config(4, 3, 2, BK=64), config(8, 3, 1, BK=128)],
    ("tf32", 64): [config(4, 2, 2, BK=64), config(8, 3, 1, archs=(90,), BK=64)],
    ("tf32x3", 64): [config(8, 3, 1, BK=16), config(8, 3, 1, BK=32, archs=(90,))],
    ("bf16", 128): [config(8, 2, 1, BK=32)],
    ("tf32", 128): [config(8, 3, 1, BK=16), config(8, 2, 1, archs=(90,), BK=32)],
}
JOIN = [config(4, 1, 2, BR=JOINED)]
GRADIENT: dict[tuple[Mode, int], list[Config]] = {
    **{(mode, 16): [config(4, 2, 4, BN=128, BC=16, BK=16)] for mode in _MODES},
    **{(mode, 32): [config(8, 2, 2, BN=128, BC=32, BK=32), config(4, 2, 3, BN=64, BC=32, BK=32)] for mode in _MODES},
    **{
        (mode, 64): [config(8, 2, 1, BN=128, BC=64, BK=64), config(4, 2, 2, BN=64, BC=64, BK=64)]
        for mode in ("bf16", "tf32")
    },
    ("tf32x3", 64): [
        config(8, 2, 1, BN=128, BC=64, BK=64, archs=(90,)),
        config(4, 2, 2, BN=64, BC=64, BK=64, archs=(90,)),
        config(8, 3, 1, BN=64, BC=64, BK=32, archs=(80,)),
    ],
    **{(mode, 128): [config(8, 3, 1, BN=64, BC=128, BK=32), config(8, 3, 1, BN=128, BC=64, BK=32)] for mode in _MODES},
    ("tf32x3", 128): [
        config(8, 3, 1, BN=64, BC=128, BK=32),
        config(8, 3, 1, BN=128, BC=64, BK=32, archs=(90,)),
    ],
}


def covariance(h: Tensor, weights: Weights) -> Covariance:
    """Of h (N, T, d), `serves(d)`."""
    n, steps, d = h.shape
    mode = mode_of(h)
    bd = min(panel(d), SPLIT_PANEL) if mode == "tf32x3" else panel(d)
    panels = triton.cdiv(d, bd)
    pairs = panels * (panels + 1) // 2
    blocks, cost = COVARIANCE[mode, bd][0].blocks, 4 * d / (n * h.element_size())
    rows = min(triton.cdiv(n, enough_parts(steps * pairs, n, 256, h.device, blocks, cost)), MOST_SUMMED)
    parts = triton.cdiv(n, rows)
    part_products = torch.empty(parts, steps, d, d, device=h.device)
    part_means = torch.empty(parts, steps, d, device=h.device)
    part_squares = torch.empty_like(part_means)
    launch(
        _covariance, COVARIANCE[mode, bd], lambda meta: parts * steps * pairs,
        h, part_products, part_means, part_squares, *h.stride()[:2], n, steps, d, rows, BD=bd,
        SPAN=SUMMED if mode == "tf32x3" else 0, ONE_PANEL=d <= bd, **precision(mode), SHAPE=shape_class(n, steps, d),
    )  # fmt: skip
    product = torch.empty(steps, d, d, dtype=operand_dtype(mode), device=h.device)
    means = torch.empty(steps, d, device=h.device)
    blocks = triton.cdiv(d, JOINED)
    norms = torch.empty(steps * blocks * blocks, device=h.device)
    hinges = torch.empty(steps * blocks, device=h.device)
    moments = Moments(means, torch.empty_like(means), hinges, hinges)  # this form needs no sums of s^2
    launch(
        _join, JOIN, lambda meta: norms.numel(),
        part_products, part_means, part_squares, product, moments.means, moments.squares, moments.hinges, norms, parts,
        rows, n, steps, d, weights.threshold, weights.eps, bd,
    )  # fmt: skip
    return Covariance(product, moments, norms)


def gradient(
    h: Tensor, product: Tensor, means: Tensor, squares: Tensor, out: Tensor, incoming: Incoming, weights: Weights,
    count: int,
) -> None:  # fmt: skip
    """dL/dh into out, (N, T, d) of any strides. count: T d of all tensors of the loss."""
    n, steps, d = h.shape
    mode: Mode = "bf16" if product.dtype == torch.bfloat16 else mode_of(h)
    configs = fitting(GRADIENT[mode, panel(d)], h)
    one_panel = all(min(dict(c.tiles)["BC"], dict(c.tiles)["BK"]) >= d for c in configs)
    launch(
        _gradient, configs,
        lambda meta: steps * triton.cdiv(d, meta["BC"]) * triton.cdiv(n, meta["BN"]),
        h, product, means, squares, out, *incoming, *h.stride()[:2], *out.stride()[:2], n, steps, d, weights.alpha,
        weights.beta, weights.threshold, weights.eps, 1 / (count * (n - 1)), 4 / (count * (n - 1) ** 2),
        ONE_PANEL=one_panel, **precision(mode), HINGE=weights.variance,
        SHAPE=shape_class(n, steps, d),
    )  # fmt: skip
