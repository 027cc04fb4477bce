"""Variance-covariance regularisation with its gradient written out, in plain torch operations.

For one time step let Z (N, d) be centred over the batch, s_k = sum_n Z_nk^2, sigma_k = sqrt(s_k / (N-1) + eps). Then

    sum_{i != j} C_ij^2 = ||Z'Z - diag||^2 / (N-1)^2               covariance form, 2 N d^2 flops
                        = (||ZZ'||^2 - sum_k s_k^2) / (N-1)^2      Gram form,       2 N^2 d flops

    dZ = b Z (Z'Z - diag) - a Z diag([sigma_k < tau] / sigma_k),   a = alpha / (T d (N-1)),   b = 4 beta / (T d (N-1)^2)

with Z Z'Z = (ZZ') Z in the Gram form, whose diagonal -b s_k joins the hinge's. Columns of dZ sum to zero, so centring
has no backward of its own. Derivations: docs/math.md; the judge: reference.py in float64.

Eager on a CPU, time steps go through in blocks that stay in the cache, in buffers made once; where a gradient will be
wanted, that of the loss is made on the way, so that the input is read once. Backward through the loss then scales it;
backward through the separate terms, or a second time, makes it again. Traced by the compiler, on a GPU or under double
differentiation all time steps go at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Elements of one block of time steps: 1 MiB in float32, so that a block and its buffers stay in an L2 cache.
_BLOCK = 1 << 18


class Settings(NamedTuple):
    """What the loss is asked for. `variance` and `covariance` say which terms are computed; the other is zero."""

    alpha: float
    beta: float
    threshold: float
    eps: float
    gram: bool
    variance: bool = True
    covariance: bool = True
    gradient: bool = False  # a gradient will be wanted: make that of the loss while a block is in the cache


class _Moments(NamedTuple):
    """Per tensor (N, T, d): squares s (T, d) and, if the penalty is asked for, the product (T, N, N) or (T, d, d, the
    diagonal zero) and the sum of its squares (T,), which backward does not need."""

    squares: Tensor
    product: Tensor | None
    norms: Tensor | None = None


def compute_dtype(h: Tensor) -> torch.dtype:
    """float64 stays float64; everything narrower is computed in float32."""
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _in_blocks(h: Tensor) -> bool:
    """Whether h goes through a block of time steps at a time: eager on a CPU, and more than one block."""
    traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
    return h.device.type == "cpu" and not traced and _block_steps(h) < h.shape[1]


def _block_steps(h: Tensor) -> int:
    """As many as fit into a block, but two where they fit into twice that: batched products gain by it."""
    n, steps, d = h.shape
    return max(1, min(steps, max(_BLOCK // (n * d), min(2, 2 * _BLOCK // (n * d)))))


def _blocks(h: Tensor, size: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """h (N, T, d) a block of t time steps at a time: (slice of T, view (t, N, d), two buffers like that view, and one
    for its products (t, size, size)). Fresh memory costs a page fault every 4 KiB; buffers are paid for once."""
    n, total, d = h.shape
    width = _block_steps(h)
    shapes = (width, n, d), (width, n, d), (width, size, size)
    one, two, three = (torch.empty(shape, dtype=compute_dtype(h)) for shape in shapes)
    for start in range(0, total, width):
        x = h[:, start : start + width].transpose(0, 1)
        yield slice(start, start + width), x, one[: len(x)], two[: len(x)], three[: len(x)]


def centred(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x (t, N, d) minus its mean over N, in compute_dtype. The first sample goes first: a mean of many sigma then
    costs no digits, since what is averaged is of the size of sigma."""
    z = torch.sub(x, x[:, :1].to(compute_dtype(x)), out=out)
    return z.sub_(z.mean(dim=1, keepdim=True))


def product_of(z: Tensor, gram: bool, out: Tensor | None = None) -> Tensor:
    """z (t, N, d): ZZ' (t, N, N), or Z'Z without its diagonal (t, d, d)."""
    if gram:
        return torch.bmm(z, z.mT, out=out)
    product = torch.bmm(z.mT, z, out=out)
    product.diagonal(dim1=1, dim2=2).mul_(0)  # times zero rather than zero_(): NaN stays NaN
    return product


