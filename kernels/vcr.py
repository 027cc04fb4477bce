"""The loss and its gradient for tensors that share N and d: which kernel serves which shape."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vjvcr_fast.kernels import covariance, gradient, gram, torch_product
from vjvcr_fast.kernels.finish import Forward, Kept, Weights, combine
from vjvcr_fast.kernels.gradient import Incoming
from vjvcr_fast.kernels.moments import moments

__all__ = ["Incoming", "Weights", "backward", "forward", "like", "product_shape", "route"]


def route(n: int, d: int, use_gram: bool) -> str:
    """The module that serves the penalty of N samples with d features: "gram", "covariance" or "torch_product"."""
    if use_gram:
        return "gram" if n <= gram.MOST_SAMPLES else "torch_product"
    return "covariance" if covariance.serves(d) else "torch_product"


def product_shape(n: int, steps: int, d: int, use_gram: bool) -> tuple[int, int, int]:
    """The shape of the product that backward needs: of K or A of each time step."""
    if route(n, d, use_gram) == "gram":
        return steps, n, gram.pitch(n)
    return (steps, n, n) if use_gram else (steps, d, d)


def forward(hs: Sequence[Tensor], weights: Weights, use_gram: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns the scalars (loss, variance, covariance), float32, and what backward needs: the `Kept` of each h.

    hs: (N, T, d) each, features side by side in memory. use_gram: the Gram form, else the covariance form.
    """
    found = [_forward(h, weights, use_gram) for h in hs]
    terms = combine(found, weights, hs[0].shape[0], _count(hs))
    return *terms, [tensor for one in found for tensor in one.kept if tensor is not None]


def _forward(h: Tensor, weights: Weights, use_gram: bool) -> Forward:
    if not weights.covariance:
        return moments(h, weights)
    where = route(h.shape[0], h.shape[2], use_gram)
    if where == "gram":
        return gram.gram(h, weights)
    return covariance.covariance(h, weights) if where == "covariance" else torch_product.product(h, weights, use_gram)


def backward(
    hs: Sequence[Tensor],
    kept: Sequence[Tensor],
    incoming: Incoming,
    weights: Weights,
    use_gram: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """dL/dh of each h, in its dtype and, if it is dense, with its strides; empty where it is not needed."""
    # A term that nobody used has no part in the gradient, not even 0 * NaN.
    weights = weights._replace(
        variance=weights.variance and not (incoming.loss is None and incoming.variance is None),
        covariance=weights.covariance and not (incoming.loss is None and incoming.covariance is None),
    )
    each = len(kept) // len(hs)
    outs = [like(h) if need else h.new_empty(0) for h, need in zip(hs, needed, strict=True)]
    for i, (h, out) in enumerate(zip(hs, outs, strict=True)):
        if not (weights.variance or weights.covariance):
            out.zero_()
        elif needed[i]:
            by_torch = weights.covariance and route(h.shape[0], h.shape[2], use_gram) == "torch_product"
            of = Kept(*kept[each * i : each * (i + 1)])
            (torch_product if by_torch else gradient).gradient(h, of, out, incoming, weights, _count(hs), use_gram)
    return outs


def like(h: Tensor) -> Tensor:
    """An empty tensor for the gradient of h: with h's strides if h is dense, and always with features side by side.
    torch.empty_like alone keeps other strides for d = 1 and for windows that overlap."""
    out = torch.empty_like(h)
    return out if out.stride(-1) == 1 else torch.empty(h.shape, dtype=h.dtype, device=h.device)


def _count(hs: Sequence[Tensor]) -> int:
    """T d, the divisor of both terms, with T the time steps of all tensors."""
    return sum(h.shape[1] for h in hs) * hs[0].shape[2]
