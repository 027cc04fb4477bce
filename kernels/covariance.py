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
from vjvcr_fast.kernels.moments import Incoming, Moments, Weights, coefficient, hinge_of, hinge_slope

MOST_FEATURES = 256  # beyond it the library's product of d x d matrices is the better one
PANEL, SPLIT_PANEL = 128, 64  # features of A's panel at most; of split operands
JOINED = 16  # rows of A that a program of `_join` makes

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def _shifted(base, start, last, stride_n, inside, first, shift, BK: tl.constexpr):
    """Samples start .. start + BK of the features at base (BD,), less `first` and `shift`; zero from `last` on."""
    rows = start + tl.arange(0, BK)
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
        x_i = _shifted(base_i, k, last, stride_n, inside_i, first_i, shift_i, BK)
        x_j = x_i if ONE_PANEL else _shifted(base_j, k, last, stride_n, inside_j, first_j, shift_j, BK)
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
    """Panel (i, j), BD features each, of Z'Z over `rows` samples of one time step, centred over those; programs on the
    diagonal also write the samples' mean, from the time step's first sample, and s.

    Bytes: h once from memory, and 2 d / BD - 1 times more from the cache unless there is one panel; BD^2 x 4 a part.
    """
    panels = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    pair = pid % (panels * panels)
    i, j = pair // panels, pair % panels
    t = (pid // (panels * panels)) % steps
    part = pid // (panels * panels * steps)
    cols_i, cols_j = i * BD + tl.arange(0, BD), j * BD + tl.arange(0, BD)
    inside_i, inside_j = cols_i < d, cols_j < d
    base = h + t.to(tl.int64) * stride_t
    base_i, base_j = base + cols_i, base + cols_j
    start = part * rows
    last = tl.minimum(start + rows, n)
    # Sums stay of the size of sigma: from each sample goes the time step's first, and the mean of the part's first.
    few = tl.minimum(last - start, BK).to(tl.float32)
    zero = tl.zeros((BD,), tl.float32)
    first_i = tl.load(base_i, mask=inside_i, other=0.0).to(tl.float32)
    shift_i = tl.sum(_shifted(base_i, start, last, stride_n, inside_i, first_i, zero, BK), axis=0) / few
    first_j = tl.load(base_j, mask=inside_j, other=0.0).to(tl.float32)
    shift_j = tl.sum(_shifted(base_j, start, last, stride_n, inside_j, first_j, zero, BK), axis=0) / few

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
    threshold, eps, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BR rows of A, with their features' mean, s, sum of hinges and sum of A^2. Bytes: 4 (parts + 1) an entry."""
    blocks = tl.cdiv(d, BR)
    pid = tl.program_id(0)
    t, block = pid // blocks, pid % blocks
    r, c = block * BR + tl.arange(0, BR), tl.arange(0, BD)
    inside_r, inside_c = r < d, c < d
    mask = inside_r[:, None] & inside_c[None, :]
    mean_r, mean_c = tl.zeros((BR,), tl.float32), tl.zeros((BD,), tl.float32)
    for part in range(parts):
        slot = (part * steps + t).to(tl.int64)
        share = tl.minimum(n - part * rows, rows).to(tl.float32) / n
        mean_r += share * tl.load(part_means + slot * d + r, mask=inside_r, other=0.0)
        mean_c += share * tl.load(part_means + slot * d + c, mask=inside_c, other=0.0)
    A = tl.zeros((BR, BD), tl.float32)
    square = tl.zeros((BR,), tl.float32)
    for part in range(parts):
        slot = (part * steps + t).to(tl.int64)
        count = tl.minimum(n - part * rows, rows).to(tl.float32)
        off_r = tl.load(part_means + slot * d + r, mask=inside_r, other=0.0) - mean_r
        off_c = tl.load(part_means + slot * d + c, mask=inside_c, other=0.0) - mean_c
        A += tl.load(part_products + slot * d * d + r[:, None] * d + c[None, :], mask=mask, other=0.0)
        A += count * off_r[:, None] * off_c[None, :]
        square += tl.load(part_squares + slot * d + r, mask=inside_r, other=0.0) + count * off_r * off_r
    A = tl.where(r[:, None] == c[None, :], 0.0, A)
    A = tl.where(mask, A, 0.0)
    tl.store(norms + pid, tl.sum(A * A))
    to = product + t.to(tl.int64) * d * d + r[:, None] * d + c[None, :]
    tl.store(to, A.to(product.dtype.element_ty), mask=mask)
    to = t.to(tl.int64) * d + r
    tl.store(means + to, mean_r, mask=inside_r)
    tl.store(squares + to, square, mask=inside_r)
    tl.store(hinges + pid, tl.sum(tl.where(inside_r, hinge_of(square, n, threshold, eps), 0.0)))


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
    ("tf32", 64): [config(4, 2, 2, BK=64), config(8, 3, 1, BK=64)],
    ("tf32x3", 64): [config(8, 3, 1, BK=16), config(8, 3, 1, BK=32, archs=(90,))],
    ("bf16", 128): [config(8, 2, 1, BK=32)],
    ("tf32", 128): [config(8, 3, 1, BK=16), config(8, 2, 1, archs=(90,), BK=32)],
}
JOIN: dict[int, list[Config]] = {bd: [config(4, 1, 2, BR=JOINED, BD=bd)] for bd in (16, 32, 64, 128, 256)}
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
    pairs = triton.cdiv(d, bd) ** 2
    rows = triton.cdiv(n, enough_parts(steps * pairs, n, 256, h.device))
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
    norms = torch.empty(steps * triton.cdiv(d, JOINED), device=h.device)
    moments = Moments(means, torch.empty_like(means), torch.empty_like(norms), torch.empty_like(norms))
    launch(
        _join, JOIN[triton.next_power_of_2(max(d, 16))], lambda meta: norms.numel(),
        part_products, part_means, part_squares, product, moments.means, moments.squares, moments.hinges, norms, parts,
        rows, n, steps, d, weights.threshold, weights.eps,
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
