"""What can be known about the actions at all: a small network that is trained on them, and linear probes.

z* cannot tell more about the actions of the target frames than these frames show. At a few pixels an object nobody
could tell a cone from a cylinder, and with a few hundred videos no network learns to. So before z* is asked for the
actions, `actions_ceiling` asks the frames; then what a model's encoder could keep of them, and what it does keep.
"""

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.config import Config
from vjvcr_fast.data.cater import CLASSES
from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.evaluation.metrics import mean_average_precision
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.models.simvp import SimVPEncoder
from vjvcr_fast.training.step import autocast

CHANNELS = (24, 32, 64, 64)
STEPS = 1_600  # whatever the number of videos
BATCH = 16
LR = 4e-3  # the highest; it grows linearly in the first fifth of the steps and then falls linearly to zero
DECAY = 1e-3
RIDGES = (0.1, 1.0, 10.0, 100.0)  # of features whose squared norm is 1 on average


class Supervised(nn.Module):
    """Frames (N, T, 3, S, S) in [0, 1] -> logits (N, 14, T) of the actions in each.

    Convolutions make maps of each frame and its differences from the one before and the one after it. A logit is the
    sum of two: the largest of all places, and one from the largest values of the maps of five frames. The maps are a
    quarter as wide as a frame.

    encoder: its maps of the frames, standardised, are read in the place of the frames, and the convolutions keep their
    width. frozen: the encoder is not trained.
    """

    def __init__(self, encoder: SimVPEncoder | None = None, frozen: bool = False) -> None:
        super().__init__()
        a, b, c, d = CHANNELS
        self.encoder = encoder.requires_grad_(not frozen) if encoder else None
        channels, stride = (encoder.map[0], 1) if encoder else (3, 2)
        self.standardise = nn.BatchNorm2d(channels, affine=False) if encoder else None
        first = _layer(3 * channels, a, kernel=5, stride=stride)
        self.maps = nn.Sequential(*first, *_layer(a, b, stride=stride), *_layer(b, c), *_layer(c, d))
        self.place = nn.Conv2d(d, len(CLASSES), 1)
        self.times = nn.Sequential(
            nn.Conv1d(d, 2 * d, 3, padding=1),
            nn.BatchNorm1d(2 * d),
            nn.ReLU(),
            nn.Conv1d(2 * d, len(CLASSES), 3, padding=1),
        )

    def forward(self, frames: Tensor) -> Tensor:
        """Frames (N, T, 3, H, W), float in [0, 1] -> one logit for each of CLASSES and frame, (N, CLASSES, T)."""
        shown = self._encoded(frames) if self.encoder else frames - 0.5
        steps = shown.diff(dim=1)
        before, after = F.pad(steps, (0, 0, 0, 0, 0, 0, 1, 0)), F.pad(steps, (0, 0, 0, 0, 0, 0, 0, 1))
        seen = torch.cat([shown, 4 * before, 4 * after], dim=2).flatten(0, 1)
        maps = self.maps(seen.contiguous(memory_format=torch.channels_last))
        largest, local = (of.amax(dim=(2, 3)).unflatten(0, frames.shape[:2]).mT for of in (maps, self.place(maps)))
        return self.times(largest) + local

    def _encoded(self, frames: Tensor) -> Tensor:
        """Frames (N, T, 3, S, S) -> the encoder's maps (N, T, features, height, width), standardised."""
        encoder = cast(SimVPEncoder, self.encoder)
        features, height, width = encoder.map
        maps = encoder(frames).view(-1, height, width, features).permute(0, 3, 1, 2)
        return cast(nn.Module, self.standardise)(maps).unflatten(0, frames.shape[:2])


def _layer(channels: int, out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out), nn.ReLU()]