def _squared_norms(product: Tensor, out: Tensor) -> Tensor:
    """||product||^2 of each time step. By rows: no copy of the squares, and short sums keep their digits."""
    return torch.sum(torch.linalg.vector_norm(product, dim=2).square_(), dim=1, out=out)


def _moments(h: Tensor, settings: Settings) -> _Moments:
    n, steps, d = h.shape
    if not _in_blocks(h):
        z = centred(h.transpose(0, 1))
        squares = z.square().sum(dim=1)
        if not settings.covariance:
            return _Moments(squares, None)
        product = product_of(z, settings.gram)
        return _Moments(squares, product, product.square().sum(dim=(1, 2)))
    size = (n if settings.gram else d) if settings.covariance else 0
    dtype = compute_dtype(h)
    squares, norms = torch.empty(steps, d, dtype=dtype), torch.empty(steps, dtype=dtype)
    product = torch.empty(steps, size, size, dtype=dtype)
    for at, x, z, work, _ in _blocks(h, 0):
        centred(x, out=z)
        torch.sum(torch.mul(z, z, out=work), dim=1, out=squares[at])
        if settings.covariance:
            block = product_of(z, settings.gram, out=product[at])
            _squared_norms(block, out=norms[at])
    return _Moments(squares, product, norms) if settings.covariance else _Moments(squares, None)


def _one_pass(h: Tensor, settings: Settings, count: int) -> tuple[_Moments, Tensor]:
    """Moments without the product, and the gradient of the loss, (N, T, d), from a single read of h."""
    n, steps, d = h.shape
    a, b = settings.alpha / (count * (n - 1)), 4 * settings.beta / (count * (n - 1) ** 2)
    squares, norms = torch.empty(steps, d, dtype=h.dtype), torch.empty(steps, dtype=h.dtype)
    gradient = torch.empty_like(h)
    for at, x, z, work, product in _blocks(h, (n if settings.gram else d) if settings.covariance else 0):
        centred(x, out=z)
        s = torch.sum(torch.mul(z, z, out=work), dim=1, out=squares[at])
        diagonal = _hinge_diagonal(s, n, settings) * -a if settings.variance else torch.zeros_like(s)
        if settings.covariance and settings.gram:
            diagonal -= b * s
        torch.mul(z, diagonal.unsqueeze(1), out=work)
        if settings.covariance:
            product_of(z, settings.gram, out=product)
            _squared_norms(product, out=norms[at])
            left, right = (product, z) if settings.gram else (z, product)
            work.baddbmm_(left, right, alpha=b)
        gradient[:, at].transpose(0, 1).copy_(work)
    return _Moments(squares, None, norms if settings.covariance else None), gradient


def _made_in_forward(h: Tensor, settings: Settings) -> bool:
    """Whether forward makes the gradient. Not of a single block, where more operations cost more than a second read;
    not in half precision, where it would underflow before a loss scale reaches it."""
    blocks = h.device.type == "cpu" and not torch.compiler.is_compiling() and _block_steps(h) < h.shape[1]
    return settings.gradient and blocks and h.dtype == compute_dtype(h)


def _sigma(squares: Tensor, n: int, settings: Settings) -> Tensor:
    return (squares / (n - 1) + settings.eps).sqrt()


def _hinge_diagonal(squares: Tensor, n: int, settings: Settings) -> Tensor:
    """[sigma < threshold] / sigma, of squares (T, d)."""
    sigma = _sigma(squares, n, settings)
    return (sigma < settings.threshold) / sigma


def hinge_sum(squares: Tensor, n: int, settings: Settings) -> Tensor:
    """The sum of max(0, threshold - sigma) over squares (T, d), in float64."""
    return (settings.threshold - _sigma(squares, n, settings)).relu().sum(dtype=torch.float64)


