"""`vjvcr-fast reproduce`: what it can make, and the command."""

import importlib
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from vjvcr_fast.cli_options import base_of, config_of, overrides, use_one_thread
from vjvcr_fast.config import Config, ConfigError, override, parse, resolve_device
from vjvcr_fast.paper.jobs import processes_for
from vjvcr_fast.paper.store import open_store

# The formats to simulate videos in (modules of vjvcr_fast.data.simulated), and what to `reproduce` with the videos.
SIMULATED = {"clevrer": "table1 --dataset clevrer", "cater": "fig2"}


class Target(NamedTuple):
    """What `reproduce` can make. `module` of vjvcr_fast.paper has the function, table1 or figure2, and the names of the
    files that it writes, TABLE1_FILES or FIGURE2_FILES. `folder` is the start of the default folder's name."""

    about: str
    preset: str
    folder: str
    module: str


TARGETS = {
    "table1": Target("models", "moving-mnist", "table1", "table1"),
    "table2": Target("latents", "moving-mnist-stochastic", "table2", "table2"),
    "fig2": Target("actions from latents", "cater", "cater", "actions"),
    "ceiling": Target("the most of fig2", "cater", "cater", "actions"),
    "fig4": Target("spectra", "cater", "cater", "actions"),
    "fig3": Target("futures with latents", "moving-mnist-stochastic", "table2", "table2"),
}


def base_of_target(given: Namespace) -> Config:
    """The configuration that the options of `reproduce` change, for the target given. Raises ConfigError."""
    return base_of(given, TARGETS[given.target].preset if given.target in TARGETS else "moving-mnist")


def reproduce(arguments: Namespace) -> None:
    """Make a table or figure of the paper, with our numbers beside the paper's.

    Runs that exist are continued or kept; table2 and fig3 share their runs.
    """
    seeds = parse("--seeds", tuple[int, ...], arguments.seeds)
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds={arguments.seeds}: must be different numbers")
    store = open_store(arguments.results)
    roots = {name: given for name in SIMULATED if (given := getattr(arguments, name))}
    if arguments.target == "all":
        _reproduce_all(arguments, seeds, roots)
        return
    if roots:
        raise ConfigError(f"--{next(iter(roots))} is for reproduce all; {arguments.target} takes --data.root")
    target, function = TARGETS[arguments.target], arguments.target.replace("fig", "figure")
    module = importlib.import_module(f"vjvcr_fast.paper.{target.module}")
    config = config_of(arguments, target.preset)
    out = arguments.out or Path("runs") / f"{target.folder}-{config.preset}"
    where = f"preset {config.preset} on {resolve_device(config.train.device).type}, into {out}"
    at_once = processes_for(arguments.processes, config)
    print(f"reproduce {arguments.target}: {where}; unfinished runs are resumed, finished ones are kept", flush=True)
    use_one_thread(arguments, config)
    text = getattr(module, function)(config, out, seeds, at_once, store)
    files = [out / name for name in getattr(module, f"{function.upper()}_FILES")]
    print(f"\n{text}\nwrote {', '.join(str(file) for file in files if file.exists())}")


def _reproduce_all(arguments: Namespace, seeds: tuple[int, ...], roots: dict[str, str]) -> None:
    from vjvcr_fast.paper.reproduce_all import PAGE, reproduce_all

    if arguments.preset or arguments.config:
        raise ConfigError("reproduce all has presets of its own: --scale instead of --preset and --config")
    for name, given in roots.items():
        if not Path(given).is_dir():
            raise ConfigError(f"--{name}={given}: no such folder")
    processes_for(arguments.processes, override(Config(), overrides(arguments)))  # wrong values fail now, not later
    out = arguments.out or Path("runs") / (f"all-{arguments.scale}" if arguments.scale else "all")
    text = reproduce_all(
        out, seeds, overrides(arguments), roots, arguments.processes, arguments.scale, arguments.results
    )
    print(f"\n{text}\nwrote {out / PAGE}")
