"""`vjvcr-fast sweep FILE.yaml`: compares settings of one preset, with several seeds each, in one table.

The file:

    preset: moving-mnist-mini        # or  config: FILE, the config.json of a run
    set: {data.split: development}   # changes for every entry
    list:                            # named settings, each with its own changes
      as it is: {}
      wider: {model.channels: [32, 64, 128]}
    grid:                            # all combinations of these values, for each setting of the list
      model.row: [vj-vcr, generative]
      train.lr: [1e-3, 2e-3]
    seeds: [0, 1]                    # default: 0
    measure: [speed_mse, psnr]       # columns of the table; default: those of DEFAULT that were measured

An entry is one setting with one seed, and has a run's folder. It is trained and evaluated like any run, and goes on
where it was stopped. Entries are numbered from 0. `--entry N` runs one of them, also under torchrun and on any machine
that sees the same folder.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vjvcr_fast.config import Config, ConfigError, Data, override, parse, preset
from vjvcr_fast.data.files import one_line, write_atomic
from vjvcr_fast.paper import SweepError, figures
from vjvcr_fast.paper.actions import ACTIONS
from vjvcr_fast.paper.jobs import Evaluation, Job, finished, prepare, processes_for, run_jobs, train_run
from vjvcr_fast.paper.machine import machine
from vjvcr_fast.paper.pages import about, named_seeds, spread, table_head, table_row
from vjvcr_fast.paper.table1 import COLUMNS, TABLE1
from vjvcr_fast.paper.table2 import TABLE2
from vjvcr_fast.training.checkpoint import CheckpointError, read_metrics
from vjvcr_fast.training.processes import speaks

SWEEP_FILES = ("sweep.md", "sweep.json", "sweep.png", "curves.png")
KEYS = ("preset", "config", "set", "list", "grid", "seeds", "measure")
# The columns of the table, with digits after the point, and what else `measure` may name.
DEFAULT = {name: digits for name, (_, digits) in COLUMNS.items()}
DEFAULT |= {"direction_accuracy": 3, "digit_accuracy": 3, "map": 3}
OTHERS: tuple[str, ...] = ("speed_mse_of_the_mean", "psnr_of_black", "psnr_of_last_frame", "feature_std", "grain")
OTHERS += ("explained", "zeros", "step", "train_seconds", "evaluate_seconds")
OTHERS += ("direction_accuracy_converged", "digit_accuracy_converged")
CURVES = 10  # at most so many settings have their learning curves drawn


class Entry(NamedTuple):
    """One run. setting: its name. changes: {dotted field: value}, made to `Sweep.base`. config: the run's own."""

    setting: str
    changes: dict[str, Any]
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        """The setting's name without characters that a file name should not have, and the seed."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.setting).strip("-.") or "setting"
        return f"{name}-seed{self.seed}"


class Sweep(NamedTuple):
    """What a sweep's file says. settings: name -> entries, one per seed, in the file's order."""

    base: Config
    settings: dict[str, list[Entry]]
    seeds: tuple[int, ...]
    measure: tuple[str, ...]

    @property
    def entries(self) -> list[Entry]:
        """The entries of all settings, in the file's order."""
        return [entry for entries in self.settings.values() for entry in entries]


def read(file: Path) -> Sweep:
    """Reads and checks a sweep's file.

    Raises ConfigError, which names the file and the entry, if something in it is wrong; ImportError without PyYAML.
    """
    try:
        import yaml

        return _sweep(_mapping("the file", yaml.safe_load(file.read_text())), file.parent)
    except ImportError:
        raise ImportError("PyYAML is not installed: pip install 'vjvcr_fast[train]'") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a readable YAML file: {one_line(' '.join(str(error).split()))}") from None


def _sweep(content: dict[str, Any], folder: Path) -> Sweep:
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ConfigError(f"{one_line(unknown[0])}: no such key; keys are {', '.join(KEYS)}")
    if ("preset" in content) == ("config" in content):
        raise ConfigError("give either preset or config, to say what is changed")
    if "preset" in content:
        base = preset(parse("preset", str, content["preset"]))
    else:
        base = Config.load(folder / parse("config", str, content["config"]))
    base = override(base, _changes("set", content.get("set")))
    listed = _mapping("list", content.get("list")) or {"": {}}
    grid = {name: _list(name, values) for name, values in _changes("grid", content.get("grid")).items()}
    seeds = tuple(parse("seeds", int, seed) for seed in _list("seeds", content.get("seeds", [0])))
    measure = tuple(parse("measure", str, name) for name in _list("measure", content.get("measure", [*DEFAULT])))
    wrong = [name for name in measure if name not in (*DEFAULT, *OTHERS)]
    if wrong:
        raise ConfigError(f"measure: {one_line(wrong[0])}: must be one of {', '.join((*DEFAULT, *OTHERS))}")
    sweep = Sweep(base, {}, seeds, measure)
    for (name, changes), values in itertools.product(listed.items(), itertools.product(*grid.values())):
        combination = dict(zip(grid, values, strict=True))
        changed = _changes(f"list: {name}", changes) | combination
        shown = [f"{key.split('.')[-1]}={_text(value)}" for key, value in combination.items()]
        setting = ", ".join([*([name] if name else []), *shown]) or "as it is"
        for seed in seeds:
            try:
                config = override(base, {**changed, "train.seed": seed})
            except ConfigError as error:
                raise ConfigError(f"{setting}: {error}") from None
            sweep.settings.setdefault(setting, []).append(Entry(setting, changed, seed, config))
    folders = [entry.folder for entry in sweep.entries]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise ConfigError(f"two entries have the folder {twice}: names and seeds must differ")
    return sweep


