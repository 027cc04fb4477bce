"""The configuration of a run, and the presets. The config.json of a run is enough to repeat it.

settings.py has the fields, one by one; "[ours]" has the same meaning here.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast.data.cater import CLASSES as ACTIONS
from vjvcr_fast.data.files import one_line
from vjvcr_fast.models import convnet, simvp, swin
from vjvcr_fast.settings import ConfigError, Data, Evaluate, Latent, Model, Train, describe, meant, need, parse

# Fields that were true or false in earlier versions, as the files of old runs and sweeps have them: today's field, and
# what it is for false and for true.
RENAMED = {"train.tensorboard": ("train.log", ("none", "tensorboard"))}

GROUPS: dict[str, Any] = {"data": Data, "model": Model, "latent": Latent, "train": Train, "evaluate": Evaluate}


@dataclass(frozen=True)
class Config:
    """A whole run. `Config.load` reads the config.json of a run, `to_json` writes it."""

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
        """Number of components of a z that the predictor reads as numbers; 0 without one (none, discrete)."""
        actions = len(ACTIONS) * self.data.frames_out
        return {"sparse": self.latent.dim, "actions": actions}.get(self.latent.kind, 0)

    @property
    def d(self) -> int:
        """Number of features of one frame."""
        return math.prod(self.map)

    def __post_init__(self) -> None:
        data, model, latent = self.data, self.model, self.latent
        conv, mnist, of_data = model.kind == "conv", data.dataset == "moving-mnist", f"data.dataset={data.dataset}"
        need(not mnist or data.digit <= data.canvas, "data.digit", data.digit, f"at most data.canvas={data.canvas}")
        need(mnist or data.split == "validation", "data.split", data.split, f"validation where {of_data}")
        need(mnist or not data.stochastic, "data.stochastic", True, f"false where {of_data}")
        need(not (mnist and data.mirror), "data.mirror", True, f"false where {of_data}")
        means = latent.kind == "none" or model.distance == "mean"
        need(means, "model.distance", model.distance, f"mean where latent.kind={latent.kind}")
        has_none = "vcr where model.row=generative, which has no regulariser"
        need(model.row != "generative" or model.regulariser == "vcr", "model.regulariser", model.regulariser, has_none)
        need(conv or model.norm_scale == 1, "model.norm_scale", model.norm_scale, "1 where model.kind=simvp")
        fits = conv or latent.kind != "discrete"
        need(fits, "latent.kind", "discrete", "none, sparse or actions for model.kind=simvp")
        fits = latent.kind != "actions" or data.dataset == "cater"
        need(fits, "latent.kind", "actions", f"another for {of_data}; only cater has actions")
        fits = latent.method != "newton" or latent.step_rule == "backtracking"
        allowed = "backtracking where latent.method=newton, which has no step size"
        need(fits, "latent.step_rule", latent.step_rule, allowed)
        probes = self.train.probe_every
        need(
            data.has_speed or probes == 0,
            "train.probe_every",
            probes,
            f"0 (never) where {of_data}, whose speeds are unknown",
        )
        try:
            if conv:
                convnet.check_sizes(model.channels, data.canvas, model.pool)
            else:
                simvp.check_sizes(model.channels, data.canvas, model.features)
                swin.check_sizes(self.map[1:], model.hidden, model.heads, model.window)
        except ValueError as error:
            raise ConfigError(f"model and data do not fit: {error} (size is data.canvas)") from None

    def to_dict(self) -> dict[str, Any]:
        """{"preset": name, "train": {"lr": 1e-3, ...}, ...}, which `from_dict` reads."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The content of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Config":
        """Fields that are missing in `values` are those of its preset. Raises ConfigError as `override` does."""
        name = parse("preset", str, values.get("preset", "moving-mnist"))
        groups = {group: given for group, given in values.items() if isinstance(given, dict)}
        flat = {f"{group}.{leaf}": value for group, given in groups.items() for leaf, value in given.items()}
        flat |= {other: value for other, value in values.items() if other not in ("preset", *groups)}
        if {"model.eps", "train.lr", "evaluate.probe_lr"} <= flat.keys():  # a run's own file
            flat = _ADDED | flat
        return override(PRESETS.get(name, Config(name)), flat)

    @staticmethod
    def load(path: str | Path) -> "Config":
        """Reads the config.json of a run. Raises ConfigError, naming the file, if it cannot be read or is wrong."""
        try:
            values = json.loads(Path(path).read_text())
            if not isinstance(values, dict):
                raise ConfigError(f"a JSON object is expected, not {type(values).__name__}")
            return Config.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not a readable config file: {one_line(error)}") from None


# Fields that files of earlier versions lack, and what these versions did.
_ADDED = {"model.kernel": 3, "model.unpool": "nearest", "model.padding": "zeros", "model.gamma_generative": 1.0}

# [ours, studied] Of MovingMNIST. The generative rows' pixel weight is as if pixels were divided by their deviation,
# 0.308. With zeros as padding, decoders draw grain in the first and last frame. With "nearest" as unpooling they draw
# the same thing in all inner cells of a pooled place, and generative models begin to learn late.
_DIGITS: dict[str, Any] = {"unpool": "learned", "padding": "replicate", "gamma_generative": 10.5}

