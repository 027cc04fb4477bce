"""Trained runs: their models, and what these make of frames.

model = vjvcr_fast.load("runs/my-run")
h = model.encode(frames)                    # (N, T, C, H, W) -> (N, T, d)
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast.config import Config, override, resolve_device
from vjvcr_fast.data.video.file import resize
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.latents import Latents

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Trained:
    """The model of least validation loss of a run, in evaluation mode. Gradients flow as through any module: for
    features alone call it under torch.no_grad().

    config: of the run. model: its EnergyModel, whose parts (encoder, predictor, decoder) are modules. d: features of a
    frame's representation.
    """

    def __init__(self, config: Config, model: EnergyModel) -> None:
        self.config, self.model, self.d = config, model, config.d
        self._latents = Latents(config, model)

    def encode(self, frames: Tensor) -> Tensor:
        """frames: (N, T, C, H, W) of any size and device, uint8, or floating point in [0, 1]; C is 3, or that of the
        run. They are resized to its canvas. Returns h (N, T, d) float32. Raises ValueError for other frames."""
        return self.model.encoder(self.prepare(frames))

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicted representations of the frames that follow: x (N, T_x, C, H, W) -> (N, T_y, d). Of a run with a
        latent at z*, which is inferred from y (N, T_y, C, H, W). Frames as of `encode`.

        Raises ValueError for another number of frames, and where y is missing.
        """
        data = self.config.data
        for name, given, wanted in (("x", x, data.frames_in), ("y", y, data.frames_out)):
            if given is not None and given.ndim == 5 and given.shape[1] != wanted:
                raise ValueError(f"{name} has {given.shape[1]} frames: the run's {wanted} are needed")
        if self.config.latent.kind == "none":
            return self.model.predict(self.prepare(x))
        if y is None:
            raise ValueError(f"the run has a latent ({self.config.latent.kind}): y is needed to infer it")
        return self._latents.predict(self.prepare(x), self.prepare(y))

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames as the model takes them: (N, T, C, S, S) float32 in [0, 1] on its device."""
        data = self.config.data
        if frames.ndim != 5 or frames.shape[2] not in (3, data.channels):
            kinds = f"(N, T, C, H, W) with C = {' or '.join(map(str, sorted({3, data.channels})))}"
            raise ValueError(f"frames have shape {tuple(frames.shape)}: {kinds} is needed")
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}: uint8, or floating point in [0, 1], is needed")
        frames = frames.to(next(self.model.parameters()).device)
        flat, size = frames.flatten(0, 1), (data.canvas, data.canvas)
        if frames.dtype == torch.uint8:
            flat = resize(flat, size).float().div_(255)
        elif flat.shape[-2:] != size:
            flat = F.interpolate(flat.float(), size=size, mode="bilinear", antialias=True)
        if data.channels == 1 and flat.shape[1] == 3:
            flat = (flat * flat.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
        return flat.float().unflatten(0, frames.shape[:2])


def load(run: str | Path, device: str = "auto") -> Trained:
    """The trained model in the folder of a run. device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:N".

    Raises ConfigError or CheckpointError, naming the file, where the folder does not hold a run.
    """
    folder = Path(run)
    config, model = load_run(folder, override(Config.load(folder / "config.json"), {"train.device": device}))
    return Trained(config, model)


def load_run(run: Path, config: Config | None = None) -> tuple[Config, EnergyModel]:
    """The config and the model of least validation loss of a run, in evaluation mode.

    config: the run's, where its device, the place of its data or `evaluate.*` differ from its config.json. In the
    one returned `latent.weight` is the calibrated weight of the checkpoint.

    Raises ConfigError or CheckpointError, naming the file, where the folder does not hold a run.
    """
    config = config or Config.load(run / "config.json")
    device = resolve_device(config.train.device)
    model = build_model(config, device)
    state = checkpoint.load(run / "best.pt")
    checkpoint.restore(run / "best.pt", state, model=model)
    return override(config, {"latent.weight": state.get("latent_weight", config.latent.weight)}), model.eval()
