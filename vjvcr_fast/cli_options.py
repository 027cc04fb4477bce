"""Options of the command line: its parser, and the options that change the configuration: --preset, --config, and
one or two for every field.

The field `lr` of Train is `--train.lr`, and `--lr` if no other group has an `lr`. `--frames-in` is `--frames_in`.
"""

import difflib
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from vjvcr_fast.config import (
    PRESETS,
    SCALES,
    Config,
    ConfigError,
    default_preset,
    fields,
    help_text,
    override,
    preset,
)
from vjvcr_fast.settings import Dataset


class Parser(ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def add_preset(parser: ArgumentParser, more: str = "") -> None:
    """Adds --preset, --scale and --config, one of which may be given. more: what the help says about the default."""
    names = ", ".join(PRESETS)
    text = f"one of {names} (default: moving-mnist on a CUDA GPU, moving-mnist-mini elsewhere{more})"
    scale = "the default preset in another size: mini (minutes on a CPU), small (half an hour a run) or full (a GPU)"
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--preset", metavar="NAME", help=text)
    group.add_argument("--scale", choices=SCALES, help=scale)
    group.add_argument("--config", type=Path, metavar="FILE", help="start from the config.json of a run instead")


def add_fields(parser: ArgumentParser, only: tuple[str, ...] = ("",), without: Sequence[str] = ()) -> None:
    """Adds the fields whose dotted names start with one of `only` and are not in `without`."""
    wanted = [name for name in fields() if name.startswith(only) and name not in without]
    leaves = Counter(name.split(".")[1] for name in wanted)
    about = "The defaults shown are those of the preset moving-mnist. Another preset, config file or run has its own."
    options = parser.add_argument_group("configuration", about)
    for name in wanted:
        leaf = name.split(".")[1]
        spellings = [name, *([leaf] if leaves[leaf] == 1 else []), *(["data"] if name == "data.dataset" else [])]
        flags = dict.fromkeys(f"--{text}" for s in spellings for text in (s, s.replace("_", "-")))
        options.add_argument(*flags, dest=name, default=SUPPRESS, metavar="X", help=help_text(name))


def overrides(arguments: Namespace) -> dict[str, str]:
    """The fields that were given, as text: {"train.lr": "0.01"}."""
    return {name: value for name, value in vars(arguments).items() if name in fields()}


def config_of(arguments: Namespace, name: str = "moving-mnist") -> Config:
    """The configuration that the options ask for. Raises ConfigError.

    Without --preset and --config it starts from the preset `name`, or from that of the data set asked for, if `name` is
    one of a data set; in the size --scale, or mini where there is no GPU.
    """
    dataset = vars(arguments).get("data.dataset", name)
    if name in get_args(Dataset) and dataset in get_args(Dataset):
        name = "clevrer" if dataset == "folder" else dataset
    if arguments.config:
        base = Config.load(arguments.config)
    else:
        base = preset(arguments.preset or default_preset(name, arguments.scale))
    return override(base, overrides(arguments))


def config_of_run(run: Path, arguments: Namespace) -> Config:
    """The configuration of the run in a folder, with the fields that were given. Raises ConfigError."""
    if not (run / "config.json").exists():
        raise ConfigError(f"{run}: not the folder of a run: it has no config.json")
    return override(Config.load(run / "config.json"), overrides(arguments))


def reject(unknown: list[str], parser: ArgumentParser) -> NoReturn:
    """Ends with one line: the unknown option, the nearest ones that exist, and where all are listed."""
    name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
    near = difflib.get_close_matches(name, parser._option_string_actions, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    what = "no such option" if name.startswith("-") else "unexpected argument"
    parser.error(f"{name}: {what}; {hint}`{parser.prog} --help` lists all")