def _terms(moments: Sequence[_Moments], n: int, count: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """The unweighted variance and covariance terms over all tensors, summed in float64. count: T d of them all."""
    hinges, penalties = [], []
    for squares, _, norms in moments:
        if settings.variance:
            hinges.append(hinge_sum(squares, n, settings))
        if norms is not None:
            penalty = norms.sum(dtype=torch.float64)
            penalties.append(penalty - squares.square().sum(dtype=torch.float64) if settings.gram else penalty)
    variance = _sum(hinges) / count if hinges else _zero(moments)
    covariance = _sum(penalties) / (count * (n - 1) ** 2) if penalties else _zero(moments)
    return variance, covariance


def _zero(moments: Sequence[_Moments]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=moments[0].squares.device)


def _sum(scalars: list[Tensor]) -> Tensor:
    """Their sum, without a zero to start from: on small shapes each scalar operation shows."""
    return reduce(torch.add, scalars)


def _gradient(h: Tensor, moments: _Moments, a: Tensor | None, b: Tensor | None, settings: Settings) -> Tensor:
    """dL/dh (N, T, d) in h's dtype, where a = dL/dvariance / (T d (N-1)) and b = 4 dL/dcovariance / (T d (N-1)^2),
    scalars, None for zero."""
    squares, product, _ = moments
    if b is None:
        product = None
    diagonal = _diagonal(squares, h.shape[0], a, b, settings)
    if not _in_blocks(h):
        return _apply(centred(h.transpose(0, 1)), diagonal, product, b, settings.gram).transpose(0, 1).to(h.dtype)
    gradient = torch.empty_like(h)
    for at, x, z, work, small in _blocks(h, 0 if product is None else product.shape[-1]):
        centred(x, out=z)
        block = None if product is None else product[at]
        gradient[:, at].transpose(0, 1).copy_(_apply(z, diagonal[at], block, b, settings.gram, work, small))
    return gradient


def gradient_of(
    z: Tensor, squares: Tensor, product: Tensor | None, n: int, a: Tensor | None, b: Tensor | None, settings: Settings
) -> Tensor:
    """As `_gradient`, of samples or features that are centred, z (T, n_r, d_r), with the moments of all N = n."""
    return _apply(z, _diagonal(squares, n, a, b, settings), product if b is not None else None, b, settings.gram)


def _diagonal(squares: Tensor, n: int, a: Tensor | None, b: Tensor | None, settings: Settings) -> Tensor:
    """What the gradient's matrix has on its diagonal, (T, d), but for that of A, which is zero."""
    diagonal = torch.zeros_like(squares) if a is None else _hinge_diagonal(squares, n, settings) * -a
    return diagonal - b * squares if b is not None and settings.gram else diagonal


def _apply(
    z: Tensor,
    diagonal: Tensor,
    product: Tensor | None,
    b: Tensor | None,
    gram: bool,
    out: Tensor | None = None,
    small: Tensor | None = None,
) -> Tensor:
    """z (t, N, d) times the gradient's matrix: Z diag + b K Z (Gram form), Z (diag + b A) (covariance form), or
    Z diag (hinge alone: no product, no b). diagonal: (t, d). out, small: buffers for the result and for b K, b A."""
    if product is None or b is None:
        return torch.mul(z, diagonal.unsqueeze(1), out=out)
    scaled = torch.mul(product, b, out=small)
    if not gram:
        scaled.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return torch.bmm(z, scaled, out=out)
    return torch.mul(z, diagonal.unsqueeze(1), out=out).baddbmm_(scaled, z)


class VCR(torch.autograd.Function):
    """(settings, *hs) -> (loss, variance, covariance, *what backward needs); the last are not differentiable.

    What backward needs of a tensor is its moments, or, where `_made_in_forward`, the loss's gradient itself.
    """

    @staticmethod
    def forward(settings: Settings, *hs: Tensor) -> tuple[Tensor, ...]:
        n, count = hs[0].shape[0], _count(hs)
        moments, kept = [], []
        with full_precision(hs[0]):
            for h in hs:
                if _made_in_forward(h, settings):
                    found, gradient = _one_pass(h, settings, count)
                    kept.append(gradient)
                else:
                    found = _moments(h, settings)
                    kept += [found.squares] if found.product is None else [found.squares, found.product]
                moments.append(found)
            variance, covariance = _terms(moments, n, count, settings)
        loss = torch.add(settings.alpha * variance, covariance, alpha=settings.beta)
        dtype = compute_dtype(hs[0])
        return loss.to(dtype), variance.to(dtype), covariance.to(dtype), *kept

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        settings, *hs = inputs
        kept = list(output[3:])
        ctx.mark_non_differentiable(*kept)
        ctx.settings, ctx.tensors = settings, len(hs)
        ctx.made, moments = [_made_in_forward(h, settings) for h in hs], []
        ctx.gradients = {}
        for i, made in enumerate(ctx.made):
            if made:
                ctx.gradients[i] = kept.pop(0)
            else:
                moments += [kept.pop(0) for _ in range(_kept(settings))]
        ctx.save_for_backward(*hs, *moments)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g_loss, g_variance, g_covariance, *_) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        settings: Settings = ctx.settings
        hs, saved = ctx.saved_tensors[: ctx.tensors], list(ctx.saved_tensors[ctx.tensors :])
        count = _count(hs)
        a, b = coefficients(len(hs[0]), count, settings, g_loss, g_variance, g_covariance)
        # Where someone differentiates the gradient, what forward kept has no graph: it is made anew.
        anew = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        loss_alone = g_loss is not None and g_variance is None and g_covariance is None
        gradients: list[Tensor | None] = [None]
        with full_precision(hs[0]):
            for i, h in enumerate(hs):
                moments = None if ctx.made[i] else _restore(saved, settings)
                if not ctx.needs_input_grad[i + 1]:
                    gradients.append(None)
                elif loss_alone and not anew and moments is None:
                    # Given away once; a second backward makes it again.
                    made = ctx.gradients.pop(i, None)
                    gradients.append((_one_pass(h, settings, count)[1] if made is None else made).mul_(g_loss))
                else:
                    if anew or moments is None:
                        moments = _moments(h, settings)
                    gradients.append(_gradient(h, moments, a, b, settings))
        return tuple(gradients)


