"""Options of the command line that change the configuration: --preset, --scale, --config, and those of fields.

The field `lr` of Train is `--train.lr`, and `--lr` if no other group has an `lr`. `--frames-in` is `--frames_in`.
"""

import inspect
import os
from argparse import SUPPRESS, Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch

from vjvcr_fast.cli_parser import Parser
from vjvcr_fast.config import (
    GROUPS,
    PRESETS,
    SCALES,
    Config,
    ConfigError,
    default_preset,
    fields,
    help_text,
    override,
    preset,
    resolve_device,
)
from vjvcr_fast.settings import Dataset

TITLES = {"train": "training", "evaluate": "evaluation"}  # of groups in help, where they are not the group's name
Base = Callable[[Namespace], Config]  # the configuration that a command's options change


def add_preset(parser: Parser, more: str = "") -> None:
    """Adds --preset, --scale and --config, one of which may be given. more: what the help says about the default."""
    names = ", ".join(PRESETS)
    text = f"one of {names} (default: moving-mnist on a CUDA GPU, moving-mnist-mini elsewhere{more})"
    scale = "the default preset in another size: mini (minutes on a CPU), small (half an hour a run) or full (a GPU)"
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--preset", metavar="NAME", help=text)
    group.add_argument("--scale", choices=SCALES, help=scale)
    group.add_argument("--config", type=Path, metavar="FILE", help="start from the config.json of a run instead")


def add_fields(parser: Parser, base: Base, only: tuple[str, ...] = ("",), without: Sequence[str] = ()) -> None:
    """Adds the fields whose dotted names start with one of `only` and are not in `without`, grouped as in Config.

    base: what the options change, as far as they are known. Help shows its values as the defaults.
    """
    wanted = [name for name in fields() if name.startswith(only) and name not in without]
    leaves = Counter(name.split(".")[1] for name in wanted)
    groups = {
        name: parser.add_argument_group(TITLES.get(name, name), inspect.getdoc(of))
        for name, of in GROUPS.items()
        if any(field.startswith(f"{name}.") for field in wanted)
    }
    actions = {}
    for name in wanted:
        group, leaf = name.split(".")
        spellings = [name, *([leaf] if leaves[leaf] == 1 else []), *(["data"] if name == "data.dataset" else [])]
        flags = dict.fromkeys(f"--{text}" for s in spellings for text in (s, s.replace("_", "-")))
        actions[name] = groups[group].add_argument(*flags, dest=name, default=SUPPRESS, metavar="X")

    def describe(given: Namespace) -> None:
        config = base(given)
        for name, action in actions.items():
            action.help = help_text(name, config).replace("%", "%%")
        file = vars(given).get("run") or vars(given).get("config")
        whose = file or f"the preset {config.preset}"
        parser.epilog = f"The defaults of {', '.join(TITLES.get(g, g) for g in groups)} are those of {whose}."

    parser.on_help = describe


def overrides(arguments: Namespace) -> dict[str, str]:
    """The fields that were given, as text: {"train.lr": "0.01"}."""
    return {name: value for name, value in vars(arguments).items() if name in fields()}


def base_of(given: Namespace, name: str = "moving-mnist") -> Config:
    """The configuration that the options start from: --config, --preset, or a default. Raises ConfigError.

    The default is the preset `name`, or that of the data set asked for, if `name` is one of a data set; in the size
    --scale, or mini where there is no GPU.
    """
    dataset = vars(given).get("data.dataset", name)
    if name in get_args(Dataset) and dataset in get_args(Dataset):
        name = "clevrer" if dataset == "folder" else dataset
    if given.config:
        return Config.load(given.config)
    return preset(given.preset or default_preset(name, given.scale))


def config_of(arguments: Namespace, name: str = "moving-mnist") -> Config:
    """The configuration that the options ask for: that of `base_of` with the fields given. Raises ConfigError."""
    return override(base_of(arguments, name), overrides(arguments))


def base_of_run(given: Namespace) -> Config:
    """The configuration of the run in the folder RUN; where none is given, a default. Raises ConfigError."""
    if given.run is None:
        return preset(default_preset())
    if not (given.run / "config.json").exists():
        raise ConfigError(f"{given.run}: not the folder of a run: it has no config.json")
    return Config.load(given.run / "config.json")


def config_of_run(arguments: Namespace) -> Config:
    """The configuration of the run in the folder RUN, with the fields that were given. Raises ConfigError."""
    return override(base_of_run(arguments), overrides(arguments))


def use_one_thread(arguments: Namespace, config: Config) -> None:
    """Sets one thread if the network is too small for a second to help and the user has not chosen a number."""
    small = config.model.kind == "conv" and max(config.model.channels) <= 32
    free = arguments.own_process and "OMP_NUM_THREADS" not in os.environ
    if small and free and resolve_device(config.train.device).type == "cpu":
        torch.set_num_threads(1)
