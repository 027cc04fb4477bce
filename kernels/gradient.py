"""The gradient of the loss, in one kernel for both forms. For larger matrices torch_product.py has it.

For one time step with Z (N, d), centred over the batch, and K = ZZ' (N, N) or A = Z'Z without its diagonal (d, d):

    dZ = b (K Z - Z diag(s)) - a Z diag([sigma < threshold] / sigma)      Gram form
    dZ = b Z A               - a Z diag([sigma < threshold] / sigma)      covariance form

    a = dL/dvariance / (T d (N-1)),   b = 4 dL/dcovariance / (T d (N-1)^2)

Both derivatives include what reaches a term through the loss. The columns of dZ sum to zero, so it is the gradient for
h, too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.finish import Kept, Weights
from vjvcr_fast.kernels.launch import Config, Kernel, Mode, ceil_div, mode_of, precision, sizes
from vjvcr_fast.kernels.moments import centred


class Incoming(NamedTuple):
    """dL/dloss, dL/dvariance, dL/dcovariance: scalars on the device, None for zero."""

    loss: Tensor | None
    variance: Tensor | None
    covariance: Tensor | None


@triton.jit
def _coefficient(g_loss, g_term, weight, scale):
    """scale * (weight * dL/dloss + dL/dterm); a pointer that is None counts as zero."""
    total = 0.0
    if g_loss is not None:
        total += tl.load(g_loss).to(tl.float32) * weight
    if g_term is not None:
        total += tl.load(g_term).to(tl.float32)
    return total * scale


@Kernel
def _gradient(
    h, product, moments, out, g_loss, g_variance, g_covariance, stride_n, stride_t, out_n, out_t, n, steps, d,
    pitch, alpha, beta, threshold, eps, hinge_scale, penalty_scale, BN: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr, GRAM: tl.constexpr, ONE_PANEL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    HINGE: tl.constexpr,
):  # fmt: skip
    """dZ for BN samples and BD features of one time step. Without a product only the hinge's part; without a hinge as
    well, Z itself. The first programs take the last time step, which forward left in the cache.

    The Gram form computes (Z'K)[BD, BN], so that Z, which needs arithmetic, is the operand that may lie in registers.

    Bytes: h once from memory, and N / BN (Gram form) or d / BD (covariance form) times more from the cache, unless one
    panel holds all features; the product from the cache; the gradient once.
    """
    chunks, blocks = tl.cdiv(n, BN), tl.cdiv(d, BD)
    pid = tl.program_id(0)
    # Neighbours share what they read: in Gram form a block of features, in covariance form a block of samples.
    chunk = pid % chunks if GRAM else pid // blocks % chunks
    block = pid // chunks % blocks if GRAM else pid % blocks
    t = (steps - 1 - pid // (chunks * blocks)).to(tl.int64)
    rows, cols = chunk * BN + tl.arange(0, BN), block * BD + tl.arange(0, BD)
    inside = cols < d
    mask = (rows < n)[:, None] & inside[None, :]
    base = h + t * stride_t
    means, squares = moments + t * d, moments + (steps + t) * d
    first = tl.load(base + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + cols, mask=inside, other=0.0)
    gradient = tl.zeros((BN, BD), tl.float32)
    if product is not None:
        product += t * (n if GRAM else d) * pitch
        if GRAM:
            gradient = tl.trans(gradient)
            for k in range(0, n, BK):
                ks = k + tl.arange(0, BK)
                z = centred(base, ks, cols, stride_n, first, mean, (ks < n)[:, None] & inside[None, :])
                at = rows.to(tl.int64)[:, None] * pitch + ks[None, :]
                K = tl.load(product + at, mask=(rows < n)[:, None] & (ks < pitch)[None, :], other=0.0)
                gradient = tl.dot(tl.trans(z.to(DTYPE)), tl.trans(K), gradient, input_precision=PRECISION)
            gradient = tl.trans(gradient)
        elif ONE_PANEL:
            z = centred(base, rows, cols, stride_n, first, mean, mask)
            at = cols[:, None] * pitch + cols[None, :]
            A = tl.load(product + at, mask=inside[:, None] & inside[None, :], other=0.0)
            gradient = tl.dot(z.to(DTYPE), tl.trans(A), input_precision=PRECISION)
        else:
            for k in range(0, d, BK):
                ks = k + tl.arange(0, BK)
                there = ks < d
                first_k = tl.load(base + ks, mask=there, other=0.0).to(tl.float32)
                mean_k = tl.load(means + ks, mask=there, other=0.0)
                z = centred(base, rows, ks, stride_n, first_k, mean_k, (rows < n)[:, None] & there[None, :])
                # A is symmetric: read by rows, used by columns.
                at = cols[:, None] * pitch + ks[None, :]
                A = tl.load(product + at, mask=inside[:, None] & there[None, :], other=0.0)
                gradient = tl.dot(z.to(DTYPE), tl.trans(A), gradient, input_precision=PRECISION)
    if not ONE_PANEL:
        z = centred(base, rows, cols, stride_n, first, mean, mask)
    square = tl.load(squares + cols, mask=inside, other=1.0)
    diagonal = tl.full((BD,), -1.0 if product is None and not HINGE else 0.0, tl.float32)
    if HINGE:
        variance = square / (n - 1) + eps
        # Squares are compared, with threshold's sign; this way round NaN stays NaN.
        slope = tl.where(variance >= threshold * tl.abs(threshold), 0.0, tl.rsqrt(variance))
        diagonal += slope * _coefficient(g_loss, g_variance, alpha, hinge_scale)
    if product is not None:
        b = _coefficient(g_loss, g_covariance, beta, penalty_scale)
        gradient *= b
        if GRAM:
            diagonal += b * square
    gradient -= diagonal[None, :] * z
    to = out + t * out_t + rows.to(tl.int64)[:, None] * out_n + cols[None, :]
    tl.store(to, gradient.to(out.dtype.element_ty), mask=mask)


# -- Launcher -------------------------------------------------------------------------------------------------------

# In Gram form by the samples of a tile, in covariance form by its features.
GRAM = {
    32: Config(4, 3, 2, {"BN": 32, "BD": 64, "BK": 32}),
    64: Config(8, 3, 1, {"BN": 64, "BD": 128, "BK": 32}),
    128: Config(8, 3, 1, {"BN": 128, "BD": 64, "BK": 32}),
}
COVARIANCE = {
    32: Config(8, 1, 2, {"BN": 128, "BD": 32, "BK": 32}, unaligned=1),
    64: Config(8, 1, 1, {"BN": 128, "BD": 64, "BK": 64}),
    128: Config(8, 3, 1, {"BN": 64, "BD": 128, "BK": 32}),
}
# Split operands of all 64 features do not fit the registers of older GPUs.
SPLIT = Config(8, 3, 1, {"BN": 64, "BD": 64, "BK": 32})
NO_PRODUCT = Config(4, 1, 4, {"BN": 32, "BD": 128, "BK": 0})


def gradient(h: Tensor, kept: Kept, out: Tensor, incoming: Incoming, weights: Weights, count: int, gram: bool) -> None:
    """dL/dh into out, which has h's shape (N, T, d) and any strides with the features side by side; Z if weights ask
    for neither term.

    count: T d of all tensors of the loss. gram: whether kept.product is K; without weights.covariance it is not used.
    """
    n, steps, d = h.shape
    product = kept.product if weights.covariance else None
    mode: Mode = "bf16" if product is not None and product.dtype == torch.bfloat16 else mode_of(h)
    if product is None:
        config, gram = NO_PRODUCT, False
    elif gram:
        config = GRAM[32 if n <= 32 else 64 if n <= 192 else 128]
    elif 32 < d <= 64:
        config = SPLIT if mode == "tf32x3" else COVARIANCE[64]
    else:
        config = COVARIANCE[32 if d <= 32 else 128]
    bn, bd, bk = config.tiles.values()
    _gradient.launch(
        config, steps * ceil_div(n, bn) * ceil_div(d, bd),
        h=h, product=product, moments=kept.moments, out=out,
        g_loss=incoming.loss, g_variance=incoming.variance, g_covariance=incoming.covariance,
        **sizes(h), out_n=out.stride(0), out_t=out.stride(1), pitch=0 if product is None else product.shape[-1],
        alpha=weights.alpha, beta=weights.beta, threshold=weights.threshold, eps=weights.eps,
        hinge_scale=1 / (count * (n - 1)), penalty_scale=4 / (count * (n - 1) ** 2),
        GRAM=gram, ONE_PANEL=not gram and d <= min(bd, bk), HINGE=weights.variance, **precision(mode),
    )  # fmt: skip