# [ours, studied] A cell of the encoder's map sees 29 pixels with 5x5 kernels and 43 with 7x7 ones. Digits are 14 pixels
# wide at 32x32 and 28 at 64x64. The kernels at 64x64 were chosen on validation digits.
_DIGITS_32: dict[str, Any] = _DIGITS | {"kernel": 5}
_DIGITS_64: dict[str, Any] = _DIGITS | {"kernel": 7}

_PRESETS = (
    # The paper's deterministic MovingMNIST, with its open choices as marked in settings.py.
    Config("moving-mnist", model=Model(**_DIGITS_64)),
    # The same for five minutes on two CPU cores; all sizes are [ours]. N / d is as above: with fewer videos per feature
    # the covariance penalty's sampling noise would hold the features down.
    Config(
        "moving-mnist-mini",
        Data(canvas=32, digit=14, frames_out=6, speed=(0.5, 4.0)),
        Model(channels=(8, 16, 32), hidden=512, **_DIGITS_32),
        train=Train(steps=1_200, batch=64, validate_every=300, validation_videos=512),
        evaluate=Evaluate(probe_videos=8_192, validation_videos=2_048, decoder_steps=1_200),
    ),
    # About half an hour a run on one CPU thread, as all small presets. The full preset's pictures; 6 target frames.
    Config(
        "moving-mnist-small",
        Data(frames_out=6),
        Model(channels=(8, 16, 32), hidden=512, **_DIGITS_64),
        train=Train(steps=5_000, batch=64, validate_every=500, validation_videos=1_024),
        evaluate=Evaluate(probe_videos=16_384, validation_videos=4_096, decoder_steps=2_000),
    ),
    # The paper's stochastic MovingMNIST. It has no latent until one of LATENTS is chosen.
    Config(
        "moving-mnist-stochastic",
        Data(frames_out=3, stochastic=True),
        Model(**_DIGITS_64),
    ),
    # The same for two CPU cores; all sizes are [ours].
    Config(
        "moving-mnist-stochastic-mini",
        Data(canvas=32, digit=14, frames_out=3, speed=(1.0, 3.0), stochastic=True),
        Model(channels=(8, 16, 32), hidden=512, **_DIGITS_32),
        train=Train(steps=1_000, batch=64, validate_every=250, validation_videos=512),
        evaluate=Evaluate(probe_videos=8_192, validation_videos=2_048, decoder_steps=1_200),
    ),
    Config(
        "moving-mnist-stochastic-small",
        Data(frames_out=3, stochastic=True),
        Model(channels=(8, 16, 32), hidden=512, **_DIGITS_64),
        train=Train(steps=5_000, batch=64, validate_every=500, validation_videos=1_024),
        evaluate=Evaluate(probe_videos=16_384, validation_videos=4_096, decoder_steps=2_000),
    ),
    # The paper's CLEVRER. d = 2048 per frame is [ours], and so is the length of an epoch: every frame once, that is,
    # 10,000 videos of 128 frames in windows of 26. 20 epochs are 3,840 steps.
    Config(
        "clevrer",
        Data("clevrer", frames_in=6, frames_out=20),
        Model(kind="simvp", channels=(64, 64, 64), hidden=512, alpha=1.0),
        train=Train(steps=3_840, weight_decay_generative=0.0, validate_every=192),
        evaluate=Evaluate(probe_videos=20_000, probe_lr_generative=1e-4, decoder_steps=2_000),
    ),
    # The same for two CPU cores and a few hundred simulated videos; all sizes are [ours]. It takes every second frame,
    # because at 32x32 an object moves by only half a pixel a frame.
    Config(
        "clevrer-mini",
        Data("clevrer", canvas=32, frames_in=4, frames_out=6, stride=2),
        Model(kind="simvp", channels=(16, 32, 32), features=8, hidden=128, depth=4, heads=4, alpha=1.0),
        train=Train(steps=800, batch=32, weight_decay_generative=0.0, validate_every=200, validation_videos=256),
        evaluate=Evaluate(probe_videos=8_192, validation_videos=2_048, probe_lr_generative=1e-4, decoder_steps=300),
    ),
    # For 2,000 simulated videos: a third of the paper's frames, every third one.
    Config(
        "clevrer-small",
        Data("clevrer", frames_in=3, frames_out=7, stride=3),
        Model(kind="simvp", channels=(8, 16, 32), features=4, hidden=128, depth=4, heads=4, alpha=1.0),
        train=Train(steps=3_000, batch=32, weight_decay_generative=0.0, validate_every=300, validation_videos=512),
        evaluate=Evaluate(probe_videos=16_384, validation_videos=4_096, probe_lr_generative=1e-4, decoder_steps=1_000),
    ),
    # The paper's CATER, where z is the actions in the target frames. An epoch [ours] is one window of every video,
    # 3,850 in batches of 160; 480 steps are 20 epochs.
    Config(
        "cater",
        Data("cater", canvas=128, frames_in=50, frames_out=50, stride=3),
        Model(kind="simvp", channels=(32, 64, 64, 64), hidden=512, alpha=1.0, beta=0.4, checkpoint=True),
        Latent("actions", iterations=10),
        Train(steps=480, batch=160, chunk=16, weight_decay_generative=0.0, validate_every=24, validation_videos=1_600),
        Evaluate(probe_batch=32),
    ),
    # The same for two CPU cores and a thousand simulated videos; all sizes are [ours]. It takes every 15th frame.
    Config(
        "cater-mini",
        Data("cater", canvas=32, frames_in=10, frames_out=10, stride=15),
        Model(kind="simvp", channels=(16, 32, 32), features=16, hidden=128, depth=4, heads=4, alpha=1.0, beta=0.4),
        Latent("actions", iterations=10),
        Train(steps=700, batch=32, weight_decay_generative=0.0, validate_every=100, validation_videos=320),
        Evaluate(probe_batch=32),
    ),
    # For 4,000 simulated videos. 50 iterations for z* gave the mAP of 10 in one run (docs/videos.md).
    Config(
        "cater-small",
        Data("cater", canvas=64, frames_in=10, frames_out=10, stride=15, mirror=True),
        Model(kind="simvp", channels=(8, 16, 32), features=6, hidden=128, depth=4, heads=4, alpha=1.0, beta=0.4),
        Latent("actions", iterations=10),
        Train(steps=1_500, batch=32, weight_decay_generative=0.0, validate_every=150, validation_videos=960),
        Evaluate(probe_batch=32),
    ),
)
PRESETS: dict[str, Config] = {config.preset: config for config in _PRESETS}

