"""The covariance penalty of a batch that is smaller than its features, through the Gram matrix: N <= 1024.

For one time step with Z (N, d), centred over the batch, and K = ZZ' (N, N):

    sum_{i != j} C_ij^2 = (||K||^2 - sum_k s_k^2) / (N-1)^2

Each program of the first kernel reads some features of h, once, and writes their part of K and their moments. Up to 160
samples that is `_whole`: a program sees all samples and centres them before it multiplies. Beyond, it is `_tiles`: a
program sees two panels of samples and subtracts the time step's first sample; `_finish` then centres K by its sums over
rows and columns. finish.py has `_finish` and the table of the buffers in between, gradient.py the gradient.
"""

import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.finish import Forward, Parts, Weights, finish, upper
from vjvcr_fast.kernels.launch import (
    Config,
    Kernel,
    Mode,
    architecture,
    ceil_div,
    mode_of,
    operand_dtype,
    precision,
    sizes,
    split,
    workspace,
)
from vjvcr_fast.kernels.moments import centred

MOST_SAMPLES = 1024  # beyond, torch's product of N x N matrices is the better one

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def _store(part_products, rows, cols, n, pitch, tile):
    """A tile of one part of K. Columns from n to pitch are zero, rows from n on are not there."""
    to = part_products + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    tl.store(to, tile, mask=(rows < n)[:, None] & (cols < pitch)[None, :])


