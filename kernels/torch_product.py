"""Larger matrices: torch's own batched product, with our kernels before and after it.

With more than 1024 samples in Gram form, or more than 256 features in covariance form, torch's own product is as fast
as any. One read of h gives the moments, a second one writes Z in the dtype it is multiplied in. The gradient is one
more product. The penalty is that of gram.py or covariance.py. float32 products follow torch's setting; float16 counts
as float32.
"""

import torch
from torch import Tensor
from vjvcr_fast.kernels import gradient as kernel
from vjvcr_fast.kernels.finish import Forward, Kept, Weights
from vjvcr_fast.kernels.gradient import Incoming
from vjvcr_fast.kernels.launch import mode_of, operand_dtype
from vjvcr_fast.kernels.moments import moments


def centred(h: Tensor, kept: Kept) -> Tensor:
    """Z (T, N, d) of h (N, T, d), in the dtype of products."""
    n, steps, d = h.shape
    z = torch.empty(steps, n, d, dtype=operand_dtype(mode_of(h)), device=h.device)
    no_terms = Weights(0.0, 0.0, 0.0, 0.0, variance=False, covariance=False)
    kernel.gradient(h, kept, z.transpose(0, 1), Incoming(None, None, None), no_terms, 1, gram=False)
    return z


def product(h: Tensor, weights: Weights, gram: bool) -> Forward:
    """K (T, N, N) or A (T, d, d) of h (N, T, d), in the dtype of products, and the moments."""
    found = moments(h, weights)
    z = centred(h, found.kept)
    left, right = (z, z.mT) if gram else (z.mT, z)
    # Rounded to bfloat16 for the gradient's product only: the penalty is summed before.
    matrix = torch.bmm(left, right, out_dtype=torch.float32) if z.dtype == torch.bfloat16 else torch.bmm(left, right)
    if not gram:
        matrix.diagonal(dim1=1, dim2=2).mul_(0)  # NaN stays NaN
    norms = torch.linalg.vector_norm(matrix, dim=2).square().flatten()
    if gram:
        norms = torch.cat([norms, -found.kept.moments[1].square().flatten()])
    return Forward(found.kept._replace(product=matrix.to(z.dtype)), found.hinges, norms)


def gradient(h: Tensor, kept: Kept, out: Tensor, incoming: Incoming, weights: Weights, count: int, gram: bool) -> None:
    """As gradient.gradient, with the penalty."""
    n, squares = h.shape[0], kept.moments[1]
    b = _coefficient(incoming.loss, incoming.covariance, weights.beta, 4 / (count * (n - 1) ** 2))
    diagonal = -b * squares if gram else torch.zeros_like(squares)
    if weights.variance:
        a = _coefficient(incoming.loss, incoming.variance, weights.alpha, 1 / (count * (n - 1)))
        sigma = (squares / (n - 1) + weights.eps).sqrt()
        diagonal = diagonal - a * (sigma < weights.threshold) / sigma
    z = centred(h, kept)
    assert kept.product is not None  # there is one, with the penalty
    matrix = b * kept.product
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
