"""The operators that torch sees: schemas, fake kernels and autograd around the project's kernels.

Importing this needs no kernel: Triton is imported by the first call. Every operator is opaque to the compiler,
allocates what it returns, and reads torch's precision setting for matrix products when it runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.losses import analytic

# -- Variance-covariance regularisation -----------------------------------------------------------------------------


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
    gradient: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """alpha * variance + beta * covariance of tensors (N, T, d), equation (4), in Triton kernels.

    Args: as `analytic.Settings`, whose fields these are. gradient: of which tensors to make that of the loss now, while
        a time step is in the cache.

    Returns: the scalars (loss, variance, covariance), float32; then what backward needs: (product, means, squares) of
        each tensor, and, if any is asked for, each tensor's gradient, empty where it is not.
    """
    from vjvcr_fast.kernels import vcr as kernels

    for h in hs:
        if h.stride(-1) != 1 and h.shape[-1] > 1:
            raise ValueError(f"a tensor with strides {h.stride()}: the last dimension's must be 1")
    weights = kernels.Weights(alpha, beta, threshold, eps, variance, covariance)
    with analytic.full_precision(hs[0]), _device_of(hs[0]):
        if any(gradient):
            return kernels.forward_with_gradient(hs, weights, gram, gradient)
        return kernels.forward(hs, weights, gram)


@vcr.register_fake
def _(hs, alpha, beta, threshold, eps, gram, variance, covariance, gradient):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.launch import mode_of, operand_dtype
    from vjvcr_fast.kernels.vcr import like, product_shape

    kept = []
    for h in hs:
        n, steps, d = h.shape
        shape = product_shape(n, steps, d, gram) if covariance else (0,)
        kept.append(h.new_empty(shape, dtype=operand_dtype(mode_of(h)) if covariance else h.dtype))
        kept += [h.new_empty((steps, d), dtype=torch.float32) for _ in range(2)]
    if any(gradient):
        kept += [like(h) if need else h.new_empty(0) for h, need in zip(hs, gradient, strict=True)]
    loss, variance, covariance = (hs[0].new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, variance, covariance, kept


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
    """dL/dh of each tensor, empty where it is not needed, from what `vcr` kept and the three terms' gradients, None for
    zero."""
    from vjvcr_fast.kernels import vcr as kernels

    weights = kernels.Weights(alpha, beta, threshold, eps, variance, covariance)
    with analytic.full_precision(hs[0]), _device_of(hs[0]):
        return kernels.backward(hs, kept, kernels.Incoming(g_loss, g_variance, g_covariance), weights, gram, needed)


@vcr_backward.register_fake
def _(hs, *options):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.vcr import like

    return [like(h) if need else h.new_empty(0) for h, need in zip(hs, options[-1], strict=True)]


@torch.library.custom_op("vjvcr::scale_", mutates_args=("tensor",))
def scale_(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor, a scalar on the device; where that is one, memory is not touched."""
    from vjvcr_fast.kernels import vcr as kernels

    with _device_of(tensor):
        kernels.scale_(tensor, factor)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hs, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.tensors = analytic.Settings(*options[:-1]), len(hs)
    ctx.needed = [h.requires_grad for h in hs]
    kept = output[3]
    ctx.gradients = [gradient.detach() for gradient in kept[3 * len(hs) :]]  # an output itself would be a cycle
    ctx.save_for_backward(*hs, *kept[: 3 * len(hs)])


def _backward(ctx: Any, g_loss: Tensor | None, g_variance: Tensor | None, g_covariance: Tensor | None, _: Any) -> Any:
    settings, hs, kept = ctx.settings, ctx.saved_tensors[: ctx.tensors], ctx.saved_tensors[ctx.tensors :]
    nothing = (None,) * len(settings)  # whose last field, `gradient`, stands for ours
    needed = ctx.needed
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Someone differentiates the gradient: in plain torch operations, which have one.
        return analytic.gradients(hs, settings, g_loss, g_variance, g_covariance), *nothing
    if ctx.gradients and g_variance is None and g_covariance is None:
        # Given away once; a second backward makes them again.
        gradients, ctx.gradients = ctx.gradients, []
        for gradient, need in zip(gradients, needed, strict=True):
            if need:
                scale_(gradient, g_loss)
    else:
        gradients = vcr_backward(list(hs), list(kept), g_loss, g_variance, g_covariance, *settings[:-1], needed)
    return [g if need else None for g, need in zip(gradients, needed, strict=True)], *nothing


vcr.register_autograd(_backward, setup_context=_setup_context)
