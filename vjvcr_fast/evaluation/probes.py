"""Linear probes that predict the speed from frozen, predicted representations.

There are two: the paper's, trained with Adam, and the exact solution, least squares. During training the exact one is
measured every `train.probe_every` steps (`training_probe`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.config import Config
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.training.build import Data, VideoSource, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.loop import DivergedError
from vjvcr_fast.training.step import split_frames


class Features(NamedTuple):
    """What a probe sees of n videos.

    values: (n, T_y d) float32, predicted representations of the target frames, flattened; at z* if there is a latent.
    speed: (n,), in pixels/frame, for CLEVRER in scene units/s.
    encoded: (n T_y, d) float32, the encoder's outputs for the same frames, or empty.
    """

    values: Tensor
    speed: Tensor
    encoded: Tensor


@torch.no_grad()
def extract(
    model: EnergyModel, videos: VideoSource, count: int, config: Config, start: int = 0, encoded: bool = False
) -> Features:
    """Features of videos start .. start + count - 1. encoded: also compute `Features.encoded`.

    The model is used in evaluation mode and full precision, on `evaluate.probe_batch` videos at a time, and left in the
    mode it was in. Raises DivergedError if the features are not finite.
    """
    parts, latents, training = [], Latents(config, model), model.training
    model.eval()
    for at in range(start, start + count, config.evaluate.probe_batch):
        batch = videos.batch(at, min(config.evaluate.probe_batch, start + count - at))
        x, y = split_frames(batch, config)
        rows = model.encode_targets(y).flatten(0, 1) if encoded else x.new_empty(0)
        parts.append(Features(latents.predict(x, y).flatten(1), batch.speed, rows))
    model.train(training)
    features = Features(*(torch.cat(of) for of in zip(*parts, strict=True)))
    if not (features.values.isfinite().all() and features.encoded.isfinite().all()):
        raise DivergedError("the model's representations are not finite: there is nothing to probe")
    return features


def adam_probe(train: Features, validation: Features, config: Config, seed: int) -> list[float]:
    """The paper's probe: a linear map from the features, as they are, to the speed; Adam on the mean squared error.

    seed: of the weights and of the order of the videos. Returns the validation MSE after every epoch, in the speed's
    unit squared.
    """
    settings, device = config.evaluate, train.values.device
    lr = settings.probe_lr if ROWS[config.model.row].hidden else settings.probe_lr_generative
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = nn.Linear(train.values.shape[1], 1).to(device)
        orders = [torch.randperm(len(train.speed)) for _ in range(settings.probe_epochs)]
    optimizer = torch.optim.Adam(probe.parameters(), lr, fused=True)
    curve = []
    for order in orders:
        for index in order.to(device).split(settings.probe_batch):
            F.mse_loss(probe(train.values[index])[:, 0], train.speed[index]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            curve.append(F.mse_loss(probe(validation.values)[:, 0], validation.speed))
    return torch.stack(curve).tolist()


def standardised(train: Features, validation: Features) -> tuple[Features, Features]:
    """Both with values shifted and scaled so that every feature has mean 0 and variance 1 in train, and with speeds
    shifted by their mean in train. This changes no error, but Adam need not learn the bias step by step."""
    mean, std = train.values.mean(dim=0), train.values.std(dim=0).clamp_min(1e-12)
    speed = train.speed.mean()
    moved = (f._replace(values=(f.values - mean) / std, speed=f.speed - speed) for f in (train, validation))
    return next(moved), next(moved)


def least_squares_probe(train: Features, validation: Features) -> float:
    """The exact linear probe: least squares on standardised features, of minimum norm if features are dependent.

    Computes in float64. Directions with less than 1e-10 of the largest variance are noise and left out. Returns the
    validation MSE, in the speed's unit squared.
    """
    both = (f._replace(values=f.values.double(), speed=f.speed.double()) for f in (train, validation))
    (x, target, _), (x_validation, speed, _) = standardised(*both)
    weights = torch.linalg.pinv(x.mT @ x, rtol=1e-10, hermitian=True) @ (x.mT @ target)
    return F.mse_loss(x_validation @ weights, speed).item()


def mean_predictor(train: Features, validation: Features) -> float:
    """MSE of predicting the mean speed of the training videos. A probe without any information reaches it."""
    return (validation.speed.double() - train.speed.double().mean()).square().mean().item()


def training_probe(model: EnergyModel, config: Config, data: Data) -> dict[str, float]:
    """The speed MSE of the exact probe and of the mean predictor, on few videos, for learning curves during training.

    Uses training data alone: the probe is fitted to one part of the "probe" stream and measured on the next.
    """
    videos = build_videos(config, data, "probe", next(model.parameters()).device)
    count = min(config.evaluate.probe_videos, 4_096)
    fitted = extract(model, videos, count, config)
    measured = extract(model, videos, max(2, count // 4), config, start=count)
    return {
        "speed_mse": least_squares_probe(fitted, measured),
        "speed_mse_of_the_mean": mean_predictor(fitted, measured),
    }
