"""Updates that are left out because their loss or gradient is not finite, decided on the device.

The optimizer's fused kernel reads `found_inf`, as it does for torch.amp.GradScaler: where that is one, weights, moments
and step count stay as they are. The model's buffers (running statistics) had already seen the batch: they are put back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjvcr_fast.training.processes import Processes


class Skipping:
    """optimizer: a fused Adam. `remember` before the forward pass, `decide` after backward, before the update."""

    def __init__(self, model: nn.Module, optimizer: Any, processes: Processes) -> None:
        self.model, self.optimizer, self.processes = model, optimizer, processes
        self.before: list[Tensor] = []

    def remember(self) -> None:
        """Keeps the buffers, which are small."""
        self.before = [buffer.clone() for buffer in self.model.buffers()]

    @torch.no_grad()
    def decide(self, loss: Tensor) -> Tensor:
        """(1,) float32: 1 where the update is left out, on all processes alike. Never waits for the device."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        bad = (~(norm + loss.detach()).isfinite()).float()
        if self.processes.group is not None:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        for buffer, before in zip(self.model.buffers(), self.before, strict=True):
            buffer.copy_(torch.where(bad.bool(), before, buffer).view_as(buffer))
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        return bad.reshape(1)
