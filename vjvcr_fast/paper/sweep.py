"""`vjvcr-fast sweep FILE.yaml`: settings of one preset beside each other, several seeds each, in one table.

The file:

    preset: moving-mnist-mini        # or  config: FILE, the config.json of a run
    set: {data.split: development}   # of every entry
    list:                            # settings by name, each a change to that
      as it is: {}
      wider: {model.channels: [32, 64, 128]}
    grid:                            # every combination, of every setting of the list
      model.row: [vj-vcr, generative]
      train.lr: [1e-3, 2e-3]
    seeds: [0, 1]                    # default: 0
    measure: [speed_mse, psnr]       # default: all that is known of DEFAULT

An entry is a setting with a seed: a run's folder, trained and evaluated, which goes on where it was stopped. Entries
are numbered from 0; any of them can be run alone (`--entry`), also by torchrun, on a machine that sees the same folder.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vjvcr_fast.config import Config, ConfigError, override, parse, preset
from vjvcr_fast.data.files import one_line, write_atomic
from vjvcr_fast.paper import SweepError, figures
from vjvcr_fast.paper.actions import ACTIONS
from vjvcr_fast.paper.side_by_side import (
    Evaluation,
    Job,
    finish_run,
    is_finished,
    processes_for,
    run_jobs,
    train_run,
)
from vjvcr_fast.paper.table1 import TABLE1, about, machine, named_seeds, spread
from vjvcr_fast.paper.table2 import TABLE2
from vjvcr_fast.training.build import fill_cache
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.processes import launched, speaks

SWEEP_FILES = ("sweep.md", "sweep.json", "sweep.png", "curves.png")
KEYS = ("preset", "config", "set", "list", "grid", "seeds", "measure")
DEFAULT = {
    "speed_mse": 3,
    "speed_mse_standardised": 3,
    "speed_mse_least_squares": 3,
    "psnr": 1,
    "rank_me": 1,
    "direction_accuracy": 3,
    "digit_accuracy": 3,
    "map": 1,
}  # and the digits to show after the point
# What `measure` may name besides.
OTHERS = (
    "speed_mse_of_the_mean",
    "psnr_of_black",
    "psnr_of_last_frame",
    "feature_std",
    "explained",
    "zeros",
    "direction_accuracy_converged",
    "digit_accuracy_converged",
    "step",
    "train_seconds",
    "evaluate_seconds",
)
CURVES = 10  # settings whose learning curves fit one figure


class Entry(NamedTuple):
    """setting: its name. changes: to `Sweep.base`, dotted. config: with the seed."""

    setting: str
    changes: dict[str, Any]
    seed: int
    config: Config

    @property
    def folder(self) -> str:
        return f"{slug(self.setting)}-seed{self.seed}"


class Sweep(NamedTuple):
    """A file, read and checked."""

    base: Config
    entries: list[Entry]
    seeds: tuple[int, ...]
    measure: tuple[str, ...]

    @property
    def settings(self) -> dict[str, list[Entry]]:
        """Name -> an entry for each seed, in the file's order."""
        names = dict.fromkeys(entry.setting for entry in self.entries)
        return {name: [entry for entry in self.entries if entry.setting == name] for name in names}