def gradients(
    hs: Sequence[Tensor],
    settings: Settings,
    g_loss: Tensor | None,
    g_variance: Tensor | None,
    g_covariance: Tensor | None,
) -> list[Tensor]:
    """dL/dh of each tensor (N, T, d), made from nothing but the tensors, so that it can be differentiated again."""
    a, b = coefficients(len(hs[0]), _count(hs), settings, g_loss, g_variance, g_covariance)
    with full_precision(hs[0]):
        return [_gradient(h, _moments(h, settings), a, b, settings) for h in hs]


def coefficients(
    n: int,
    count: int,
    settings: Settings,
    g_loss: Tensor | None,
    g_variance: Tensor | None,
    g_covariance: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """a and b of `gradient_of`, from what comes back to the three terms. count: T d of all tensors."""
    a = b = None
    if settings.variance:
        a = _coefficient(1 / (count * (n - 1)), settings.alpha, g_loss, g_variance)
    if settings.covariance:
        b = _coefficient(4 / (count * (n - 1) ** 2), settings.beta, g_loss, g_covariance)
    return a, b


def _kept(settings: Settings) -> int:
    """How many tensors `_Moments` leaves for backward."""
    return 2 if settings.covariance else 1


def _restore(saved: list[Tensor], settings: Settings) -> _Moments:
    """Takes the first tensor's moments out of `saved`."""
    return _Moments(saved.pop(0), saved.pop(0) if settings.covariance else None)


def _count(hs: Sequence[Tensor]) -> int:
    """T d, the divisor of both terms, with T the time steps of all tensors."""
    return sum(h.shape[1] for h in hs) * hs[0].shape[2]


def _coefficient(scale: float, weight: float, g_loss: Tensor | None, g_term: Tensor | None) -> Tensor | None:
    """scale * (weight * dL/dloss + dL/dterm), where None is zero."""
    parts = [] if g_loss is None else [g_loss * (scale * weight)]
    if g_term is not None:
        parts.append(g_term * scale)
    return _sum(parts) if parts else None


def full_precision(h: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off where it is on; some devices (meta) know none."""
    on = torch.amp.is_autocast_available(h.device.type) and torch.is_autocast_enabled(h.device.type)
    return torch.autocast(h.device.type, enabled=False) if on else nullcontext()
