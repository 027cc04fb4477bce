"""The loss on a CPU as one compiled operator (csrc/vcr_cpu.cpp), for autograd and torch.compile.

Forward also computes the gradient of the loss, while h is in the cache. Backward multiplies it by the incoming gradient,
unless that is 1. What forward did not compute, backward computes from h.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.losses import analytic
from vjvcr_fast.losses.analytic import Settings, Terms


class VCR(torch.autograd.Function):
    """(settings, made, *hs) -> (loss, variance, covariance). hs: (N, T, d) tensors, any strides. made: for each tensor,
    whether forward computes the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, made: Sequence[bool], *hs: Tensor) -> Terms:
        *terms, gradients = torch.ops.vjvcr.vcr_cpu(hs, *settings, made)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.needed, ctx.early = settings, list(ctx.needs_input_grad[2:]), any(made)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*hs, *gradients)
        else:
            ctx.save_for_backward(*hs)
            ctx.gradients = gradients
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, needed, compiling = ctx.settings, ctx.needed, torch.compiler.is_compiling()
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        hs = saved[: len(needed)]
        if torch.is_grad_enabled() and not compiling:
            # The gradient will be differentiated: compute it by plain torch operations, which autograd can follow.
            return None, None, *analytic.gradients(hs, settings, incoming, needed)
        g_loss, g_variance, g_covariance = incoming
        found = None
        if ctx.early and g_loss is not None and g_variance is None and g_covariance is None:
            if compiling:
                found = [gradient * g_loss for gradient in saved[len(needed) :]]
            elif ctx.gradients is not None:
                # Given away once, because the caller may change it.
                found, ctx.gradients = ctx.gradients, None
                if torch._C._len_torch_dispatch_stack() or g_loss.item() != 1:
                    found = [gradient.mul_(g_loss) for gradient in found]
        if found is None:
            found = torch.ops.vjvcr.vcr_cpu_backward(hs, *incoming, *settings, needed)
        return None, None, *(gradient if need else None for gradient, need in zip(found, needed, strict=True))
