"""The loss on a CPU as one compiled operator (csrc/vcr_cpu.cpp), for autograd and torch.compile.

Forward also computes the gradient of the loss, while h is in the cache. Backward multiplies it by the incoming
gradient, unless that is 1. What forward did not compute, backward computes from h.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.losses import analytic
from vjvcr_fast.losses.analytic import Settings


def forward(settings: Settings, made: Sequence[bool], *hs: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(loss, variance, covariance, gradients of the loss): see `VCR`."""
    return torch.ops.vjvcr.vcr_cpu(hs, *settings, made)


class VCR(torch.autograd.Function):
    """(settings, made, *hs) -> (loss, variance, covariance). hs: (N, T, d) tensors, any strides. made: for each tensor,
    whether forward computes the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, made: Sequence[bool], *hs: Tensor) -> tuple[Tensor, ...]:
        *terms, gradients = forward(settings, made, *hs)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.needed = settings, list(ctx.needs_input_grad[2:])
        ctx.save_for_backward(*hs)
        if any(made):
            ctx.gradients = gradients
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, needed = ctx.settings, ctx.needed
        hs = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            # The gradient will be differentiated: compute it by plain torch operations, which autograd can follow.
            return None, None, *analytic.gradients(hs, settings, incoming, needed)
        g_loss, g_variance, g_covariance = incoming
        found = None
        if not compiling and g_variance is None and g_covariance is None:
            found = ctx.__dict__.pop("gradients", None)  # given away once, because the caller may change them
        if found is not None and g_loss is not None:
            if torch._C._len_torch_dispatch_stack() or g_loss.item() != 1:
                found = [gradient.mul_(g_loss) for gradient in found]
        else:
            found = torch.ops.vjvcr.vcr_cpu_backward(hs, *incoming, *settings, needed)
        return None, None, *(gradient if need else None for gradient, need in zip(found, needed, strict=True))
