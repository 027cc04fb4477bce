"""From a Config to its model and its videos."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vjvcr_fast.config import Config, ConfigError, resolve_device
from vjvcr_fast.data import cater, clevrer, folder
from vjvcr_fast.data.digits import ENVIRONMENT, Digits, development_digits, load_digits, split_digits
from vjvcr_fast.data.files import cores
from vjvcr_fast.data.moving_mnist import MovingMNIST
from vjvcr_fast.data.video.cache import Filled, FrameCache, fill
from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.data.video.decode import resolve
from vjvcr_fast.data.video.scan import Split
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.models.convnet import ConvDecoder, ConvEncoder, MLPPredictor
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.models.simvp import SimVPDecoder, SimVPEncoder
from vjvcr_fast.models.swin import SwinPredictor

FILES: dict[str, Any] = {"clevrer": clevrer, "cater": cater, "folder": folder}
CACHE = "vjvcr-cache"  # in the folder of the data

Data = Digits | Split  # one split of a data set: what videos are made from


class Batch(Protocol):
    """frames: (N, T, C, S, S), float32 in [0, 1] or uint8. speed: (N,) float32."""

    @property
    def frames(self) -> Tensor: ...
    @property
    def speed(self) -> Tensor: ...


class VideoSource(Protocol):
    """Videos by their numbers, every one a function of its number alone."""

    @property
    def device(self) -> torch.device: ...
    def batch(self, start_index: int, n: int) -> Batch: ...
    def batches(self, step: int, n: int, rank: int = 0, world: int = 1) -> Iterator[Batch]: ...


def build_model(config: Config, device: torch.device) -> EnergyModel:
    """The energy model of `config.model`, its weights drawn from `config.train.seed`.

    The weights of encoder and predictor do not depend on the row: each part has its own seed.
    """
    model = config.model
    with torch.random.fork_rng(devices=[]):
        _seed(config, 0)
        encoder = build_encoder(config)
        _seed(config, 1)
        predictor = build_predictor(config)
        _seed(config, 2)
        decoder = build_decoder(config) if ROWS[model.row].pixel else None
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
        distance=model.distance,
    )
    return energy.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_encoder(config: Config) -> nn.Module:
    model, data = config.model, config.data
    if model.kind == "conv":
        return ConvEncoder(data.channels, model.channels, data.canvas, model.pool, model.norm_scale)
    return SimVPEncoder(data.channels, data.canvas, model.channels, model.features, checkpoint=model.checkpoint)


def build_decoder(config: Config) -> nn.Module:
    """The mirror of the encoder, its weights from torch's generator as it is."""
    model, data = config.model, config.data
    if model.kind == "conv":
        return ConvDecoder(data.channels, model.channels, data.canvas, model.pool)
    return SimVPDecoder(data.channels, data.canvas, model.channels, model.features, checkpoint=model.checkpoint)


def build_predictor(config: Config) -> nn.Module:
    data, model, latent, latent_dim = config.data, config.model, config.latent, config.latent_dim
    if model.kind == "conv":
        heads = latent.heads if latent.kind == "discrete" else 1
        return MLPPredictor(config.d, data.frames_in, data.frames_out, model.hidden, latent_dim=latent_dim, heads=heads)
    return SwinPredictor(
        config.map,
        data.frames_in,
        data.frames_out,
        dim=model.hidden,
        depth=model.depth,
        heads=model.heads,
        window=model.window,
        latent_dim=latent_dim,
        checkpoint=model.checkpoint,
    )


