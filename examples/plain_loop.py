"""A JEPA in a plain PyTorch loop: without VCR its features collapse, with it they vary.

    python examples/plain_loop.py
    python examples/plain_loop.py --compile    # the loss through torch.compile, in one graph

A GPU is used if there is one.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.data import MovingMNIST, load_digits
from vjvcr_fast.losses import VCRLoss
from vjvcr_fast.training.telemetry import collapse_measures

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, N = 100, 128


def train(videos: MovingMNIST, alpha: float, beta: float, compiled: bool) -> dict[str, float]:
    """Trains on frames (N, 6, 1, 16, 16): three to predict from, three to predict. Returns the telemetry at the end."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).to(DEVICE)
    predictor = nn.Sequential(nn.Linear(3 * 64, 256), nn.ReLU(), nn.Linear(256, 3 * 64)).to(DEVICE)
    regulariser = VCRLoss(alpha, beta)
    optimizer = torch.optim.Adam([*encoder.parameters(), *predictor.parameters()], 3e-3)

    def objective(frames: Tensor) -> Tensor:
        h = encoder(frames)  # (N, 6, 64); gradients flow through all frames: no stop-gradient, no EMA
        predicted = predictor(h[:, :3].flatten(1)).view_as(h[:, 3:])
        return F.mse_loss(predicted, h[:, 3:]) + regulariser(h).loss

    step = torch.compile(objective, fullgraph=True) if compiled else objective
    for number, batch in zip(range(STEPS), videos.batches(0, N), strict=False):
        loss = step(batch.frames)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 25 == 0:
            std = collapse_measures(encoder(batch.frames))["feature_std"]
            print(f"step {number:3}: loss {loss.item():.4f}, standard deviation of the features {std:.3f}")
    return collapse_measures(encoder(videos.batch(STEPS * N, 1024).frames))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the loss")
    compiled = parser.parse_args().compile
    size = {"frames": 6, "canvas": 16, "digit_size": 8, "speed": (0.5, 2.0)}
    videos = MovingMNIST(load_digits(), **size, seed=0, stream="train", device=DEVICE)
    rows = {}
    for name, alpha, beta in (("without VCR", 0.0, 0.0), ("with VCR", 2.0, 0.2)):
        print(name)
        rows[name] = train(videos, alpha, beta, compiled)
    for name, row in rows.items():
        print(f"{name:11}:", ", ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