def run_entry(sweep: Sweep, number: int, out: Path) -> dict[str, Any] | None:
    """Trains what is missing of an entry and evaluates it; returns the evaluation.

    Under torchrun all processes train together. The first one evaluates, the others return None.

    Raises ConfigError if there is no such entry; else as `jobs.finish_run`.
    """
    if not 0 <= number < len(sweep.entries):
        raise ConfigError(f"--entry={number}: must be between 0 and {len(sweep.entries) - 1}")
    entry = sweep.entries[number]
    train_run(entry.config, out / entry.folder)
    return evaluation_of(entry.config).measure(out / entry.folder, entry.config) if speaks() else None


def run_all(file: Path, out: Path, processes: str = "auto") -> str:
    """Runs every entry of a sweep's file and returns the table as Markdown.

    processes: how many entries run side by side, see `processes_for`. Writes SWEEP_FILES to `out`, and sweep.log, what
    an entry printed, to the folder of each.

    Raises:
        ConfigError: if the file or `processes` is wrong.
        SweepError: if entries failed. All others are finished and summarised first.
        StopRequestedError: on SIGTERM or Ctrl-C, after the running entries have written their checkpoints.
        ImportError: without matplotlib.
    """
    sweep = read(file)
    at_once = processes_for(processes, sweep.base)
    jobs, data = [], dict[Data, Config]()
    for number, entry in enumerate(sweep.entries):
        run, arguments = out / entry.folder, ("sweep", str(file), "--out", str(out), "--entry", str(number))
        with contextlib.suppress(ConfigError, CheckpointError):  # its own process will say what is wrong
            if finished(entry.config, run, evaluation_of(entry.config)):
                continue
        jobs.append(Job(run, entry.config.train.steps, arguments, run / "sweep.log"))
        data.setdefault(entry.config.data, entry.config)
    for config in data.values():
        with contextlib.suppress(*([ConfigError] if len(data) > 1 else [])):  # as above
            prepare(config)
    failed = run_jobs(jobs, at_once)
    text = summarise(sweep, out)
    if failed:
        names = ", ".join(job.run.name for job in failed)
        raise SweepError(f"{len(failed)} of {len(sweep.entries)} entries failed, see sweep.log in {names}")
    return text


def summarise(sweep: Sweep, out: Path) -> str:
    """Returns the table of the entries that are finished, as Markdown; writes SWEEP_FILES to `out`."""
    found: dict[str, dict[Path, dict[str, Any]]] = {setting: {} for setting in sweep.settings}
    for entry in sweep.entries:
        run, evaluation = out / entry.folder, evaluation_of(entry.config)
        with contextlib.suppress(ConfigError, CheckpointError):  # a run of other settings is not this entry's
            if (run / evaluation.file).exists() and (result := finished(entry.config, run, evaluation)):
                found[entry.setting][run] = result
    done = [evaluation for runs in found.values() for evaluation in runs.values()]
    measured = [name for name in sweep.measure if any(_number(e.get(name)) for e in done)]
    columns = {n: {s: [e[n] for e in es.values() if _number(e.get(n))] for s, es in found.items()} for n in measured}
    lines = table_head(["setting", "seeds", *measured])
    for setting, runs in found.items():
        values = {name: column[setting] for name, column in columns.items()}
        cells = [spread(ours, DEFAULT.get(name, 4)) if ours else "" for name, ours in values.items()]
        lines.append(table_row([setting, f"{len(runs)} of {len(sweep.seeds)}", *cells]))
    note = "Nothing is finished."
    if done:
        note = f"{about(sweep.base)}; {named_seeds(sweep.seeds)}. Data: {done[0]['data']}."
    text = "\n".join([*lines, "", note]) + "\n"
    settings = {}
    for setting, entries in sweep.settings.items():
        numbers = [{k: v for k, v in e.items() if not isinstance(v, dict | list)} for e in found[setting].values()]
        seeds = [entry.seed for entry in entries]
        settings[setting] = {"changes": entries[0].changes, "seeds": seeds, "evaluations": numbers}
    summary = {"config": sweep.base.to_dict(), "machine": machine(sweep.base), "settings": settings}
    write_atomic(out / "sweep.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(out / "sweep.md", text)
    if columns:
        figures.settings(out / "sweep.png", columns)
    if done:
        first = [(setting, next(iter(runs))) for setting, runs in found.items() if runs][:CURVES]
        figures.curves(out / "curves.png", {setting: read_metrics(run / "metrics.jsonl") for setting, run in first})
    return text


def evaluation_of(config: Config) -> Evaluation:
    """How a run of this config is evaluated: by what its z* can be probed for, actions or directions.

    Where there is neither, the run is measured like one without a latent.
    """
    if config.latent.kind == "actions":
        return ACTIONS
    return TABLE2 if config.data.stochastic and config.latent.kind != "none" else TABLE1


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, float | int)


def _changes(name: str, value: Any) -> dict[str, Any]:
    """Changes to a config. Raises ConfigError if the seed is among them: each setting is trained with every seed."""
    changes = _mapping(name, value)
    if "train.seed" in changes:
        raise ConfigError(f"{name}: train.seed={one_line(changes['train.seed'])}: give `seeds: [0, 1, ...]` instead")
    return changes


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name}: a mapping is expected, not {type(value).__name__}")
    return {str(key): item for key, item in (value or {}).items()}


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name}: a list of at least one value is expected, not {one_line(value)}")
    return value
