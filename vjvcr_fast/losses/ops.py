"""The Triton kernels (vjvcr_fast.kernels) for PyTorch: with autograd, and as operators for torch.compile.

`terms` computes the loss. It launches the kernels itself, with `VCR` for autograd, unless something wants to see each
operation: a dispatch mode or a subclass of Tensor. These and the compiler get the operators `vcr` and `vcr_backward`,
into which the compiler does not look, and whose checks take the host longer than all launches. Both ways call
`_forward` and `_backward`. Triton is imported by the first call, not by this file. PyTorch's precision setting for
matrix products is read when a kernel is launched.

`sigreg` and `sigreg_backward` are the same for SIGReg, without autograd, which is in projections.py.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.losses import analytic
from vjvcr_fast.losses.analytic import Incoming, Settings, Terms


def terms(hs: Sequence[Tensor], settings: Settings) -> Terms:
    """The float32 scalars (loss, variance, covariance) of tensors (N, T, d), features side by side."""
    if _watched(hs):
        return operator(hs, settings)
    return VCR.apply(settings, *hs)


def operator(hs: Sequence[Tensor], settings: Settings) -> Terms:
    """The same by the operator."""
    loss, variance, covariance, _ = vcr(hs, *settings)
    return loss, variance, covariance


def _watched(hs: Sequence[Tensor]) -> bool:
    """Whether something wants to see each operation."""
    # Under the compiler it is known without a look at its own mode, which is a dispatch mode.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return any(type(h) is not Tensor for h in hs)


# -- What both ways do ----------------------------------------------------------------------------------------------


def _forward(hs: Sequence[Tensor], settings: Settings) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Returns the three scalars and what backward needs: moments of each tensor and, for the penalty, a product."""
    from vjvcr_fast.kernels import vcr as kernels

    with analytic.full_precision(hs[0]), _device_of(hs[0]):
        return kernels.forward(hs, _weights(settings), settings.gram)


def _backward(
    hs: Sequence[Tensor], kept: Sequence[Tensor], incoming: Incoming, settings: Settings, needed: Sequence[bool]
) -> list[Tensor]:
    """dL/dh of each tensor, empty if it is not needed."""
    from vjvcr_fast.kernels import vcr as kernels

    with analytic.full_precision(hs[0]), _device_of(hs[0]):
        return kernels.backward(hs, kept, kernels.Incoming(*incoming), _weights(settings), settings.gram, needed)


def _weights(settings: Settings) -> Any:
    from vjvcr_fast.kernels.finish import Weights

    alpha, beta, threshold, eps, _, variance, covariance = settings
    # Triton would compile whole numbers in. To read a weight that is a tensor waits for its device.
    return Weights(float(alpha), float(beta), float(threshold), float(eps), variance, covariance)


def _check_strides(hs: Sequence[Tensor]) -> None:
    for h in hs:
        if h.stride(-1) != 1 and h.shape[-1] > 1:
            raise ValueError(f"a tensor with strides {h.stride()}: the last dimension's must be 1")


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, so this makes the tensor's device the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _gradients(ctx: Any, incoming: Incoming) -> list[Tensor | None]:
    """What autograd hands on: dL/dh of each tensor, None if it is not needed."""
    saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
    hs, kept = saved[: len(ctx.needed)], saved[len(ctx.needed) :]
    if analytic.followed(incoming):
        return analytic.gradients(hs, ctx.settings, incoming, ctx.needed)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        found = vcr_backward(list(hs), list(kept), *incoming, *ctx.settings, ctx.needed)
    else:
        found = _backward(hs, kept, incoming, ctx.settings, ctx.needed)
    return [gradient if need else None for gradient, need in zip(found, ctx.needed, strict=True)]


# -- Launched at once -----------------------------------------------------------------------------------------------


class VCR(torch.autograd.Function):
    """(settings, *hs) -> (loss, variance, covariance)."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *hs: Tensor) -> Terms:
        """hs: (N, T, d) each. Keeps hs and what the kernels of backward read."""
        loss, variance, covariance, kept = _forward(hs, settings)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.needed = settings, list(ctx.needs_input_grad[1:])
        ctx.save_for_backward(*hs, *kept)
        return loss, variance, covariance

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """incoming: dL/d of each term, None if there is none. Returns dL/dh of each tensor that needs it."""
        return None, *_gradients(ctx, incoming)


# -- As operators ---------------------------------------------------------------------------------------------------


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

    Returns the float32 scalars (loss, variance, covariance) and a list for backward: of each tensor the moments and,
    with the penalty, the product.
    Raises ValueError if the features of a tensor are not adjacent in memory.
    """
    _check_strides(hs)
    return _forward(hs, Settings(alpha, beta, threshold, eps, gram, variance, covariance))


