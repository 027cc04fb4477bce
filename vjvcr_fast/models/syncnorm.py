"""Batch norm over the batches of all processes: torch's SyncBatchNorm on GPUs, the same in plain torch elsewhere.

SyncBatchNorm refuses CPU tensors; `_BatchNorm` here is what it computes, by differentiable sums over processes, so that
a model trained in several processes on CPUs is that of one process with the whole batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjvcr_fast.losses.distributed import summed


def synchronised(model: nn.Module, group: Any, device: torch.device) -> None:
    """Makes every batch norm inside the model, in place, one over the processes of `group`; weights and statistics are
    the same objects."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            cuda = device.type == "cuda"
            made = nn.SyncBatchNorm.convert_sync_batchnorm(child, group) if cuda else _BatchNorm(child, group)
            setattr(model, name, made)
        else:
            synchronised(child, group, device)


class _BatchNorm(nn.BatchNorm2d):
    """`of` over the processes of `group`: normalises (N, C, ...) by mean and variance of all processes' N."""

    def __init__(self, of: nn.modules.batchnorm._BatchNorm, group: Any) -> None:
        super().__init__(of.num_features, of.eps, of.momentum, of.affine, of.track_running_stats)
        self.weight, self.bias = of.weight, of.bias
        for name, buffer in of.named_buffers():
            setattr(self, name, buffer)
        self.group = group
        self.train(of.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims, shape = [d for d in range(x.ndim) if d != 1], [-1 if d == 1 else 1 for d in range(x.ndim)]
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        dist.all_reduce(count, group=self.group)
        total = float(count)  # a CPU does not wait for itself
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = summed(wide.sum(dim=dims), self.group) / total
        centred = wide - mean.view(shape)
        variance = summed(centred.square().sum(dim=dims), self.group) / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_((variance * (total / max(total - 1, 1))).to(self.running_var), share)
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype).contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