def actions_ceiling(
    config: Config,
    fitted: VideoClips,
    held_out: VideoClips,
    videos: int,
    encoder: SimVPEncoder | None = None,
    frozen: bool = False,
) -> dict[str, Any]:
    """mAP of `Supervised` on all held-out videos, after training on the target frames of `videos` others.

    It learns the actions of every frame. A video's score for an action is the probability that one of its frames has
    it or more do. Half of the videos are mirrored in training. encoder, frozen: see `Supervised`; the encoder itself is
    left as it is.

    Returns map, map_by_class, and map_fitted, that of the videos it is trained on.
    """
    device, drawn = held_out.device, STEPS * BATCH
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        network = Supervised(copy.deepcopy(encoder), frozen).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        order = torch.cat([torch.randperm(videos) for _ in range(drawn // videos + 1)])[:drawn].to(device)
        turned = (torch.rand(drawn) < 0.5).view(-1, 1, 1, 1, 1).to(device)
    frames, actions = target_frames(config, fitted, videos)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, LR, weight_decay=DECAY, fused=True)
    for step, (index, turn) in enumerate(zip(order.split(BATCH), turned.split(BATCH), strict=True)):
        optimizer.param_groups[0]["lr"] = LR * min(5 * (step + 1) / STEPS, (1 - step / STEPS) / 0.8)
        seen = frames[index].float() / 255
        with autocast(config, device):
            logits = network(torch.where(turn, seen.flip(-1), seen))
        F.binary_cross_entropy_with_logits(logits.float(), actions[index]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    network.eval()
    found, by_class = _map(network, *target_frames(config, held_out, len(held_out)))
    named = dict(zip(CLASSES, by_class, strict=True))
    return {"map": found, "map_by_class": named, "map_fitted": _map(network, frames, actions)[0]}


def target_frames(config: Config, videos: VideoClips, count: int) -> tuple[Tensor, Tensor]:
    """Of windows 0 .. count - 1: target frames (count, T_y, 3, S, S) uint8, and their actions (count, 14, T_y)."""
    start, size, parts = config.data.frames_in, config.evaluate.probe_batch, []
    for at in range(0, count, size):
        clips = videos.batch(at, min(size, count - at))
        parts.append((clips.frames[:, start:], clips.target[:, :, start:]))
    frames, actions = (torch.cat(of) for of in zip(*parts, strict=True))
    return frames, actions


@torch.no_grad()
def _map(network: Supervised, frames: Tensor, actions: Tensor) -> tuple[float, list[float]]:
    logits = torch.cat([network(part.float() / 255) for part in frames.split(4 * BATCH)])
    # 1 - prod (1 - p_t) grows with sum -log(1 - p_t).
    return mean_average_precision(F.softplus(logits).sum(dim=2), actions.bool().any(dim=2))


@torch.no_grad()
def linear_ceilings(model: EnergyModel, fitted: VideoClips, held_out: VideoClips, config: Config) -> dict[str, float]:
    """mAP on all held-out videos of linear maps from h_y and from the size of its differences, fitted to all others."""
    h, labels = [], []
    for videos in (fitted, held_out):
        frames, actions = target_frames(config, videos, len(videos))
        parts = frames.split(config.evaluate.probe_batch)
        h.append(torch.cat([model.encode_targets(part.float() / 255) for part in parts]))
        labels.append(actions.bool().any(dim=2))
    return {
        "h_y": ridge_map(h[0], labels[0], h[1], labels[1]),
        "the differences of h_y": ridge_map(h[0].diff(dim=1).abs(), labels[0], h[1].diff(dim=1).abs(), labels[1]),
    }


def ridge_map(fitted: Tensor, label: Tensor, held_out: Tensor, label_held_out: Tensor) -> float:
    """mAP of a linear map: least squares with a ridge on standardised features.

    The ridge is the best of RIDGES for every fifth video of `fitted`, which is then left out of the fit.

    fitted: (n, ...), held_out: (m, ...), features. label: (n, classes), label_held_out: (m, classes), bool.
    """
    x = fitted.flatten(1)
    std, mean = torch.std_mean(x, dim=0)
    scale = 1 / (std.clamp_min(1e-6) * x.shape[1] ** 0.5)
    x, other = (x - mean) * scale, (held_out.flatten(1) - mean) * scale
    within, across, tried = (x @ x.mT).double(), (other @ x.mT).double(), torch.arange(len(x), device=x.device) % 5 == 4

    def scores(among: Tensor, to: Tensor, label: Tensor, ridge: float) -> Tensor:
        shifted = label.double() - label.double().mean(dim=0)
        return to @ torch.linalg.solve(among + ridge * torch.eye(len(among)).to(among), shifted)

    def trial(ridge: float) -> float:
        found = scores(within[~tried][:, ~tried], within[tried][:, ~tried], label[~tried], ridge)
        return mean_average_precision(found, label[tried])[0]

    return mean_average_precision(scores(within, across, label, max(RIDGES, key=trial)), label_held_out)[0]
