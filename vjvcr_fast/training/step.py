"""One update of the weights from a batch of videos: infer z*, compute the energy and its gradient, step the optimizer.

Nothing here waits for the device.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.data.video.clips import Clips
from vjvcr_fast.models.energy import Energy
from vjvcr_fast.training.build import Batch, build_model
from vjvcr_fast.training.calibration import DuringForward, Latents
from vjvcr_fast.training.chunked import backward_chunked, check_no_mixing
from vjvcr_fast.training.nonfinite import skip_if_not_finite
from vjvcr_fast.training.processes import Processes


class Step:
    """A run's model and what trains it: the latents and the optimizer. Calling it with a batch makes one update.

    names: what the numbers that a call returns are, except the last one, which says whether the update was skipped.

    Raises ConfigError if `train.chunk` or `latent.method` does not fit the model.
    """

    def __init__(self, config: Config, processes: Processes) -> None:
        settings, device = config.train, processes.device
        self.config, self.processes = config, processes
        self.model = build_model(config, device)
        self.model.share(processes.group)
        decay = settings.weight_decay if self.model.terms.hidden else settings.weight_decay_generative
        self.latents = Latents(config, self.model)
        self.latents.check_method()
        self.optimizer = torch.optim.Adam(self.latents.parameters(), settings.lr, weight_decay=decay, fused=True)
        self.inference = DuringForward(self.latents)
        self.energy = compiled(processes.parallel(self.model), settings.compile, device)
        if settings.chunk:
            try:
                check_no_mixing(self.model)
            except ValueError as error:
                raise ConfigError(f"train.chunk={settings.chunk}: {error}") from None
        self.names = (*Energy._fields, *self.latents.names)

    def warm_up(self, step: int) -> None:
        """Sets the learning rate for update number `step`, counted from 0: `train.lr`, after a linear warm-up to it."""
        settings = self.config.train
        if step <= settings.warmup:
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * (step + 1) / (settings.warmup + 1)

    def __call__(self, clips: Batch) -> Tensor:
        """Makes one update. Returns the numbers `names` and, last, 1 if the update was skipped: (len(names) + 1,)."""
        config, model, chunk = self.config, self.model, self.config.train.chunk
        x, y = split_frames(clips, config)
        skips = config.train.on_nonfinite == "skip"
        before = [buffer.clone() for buffer in model.buffers()] if skips else []
        with autocast(config, x.device):
            given = actions(clips, config)
            if chunk or given is not None or config.latent.kind == "none":
                z, measured = self.latents.infer(x, y, given)
                terms = backward_chunked(model, x, y, z, chunk=chunk) if chunk else self.energy(x, y, z)
            else:
                terms = self.energy(x, y, self.inference)
                measured = self.inference.measured
        if chunk:
            self.processes.mean_gradients(model)
        else:
            terms.loss.backward()
        skipped = x.new_zeros(1)
        if skips:
            skipped = skip_if_not_finite(terms.loss, model, before, self.optimizer, self.processes.group)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.latents.project()
        return torch.cat([torch.stack(terms).detach(), measured, skipped])

    @torch.no_grad()
    def representations(self, clips: Batch) -> Tensor:
        """h_x (N, T_x, d) float32 of the whole batch, over all processes, as training sees it."""
        x, _ = split_frames(clips, self.config)
        parts = x.split(self.config.train.chunk or len(x))
        with autocast(self.config, x.device):
            return self.processes.gathered(torch.cat([self.latents.encode(part) for part in parts]).float())


def split_frames(videos: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """Splits videos into input frames x (N, T_x, C, S, S) and target frames y (N, T_y, C, S, S), float32 in [0, 1]."""
    frames = videos.frames if videos.frames.is_floating_point() else videos.frames.float().div_(255)
    return frames[:, : config.data.frames_in], frames[:, config.data.frames_in :]


def actions(videos: Batch, config: Config) -> Tensor | None:
    """The actions in the target frames, (N, 14, T_y) float32, if they are the latent of pre-training; else None."""
    if config.latent.kind != "actions":
        return None
    return cast(Clips, videos).target[:, :, config.data.frames_in :]


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The autocast that `train.precision` asks for: to bfloat16 with "bf16", and with "auto" on CUDA."""
    asked = config.train.precision
    on = asked == "bf16" or (asked == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def compiled(module: torch.nn.Module, choice: str, device: torch.device) -> Callable[..., Any]:
    """The module, compiled if `choice` (train.compile) is "on", or "auto" on CUDA."""
    return torch.compile(module) if choice == "on" or (choice == "auto" and device.type == "cuda") else module
