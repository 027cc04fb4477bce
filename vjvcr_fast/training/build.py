"""From a Config to its model, its data and its videos."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vjvcr_fast.config import Config, ConfigError, resolve_device
from vjvcr_fast.data import cater, clevrer, folder
from vjvcr_fast.data.digits import ENVIRONMENT, Digits, development_digits, load_digits, split_digits
from vjvcr_fast.data.files import cores
from vjvcr_fast.data.moving_mnist import MovingMNIST, Videos
from vjvcr_fast.data.video.cache import Filled, FrameCache, fill
from vjvcr_fast.data.video.clips import Clips, VideoClips
from vjvcr_fast.data.video.decode import resolve
from vjvcr_fast.data.video.scan import Split
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.losses import SIGRegLoss
from vjvcr_fast.models.convnet import ConvDecoder, ConvEncoder, MLPPredictor
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.models.simvp import SimVPDecoder, SimVPEncoder
from vjvcr_fast.models.swin import SwinPredictor

FILES: dict[str, Any] = {"clevrer": clevrer, "cater": cater, "folder": folder}
SPLITS = ("train", "validation")

Data = Digits | Split  # one split of a data set, from which videos are made
Batch = Videos | Clips  # with frames (N, T, C, S, S), float32 in [0, 1] or uint8, and speed (N,) float32


class VideoSource(Protocol):
    """Gives videos by their numbers: the same number, the same video."""

    @property
    def device(self) -> torch.device:
        """Where the frames are delivered."""
        ...

    def batch(self, start_index: int, n: int) -> Batch:
        """The n videos from number start_index on."""
        ...

    def batches(self, step: int, n: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of n videos without end, from batch number `step` on. Each of `world` processes gets n other ones."""
        ...


def build_model(config: Config, device: torch.device) -> EnergyModel:
    """The energy model of `config.model` on `device`, in channels_last, with weights drawn from `config.train.seed`.

    Each part is drawn with a seed of its own, so that all rows begin with the same encoder and predictor.
    """
    model = config.model
    parts: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for number, build in enumerate((build_encoder, build_predictor, build_decoder)):
            torch.manual_seed(config.train.seed * 1_000 + number)
            parts.append(build(config))
    encoder, predictor, decoder = parts
    energy = EnergyModel(
        encoder,
        predictor,
        decoder if ROWS[model.row].pixel else None,
        model.row,
        alpha=model.alpha,
        beta=model.beta,
        gamma=model.gamma if ROWS[model.row].hidden else model.gamma_generative,
        threshold=model.threshold,
        eps=model.eps,
        distance=model.distance,
        sigreg=SIGRegLoss(seed=config.train.seed) if model.regulariser == "sigreg" else None,
        sigreg_weight=model.sigreg_weight,
    )
    return energy.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_encoder(config: Config) -> nn.Module:
    """The encoder of `config.model`, with weights from torch's global generator as it is."""
    model, data = config.model, config.data
    if model.kind == "conv":
        sizes = data.channels, model.channels, data.canvas, model.pool
        return ConvEncoder(*sizes, kernel=model.kernel, norm_scale=model.norm_scale)
    return SimVPEncoder(data.channels, data.canvas, model.channels, model.features, checkpoint=model.checkpoint)


def build_decoder(config: Config) -> nn.Module:
    """The mirror of the encoder, with weights from torch's global generator as it is."""
    model, data = config.model, config.data
    if model.kind == "conv":
        return ConvDecoder(data.channels, model.channels, data.canvas, model.pool, model.padding, model.unpool)
    return SimVPDecoder(data.channels, data.canvas, model.channels, model.features, checkpoint=model.checkpoint)


def build_predictor(config: Config) -> nn.Module:
    """The predictor of `config.model` and `config.latent`, with weights from torch's global generator as it is."""
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
    """The training and the validation data of `config.data`. Files that are left out are named on stderr.

    With data.split "development" both are parts of the training digits, and the validation digits are not used at all.
    processes: how many share the cores of this machine for decoding.

    Raises DigitsError, DataError, VideoError or ImportError if there are no data or a file cannot be used.
    """
    data = config.data
    if data.dataset == "moving-mnist":
        digits = load_digits(data.root, download=data.download)
        return development_digits(digits) if data.split == "development" else split_digits(digits)
    pool = open_pool(config, processes)
    train, validation = (open_split(config, name, pool) for name in SPLITS)
    for line in (line for split in (train, validation) for line in split.remarks()):
        print(line, file=sys.stderr)
    return train, validation