# What a preset's name ends in, except that full adds nothing.
SCALES = ("mini", "small", "full")

# The latents of Table 2, and none, for figure 3: changes to a stochastic preset.
LATENTS: dict[str, dict[str, Any]] = {
    "none": {"latent.kind": "none"},
    "discrete": {"latent.kind": "discrete"},
    "sparse-high": {"latent.kind": "sparse", "latent.zeros": 0.8},
    "sparse-low": {"latent.kind": "sparse", "latent.zeros": 0.2},
}

INFERENCE = ("method", "iterations", "tolerance")  # of the latent: what `evaluate` may be told to do otherwise


def preset(name: str) -> Config:
    """The preset with this name. Raises ConfigError if PRESETS has none."""
    need(name in PRESETS, "preset", repr(name), f"one of {', '.join(PRESETS)}{meant(name, PRESETS)}")
    return PRESETS[name]


def default_preset(name: str = "moving-mnist", scale: str | None = None) -> str:
    """The preset `name` in one of SCALES; if none is given, full where there is a CUDA GPU, else mini."""
    scale = scale or ("full" if torch.cuda.is_available() else "mini")
    need(scale in SCALES, "scale", repr(scale), f"one of {', '.join(SCALES)}{meant(scale, SCALES)}")
    return name if scale == "full" else f"{name}-{scale}"


def latent(config: Config, name: str) -> Config:
    """config with the latent of this name. Raises ConfigError if LATENTS has none."""
    need(name in LATENTS, "latent", repr(name), f"one of {', '.join(LATENTS)}{meant(name, LATENTS)}")
    return override(config, LATENTS[name])


def differences(config: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """{"train.lr": (config's value, other's)} for every field in which the two differ."""
    pairs = {name: (attrgetter(name)(config), attrgetter(name)(other)) for name in fields()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def fields() -> dict[str, Any]:
    """The type of every field that can be overridden, by its dotted name: {"train.lr": float, ...}."""
    return {f"{group}.{f.name}": f.type for group, of in GROUPS.items() for f in dataclasses.fields(of)}


def help_text(name: str, config: Config) -> str:
    """What the field with this dotted name is, which values it takes, and its value in `config`, the default."""
    group, leaf = name.split(".")
    found = GROUPS[group].__dataclass_fields__[leaf]
    return f"{found.metadata['help']}; {describe(found.type)} (default: {shown(attrgetter(name)(config)) or 'empty'})"


def shown(value: Any) -> str:
    """A field's value as one writes it on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def override(config: Config, values: dict[str, Any]) -> Config:
    """config with other values for some fields, such as {"train.lr": 2e-3}. Text from a command line is converted.
    Fields of earlier versions (RENAMED) are taken as what they are now.

    Raises ConfigError if a field does not exist, or if a value has the wrong type or is out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name in RENAMED:
            now, meanings = RENAMED[name]
            name, value = now, meanings[parse(name, bool, value)]
        if name not in fields():
            known = meant(name, fields(), 0.8) or f"; fields are {', '.join(fields())}"
            raise ConfigError(f"{one_line(name)}: no such field{known}")
        group, leaf = name.split(".")
        changes.setdefault(group, {})[leaf] = value
    groups = {g: dataclasses.replace(getattr(config, g), **leaves) for g, leaves in changes.items()}
    return dataclasses.replace(config, **groups)


def resolve_device(name: str, option: str = "train.device") -> torch.device:
    """The device that `option` means; "auto" is CUDA where there is a GPU, else the CPU.

    Raises ConfigError if this machine does not have the CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{option}={name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
