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
compute the gradient, for both forms. `VCR` joins them for autograd. On a CPU it goes through h by blocks of a few time
steps, which stay in the cache. All time steps at once take up to 1.6 times as long.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Elements of one block: 1 MiB in float32, so that a block and what is made of it stay in an L2 cache.
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


def blocks(h: Tensor) -> Sequence[Tensor]:
    """h (N, T, d) as tensors (T', N, d): on a CPU some time steps each, elsewhere and for the compiler all of them."""
    x = h.transpose(0, 1)
    if torch.compiler.is_compiling() or h.device.type != "cpu":
        return (x,)
    # As many time steps as fit, and two if they fit twice the size, because bmm gains from it.
    size = x[0].numel()
    return x.split(max(1, _BLOCK // size, min(2, 2 * _BLOCK // size)))


def centred(x: Tensor) -> Tensor:
    """x (T, N, d) minus its mean over N, in `compute_dtype`.

    The first sample is subtracted first. What is then averaged is of the size of sigma, so that means of many sigma
    cost no digits.
    """
    z = x - x[:, :1].to(compute_dtype(x))
    return z.sub_(z.mean(dim=1, keepdim=True))


def moments_of(z: Tensor, settings: Settings) -> Moments:
    """The moments of a centred tensor z (T, N, d)."""
    squares = z.square().sum(dim=1)
    if not settings.covariance:
        return Moments(squares)
    product = torch.bmm(z, z.mT) if settings.gram else torch.bmm(z.mT, z)
    if not settings.gram:
        product.diagonal(dim1=1, dim2=2).mul_(0)  # not zero_(): NaN must stay NaN
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
    # Not torch.add(..., alpha=...): under torch.func.linearize it crashes where one of the two is constant.
    loss = settings.alpha * variance + settings.beta * covariance
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
) -> Tensor:
    """dZ of the module's head, (T, N, d).

    z: (T, N, d), centred; some of the samples (covariance form) or of the features (Gram form) will do. moments: of all
    n samples. a, b: from `coefficients`.
    """
    squares, product, _ = moments
    if a is None:
        diagonal = torch.zeros_like(squares)
    else:
        sigma = _sigma(squares, n, settings)
        diagonal = (sigma < settings.threshold) / sigma * -a
    if b is None or product is None:
        return z * diagonal.unsqueeze(1)
    scaled = product * b
    if settings.gram:
        diagonal = diagonal - b * squares
        return (z * diagonal.unsqueeze(1)).baddbmm_(scaled, z)
    scaled.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return torch.bmm(z, scaled)


def gradients(
    hs: Sequence[Tensor],
    settings: Settings,
    incoming: Incoming,
    needed: Sequence[bool],
    kept: Sequence[Sequence[Moments]] | None = None,
) -> list[Tensor | None]:
    """dL/dh for each tensor (N, T, d); None where it is not needed.

    kept: for each tensor the moments of its `blocks`, from the forward pass. Without them they are computed again from
    h, all time steps at once, by operations that autograd can differentiate.
    """
    n = hs[0].shape[0]
    a, b = coefficients(n, _count(hs), settings, incoming)

    def of(x: Tensor, moments: Moments | None) -> Tensor:
        z = centred(x)
        return gradient_of(z, moments_of(z, settings) if moments is None else moments, n, a, b, settings)

    found: list[Tensor | None] = [None for _ in hs]
    with full_precision(hs[0]):
        for i, h in enumerate(hs):
            if not needed[i]:
                continue
            if kept is None or len(kept[i]) == 1:
                found[i] = of(h.transpose(0, 1), kept[i][0] if kept else None).transpose(0, 1).to(h.dtype)
                continue
            found[i] = made = torch.empty_like(h)
            steps = [len(each.squares) for each in kept[i]]
            parts = (tensor.transpose(0, 1).split(steps) for tensor in (made, h))
            for to, x, moments in zip(*parts, kept[i], strict=True):
                to.copy_(of(x, moments))
    return found


# -- For autograd ---------------------------------------------------------------------------------------------------


def plain(hs: Sequence[Tensor], settings: Settings) -> tuple[Terms, list[Moments]]:
    """The terms, and the moments of all `blocks`, by operations that every transform of torch.func can follow. Autograd
    would keep all that these make: for it there is `VCR`."""
    with full_precision(hs[0]):
        moments = [moments_of(centred(x), settings) for h in hs for x in blocks(h)]
        return terms(moments, hs[0].shape[0], _count(hs), settings), moments


def followed(incoming: Incoming) -> bool:
    """True in a backward pass that will be differentiated, or is for many incoming gradients at once (vmap): then
    plain operations on h must compute the gradient, and what forward kept is no use."""
    if torch.compiler.is_compiling():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor  # is_grads_batched of torch.autograd.grad
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or any(g is not None and batched(g) for g in incoming)
    )


class VCR(torch.autograd.Function):
    """(settings, *hs) -> (loss, variance, covariance, *what backward needs); the last are not differentiable.

    Forward keeps squares and product of each block, and backward reads h again.
    """

    @staticmethod
    def forward(settings: Settings, *hs: Tensor) -> tuple[Tensor, ...]:
        """hs: (N, T, d) each. Returns the three terms, then squares and product of each block."""
        values, moments = plain(hs, settings)
        return *values, *(tensor for each in moments for tensor in each[:2] if tensor is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves hs and what forward kept for backward."""
        settings, *hs = inputs
        kept = output[3:]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.blocks = settings, [len(blocks(h)) for h in hs]
        ctx.save_for_backward(*hs, *kept)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """incoming: dL/d of each output, None if there is none. Returns dL/dh of each tensor that needs it."""
        settings: Settings = ctx.settings
        saved = iter(ctx.saved_tensors)  # read once: torch.utils.checkpoint allows no more
        hs = [next(saved) for _ in ctx.blocks]
        kept = None
        if not followed(incoming):
            each = 2 if settings.covariance else 1
            kept = [[Moments(*islice(saved, each)) for _ in range(count)] for count in ctx.blocks]
        return None, *gradients(hs, settings, incoming[:3], ctx.needs_input_grad[1:], kept)
