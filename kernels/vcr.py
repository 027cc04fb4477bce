"""The loss and its gradient for tensors that share N and d: which kernel serves which shape."""

import math
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor
from vjvcr_fast.kernels import covariance, gram, library
from vjvcr_fast.kernels.launch import cache_bytes
from vjvcr_fast.kernels.moments import (
    Incoming,
    Moments,
    Weights,
    combine,
    hinge_gradient,
    moments,
    scale_,
)

__all__ = ["Incoming", "Weights", "backward", "forward", "forward_with_gradient", "like", "route", "scale_"]

KEPT = 3  # tensors that backward needs of each h: product, means, squares


def route(n: int, d: int, use_gram: bool) -> str:
    """Which module serves the penalty of N samples with d features: "gram", "covariance" or "library"."""
    if use_gram:
        return "gram" if n <= gram.MOST_SAMPLES else "library"
    return "covariance" if covariance.serves(d) else "library"


def product_shape(n: int, steps: int, d: int, use_gram: bool) -> tuple[int, int, int]:
    """Of what the penalty keeps for its gradient: K or A of each time step."""
    if route(n, d, use_gram) == "gram":
        return steps, n, gram.pitch(n)
    return (steps, n, n) if use_gram else (steps, d, d)


def forward(hs: Sequence[Tensor], weights: Weights, use_gram: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """hs: (N, T, d) each, features side by side in memory. Returns the scalars (loss, variance, covariance) and what
    backward needs: for each h its product, empty where no penalty is asked for, means and squares."""
    parts = [_forward(h, weights, use_gram) for h in hs]
    kept = [tensor for product, found, _ in parts for tensor in (product, found.means, found.squares)]
    terms = combine([p[1] for p in parts], [p[2] for p in parts], weights, use_gram, hs[0].shape[0], _count(hs))
    return *terms, kept


def _forward(h: Tensor, weights: Weights, use_gram: bool) -> tuple[Tensor, Moments, Tensor]:
    if not weights.covariance:
        return h.new_empty(0), moments(h, weights), h.new_empty(0)
    where = route(h.shape[0], h.shape[2], use_gram)
    if where == "gram":
        return gram.gram(h, weights)
    return covariance.covariance(h, weights) if where == "covariance" else library.product(h, weights, use_gram)


def forward_with_gradient(
    hs: Sequence[Tensor], weights: Weights, use_gram: bool, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`forward`, and after what it keeps the gradient of the loss for each h, empty where it is not needed, made a
    block of time steps at a time while the block is in the GPU's cache."""
    one = torch.ones((), device=hs[0].device)
    incoming, count = Incoming(one, None, None), _count(hs)
    found, kept, gradients = [], [], []
    for h, need in zip(hs, needed, strict=True):
        out = like(h) if need else h.new_empty(0)
        blocks = []
        for at in _blocks(h, weights, use_gram):
            product, block, norms = _forward(h[:, at], weights, use_gram)
            if need:
                _backward(h[:, at], product, block.means, block.squares, out[:, at], incoming, weights, use_gram, count)
            found.append((block, norms))
            blocks.append((product, block.means, block.squares))
        kept += [torch.cat(tensors) for tensors in zip(*blocks, strict=True)] if len(blocks) > 1 else blocks[0]
        gradients.append(out)
    terms = combine([m for m, _ in found], [norms for _, norms in found], weights, use_gram, hs[0].shape[0], count)
    return *terms, kept + gradients


def _blocks(h: Tensor, weights: Weights, use_gram: bool) -> Iterator[slice]:
    """Time steps of h (N, T, d) that fit the cache with their gradient and their product, evenly many in each block."""
    n, steps, d = h.shape
    product = math.prod(product_shape(n, 1, d, use_gram)) if weights.covariance else 0
    fit = max(1, cache_bytes(h.device) // (2 * n * d * h.element_size() + 8 * product))
    width = triton.cdiv(steps, triton.cdiv(steps, fit))
    return (slice(start, start + width) for start in range(0, steps, width))


def backward(
    hs: Sequence[Tensor],
    kept: Sequence[Tensor],
    incoming: Incoming,
    weights: Weights,
    use_gram: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """dL/dh for each h, in its dtype and, where it is dense, its strides; empty where it is not needed."""
    outs = [like(h) if need else h.new_empty(0) for h, need in zip(hs, needed, strict=True)]
    for i, (h, out) in enumerate(zip(hs, outs, strict=True)):
        if needed[i]:
            _backward(h, *kept[KEPT * i : KEPT * (i + 1)], out, incoming, weights, use_gram, _count(hs))
    return outs


def _backward(
    h: Tensor, product: Tensor, means: Tensor, squares: Tensor, out: Tensor, incoming: Incoming, weights: Weights,
    use_gram: bool, count: int,
) -> None:  # fmt: skip
    # A term that nobody used has no part in the gradient, not even 0 * NaN.
    if incoming.loss is None and incoming.variance is None:
        weights = weights._replace(variance=False)
    if not weights.covariance or (incoming.loss is None and incoming.covariance is None):
        hinge_gradient(h, means, squares, out, incoming, weights, count)
        return
    arguments = h, product, means, squares, out, incoming, weights, count
    where = route(h.shape[0], h.shape[2], use_gram)
    if where == "library":
        library.gradient(*arguments, use_gram)
    else:
        (gram if where == "gram" else covariance).gradient(*arguments)


def like(h: Tensor) -> Tensor:
    """For a gradient: h's strides where it is dense, and features side by side, which h's may not be for d = 1 and are
    not in what torch makes like windows that overlap."""
    out = torch.empty_like(h)
    return out if out.stride(-1) == 1 else torch.empty(h.shape, dtype=h.dtype, device=h.device)


def _count(hs: Sequence[Tensor]) -> int:
    """T d, the divisor of both terms, with T the time steps of all tensors."""
    return sum(h.shape[1] for h in hs) * hs[0].shape[2]
