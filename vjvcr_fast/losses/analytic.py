"""The variance-covariance loss and its gradient, written out in plain PyTorch operations.

For one time step, let Z (N, d) be h minus its mean over the batch, s_k = sum_n Z_nk^2 and
sigma_k = sqrt(s_k / (N-1) + eps). The covariance penalty has two forms, which give the same number:

    sum_{i != j} C_ij^2 = ||Z'Z - diag(s)||^2 / (N-1)^2            covariance form, 2 N d^2 flops
                        = (||ZZ'||^2 - sum_k s_k^2) / (N-1)^2      Gram form,       2 N^2 d flops

The gradient of alpha * variance + beta * covariance has the same two forms:

    dZ = Z (b (Z'Z - diag(s)) - a diag([sigma < tau] / sigma))     covariance form
       = b (ZZ') Z - Z diag(b s + a [sigma < tau] / sigma)         Gram form

with a = alpha / (T d (N-1)) and b = 4 beta / (T d (N-1)^2). The columns of dZ sum to zero, so dZ is the gradient for h
as well. Derivations: docs/math.md. Tests compare everything here with reference.py in float64.

How to read this file: `centred`, `moments_of` and `terms` compute the loss, `coefficients` (a and b) and `gradient_of`
compute the gradient, for both forms. `VCR` joins them for autograd, in one of two ways:

- By blocks: eager mode on a CPU, if the input is larger than one block. A block is a few time steps, which stay in the
  cache. The forward pass can compute the gradient of the loss on the way, so that h is read once.
- All time steps at once: small inputs, other devices, torch.compile, and a gradient that is differentiated again.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Elements of one block: 1 MiB in float32, so that a block and its buffers stay in an L2 cache.
_BLOCK = 1 << 18


class Settings(NamedTuple):
    """What to compute. `gram` chooses the form. `variance` and `covariance` switch the terms on; one that is off is
    zero."""

    alpha: float
    beta: float
    threshold: float
    eps: float
    gram: bool
    variance: bool = True
    covariance: bool = True


class Moments(NamedTuple):
    """What the loss needs of one tensor (N, T, d).

    squares: s, (T, d). product: ZZ' (T, N, N), or Z'Z with a zero diagonal (T, d, d); None if it is not needed.
    norms: the sum of the product's squares at each time step, (T,).
    """

    squares: Tensor
    product: Tensor | None = None
    norms: Tensor | None = None


Terms: TypeAlias = tuple[Tensor, Tensor, Tensor]  # loss, variance, covariance
Incoming: TypeAlias = Sequence[Tensor | None]  # dL/dloss, dL/dvariance, dL/dcovariance; None for zero


def compute_dtype(h: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all narrower types."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def full_precision(h: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on h's device. Some devices (meta) have no autocast at all."""
    # Dynamo of torch 2.11 cannot trace the first question; where it compiles, there is autocast.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(h.device.type)
    on = known and torch.is_autocast_enabled(h.device.type)
    return torch.autocast(h.device.type, enabled=False) if on else nullcontext()


def _count(hs: Sequence[Tensor]) -> int:
    """T d, the divisor of both terms, where T counts the time steps of all tensors."""
    return sum(h.shape[1] for h in hs) * hs[0].shape[2]


# -- The loss -------------------------------------------------------------------------------------------------------


