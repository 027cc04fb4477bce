"""Mean and sum of squares of each feature over the batch.

    s_k = sum_n (h_nk - mean_k)^2,   sigma_k = sqrt(s_k / (N-1) + eps),   hinge_k = max(0, threshold - sigma_k)

Means are kept relative to the first sample of their time step, h[0, t, k]. What is summed is then of the size of sigma,
even where the mean is 1e4 sigma.
"""

import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.finish import Forward, Parts, Weights, finish
from vjvcr_fast.kernels.launch import Config, Kernel, ceil_div, sizes, split, workspace

# -- On the device --------------------------------------------------------------------------------------------------


@triton.jit
def centred(base, rows, cols, stride_n, first, mean, mask):
    """h[rows, cols] - first - mean of one time step, in float32, zero outside the mask. `first` is the time step's
    first sample and goes first, which is exact where the mean is many sigma."""
    x = tl.load(base + rows.to(tl.int64)[:, None] * stride_n + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - first[None, :] - mean[None, :], 0.0)


@Kernel
def _moments(
    h, part_means, part_squares, stride_n, stride_t, n, steps, d, rows, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Means and s of BD features over `rows` samples of one time step. Bytes: h once."""
    blocks = tl.cdiv(d, BD)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BD + tl.arange(0, BD)
    t = (pid // blocks) % steps
    part = pid // (blocks * steps)
    inside = cols < d
    base = h + t.to(tl.int64) * stride_t
    first = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros((BD,), tl.float32)
    square = tl.zeros((BD,), tl.float32)
    count = 0.0
    last = tl.minimum(part * rows + rows, n)
    for start in range(part * rows, last, BN):
        at = start + tl.arange(0, BN)
        mask = (at < last)[:, None] & inside[None, :]
        x = centred(base, at, cols, stride_n, first, tl.zeros((BD,), tl.float32), mask)
        more = tl.minimum(last - start, BN).to(tl.float32)
        delta = tl.sum(x, axis=0) / more
        z = tl.where(mask, x - delta[None, :], 0.0)
        total = count + more
        delta -= mean
        mean += delta * (more / total)
        square += tl.sum(z * z, axis=0) + delta * delta * (count * more / total)
        count = total
    to = (part * steps + t).to(tl.int64) * d + cols
    tl.store(part_means + to, mean, mask=inside)
    tl.store(part_squares + to, square, mask=inside)


# -- Launcher -------------------------------------------------------------------------------------------------------

MOMENTS = Config(4, 3, 5, {"BN": 32, "BD": 128})


def moments(h: Tensor, weights: Weights) -> Forward:
    """Moments of h (N, T, d), without a penalty."""
    n, steps, d = h.shape
    programs = steps * ceil_div(d, MOMENTS.tiles["BD"])
    rows, parts = split(h.device, MOMENTS.planned(d), programs, n, 512, 8 / (n * h.element_size()))
    part_means, part_squares = workspace(h.device, *[parts * steps * d] * 2)
    _moments.launch(
        MOMENTS, parts * programs, h=h, part_means=part_means, part_squares=part_squares, **sizes(h), rows=rows
    )
    return finish(h, weights, Parts(part_means, part_squares, parts, rows))