@vcr.register_fake
def _(hs, alpha, beta, threshold, eps, gram, variance, covariance):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.launch import mode_of, operand_dtype
    from vjvcr_fast.kernels.vcr import product_shape

    kept = []
    for h in hs:
        n, steps, d = h.shape
        kept.append(h.new_empty((2, steps, d), dtype=torch.float32))
        if covariance:
            kept.append(h.new_empty(product_shape(n, steps, d, gram), dtype=operand_dtype(mode_of(h))))
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
    settings = Settings(alpha, beta, threshold, eps, gram, variance, covariance)
    return _backward(hs, kept, (g_loss, g_variance, g_covariance), settings, needed)


@vcr_backward.register_fake
def _(hs, *options):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.vcr import like

    return [like(h) if need else h.new_empty(0) for h, need in zip(hs, options[-1], strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hs, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.needed = Settings(*settings), [h.requires_grad for h in hs]
    ctx.save_for_backward(*hs, *output[3])


def _operator_backward(ctx: Any, *incoming: Any) -> tuple[Any, ...]:
    return _gradients(ctx, incoming[:3]), *(None,) * len(ctx.settings)


vcr.register_autograd(_operator_backward, setup_context=_setup_context)


# -- SIGReg ---------------------------------------------------------------------------------------------------------


def sigreg(hs: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """`_sigreg`, by its operator where something wants to see that."""
    return (sigreg_operator if _watched(hs) else _sigreg)(hs, *arguments)


def sigreg_backward(hs: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """`_sigreg_backward`, by its operator where something wants to see that."""
    return (sigreg_backward_operator if _watched(hs) else _sigreg_backward)(hs, *arguments)


def _sigreg(
    hs: Sequence[Tensor], directions: Tensor, knots: int, step: float, half: bool, divisor: int
) -> tuple[Tensor, list[Tensor]]:
    """The loss of tensors (N, T, d), features side by side, as a float32 scalar; and D and S of each, (T, 2, J, K).

    directions: (d, K), float32. knots: J. step, half: t_j is step * (1, ... J), or half a step less. divisor: T K N^2
    / F, a whole number, which torch.compile can leave open. See projections.py.
    Raises ValueError if the features of a tensor are not adjacent in memory.
    """
    from vjvcr_fast.kernels import sigreg as kernels

    _check_strides(hs)
    with _device_of(hs[0]):
        return kernels.forward(hs, directions, kernels.Knots(knots, step, half), 1 / divisor)


def _sigreg_backward(
    hs: Sequence[Tensor],
    directions: Tensor,
    sums: Sequence[Tensor],
    incoming: Tensor,
    knots: int,
    step: float,
    half: bool,
    times: int,
    divisor: int,
) -> list[Tensor]:
    """dL/dh of each tensor. sums: its D and S. incoming: dL/dloss, a scalar. times: 2, or 2 times the number of
    processes."""
    from vjvcr_fast.kernels import sigreg as kernels
    from vjvcr_fast.kernels.vcr import like

    outs = [like(h) for h in hs]
    with _device_of(hs[0]):
        for h, of_one, out in zip(hs, sums, outs, strict=True):
            kernels.backward(h, directions, of_one, incoming, out, kernels.Knots(knots, step, half), times / divisor)
    return outs


sigreg_operator = torch.library.custom_op("vjvcr::sigreg", _sigreg, mutates_args=())
sigreg_backward_operator = torch.library.custom_op("vjvcr::sigreg_backward", _sigreg_backward, mutates_args=())


@sigreg_operator.register_fake
def _(hs, directions, knots, step, half, divisor):  # type: ignore[no-untyped-def]
    count = directions.shape[1]
    found = [h.new_empty((h.shape[1], 2, knots, count), dtype=torch.float32) for h in hs]
    return directions.new_empty((), dtype=torch.float32), found


@sigreg_backward_operator.register_fake
def _(hs, *options):  # type: ignore[no-untyped-def]
    from vjvcr_fast.kernels.vcr import like

    return [like(h) for h in hs]