def open_pool(config: Config, processes: int = 1) -> Pool:
    """The processes that read video files. processes: how many training processes share the cores."""
    data = config.data
    count = max(cores() // processes, 1) if data.workers == -1 else data.workers
    return Pool(count, data.decode_timeout, backend=data.decoder)


def open_split(config: Config, name: str, pool: Pool, **options: Any) -> Split:
    """Scans the split `name` of the video files that `config.data` asks for. options: of `scan.open_split`.

    Raises DataError, VideoError or ImportError if there are no videos or a file cannot be used.
    """
    data, cache = config.data, _cache_top(config)
    options = {"backend": data.decoder, "on_bad": data.on_bad_video, **options}
    index = cache and cache / f"{name}-scan.pt"
    frames = data.frames_in, data.frames_out, data.stride
    split: Split = FILES[data.dataset].load_split(data_root(config), name, *frames, pool=pool, index=index, **options)
    return split


def build_videos(config: Config, part: Data, stream: str, device: torch.device) -> VideoSource:
    """The videos that `config.data` asks for, made from the split `part`.

    stream: "train", "probe", "validation", ...: streams of digits share no video, streams of files no random draw. Only
    "train" is mirrored if `data.mirror` asks for it.
    """
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
            cache=open_cache(config, part, device),
            pool=part.pool,
            on_bad=data.on_bad_video,
            mirror=data.mirror and stream == "train",
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
    """The folder `data.root`, or else VJVCR_DATA. Raises ConfigError if neither is set."""
    root = config.data.root or os.environ.get(ENVIRONMENT, "")
    if not root:
        raise ConfigError(f"data.root is empty and {ENVIRONMENT} not set: which folder holds the videos?")
    return Path(root).expanduser()


def cache_folder(config: Config, split: str) -> Path | None:
    """The folder for the decoded frames of a split, or None if `data.cache` is "off"."""
    top = _cache_top(config)
    stride = f"-every{config.data.stride}" if config.data.stride > 1 else ""
    return top and top / f"{split}-{config.data.canvas}x{config.data.canvas}{stride}"


def open_cache(config: Config, part: Split, device: torch.device) -> FrameCache | None:
    """The cache of a split's decoded frames, or None if there is none. Raises CacheError if its frames do not fit.

    It is opened once and shared, so that a GPU holds its frames once.
    """
    folder, size = cache_folder(config, part.name), (config.data.canvas, config.data.canvas)
    if folder is None or not (folder / "meta.json").exists():
        return None
    key = folder, size, config.data.decoder, device
    if key not in part.caches:
        part.caches[key] = FrameCache(*key)
    return part.caches[key]


def fill_cache(config: Config, verify: bool = False) -> dict[str, Filled]:
    """Decodes into the caches of both splits what they lack. Returns what was done, by split.

    verify: also check what is there, and decode it again if it is damaged.

    Raises ConfigError if the videos are not files or `data.cache` is "off"; CacheError; what `build_data` raises.
    """
    if config.data.dataset == "moving-mnist" or config.data.cache == "off":
        raise ConfigError(f"data.dataset={config.data.dataset}, data.cache={config.data.cache!r}: nothing to cache")
    done, side, device = {}, config.data.canvas, resolve_device(config.train.device)
    with ExitStack() as stack:
        for part in build_data(config):
            assert isinstance(part, Split)
            stack.enter_context(part.pool)  # one for both splits
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
    return done


def _cache_top(config: Config) -> Path | None:
    chosen = config.data.cache
    if chosen == "off":
        return None
    files = FILES[config.data.dataset]
    return Path(chosen).expanduser() if chosen else files.find_root(data_root(config)) / folder.CACHE
