"""Batch norm over the samples of all processes: torch's SyncBatchNorm on GPUs, the same in plain torch on CPUs.

SyncBatchNorm refuses CPU tensors. `_OnCPU` computes the same with differentiable sums over the processes, so that
several processes on CPUs train the same model as one process with the whole batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjvcr_fast.losses.distributed import summed


def synchronised(model: nn.Module, group: Any, device: torch.device) -> None:
    """Turns every batch norm inside the model, in place, into one over the processes of `group`.

    Weights and running statistics stay the same objects. Every process must hold equally many samples.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__, module.group = _OnCPU, group


class _OnCPU(nn.BatchNorm2d):
    """Normalises x (N, C, ...) with the mean and variance over the N of all processes of `group`."""

    group: Any

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.ndim) if d != 1], [-1 if d == 1 else 1 for d in range(x.ndim)]
        total = x.numel() // x.shape[1] * dist.get_world_size(self.group)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = summed(wide.sum(dim=dims), self.group) / total
        centred = wide - mean.view(shape)
        variance = summed(centred.square().sum(dim=dims), self.group) / total
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * (total / max(total - 1, 1))).to(self.running_var), share)
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype)
