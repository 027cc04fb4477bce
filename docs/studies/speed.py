"""What can be told of the speed in CLEVRER's videos: from the frames, and from what runs keep and predict of them?

    python docs/studies/speed.py RUN [RUN ...]

A small network (`Supervised` of `vjvcr_fast.evaluation.ceiling`, with one output) is trained to read the speed of the
fastest object in the last target frame, on the windows that the speed probe is fitted to. It reads, of every run, h_y
and the prediction of it, as maps; then the frames of x, and those of y. All runs must share their data. Prints JSON,
{what is read: {"speed_mse", "speed_mse_fitted"}}, in the annotations' (scene units/s)^2: the mean squared errors on
validation windows and on those that were fitted. {"the mean": ...} is the error of predicting the mean.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.evaluation.ceiling import Supervised
from vjvcr_fast.models.simvp import SimVPEncoder
from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import build_data, build_videos

STEPS, BATCH, LR, DECAY = 2_000, 32, 2e-3, 1e-2
CPU = torch.device("cpu")
Read = dict[str, Tensor]


class Given(nn.Module):
    """Stands in for an encoder where the features are computed already: (N, T, d), d = the product of `map`."""

    def __init__(self, map_: tuple[int, int, int]) -> None:
        super().__init__()
        self.map = map_

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def read_by(runs: list[Path]) -> tuple[dict[str, tuple[int, int, int] | None], list[Read]]:
    """The features' maps (None for frames), and what is read of fitted and of validation windows, with their speed."""
    configs, models = zip(*(load_run(run) for run in runs), strict=True)
    config, start = configs[0], configs[0].data.frames_in
    if config.data.dataset != "clevrer" or any(of.data != config.data for of in configs):
        sys.exit("runs on CLEVRER with the same data are needed")
    maps: dict[str, Any] = {}
    found, settings = [], config.evaluate
    counts = settings.probe_videos, settings.validation_videos
    for data, stream, count in zip(build_data(config), ("probe", "validation"), counts, strict=True):
        videos, parts = cast(VideoClips, build_videos(config, data, stream, CPU)), []
        for at in range(0, count, settings.probe_batch):
            batch = videos.batch(at, min(settings.probe_batch, count - at))
            part = {
                "the frames of y": batch.frames[:, start:],
                "the frames of x": batch.frames[:, :start],
                "speed": batch.speed,
            }
            frames = batch.frames.float() / 255
            for run, model in zip(runs, models, strict=True):
                model.to(CPU).eval()
                part[f"h_y of {run.name}"] = model.encode_targets(frames[:, start:])
                part[f"the prediction of {run.name}"] = model.predict(frames[:, :start])
                for name in list(part)[-2:]:
                    maps[name] = cast(SimVPEncoder, model.encoder).map
            parts.append(part)
        found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return maps | {"the frames of x": None, "the frames of y": None}, found


def errors(fitted: Tensor, speed: Tensor, held_out: Tensor, right: Tensor, map_: Any) -> dict[str, float]:
    """Mean squared errors of a network trained on `fitted` (n, T, ...) and its `speed` (n,)."""
    torch.manual_seed(0)
    encoder = cast(SimVPEncoder, Given(map_)) if map_ else None
    network = Supervised(encoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=DECAY, fused=True)
    std, mean = torch.std_mean(speed)

    def told(of: Tensor) -> Tensor:
        return std * network(of if map_ else of.float() / 255)[:, 0, -1] + mean

    order = torch.cat([torch.randperm(len(fitted)) for _ in range(STEPS * BATCH // len(fitted) + 1)])
    for step, index in enumerate(order[: STEPS * BATCH].split(BATCH)):
        optimizer.param_groups[0]["lr"] = LR * min(5 * (step + 1) / STEPS, (1 - step / STEPS) / 0.8)
        (F.mse_loss(told(fitted[index]), speed[index]) / std.square()).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    with torch.no_grad():
        own, others = (torch.cat([told(part) for part in of.split(4 * BATCH)]) for of in (fitted, held_out))
    return {"speed_mse": F.mse_loss(others, right).item(), "speed_mse_fitted": F.mse_loss(own, speed).item()}


def main(runs: list[str]) -> None:
    maps, (fitted, held_out) = read_by([Path(run) for run in runs])
    speed, right = fitted["speed"], held_out["speed"]
    mean = (right - speed.mean()).square().mean().item()
    found = {"the mean": {"speed_mse": mean, "speed_mse_fitted": speed.var(correction=0).item()}}
    for name, map_ in maps.items():
        found[name] = errors(fitted[name], speed, held_out[name], right, map_)
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