def read(file: Path) -> Sweep:
    """A sweep's file. Raises ConfigError, naming file and entry, for one that is not; ImportError without PyYAML."""
    try:
        import yaml
    except ImportError:
        raise ImportError("PyYAML is not installed: pip install 'vjvcr_fast[train]'") from None
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a readable YAML file: {one_line(' '.join(str(error).split()))}") from None
    try:
        return _sweep(_mapping("the file", content), file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _sweep(content: dict[str, Any], file: Path) -> Sweep:
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ConfigError(f"{one_line(unknown[0])}: no such key; keys are {', '.join(KEYS)}")
    if ("preset" in content) == ("config" in content):
        raise ConfigError("preset or config, one of them, must say what is changed")
    if "preset" in content:
        base = preset(parse("preset", str, content["preset"]))
    else:
        base = Config.load(file.parent / parse("config", str, content["config"]))
    base = override(base, _mapping("set", content.get("set")))
    listed = _mapping("list", content.get("list")) or {"": {}}
    grid = {name: _list(name, values) for name, values in _mapping("grid", content.get("grid")).items()}
    seeds = tuple(parse("seeds", int, seed) for seed in _list("seeds", content.get("seeds", [0])))
    measure = tuple(parse("measure", str, name) for name in _list("measure", content.get("measure", [*DEFAULT])))
    wrong = [name for name in measure if name not in (*DEFAULT, *OTHERS)]
    if wrong:
        raise ConfigError(f"measure: {one_line(wrong[0])}: must be one of {', '.join((*DEFAULT, *OTHERS))}")
    entries = []
    for name, changes in listed.items():
        for values in itertools.product(*grid.values()):
            combination = dict(zip(grid, values, strict=True))
            changed = {**_mapping(f"list: {name}", changes), **combination}
            shown = [f"{key.split('.')[-1]}={_text(value)}" for key, value in combination.items()]
            setting = ", ".join([*([str(name)] if name != "" else []), *shown]) or "as it is"
            try:
                configs = [override(base, {**changed, "train.seed": seed}) for seed in seeds]
            except ConfigError as error:
                raise ConfigError(f"{setting}: {error}") from None
            entries += [Entry(setting, changed, seed, c) for seed, c in zip(seeds, configs, strict=True)]
    folders = [entry.folder for entry in entries]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise ConfigError(f"two entries have the folder {twice}: names and seeds must differ")
    return Sweep(base, entries, seeds, measure)


def run_entry(sweep: Sweep, number: int, out: Path) -> dict[str, Any] | None:
    """Trains what is missing of an entry and evaluates it; returns its evaluation, None where another process does.

    Raises: ConfigError for a number that is not there; as `finish_run`.
    """
    if not 0 <= number < len(sweep.entries):
        raise ConfigError(f"--entry={number}: must be between 0 and {len(sweep.entries) - 1}")
    entry = sweep.entries[number]
    run = out / entry.folder
    if launched() > 1:  # they train together, one evaluates
        train_run(entry.config, run)
        return evaluation_of(entry.config).measure(run, entry.config) if speaks() else None
    return finish_run(entry.config, run, evaluation_of(entry.config))


def run_all(file: Path, out: Path, processes: str = "auto") -> str:
    """Every entry of a sweep's file, `processes` side by side (`processes_for`); returns the table as Markdown.

    Each process has its share of the cores. Writes SWEEP_FILES to `out` and, of every process, sweep.log to its run.

    Raises: ConfigError; SweepError where entries failed, after all others and the summary of those; StopRequestedError
    on SIGTERM or Ctrl-C, after the running ones have written their checkpoints; ImportError without matplotlib.
    """
    figures.require_matplotlib()
    sweep = read(file)
    at_once = processes_for(processes, sweep.base)
    if sweep.base.data.dataset != "moving-mnist" and sweep.base.data.cache != "off":
        fill_cache(sweep.base)
    jobs = [
        _job(file, number, entry, out)
        for number, entry in enumerate(sweep.entries)
        if not is_finished(entry.config, out / entry.folder, evaluation_of(entry.config))
    ]
    failed = run_jobs(jobs, at_once, finished=lambda job, show: None)
    text = summarise(sweep, out)
    if failed:
        names = ", ".join(job.name for job in failed)
        raise SweepError(f"{len(failed)} of {len(sweep.entries)} entries failed, see sweep.log in {names}")
    return text


def _job(file: Path, number: int, entry: Entry, out: Path) -> Job:
    arguments = ("sweep", str(file), "--out", str(out), "--entry", str(number))
    run = out / entry.folder
    return Job(entry.folder, run, entry.config.train.steps, arguments, run / "sweep.log")


def summarise(sweep: Sweep, out: Path) -> str:
    """The table of the entries that are finished, as Markdown; writes SWEEP_FILES."""
    found: dict[str, list[dict[str, Any]]] = {}
    for setting, entries in sweep.settings.items():
        files = [out / entry.folder / evaluation_of(entry.config).file for entry in entries]
        found[setting] = [json.loads(file.read_text()) for file in files if file.exists()]
    done = [evaluation for evaluations in found.values() for evaluation in evaluations]
    measured = [name for name in sweep.measure if any(isinstance(e.get(name), float | int) for e in done)]
    columns = {name: {s: [e[name] for e in es if name in e] for s, es in found.items()} for name in measured}
    lines = ["| setting | seeds | " + " | ".join(measured) + " |", "|" + " --- |" * (2 + len(measured))]
    for setting, evaluations in found.items():
        cells = (columns[name][setting] for name in measured)
        shown = [spread(c, DEFAULT.get(n, 4)) if c else "" for n, c in zip(measured, cells, strict=True)]
        lines.append(f"| {setting} | {len(evaluations)} of {len(sweep.seeds)} | {' | '.join(shown)} |")
    note = (
        f"{about(sweep.base)}; {named_seeds(sweep.seeds)}. Data: {done[0]['data']}." if done else "Nothing is finished."
    )
    text = "\n".join([*lines, "", note]) + "\n"
    settings = {
        setting: {
            "changes": entries[0].changes,
            "seeds": [entry.seed for entry in entries],
            "evaluations": [{k: v for k, v in e.items() if not isinstance(v, dict | list)} for e in found[setting]],
        }
        for setting, entries in sweep.settings.items()
    }
    summary = {"config": sweep.base.to_dict(), "machine": machine(sweep.base), "settings": settings}
    write_atomic(out / "sweep.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(out / "sweep.md", text)
    if done:
        if columns:
            figures.settings(out / "sweep.png", columns)
        logs = {s: [out / entry.folder / "metrics.jsonl" for entry in es] for s, es in sweep.settings.items()}
        first = {s: next(path for path in paths if path.exists()) for s, paths in logs.items() if found[s]}
        figures.curves(out / "curves.png", {s: read_metrics(path) for s, path in [*first.items()][:CURVES]})
    return text


def evaluation_of(config: Config) -> Evaluation:
    """What evaluates a run of this config."""
    # The z* of any videos has no classes to be told by; the rest is measured at it.
    kind = "none" if config.data.dataset == "folder" else config.latent.kind
    return {"none": TABLE1, "actions": ACTIONS}.get(kind, TABLE2)


def slug(name: str) -> str:
    """name as part of a file's: letters, digits, points and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "setting"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name}: a mapping is expected, not {type(value).__name__}")
    return {str(key): item for key, item in (value or {}).items()}


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name}: a list of at least one value is expected, not {one_line(value)}")
    return value
