"""The results of finished runs as small files, so that tables are made again without training and without checkpoints.

A folder has one file for each run, PRESET/ROW-seedK.json: the config, what was measured, the learning curves with few
points, and where the run was made. `vjvcr-fast reproduce --results DIR` takes finished rows from there instead of
training them, and adds each run that ends. What is there is not lost: a file of another config stays as it is. A file
has no paths of the machine.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vjvcr_fast.config import Config, ConfigError, differences, override
from vjvcr_fast.data.files import one_line, write_atomic
from vjvcr_fast.evaluation.evaluate import MEASURES
from vjvcr_fast.paper.figures import CURVES
from vjvcr_fast.paper.machine import checkout, machine, package_parent
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.loop import NEUTRAL

OFF = "off"
POINTS = 100  # of a learning curve, at most


class OtherConfigError(ConfigError):
    """A file has the results of a run of another config."""


class Kept(NamedTuple):
    """A finished run. evaluation: what was measured. machine: where it was made. curves: lines as in metrics.jsonl."""

    file: Path
    evaluation: dict[str, Any]
    machine: dict[str, str]
    curves: list[dict[str, float]]


class Store(NamedTuple):
    """A folder of results. writes: finished runs are added to it."""

    folder: Path
    writes: bool

    def file(self, run: Path, config: Config) -> Path:
        """The file of a run's results: only the run's name and the config's preset count."""
        return self.folder / config.preset / f"{run.name}.json"

    def take(self, run: Path, config: Config, measured: str) -> Kept | None:
        """The results of a run of this config, or None if there are none. Says on stderr if a file does not fit.

        run: only its name counts. measured: the name of the evaluation's file, such as evaluation.json.
        """
        file = self.file(run, config)
        if not file.exists():
            return None
        try:
            kept = _read(file, config, measured)
        except ConfigError as error:
            print(f"not taken: {file}: {error}", file=sys.stderr)
            return None
        print(f"taken, not trained: {file}, {_made(kept)}", file=sys.stderr)
        return kept

    def add(self, run: Path, config: Config, measured: str, evaluation: dict[str, Any]) -> None:
        """Writes the results of a finished run, if the folder is written to.

        A file of these results stays as it is, since it says where they were made; one of another config stays too,
        and stderr says so.
        """
        file = self.file(run, config)
        if not self.writes:
            return
        if file.exists():
            try:
                if json.dumps(_read(file, config, measured).evaluation) == json.dumps(evaluation):
                    return
            except OtherConfigError as error:
                print(f"not kept: {run.name}: {file} is of {error}; choose another --results", file=sys.stderr)
                return
            except ConfigError:  # damaged, or measured as earlier versions did
                pass
        content = {
            "config": override(config, {"data.root": "", "data.cache": ""}).to_dict(),
            "machine": machine(config),
            "measured": measured,
            "evaluation": evaluation,
            "curves": _few(read_metrics(run / "metrics.jsonl")),
        }
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        write_atomic(file, f"{{\n{lines}\n}}\n")


def open_store(asked: str | None) -> Store | None:
    """The store that --results asks for, or None for "off". Without the option: that of a checkout, only to read.

    Raises ConfigError if it is not a folder.
    """
    if asked == OFF:
        return None
    if asked:
        if Path(asked).exists() and not Path(asked).is_dir():
            raise ConfigError(f"--results={asked}: not a folder")
        checkout()  # remembered from now on: the checkout may change while runs are trained
        return Store(Path(asked), writes=True)
    own = package_parent() / "docs" / "results" / "runs"
    return Store(own, writes=False) if own.is_dir() else None


def taken_notes(taken: Mapping[Path, Kept]) -> list[str]:
    """What a page says about runs that were taken: a list of one line or none."""
    made = dict[str, list[str]]()
    for run, kept in taken.items():
        made.setdefault(_made(kept), []).append(run.name)
    runs = "; ".join(f"{', '.join(names)}: {where}" for where, names in made.items())
    return [f"Not trained again but taken from files of results: {runs}."] if taken else []


def _read(file: Path, config: Config, measured: str) -> Kept:
    """Raises OtherConfigError if the file is of another config, ConfigError if it is otherwise not what is wanted."""
    try:
        content = json.loads(file.read_text())
        theirs = Config.from_dict(content["config"])
        kept = Kept(file, content["evaluation"], content["machine"], _lines(content["curves"]))
        measures = content["measured"], kept.evaluation["measures"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"not a file of results: {one_line(error)}") from None
    pairs = differences(theirs, config).items()
    changes = [f"{name} {was} -> {now}" for name, (was, now) in pairs if name not in NEUTRAL]
    if changes:
        raise OtherConfigError(f"another config ({', '.join(changes)})")
    if measures != (measured, MEASURES):
        raise ConfigError(f"measured as {measures}, here {(measured, MEASURES)}")
    return kept


def _made(kept: Kept) -> str:
    return f"commit {kept.machine['commit']} on {kept.machine['name']}"


def _few(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """{name: [steps, values]} of what learning curves show, and of energies at several z, with POINTS points at most,
    the last one among them."""
    curves, energies = {}, sorted({name for row in rows for name in row if "_energy_" in name})
    for name in (*CURVES, *energies):
        points = [(row["step"], float(f"{row[name]:.4g}")) for row in rows if row.get(name)]
        every = -(-len(points) // POINTS)
        if points:
            steps, values = zip(*points[::-1][::every][::-1], strict=True)
            curves[name] = [[*steps], [*values]]
    return curves


def _lines(curves: Mapping[str, Any]) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that `_few` has kept, one for each point."""
    return [
        {"step": s, name: v} for name, (steps, values) in curves.items() for s, v in zip(steps, values, strict=True)
    ]
