"""From a Config to its model and its videos."""

import torch

from vjvcr_fast.config import Config
from vjvcr_fast.data.digits import Digits, load_digits, split_digits
from vjvcr_fast.data.moving_mnist import MovingMNIST
from vjvcr_fast.models.convnet import ConvDecoder, ConvEncoder, MLPPredictor
from vjvcr_fast.models.energy import ROWS, EnergyModel


def build_model(config: Config, device: torch.device) -> EnergyModel:
    """The energy model of `config.model`, its weights drawn from `config.train.seed`.

    The weights of encoder and predictor do not depend on the row: each part has its own seed.
    """
    data, model, latent = config.data, config.model, config.latent
    sizes = (1, model.channels, data.canvas, model.pool)

    def seeded(part: int) -> None:
        torch.manual_seed(config.train.seed * 1_000 + part)

    with torch.random.fork_rng(devices=[]):
        seeded(0)
        encoder = ConvEncoder(*sizes)
        seeded(1)
        predictor = MLPPredictor(
            encoder.d,
            data.frames_in,
            data.frames_out,
            model.hidden,
            latent_dim=latent.dim if latent.kind == "sparse" else 0,
            heads=latent.heads if latent.kind == "discrete" else 1,
        )
        seeded(2)
        decoder = ConvDecoder(*sizes) if ROWS[model.row].pixel else None
    energy = EnergyModel(
        encoder,
        predictor,
        decoder,
        model.row,
        alpha=model.alpha,
        beta=model.beta,
        gamma=model.gamma,
        threshold=model.threshold,
        eps=model.eps,
    )
    return energy.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_digits(config: Config) -> tuple[Digits, Digits]:
    """(train, validation) digits of `config.data`. Raises DigitsError or ImportError where there are none."""
    return split_digits(load_digits(config.data.root, download=config.data.download))


def build_videos(config: Config, digits: Digits, stream: str, device: torch.device) -> MovingMNIST:
    """The videos of `config.data` made from `digits`; streams ("train", "probe", "validation") share no video."""
    data = config.data
    return MovingMNIST(
        digits,
        frames=data.frames_in + data.frames_out,
        canvas=data.canvas,
        digit_size=data.digit,
        speed=data.speed,
        stochastic=data.stochastic,
        x_frames=data.frames_in,
        start=data.start,
        subpixel=data.subpixel,
        seed=config.train.seed,
        stream=stream,
        device=device,
    )
