"""What do the features of a MovingMNIST run tell of the digit and, in stochastic videos, of the direction?

    python docs/studies/kept.py RUN [RUN ...]

An MLP with one hidden layer of 512 is trained to read the label: the digit from the features of one frame, the middle
one of y; the direction from those of all frames, together with h_x. The features are h_y, the prediction of it (at z*,
if there is a latent), and z*, which is also read alone. Prints the accuracies on videos of validation digits as JSON,
{run: {label: {features: accuracy}}}; chance is 0.1 for the digit, 0.2 for the direction.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import build_data, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.step import split_frames

FITTED, HELD_OUT, BATCH, EPOCHS = 16_384, 2_048, 64, 20
CLASSES = {"digit": 10, "direction": 5}
CPU = torch.device("cpu")
Found = dict[str, Tensor]


def features(run: Path) -> list[Found]:
    """Of fitted and held-out videos: h_x (n, T_x, d), h_y and predicted (n, T_y, d), z (n, m) and labels (n,)."""
    config, model = load_run(run)
    if config.data.dataset != "moving-mnist":
        sys.exit(f"{run}: a MovingMNIST run is needed")
    model.to(CPU)
    latents, found = Latents(config, model), []
    for part, stream, n in zip(build_data(config), ("probe", "validation"), (FITTED, HELD_OUT), strict=True):
        videos, batches = build_videos(config, part, stream, CPU), []
        for start in range(0, n, BATCH):
            clips = videos.batch(start, BATCH)
            x, y = split_frames(clips, config)
            z = latents.infer(x, y).z
            with torch.no_grad():
                h_x, h_y, predicted = model.encoder(x), model.encode_targets(y), model.predict(x, z)
            z = x.new_empty(len(x), 0) if z is None else z
            batches.append((h_x, h_y, predicted, z, clips.digit, clips.direction))
        names = ("h_x", "h_y", "predicted", "z", *CLASSES)
        found.append({name: torch.cat(t) for name, t in zip(names, zip(*batches, strict=True), strict=True)})
    return found


def inputs(of: Found, label: str) -> Found:
    """What the label is read from, (n, ...)."""
    if label == "digit":
        middle = of["h_y"].shape[1] // 2
        return {"h_y": of["h_y"][:, middle], "predicted": of["predicted"][:, middle], "z": of["z"]}
    names = [name for name in ("h_y", "predicted", "z") if of[name].shape[1]]
    both = {name: torch.cat([of["h_x"].flatten(1), of[name].flatten(1)], dim=1) for name in names}
    return {"h_x": of["h_x"].flatten(1), "z": of["z"], **{f"h_x and {name}": t for name, t in both.items()}}


def accuracy(fitted: Tensor, labels: Tensor, held_out: Tensor, right: Tensor, classes: int) -> float:
    torch.manual_seed(0)
    d = fitted.shape[1]
    probe = nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, 512), nn.ReLU(), nn.Linear(512, classes))
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(EPOCHS):
        for index in torch.randperm(FITTED).split(256):
            F.cross_entropy(probe(fitted[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return (probe.eval()(held_out).argmax(dim=1) == right).float().mean().item()


def main(runs: list[str]) -> None:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in map(Path, runs):
        fitted, held_out = features(run)
        found[run.name] = {}
        for label, classes in CLASSES.items():
            if (fitted[label] < 0).any():  # of videos that are not stochastic
                continue
            ours = inputs(held_out, label)
            found[run.name][label] = {
                name: accuracy(t, fitted[label], ours[name], held_out[label], classes)
                for name, t in inputs(fitted, label).items()
                if t.shape[1]
            }
        print(run.name, found[run.name], file=sys.stderr)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