def build_data(config: Config, processes: int = 1) -> tuple[Data, Data]:
    """(training, validation) data of `config.data`; with split "development" both are of the training digits, and what
    is held out for validation does not appear. processes: that share the cores for decoding (on one machine).

    Raises DigitsError, DataError, VideoError or ImportError where there are none or a file cannot be used.
    """
    data = config.data
    if data.dataset == "moving-mnist":
        digits = load_digits(data.root, download=data.download)
        return development_digits(digits) if data.split == "development" else split_digits(digits)
    workers = max(cores() // processes, 1) if data.workers == -1 and processes > 1 else data.workers
    pool = Pool(workers, data.decode_timeout)
    splits = [_split(config, split, pool) for split in ("train", "validation")]
    for split in splits:
        for line in split.remarks():
            print(line, file=sys.stderr)
    return splits[0], splits[1]


def build_videos(config: Config, part: Data, stream: str, device: torch.device) -> VideoSource:
    """The videos of `config.data` made from `part`; streams ("train", "probe", "validation") share no video, or, of
    files, no draw."""
    data = config.data
    if isinstance(part, Split):
        return VideoClips(
            part.sources,
            frames=data.frames_in + data.frames_out,
            size=(data.canvas, data.canvas),
            seed=config.train.seed,
            stream=stream,
            backend=data.decoder,
            device=device,
            cache=open_cache(config, part),
            pool=part.pool,
            on_bad=data.on_bad_video,
        )
    return MovingMNIST(
        part,
        frames=data.frames_in + data.frames_out,
        canvas=data.canvas,
        digit_size=data.digit,
        speed=data.speed,
        stochastic=data.stochastic,
        x_frames=data.frames_in,
        start=data.start,
        subpixel=data.subpixel,
        seed=config.train.seed,
        stream=stream if data.split == "validation" else f"{data.split}-{stream}",
        device=device,
    )


def data_root(config: Config) -> Path:
    """The folder of `data.root`, or of VJVCR_DATA. Raises ConfigError without either."""
    root = config.data.root or os.environ.get(ENVIRONMENT, "")
    if not root:
        raise ConfigError(f"data.root is empty and {ENVIRONMENT} not set: which folder holds the videos?")
    return Path(root).expanduser()


def cache_folder(config: Config, split: str) -> Path | None:
    """Where the decoded frames of a split are kept; None where `data.cache` is "off"."""
    top = _cache_top(config)
    stride = f"-every{config.data.stride}" if config.data.stride > 1 else ""
    return top and top / f"{split}-{config.data.canvas}x{config.data.canvas}{stride}"


def open_cache(config: Config, part: Split) -> FrameCache | None:
    """The decode-once cache of a split, where there is one, opened once. Raises CacheError where it does not fit."""
    folder, size = cache_folder(config, part.name), (config.data.canvas, config.data.canvas)
    if folder is None or not (folder / "meta.json").exists():
        return None
    key = folder, size, config.data.decoder
    if key not in part.caches:
        part.caches[key] = FrameCache(*key)
    return part.caches[key]


def fill_cache(config: Config, verify: bool = False) -> dict[str, Filled]:
    """Decodes what the caches of both splits lack; {split: what was done}.

    verify: check what is there, and decode anew what is damaged. Raises as `build_data`; CacheError; ConfigError where
    the videos are not files or `data.cache` is "off".
    """
    if config.data.dataset == "moving-mnist" or config.data.cache == "off":
        raise ConfigError(f"data.dataset={config.data.dataset}, data.cache={config.data.cache!r}: nothing to cache")
    done, side, device = {}, config.data.canvas, resolve_device(config.train.device)
    for part in build_data(config):
        assert isinstance(part, Split)
        folder = cache_folder(config, part.name)
        assert folder is not None
        done[part.name] = fill(
            part.sources,
            folder,
            (side, side),
            resolve(config.data.decoder, device),
            part.pool,
            device=device,
            on_bad=config.data.on_bad_video,
            verify=verify,
            desc=f"cache {part.name}",
        )
        part.pool.close()
    return done


def _cache_top(config: Config) -> Path | None:
    chosen = config.data.cache
    if chosen == "off":
        return None
    return Path(chosen).expanduser() if chosen else FILES[config.data.dataset].find_root(data_root(config)) / CACHE


def _split(config: Config, split: str, pool: Pool) -> Split:
    data, top = config.data, _cache_top(config)
    return FILES[data.dataset].load_split(
        data_root(config),
        split,
        data.frames_in,
        data.frames_out,
        data.stride,
        backend=data.decoder,
        pool=pool,
        index=top and top / f"{split}-scan.pt",
        on_bad=data.on_bad_video,
    )


def _seed(config: Config, part: int) -> None:
    torch.manual_seed(config.train.seed * 1_000 + part)
