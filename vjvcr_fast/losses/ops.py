"""The Triton kernels (vjvcr_fast.kernels) as PyTorch operators, with autograd and what torch.compile needs.

`vcr` computes the loss, `vcr_backward` its gradient. Triton is imported by their first call, not by this file. The
compiler does not look into the operators. Each allocates what it returns, and reads PyTorch's precision setting for
matrix products when it runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.losses import analytic


@torch.library.custom_op("vjvcr::vcr", mutates_args=())
def vcr(
    hs: Sequence[Tensor],
    alpha: float,
    beta: float,
    threshold: float,
    eps: float,
    gram: bool,
    variance: bool,
    covariance: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Equation (4), alpha * variance + beta * covariance, of tensors (N, T, d).

    alpha ... covariance: the fields of `analytic.Settings`.

    Returns the float32 scalars (loss, variance, covariance) and a list for backward: product, means and squares of each
    tensor.
    Raises ValueError if the features of a tensor are not adjacent in memory.
    """
    from vjvcr_fast.kernels import vcr as kernels

    for h in hs:
        if h.stride(-1) != 1 and h.shape[-1] > 1:
            raise ValueError(f"a tensor with strides {h.stride()}: the last dimension's must be 1")
    weights = kernels.Weights(alpha, beta, threshold, eps, variance, covariance)
    with analytic.full_precision(hs[0]), _device_of(hs[0]):
        return kernels.forward(hs, weights, gram)


@vcr.register_fake
def _(hs, alpha, beta, threshold, eps, gram, variance, covariance):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.launch import mode_of, operand_dtype
    from vjvcr_fast.kernels.vcr import product_shape

    kept = []
    for h in hs:
        n, steps, d = h.shape
        shape = product_shape(n, steps, d, gram) if covariance else (0,)
        kept.append(h.new_empty(shape, dtype=operand_dtype(mode_of(h)) if covariance else h.dtype))
        kept += [h.new_empty((steps, d), dtype=torch.float32) for _ in range(2)]
    return *(hs[0].new_empty((), dtype=torch.float32) for _ in range(3)), kept


@torch.library.custom_op("vjvcr::vcr_backward", mutates_args=())
def vcr_backward(
    hs: Sequence[Tensor],
    kept: Sequence[Tensor],
    g_loss: Tensor | None,
    g_variance: Tensor | None,
    g_covariance: Tensor | None,
    alpha: float,
    beta: float,
    threshold: float,
    eps: float,
    gram: bool,
    variance: bool,
    covariance: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """dL/dh of each tensor, empty if it is not needed.

    kept: from `vcr`. g_loss, g_variance, g_covariance: the gradients of its three scalars, None for zero.
    """
    from vjvcr_fast.kernels import vcr as kernels

    weights = kernels.Weights(alpha, beta, threshold, eps, variance, covariance)
    with analytic.full_precision(hs[0]), _device_of(hs[0]):
        return kernels.backward(hs, kept, kernels.Incoming(g_loss, g_variance, g_covariance), weights, gram, needed)


@vcr_backward.register_fake
def _(hs, *options):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.vcr import like

    return [like(h) if need else h.new_empty(0) for h, need in zip(hs, options[-1], strict=True)]


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so this makes the tensor's device the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hs, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.tensors = analytic.Settings(*settings), len(hs)
    ctx.needed = [h.requires_grad for h in hs]
    ctx.save_for_backward(*hs, *output[3])


def _backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
    settings, saved = ctx.settings, ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
    hs, kept = saved[: ctx.tensors], saved[ctx.tensors :]
    incoming, needed = incoming[:3], ctx.needed
    nothing = (None,) * len(settings)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # The gradient will be differentiated: compute it by plain torch operations, which autograd can follow.
        return analytic.gradients(hs, settings, incoming, needed), *nothing
    gradients = vcr_backward(list(hs), list(kept), *incoming, *settings, needed)
    return [g if need else None for g, need in zip(gradients, needed, strict=True)], *nothing


vcr.register_autograd(_backward, setup_context=_setup_context)
