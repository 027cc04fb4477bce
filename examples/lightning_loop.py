"""The same JEPA as a LightningModule, in several processes: `VCRLoss` is of the whole batch, the telemetry a callback.

    python examples/lightning_loop.py
    python examples/lightning_loop.py --devices 1    # the same losses in one process

All GPUs are used; without any, two processes on the CPU.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as L  # or: import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from vjvcr_fast.data import MovingMNIST, load_digits
from vjvcr_fast.losses import VCRLoss
from vjvcr_fast.training.telemetry import collapse_measures

N = 128  # samples in a batch, over all processes


class JEPA(L.LightningModule):
    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        self.predictor = nn.Sequential(nn.Linear(3 * 64, 256), nn.ReLU(), nn.Linear(256, 3 * 64))
        self.alpha, self.beta = alpha, beta
        size = {"frames": 6, "canvas": 16, "digit_size": 8, "speed": (0.5, 2.0)}
        self.videos = MovingMNIST(load_digits(), **size, seed=0, stream="train")

    def setup(self, stage: str) -> None:
        # Only now are there processes. DDP's mean of their gradients is the gradient of the whole batch.
        several = {"group": dist.group.WORLD, "samples": "equal"} if self.trainer.world_size > 1 else {}
        self.regulariser = VCRLoss(self.alpha, self.beta, **several)

    def train_dataloader(self) -> Iterator[Tensor]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return (batch.frames for batch in self.videos.batches(0, N // world, rank, world))

    def training_step(self, frames: Tensor, index: int) -> dict[str, Tensor]:
        h = self.encoder(frames)  # (this process's part of N, 6, 64)
        predicted = self.predictor(h[:, :3].flatten(1)).view_as(h[:, 3:])
        loss = F.mse_loss(predicted, h[:, 3:]) + self.regulariser(h).loss
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return {"loss": loss, "h": h.detach()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


class Telemetry(L.Callback):
    """Logs the signs of a collapse every few steps, of the samples of all processes."""

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            h = module.all_gather(outputs["h"]).reshape(-1, *outputs["h"].shape[1:])
            self.measures = collapse_measures(h)
            module.log_dict(self.measures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    devices = torch.cuda.device_count() or 2
    parser.add_argument("--devices", type=int, default=devices, help=f"number of processes (default: {devices})")
    parser.add_argument("--out", default="runs/lightning", help="folder of the logs (default: runs/lightning)")
    options = parser.parse_args()
    for name, alpha, beta in (("without-vcr", 0.0, 0.0), ("with-vcr", 2.0, 0.2)):
        L.seed_everything(0)
        telemetry = Telemetry()
        trainer = L.Trainer(
            devices=options.devices,
            strategy="ddp" if options.devices > 1 else "auto",
            max_steps=100,
            log_every_n_steps=10,
            logger=CSVLogger(options.out, name, version=options.devices),
            callbacks=[telemetry],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(JEPA(alpha, beta))
        if trainer.is_global_zero:
            print(f"{name:11}:", ", ".join(f"{key} {value:.3f}" for key, value in telemetry.measures.items()))


if __name__ == "__main__":
    main()
