"""Loading a trained run and applying its model to frames.

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
from vjvcr_fast.training.calibration import Latents

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Trained:
    """A run's best model (lowest validation loss) in eval mode.

    Gradients flow as through any module. If you need features only, call it under torch.no_grad().

    config: the run's Config. model: its EnergyModel; model.encoder, model.predictor and model.decoder are modules.
    d: the number of features of a frame's representation.
    """

    def __init__(self, config: Config, model: EnergyModel) -> None:
        self.config, self.model, self.d = config, model, config.d
        self._latents = Latents(config, model)

    def encode(self, frames: Tensor) -> Tensor:
        """The representations h (N, T, d), float32, of frames (N, T, C, H, W).

        frames: of any size and on any device, uint8 or floating point in [0, 1]. C is 3 or the run's number of
        channels. Frames are resized to the run's canvas. Raises ValueError for other frames.
        """
        return self.model.encoder(self.prepare(frames))

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The predicted representations (N, T_y, d) of the frames that follow x.

        x: (N, T_x, C, H, W), frames as in `encode`. y: the true frames that follow, (N, T_y, C, H, W). It is needed if
        the run has a latent: z* is inferred from x and y, and the prediction is made with it.
        Raises ValueError if the number of frames is not the run's, or if y is missing.
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
        """Converts frames (as in `encode`) to the model's input: (N, T, C, S, S), float32 in [0, 1], on its device."""
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
    """Loads the trained model from a run's folder. device: "auto" (CUDA if available), "cpu", "cuda" or "cuda:N".

    Raises ConfigError or CheckpointError, which name the file, if the folder does not hold a run.
    """
    folder = Path(run)
    config, model = load_run(folder, override(Config.load(folder / "config.json"), {"train.device": device}))
    return Trained(config, model)


def load_run(run: Path, config: Config | None = None) -> tuple[Config, EnergyModel]:
    """The config of a run and its best model (lowest validation loss) in eval mode.

    config: by default config.json of the run. Pass one to change the device, the path of the data or `evaluate.*`.
    In the returned config, `latent.weight` is the calibrated weight from the checkpoint.

    Raises ConfigError or CheckpointError, which name the file, if the folder does not hold a run.
    """
    config = config or Config.load(run / "config.json")
    device = resolve_device(config.train.device)
    model = build_model(config, device)
    state = checkpoint.load(run / "best.pt")
    checkpoint.restore(run / "best.pt", state, model=model)
    return override(config, {"latent.weight": state.get("latent_weight", config.latent.weight)}), model.eval()
