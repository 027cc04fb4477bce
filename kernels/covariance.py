"""The covariance penalty of a batch that is larger than its features: d <= 256 and N up to millions.

For one time step with Z (N, d), centred over the batch, and A = Z'Z without its diagonal (d, d):

    sum_{i != j} C_ij^2 = ||A||^2 / (N-1)^2

`_covariance` reads h once. A program takes a part of the batch and subtracts the mean of a few samples, so that its
sums are of the size of sigma; at its end it centres them. `_finish` (finish.py, with the table of the buffers in
between) adds the parts and what their means differ by. gradient.py has the gradient.
"""

import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.finish import Forward, Parts, Weights, finish, upper
from vjvcr_fast.kernels.launch import (
    Config,
    Kernel,
    Mode,
    ceil_div,
    mode_of,
    operand_dtype,
    precision,
    sizes,
    split,
    workspace,
)
from vjvcr_fast.kernels.moments import centred

MOST_FEATURES = 256  # beyond, torch's product of d x d matrices is the better one
PANEL, SPLIT_PANEL = 128, 64  # features of A's panel at most; of split operands
# Samples of a part: tensor cores truncate their sums, and the bias grows with their length.
MOST_SUMMED = 32768

# -- On the device --------------------------------------------------------------------------------------------------


@Kernel
def _covariance(
    h, part_products, part_means, part_squares, stride_n, stride_t, n, steps, d, rows, BD: tl.constexpr,
    BK: tl.constexpr, ONE_PANEL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Panel (i, j), i <= j, BD features each, of Z'Z over `rows` samples of one time step, centred over those. Programs
    on the diagonal also write the samples' mean and s.

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
    start = part * rows
    last = tl.minimum(start + rows, n)
    # Sums stay of the size of sigma: from each sample goes the time step's first, and the mean of a few of the part's,
    # from all over it, since the batch may be sorted.
    few = tl.minimum(last - start, BK).to(tl.float32)
    spread = start + tl.arange(0, BK) * tl.maximum((last - start) // BK, 1)
    zero = tl.zeros((BD,), tl.float32)
    first_i = tl.load(base + cols_i, mask=inside_i, other=0.0).to(tl.float32)
    mask_i = (spread < last)[:, None] & inside_i[None, :]
    shift_i = tl.sum(centred(base, spread, cols_i, stride_n, first_i, zero, mask_i), axis=0) / few
    first_j = tl.load(base + cols_j, mask=inside_j, other=0.0).to(tl.float32)
    mask_j = (spread < last)[:, None] & inside_j[None, :]
    shift_j = tl.sum(centred(base, spread, cols_j, stride_n, first_j, zero, mask_j), axis=0) / few

    product = tl.zeros((BD, BD), tl.float32)
    sums_i = tl.zeros((BK, BD), tl.float32)
    sums_j = tl.zeros((BK, BD), tl.float32)
    squares_i = tl.zeros((BK, BD), tl.float32)
    for k in range(start, last, BK):
        at = k + tl.arange(0, BK)
        x_i = centred(base, at, cols_i, stride_n, first_i, shift_i, (at < last)[:, None] & inside_i[None, :])
        x_j = x_i
        if not ONE_PANEL:
            x_j = centred(base, at, cols_j, stride_n, first_j, shift_j, (at < last)[:, None] & inside_j[None, :])
            sums_j += x_j
        product = tl.dot(tl.trans(x_i.to(DTYPE)), x_j.to(DTYPE), product, input_precision=PRECISION)
        sums_i += x_i
        squares_i += x_i * x_i
    count = (last - start).to(tl.float32)
    sum_i = tl.sum(sums_i, axis=0)
    sum_j = tl.sum(sums_i if ONE_PANEL else sums_j, axis=0)
    product -= sum_i[:, None] * (sum_j / count)[None, :]
    slot = (part * steps + t).to(tl.int64)
    to = part_products + slot * d * d + cols_i[:, None] * d + cols_j[None, :]
    tl.store(to, product, mask=inside_i[:, None] & inside_j[None, :])
    if i == j:
        feature = slot * d + cols_i
        tl.store(part_means + feature, shift_i + sum_i / count, mask=inside_i)
        tl.store(part_squares + feature, tl.sum(squares_i, axis=0) - sum_i * (sum_i / count), mask=inside_i)


# -- Launcher -------------------------------------------------------------------------------------------------------

# By the features, rounded up, 128 at most.
COVARIANCE: dict[tuple[Mode, int], Config] = {
    ("bf16", 32): Config(4, 3, 5, {"BK": 64}, unaligned=4),
    ("tf32", 32): Config(4, 3, 4, {"BK": 64}, unaligned=3),
    ("tf32x3", 32): Config(4, 3, 2, {"BK": 64}),
    **{(mode, 64): Config(4, 3, 3, {"BK": 32}, unaligned=2) for mode in ("bf16", "tf32")},
    ("tf32x3", 64): Config(4, 4, 3, {"BK": 16}, unaligned=2),
    **{(mode, 128): Config(8, 4, 1, {"BK": 16}) for mode in ("bf16", "tf32")},
    ("tf32x3", 128): Config(4, 4, 2, {"BK": 16}),
}


def serves(d: int) -> bool:
    """Two panels with their sums and, for a d that is no multiple of 16, their addresses do not fit the registers."""
    return d <= MOST_FEATURES and (d <= PANEL or d % 16 == 0)


def covariance(h: Tensor, weights: Weights) -> Forward:
    """A (T, d, d) of h (N, T, d), `serves(d)`, and the moments."""
    n, steps, d = h.shape
    mode = mode_of(h)
    rounded = min(max(1 << (d - 1).bit_length(), 32), PANEL)
    bd = min(rounded, SPLIT_PANEL) if mode == "tf32x3" else rounded
    config, panels = COVARIANCE[mode, rounded], ceil_div(d, bd)
    programs = steps * panels * (panels + 1) // 2
    rows, parts = split(h.device, config.planned(d), programs, n, 256, 4 * d / (n * h.element_size()))
    if rows > MOST_SUMMED:
        rows, parts = MOST_SUMMED, ceil_div(n, MOST_SUMMED)
    found = workspace(h.device, *[parts * steps * d] * 2, parts * steps * d * d)
    part_means, part_squares, part_products = found
    _covariance.launch(
        config, programs * parts,
        h=h, part_products=part_products, part_means=part_means, part_squares=part_squares, **sizes(h),
        rows=rows, BD=bd, ONE_PANEL=panels == 1, **precision(mode),
    )  # fmt: skip
    made = Parts(part_means, part_squares, parts, rows, part_products, parts=parts, size=d, pitch=d)
    return finish(h, weights, made, dtype=operand_dtype(mode))
