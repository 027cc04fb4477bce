"""What do the features of a MovingMNIST run tell of the digit?

    python docs/studies/digit.py RUN [RUN ...]

An MLP with one hidden layer of 512 is trained to read the digit from the features of one frame, the middle one of y:
from h_y, and from the prediction of it. Prints the accuracies on videos of validation digits as JSON, {run: {features:
accuracy}}; chance is 0.1.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import build_data, build_videos
from vjvcr_fast.training.step import split_frames

FITTED, HELD_OUT, BATCH, EPOCHS = 16_384, 2_048, 64, 20
CPU = torch.device("cpu")


def features(run: Path) -> list[dict[str, Tensor]]:
    """Of the fitted and of the held-out videos: {"h_y": (n, d), "predicted": (n, d), "digit": (n,)}."""
    config, model = load_run(run)
    if config.data.dataset != "moving-mnist" or config.latent.kind != "none":
        sys.exit(f"{run}: a MovingMNIST run without a latent is needed")
    model.to(CPU)
    middle, found = config.data.frames_out // 2, []
    for part, stream, n in zip(build_data(config), ("probe", "validation"), (FITTED, HELD_OUT), strict=True):
        videos, batches = build_videos(config, part, stream, CPU), []
        for start in range(0, n, BATCH):
            clips = videos.batch(start, BATCH)
            x, y = split_frames(clips, config)
            with torch.no_grad():
                h_y, predicted = model.encode_targets(y), model.predict(x)
            batches.append((h_y[:, middle], predicted[:, middle], clips.digit))
        names = ("h_y", "predicted", "digit")
        found.append({name: torch.cat(t) for name, t in zip(names, zip(*batches, strict=True), strict=True)})
    return found


def accuracy(name: str, fitted: dict[str, Tensor], held_out: dict[str, Tensor]) -> float:
    torch.manual_seed(0)
    d = fitted[name].shape[1]
    probe = nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(EPOCHS):
        for index in torch.randperm(FITTED).split(256):
            F.cross_entropy(probe(fitted[name][index]), fitted["digit"][index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    right = probe.eval()(held_out[name]).argmax(dim=1) == held_out["digit"]
    return right.float().mean().item()


def main(runs: list[str]) -> None:
    found = {}
    for run in map(Path, runs):
        fitted, held_out = features(run)
        found[run.name] = {name: accuracy(name, fitted, held_out) for name in ("h_y", "predicted")}
        print(run.name, found[run.name], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