@Kernel
def _whole(
    h, part_products, part_means, part_squares, stride_n, stride_t, n, steps, d, pitch, width, parts,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K of all n <= BN + BM samples over `width` features of one time step, and these features' mean and s. Bytes: h
    once; 4 an entry of K's upper triangle."""
    pid = tl.program_id(0)
    t, part = pid // parts, pid % parts
    base = h + t.to(tl.int64) * stride_t
    rows = tl.arange(0, BN)
    zero = tl.zeros((BK,), tl.float32)
    product = tl.zeros((BN, BN), tl.float32)
    if BM:
        more = BN + tl.arange(0, BM)
        beside = tl.zeros((BN, BM), tl.float32)
        below = tl.zeros((BM, BM), tl.float32)
    last = tl.minimum(part * width + width, d)
    for k in range(part * width, last, BK):
        cols = k + tl.arange(0, BK)
        inside = cols < last
        first = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
        mask = (rows < n)[:, None] & inside[None, :]
        z = centred(base, rows, cols, stride_n, first, zero, mask)
        mean = tl.sum(z, axis=0)
        if BM:
            mask_more = (more < n)[:, None] & inside[None, :]
            z_more = centred(base, more, cols, stride_n, first, zero, mask_more)
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
        tl.store(part_means + to, mean, mask=inside)
        tl.store(part_squares + to, square, mask=inside)
    part_products += (part * steps + t).to(tl.int64) * n * pitch
    _store(part_products, rows, rows, n, pitch, product)
    if BM:
        _store(part_products, rows, more, n, pitch, beside)
        _store(part_products, more, more, n, pitch, below)


@Kernel
def _tiles(
    h, part_products, sums, part_means, part_squares, stride_n, stride_t, n, steps, d, pitch, width, parts,
    BN: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile (i, j), i <= j, of XX' over `width` features of one time step, X = h less its first sample, and the tile's
    sums by row and by column. Programs on the diagonal also write mean and s of their BN samples.

    Bytes: h once from memory, N / BN times more from the cache; 4 an entry of K's upper triangle.
    """
    panels = tl.cdiv(n, BN)
    pairs = panels * (panels + 1) // 2
    pid = tl.program_id(0)
    i, j = upper(pid % pairs)
    t = (pid // pairs) % steps
    part = pid // (pairs * steps)
    rows_i, rows_j = i * BN + tl.arange(0, BN), j * BN + tl.arange(0, BN)
    base = h + t.to(tl.int64) * stride_t
    count = tl.minimum(n - i * BN, BN).to(tl.float32)
    last = tl.minimum(part * width + width, d)
    zero = tl.zeros((BK,), tl.float32)
    product = tl.zeros((BN, BN), tl.float32)
    for k in range(part * width, last, BK):
        cols = k + tl.arange(0, BK)
        inside = cols < last
        mask_i, mask_j = (rows_i < n)[:, None] & inside[None, :], (rows_j < n)[:, None] & inside[None, :]
        first = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
        x_i = centred(base, rows_i, cols, stride_n, first, zero, mask_i)
        x_j = centred(base, rows_j, cols, stride_n, first, zero, mask_j)
        product = tl.dot(x_i.to(DTYPE), tl.trans(x_j.to(DTYPE)), product, input_precision=PRECISION)
        if i == j:
            mean = tl.sum(x_i, axis=0) / count
            z = tl.where(mask_i, x_i - mean[None, :], 0.0)
            to = (i * steps + t).to(tl.int64) * d + cols
            tl.store(part_means + to, mean, mask=inside)
            tl.store(part_squares + to, tl.sum(z * z, axis=0), mask=inside)
    _store(part_products + (part * steps + t).to(tl.int64) * n * pitch, rows_i, rows_j, n, pitch, product)
    slot, inner = (t * panels).to(tl.int64) * parts + part, tl.arange(0, BN)
    tl.store(sums + ((slot + i * parts) * panels + j) * BN + inner, tl.sum(product, axis=1))
    if i != j:
        tl.store(sums + ((slot + j * parts) * panels + i) * BN + inner, tl.sum(product, axis=0))


# -- Launcher -------------------------------------------------------------------------------------------------------

# By the samples of `_whole`'s two panels, in ascending order: the first pair that holds all samples is taken.
WHOLE: dict[tuple[Mode, tuple[int, int]], Config] = {
    ("bf16", (32, 0)): Config(4, 3, 7, {"BK": 32}),
    ("tf32", (32, 0)): Config(4, 3, 6, {"BK": 32}),
    ("tf32x3", (32, 0)): Config(4, 3, 3, {"BK": 32}),
    ("bf16", (64, 0)): Config(4, 3, 3, {"BK": 64}),
    ("tf32", (64, 0)): Config(4, 3, 2, {"BK": 64}),
    ("tf32x3", (64, 0)): Config(4, 3, 2, {"BK": 32}),
    **{(mode, (64, 64)): Config(8, 3, 1, {"BK": 32}) for mode in ("bf16", "tf32")},
    ("bf16", (128, 32)): Config(8, 3, 1, {"BK": 32}),
    ("tf32", (128, 32)): Config(8, 3, 1, {"BK": 16}),
}
# What fits the registers on Hopper only, and only if rows are multiples of 16 long: the addresses of others take more.
# Some differ in their blocks alone.
HOPPER: dict[tuple[Mode, tuple[int, int]], Config] = {
    ("tf32", (32, 0)): Config(4, 3, 7, {"BK": 32}),
    ("bf16", (64, 0)): Config(4, 3, 4, {"BK": 64}),
    ("tf32", (64, 0)): Config(4, 3, 3, {"BK": 64}),
    ("tf32x3", (64, 0)): Config(4, 3, 3, {"BK": 32}),
    ("bf16", (64, 64)): Config(8, 3, 2, {"BK": 32}),
    ("tf32x3", (64, 64)): Config(8, 3, 1, {"BK": 16}),
    ("bf16", (128, 32)): Config(8, 3, 1, {"BK": 64}),
    ("tf32", (128, 32)): Config(8, 3, 1, {"BK": 32}),
    ("tf32x3", (128, 32)): Config(8, 3, 1, {"BK": 16}),
}
# By the samples of a panel of `_tiles`. ("tf32x3", 128) fits where HOPPER does.
TILES: dict[tuple[Mode, int], Config] = {
    ("bf16", 128): Config(8, 3, 1, {"BK": 32}),
    ("tf32", 128): Config(8, 3, 1, {"BK": 16}),
    ("tf32x3", 128): Config(8, 3, 1, {"BK": 16}),
    ("tf32x3", 64): Config(4, 3, 2, {"BK": 16}),
}


def gram(h: Tensor, weights: Weights) -> Forward:
    """K (T, N, pitch(N)) of h (N, T, d), N <= MOST_SAMPLES, zero beyond its N columns, and the moments."""
    n, steps, d = h.shape
    mode = mode_of(h)
    # 120 and later have no more shared memory than 86.
    hopper = 90 <= architecture(h.device) < 120 and d % 16 == 0
    whole = WHOLE | HOPPER if hopper else WHOLE
    panels = next((p for m, p in whole if m == mode and n <= sum(p)), None)
    tile = min(panels[0], 64) if panels else 64 if mode == "tf32x3" and not hopper else 128
    config = whole[mode, panels] if panels else TILES[mode, tile]
    count = ceil_div(n, tile)
    programs = steps if panels else steps * count * (count + 1) // 2
    # A part costs the upper half of K in float32; the input is what every pair of tiles reads.
    cost = 2 * n / (d * h.element_size())
    width, parts = split(h.device, config.planned(d), programs, d, 128, cost, unit=64)
    rows = n if panels else tile
    sample_parts = ceil_div(n, rows)
    needed = [*[sample_parts * steps * d] * 2, parts * steps * n * pitch(n)]
    part_means, part_squares, part_products, *sums = workspace(
        h.device, *needed, *([] if panels else [steps * count * parts * count * tile])
    )
    common = {
        "h": h, "part_products": part_products, "part_means": part_means, "part_squares": part_squares, **sizes(h),
        "pitch": pitch(n), "width": width, "parts": parts, **precision(mode),
    }  # fmt: skip
    if panels:
        _whole.launch(config, programs * parts, BN=panels[0], BM=panels[1], **common)
    else:
        _tiles.launch(config, programs * parts, sums=sums[0], BN=tile, **common)
    of_product = {"parts": parts, "size": n, "pitch": pitch(n)}
    found = Parts(part_means, part_squares, sample_parts, rows, part_products, *sums, **of_product)
    return finish(h, weights, found, gram=True, tile=tile, dtype=operand_dtype(mode))


def pitch(n: int) -> int:
    """From row to row of K: rows that begin at multiples of 16 are read 16 bytes at a time whatever n is."""
    return 16 * ceil_div(n, 16)