def centred(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x (T, N, d) minus its mean over N, in `compute_dtype`.

    The first sample is subtracted first. What is then averaged is of the size of sigma, so that means of many sigma
    cost no digits.
    """
    z = torch.sub(x, x[:, :1].to(compute_dtype(x)), out=out)
    return z.sub_(z.mean(dim=1, keepdim=True))


def product_of(z: Tensor, gram: bool, out: Tensor | None = None) -> Tensor:
    """ZZ' (T, N, N), or Z'Z with a zero diagonal (T, d, d), for z (T, N, d)."""
    if gram:
        return torch.bmm(z, z.mT, out=out)
    product = torch.bmm(z.mT, z, out=out)
    product.diagonal(dim1=1, dim2=2).mul_(0)  # not zero_(): NaN must stay NaN
    return product


def moments_of(z: Tensor, settings: Settings) -> Moments:
    """The moments of a centred tensor z (T, N, d)."""
    squares = z.square().sum(dim=1)
    if not settings.covariance:
        return Moments(squares)
    product = product_of(z, settings.gram)
    return Moments(squares, product, product.square().sum(dim=(1, 2)))


def terms(
    moments: Sequence[Moments],
    n: int,
    count: int,
    settings: Settings,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Terms:
    """The scalars (loss, variance, covariance) from the moments of all tensors, summed in float64.

    n: N. count: T d. total: adds up a tensor over processes, if each process has only a part of the sums.
    """
    squares = [each.squares for each in moments]
    if not (settings.variance and settings.covariance):
        variance = covariance = torch.zeros((), dtype=torch.float64, device=squares[0].device)
    if settings.variance:
        hinges = [(settings.threshold - _sigma(s, n, settings)).relu().sum(dtype=torch.float64) for s in squares]
        variance = reduce(torch.add, hinges) / count
    if settings.covariance:
        penalty = reduce(torch.add, [m.norms.sum(dtype=torch.float64) for m in moments if m.norms is not None])
        if settings.gram:
            penalty = reduce(torch.sub, [s.square().sum(dtype=torch.float64) for s in squares], penalty)
        covariance = penalty / (count * (n - 1) ** 2)
    if total is not None:
        both = total(torch.stack([variance, covariance]))
        variance, covariance = both[0].clone(), both[1].clone()  # of views autograd forbids changes in place
    loss = torch.add(settings.alpha * variance, covariance, alpha=settings.beta)
    dtype = squares[0].dtype
    return loss.to(dtype), variance.to(dtype), covariance.to(dtype)


def _sigma(squares: Tensor, n: int, settings: Settings) -> Tensor:
    return (squares / (n - 1) + settings.eps).sqrt()


# -- Its gradient ---------------------------------------------------------------------------------------------------


def coefficients(n: int, count: int, settings: Settings, incoming: Incoming) -> tuple[Tensor | None, Tensor | None]:
    """The scalars a and b of the module's head, for the gradients that come in; None for zero."""
    g_loss, g_variance, g_covariance = incoming
    a = b = None
    if settings.variance:
        a = _coefficient(1 / (count * (n - 1)), settings.alpha, g_loss, g_variance)
    if settings.covariance:
        b = _coefficient(4 / (count * (n - 1) ** 2), settings.beta, g_loss, g_covariance)
    return a, b


def _coefficient(scale: float, weight: float, g_loss: Tensor | None, g_term: Tensor | None) -> Tensor | None:
    """scale * (weight * dL/dloss + dL/dterm), where None is zero."""
    if g_loss is None:
        return None if g_term is None else g_term * scale
    weighted = g_loss * (scale * weight)
    return weighted if g_term is None else torch.add(weighted, g_term, alpha=scale)


def gradient_of(
    z: Tensor,
    moments: Moments,
    n: int,
    a: Tensor | None,
    b: Tensor | None,
    settings: Settings,
    out: Tensor | None = None,
    scaled: Tensor | None = None,
) -> Tensor:
    """dZ of the module's head, (T, N, d).

    z: (T, N, d), centred; some of the samples (covariance form) or of the features (Gram form) will do. moments: of all
    n samples. a, b: from `coefficients`. out, scaled: buffers for the result and for b times the product.
    """
    squares, product, _ = moments
    if a is None:
        diagonal = torch.zeros_like(squares)
    else:
        sigma = _sigma(squares, n, settings)
        diagonal = (sigma < settings.threshold) / sigma * -a
    if b is None or product is None:
        return torch.mul(z, diagonal.unsqueeze(1), out=out)
    scaled = torch.mul(product, b, out=scaled)
    if settings.gram:
        diagonal = diagonal - b * squares
        return torch.mul(z, diagonal.unsqueeze(1), out=out).baddbmm_(scaled, z)
    scaled.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return torch.bmm(z, scaled, out=out)


def gradients(
    hs: Sequence[Tensor],
    settings: Settings,
    incoming: Incoming,
    needed: Sequence[bool],
    kept: Sequence[Moments] | None = None,
) -> list[Tensor | None]:
    """dL/dh for each tensor (N, T, d), all time steps at once; None where it is not needed.

    kept: the moments from the forward pass. Without them they are computed again from h, by operations that autograd
    can differentiate.
    """
    n = hs[0].shape[0]
    found: list[Tensor | None] = []
    a, b = coefficients(n, _count(hs), settings, incoming)
    with full_precision(hs[0]):
        for i, h in enumerate(hs):
            if needed[i]:
                z = centred(h.transpose(0, 1))
                moments = moments_of(z, settings) if kept is None else kept[i]
                found.append(gradient_of(z, moments, n, a, b, settings).transpose(0, 1).to(h.dtype))
            else:
                found.append(None)
    return found


def plain(hs: Sequence[Tensor], settings: Settings) -> Terms:
    """The terms by operations that every transform of torch.func can follow; autograd keeps all that they make."""
    with full_precision(hs[0]):
        moments = [moments_of(centred(h.transpose(0, 1)), settings) for h in hs]
        return terms(moments, hs[0].shape[0], _count(hs), settings)


# -- By blocks ------------------------------------------------------------------------------------------------------


def _block_steps(h: Tensor) -> int:
    """The time steps of a block: as many as fit, and two if they fit twice the size, because bmm gains from it."""
    n, steps, d = h.shape
    return max(1, min(steps, max(_BLOCK // (n * d), min(2, 2 * _BLOCK // (n * d)))))


def _in_blocks(hs: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or hs[0].device.type != "cpu":
        return False
    return any(_block_steps(h) < h.shape[1] for h in hs)


def _by_blocks(
    h: Tensor, settings: Settings, a: Tensor | None, b: Tensor | None, gradient: bool
) -> tuple[Moments, Tensor | None]:
    """The moments of h (N, T, d) without the products and, if `gradient`, dL/dh. Reads h once."""
    n, steps, d = h.shape
    width, dtype = _block_steps(h), compute_dtype(h)
    size = (n if settings.gram else d) if settings.covariance else 0
    squares, norms = torch.empty(steps, d, dtype=dtype), torch.empty(steps, dtype=dtype)
    made = torch.empty_like(h) if gradient else None
    # The buffers are shared by all blocks: fresh memory costs a page fault every 4 KiB.
    buffers = [torch.empty(shape, dtype=dtype) for shape in ((width, n, d), (width, n, d), (width, size, size))]
    for start in range(0, steps, width):
        at = slice(start, start + width)
        x = h[:, at].transpose(0, 1)
        z, work, product = (buffer[: len(x)] for buffer in buffers)
        centred(x, out=z)
        torch.sum(torch.mul(z, z, out=work), dim=1, out=squares[at])
        if settings.covariance:
            product_of(z, settings.gram, out=product)
            # By rows: no copy of the squares, and short sums keep their digits.
            torch.sum(torch.linalg.vector_norm(product, dim=2).square_(), dim=1, out=norms[at])
        if made is not None:
            gradient_of(z, Moments(squares[at], product), n, a, b, settings, out=work, scaled=product)
            made[:, at].transpose(0, 1).copy_(work)
    return Moments(squares, None, norms if settings.covariance else None), made


# -- For autograd ---------------------------------------------------------------------------------------------------


class VCR(torch.autograd.Function):
    """(settings, made, *hs) -> (loss, variance, covariance, *what backward needs); the last are not differentiable.

    By blocks, the forward pass computes the gradient of the loss for each tensor whose `made` is true, and backward
    only scales it. A backward pass through the separate terms, or a second one, computes it again from h.
    All at once, `made` has no effect: forward keeps squares and product of each tensor, and backward reads h again.
    """

    @staticmethod
    def forward(settings: Settings, made: Sequence[bool], *hs: Tensor) -> tuple[Tensor, ...]:
        n, count = hs[0].shape[0], _count(hs)
        with full_precision(hs[0]):
            if _in_blocks(hs):
                one = torch.ones((), dtype=compute_dtype(hs[0]))
                a, b = coefficients(n, count, settings, (one, None, None))
                found = [_by_blocks(h, settings, a, b, make) for h, make in zip(hs, made, strict=True)]
                moments = [each for each, _ in found]
                kept = [gradient for _, gradient in found if gradient is not None]
            else:
                moments = [moments_of(centred(h.transpose(0, 1)), settings) for h in hs]
                kept = [tensor for each in moments for tensor in each[:2] if tensor is not None]
            return *terms(moments, n, count, settings), *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        settings, made, *hs = inputs
        kept = output[3:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.tensors, ctx.blocks = settings, len(hs), _in_blocks(hs)
        ctx.gradients = {}
        if ctx.blocks:
            ctx.gradients = dict(zip([i for i, make in enumerate(made) if make], kept, strict=True))
            kept = ()
        ctx.save_for_backward(*hs, *kept)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        settings: Settings = ctx.settings
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        hs, kept = saved[: ctx.tensors], saved[ctx.tensors :]
        incoming, needed = incoming[:3], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # The gradient will be differentiated. What forward kept has no graph.
            return None, None, *gradients(hs, settings, incoming, needed)
        if not ctx.blocks:
            each = 2 if settings.covariance else 1
            moments = [Moments(*kept[i : i + each]) for i in range(0, len(kept), each)]
            return None, None, *gradients(hs, settings, incoming, needed, moments)
        found: list[Tensor | None] = []
        a, b = coefficients(len(hs[0]), _count(hs), settings, incoming)
        g_loss, g_variance, g_covariance = incoming
        loss_alone = g_loss is not None and g_variance is None and g_covariance is None
        with full_precision(hs[0]):
            for i, h in enumerate(hs):
                if loss_alone and i in ctx.gradients:
                    # Given away once, because the caller may change it.
                    found.append(ctx.gradients.pop(i).mul_(g_loss))
                elif needed[i]:
                    found.append(_by_blocks(h, settings._replace(covariance=b is not None), a, b, True)[1])
                else:
                    found.append(None)
        return None, None, *found
