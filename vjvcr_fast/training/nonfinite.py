"""Leaving out updates whose loss or gradient is not finite (`train.on_nonfinite` "skip"), decided on the device.

The optimizer's fused kernel reads `found_inf`, as it does for torch.amp.GradScaler: if it is 1, weights, moments and
step count stay as they are. The model's buffers (running statistics) have seen the batch by then; we put them back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def skip_if_not_finite(loss: Tensor, model: nn.Module, before: list[Tensor], optimizer: Any, group: Any) -> Tensor:
    """To be called between backward and the update; never waits for the device.

    Args:
        loss: a scalar. It and the gradients of `model` are checked.
        before: copies of the model's buffers from before the forward pass, put back if the update is skipped.
        optimizer: a fused Adam.
        group: of torch.distributed, or None. All its processes skip if one has to.

    Returns:
        (1,) float32: 1 if the update is skipped, else 0.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    bad = (~(nn.utils.get_total_norm(gradients) + loss.detach()).isfinite()).float()
    if group is not None:
        dist.all_reduce(bad, dist.ReduceOp.MAX, group)
    for buffer, old in zip(model.buffers(), before, strict=True):
        buffer.copy_(torch.where(bad.bool(), old, buffer).view_as(buffer))
    optimizer.grad_scale, optimizer.found_inf = None, bad
    return bad.reshape(1)
