"""VCR on a CPU as one compiled operator (csrc/vcr_cpu.cpp), with autograd.

`terms` is for eager mode. Forward also computes the gradient of the loss, while h is in the cache, and backward
multiplies it by the incoming gradient, unless that is 1. What forward did not compute, backward computes from h.
The operator by itself can be differentiated, too: that is for graphs, which hold it without our Python around it. So
can those of SIGReg (csrc/sigreg_cpu.cpp), for which projections.py has all the rest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast import native
from vjvcr_fast.losses import analytic, projections
from vjvcr_fast.losses.analytic import Incoming, Settings, Terms


def terms(hs: Sequence[Tensor], settings: Settings, early: bool) -> Terms:
    """(loss, variance, covariance) of (N, T, d) tensors with any strides. early: forward may compute the gradient."""
    early = early and makes_gradients(hs[0])
    return VCR.apply(settings, [early and h.requires_grad for h in hs], *hs)


def makes_gradients(h: Tensor) -> bool:
    """Whether a forward pass in eager mode may compute the gradient for tensors like h.

    Not in half precision: multiplying by the incoming gradient would round twice, and float16 may underflow before
    that. Not where hooks (checkpoints, save_on_cpu) decide what is kept until backward.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return torch.is_grad_enabled() and h.dtype == analytic.compute_dtype(h) and not hooked


def operator(hs: Sequence[Tensor], settings: Settings) -> Terms:
    """The same for a graph: nothing but the operator, which leaves the gradient to backward."""
    return torch.ops.vjvcr.vcr_cpu(hs, *settings, [False] * len(hs))[:3]


def _gradients(ctx: Any, incoming: Incoming) -> Sequence[Tensor | None]:
    """What autograd hands on: dL/dh of each tensor, None if it is not needed."""
    hs = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
    if analytic.followed(incoming):
        return analytic.gradients(hs, ctx.settings, incoming, ctx.needed)
    g_loss, g_variance, g_covariance = incoming
    found = None
    if g_loss is not None and g_variance is None and g_covariance is None:
        found = ctx.__dict__.pop("gradients", None)  # given away once, because the caller may change them
        if found is not None and (torch._C._len_torch_dispatch_stack() or g_loss.item() != 1):
            found = [gradient.mul_(g_loss) for gradient in found]
    if found is None:
        found = torch.ops.vjvcr.vcr_cpu_backward(hs, *incoming, *ctx.settings, ctx.needed)
    return [gradient if need else None for gradient, need in zip(found, ctx.needed, strict=True)]


class VCR(torch.autograd.Function):
    """(settings, made, *hs) -> (loss, variance, covariance). made: for each tensor, whether forward computes the
    gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, made: Sequence[bool], *hs: Tensor) -> Terms:
        """hs: (N, T, d) each. Keeps hs, and the gradients that were made."""
        with torch._C._AutoDispatchBelowAutograd():
            loss, variance, covariance, gradients = torch.ops.vjvcr.vcr_cpu(hs, *settings, made)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.needed = settings, list(ctx.needs_input_grad[2:])
        ctx.save_for_backward(*hs)
        if any(made):
            ctx.gradients = gradients
        return loss, variance, covariance

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """incoming: dL/d of each term, None if there is none. Returns dL/dh of each tensor that needs it."""
        return None, None, *_gradients(ctx, incoming)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hs, *settings, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.needed = Settings(*settings), [h.requires_grad for h in hs]
    ctx.save_for_backward(*hs)


def _backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
    return _gradients(ctx, incoming[:3]), *(None,) * (len(ctx.settings) + 1)


# -- SIGReg ---------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    h, directions, grid, ctx.half, *ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, directions, grid, *([output[1]] if ctx.scale else []))


def _backward_of_sums(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    h, directions, grid = ctx.saved_tensors
    with analytic.full_precision(h):
        if analytic.followed((incoming,)):
            with torch.enable_grad():
                sums = projections.plain_sums(h, directions, grid)
            (found,) = torch.autograd.grad(sums, h, incoming, create_graph=True)
        else:
            factors = (incoming.flip(1) * grid[0].to(incoming.dtype)[:, None]).contiguous()
            found = torch.ops.vjvcr.sigreg_gradient_cpu(h, directions, grid, ctx.half, factors)
    return found, None, None, None


def _backward_of_loss(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    h, directions, grid, gradient = ctx.saved_tensors
    g_loss, g_gradient = incoming
    if g_loss is not None and g_gradient is None and not analytic.followed(incoming):
        found = gradient * g_loss.to(gradient.dtype)
    else:
        with torch.enable_grad(), analytic.full_precision(h):
            loss = projections.loss_of(projections.plain_sums(h, directions, grid), grid, *ctx.scale)
            both = (loss, *torch.autograd.grad(loss, h, create_graph=True))
            kept = [(x, g) for x, g in zip(both, incoming, strict=True) if g is not None]
            (found,) = torch.autograd.grad([x for x, _ in kept], h, [g for _, g in kept], create_graph=True)
    return found, None, None, None, None


if native.MISSING is None:
    torch.library.register_autograd("vjvcr::vcr_cpu", _backward, setup_context=_setup_context)
    torch.library.register_autograd("vjvcr::sigreg_sums_cpu", _backward_of_sums, setup_context=_keep)
    torch.library.register_autograd("vjvcr::sigreg_cpu", _backward_of_loss, setup_context=_keep)
