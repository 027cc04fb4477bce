"""Larger matrices: the library's batched product, with ours before and after it.

N > 1024 samples in Gram form, or d > 256 features in covariance form: there torch's own product is as fast as any. One
read of h gives the moments, a second one writes Z in the dtype it is multiplied in; the gradient is one more product.
The penalty is that of gram.py or covariance.py; float32 products follow torch's setting, float16 counts as float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from vjvcr_fast.kernels.launch import config, entry, launch, mode_of, operand_dtype
from vjvcr_fast.kernels.moments import Incoming, Moments, Weights, moments


@entry
def _centred(
    h, means, out, stride_n, stride_t, n, steps, d, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Z (T, N, d) of h (N, T, d). Bytes: h once, Z once."""
    blocks, chunks = tl.cdiv(d, BD), tl.cdiv(n, BN)
    pid = tl.program_id(0)
    cols = (pid % blocks) * BD + tl.arange(0, BD)
    rows = (pid // blocks) % chunks * BN + tl.arange(0, BN)
    t = (pid // (blocks * chunks)).to(tl.int64)
    inside = cols < d
    mask = (rows < n)[:, None] & inside[None, :]
    base = h + t * stride_t + cols
    shift = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(means + t * d + cols, mask=inside, other=0.0)
    x = tl.load(base[None, :] + rows.to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    to = out + (t * n + rows)[:, None] * d + cols[None, :]
    tl.store(to, (x - shift[None, :] - mean[None, :]).to(out.dtype.element_ty), mask=mask)


CENTRED = [config(4, 1, 4, BN=32, BD=128)]


def centred(h: Tensor, means: Tensor) -> Tensor:
    """Z (T, N, d) in the dtype of products."""
    n, steps, d = h.shape
    z = torch.empty(steps, n, d, dtype=operand_dtype(mode_of(h)), device=h.device)
    launch(
        _centred, CENTRED, lambda meta: steps * triton.cdiv(d, meta["BD"]) * triton.cdiv(n, meta["BN"]),
        h, means, z, *h.stride()[:2], n, steps, d,
    )  # fmt: skip
    return z


def product(h: Tensor, weights: Weights, gram: bool) -> tuple[Tensor, Moments, Tensor]:
    """K (T, N, N) or A (T, d, d), its diagonal zero, in the dtype of products; moments; squared norms of rows."""
    found = moments(h, weights)
    z = centred(h, found.means)
    left, right = (z, z.mT) if gram else (z.mT, z)
    # Rounded to bfloat16 for the gradient's product only: the penalty is summed before.
    matrix = torch.bmm(left, right, out_dtype=torch.float32) if z.dtype == torch.bfloat16 else torch.bmm(left, right)
    if not gram:
        matrix.diagonal(dim1=1, dim2=2).mul_(0)  # NaN stays NaN
    return matrix.to(z.dtype), found, torch.linalg.vector_norm(matrix, dim=2).square().flatten()


def gradient(
    h: Tensor, product: Tensor, means: Tensor, squares: Tensor, out: Tensor, incoming: Incoming, weights: Weights,
    count: int, gram: bool,
) -> None:  # fmt: skip
    """dL/dh into out, (N, T, d) of any strides. count: T d of all tensors of the loss."""
    n = h.shape[0]
    b = _coefficient(incoming.loss, incoming.covariance, weights.beta, 4 / (count * (n - 1) ** 2))
    diagonal = -b * squares if gram else torch.zeros_like(squares)
    if weights.variance:
        a = _coefficient(incoming.loss, incoming.variance, weights.alpha, 1 / (count * (n - 1)))
        sigma = (squares / (n - 1) + weights.eps).sqrt()
        diagonal = diagonal - a * (sigma < weights.threshold) / sigma
    z = centred(h, means)
    matrix = b * product
    if gram:
        result = torch.baddbmm(z * diagonal.unsqueeze(1).to(z.dtype), matrix.to(z.dtype), z)
    else:
        matrix.diagonal(dim1=1, dim2=2).copy_(diagonal)
        result = torch.bmm(z, matrix.to(z.dtype))
    out.transpose(0, 1).copy_(result)


def _coefficient(g_loss: Tensor | None, g_term: Tensor | None, weight: float, scale: float) -> Tensor | float:
    """scale * (weight * dL/dloss + dL/dterm)."""
    total = 0.0 if g_loss is None else g_loss * weight
    return (total if g_term is None else total + g_term) * scale
