"""The same JEPA with Hugging Face accelerate, in one process or several.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py          # on two GPUs
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py    # two processes on the CPU

The losses are the same each time.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vjvcr_fast.data import MovingMNIST, load_digits
from vjvcr_fast.losses import VCRLoss
from vjvcr_fast.training.telemetry import collapse_measures

N = 128  # samples in a batch, over all processes


class JEPA(nn.Module):
    """Frames (n, 6, 1, 16, 16) -> predicted and true representations of the last three, and those of all."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        self.predictor = nn.Sequential(nn.Linear(3 * 64, 256), nn.ReLU(), nn.Linear(256, 3 * 64))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(frames)
        return self.predictor(h[:, :3].flatten(1)).view_as(h[:, 3:]), h[:, 3:], h


def train(accelerator: Accelerator, frames: Tensor, alpha: float, beta: float) -> dict[str, float]:
    set_seed(0)
    model = JEPA()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    data = DataLoader(frames, batch_size=N // accelerator.num_processes, drop_last=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    # The statistics are those of the whole batch. DDP's mean of the gradients is then the gradient of the whole batch.
    several = {"group": dist.group.WORLD, "samples": "equal"} if accelerator.num_processes > 1 else {}
    regulariser = VCRLoss(alpha, beta, **several)
    for epoch in range(4):
        for batch in data:
            predicted, target, h = model(batch)
            loss = F.mse_loss(predicted, target) + regulariser(h).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        measures = collapse_measures(accelerator.gather(h.detach()))
        mean = accelerator.reduce(loss.detach(), "mean").item()
        accelerator.print(f"epoch {epoch}: loss {mean:.5f}, feature_std {measures['feature_std']:.3f}")
    return measures


def main() -> None:
    accelerator = Accelerator()
    size = {"frames": 6, "canvas": 16, "digit_size": 8, "speed": (0.5, 2.0)}
    frames = MovingMNIST(load_digits(), **size, seed=0, stream="train").batch(0, 32 * N).frames
    rows = {}
    for name, alpha, beta in (("without VCR", 0.0, 0.0), ("with VCR", 2.0, 0.2)):
        accelerator.print(name)
        rows[name] = train(accelerator, frames, alpha, beta)
    for name, row in rows.items():
        accelerator.print(f"{name:11}:", ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    accelerator.end_training()


if __name__ == "__main__":
    main()
