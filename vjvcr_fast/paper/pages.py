"""What the pages of all tables and figures share: Markdown, JSON, and how a run's pictures are made."""

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vjvcr_fast.config import PRESETS, Config, differences
from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.evaluation.evaluate import decode, frozen_decoder
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.jobs import Results, Table
from vjvcr_fast.paper.machine import machine
from vjvcr_fast.paper.store import taken_notes
from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import VideoSource, build_data, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import read_metrics


def write_table(table: Table, name: str, title: str, lines: Sequence[str], notes: Sequence[str], **numbers: Any) -> str:
    """Writes NAME.md and NAME.json to `table.out`; returns the Markdown.

    lines: the Markdown table. notes: what a reader has to know; config, seeds and times are added. numbers: for the
    JSON, after config, seeds and machine.
    """
    config, ran_on = table.config, machine(table.config)
    found = [evaluation for evaluations in table.results.values() for evaluation in evaluations]
    names = [kept.machine["name"] for kept in table.taken.values()]
    names += [ran_on["name"]] if len(table.taken) < len(found) else []
    train, evaluate = (sum(e[f"{what}_seconds"] for e in found) for what in ("train", "evaluate"))
    cost = f"{train:.0f} s of training, {evaluate:.0f} s of evaluation"
    where = f"{len(found)} runs on {' and '.join(dict.fromkeys(names))}: {cost}."
    notes = [f"{about(config)}; {named_seeds(table.seeds)}.", *notes, where, *taken_notes(table.taken)]
    described = {"preset": config.preset, "config": config.to_dict(), "seeds": [*table.seeds], "machine": ran_on}
    if table.taken:
        described["taken"] = {run.name: kept.machine for run, kept in table.taken.items()}
    return write_page(table.out, name, title, lines, notes, described | numbers)


def write_page(
    out: Path, name: str, title: str, lines: Sequence[str], notes: Sequence[str], numbers: Any, indent: int | None = 1
) -> str:
    """Writes NAME.md (title, lines, notes) and NAME.json (numbers) to `out`; returns the Markdown."""
    text = "\n".join([f"# {title}", "", *lines, "", *notes]) + "\n"
    write_atomic(out / f"{name}.json", json.dumps(numbers, indent=indent) + "\n")
    write_atomic(out / f"{name}.md", text)
    return text


def draw_curves(table: Table, file: str) -> None:
    """Draws the learning curves of every row, first seed."""
    first = {row: table.first_run(row)[0] for row in table.results}
    taken = {row: table.taken[run].curves for row, run in first.items() if run in table.taken}
    metrics = {row: taken[row] if row in taken else read_metrics(run / "metrics.jsonl") for row, run in first.items()}
    figures.curves(table.out / file, metrics)


def futures_of(table: Table, row: str) -> tuple[Config, VideoSource, Callable[..., Tensor]]:
    """Of a row's first run: its config, its validation videos, and what decodes its predictions, (x, y) -> future of x.

    Trains a decoder on the frozen predictions if the model has none.
    """
    run, config = table.first_run(row)
    config, model = load_run(run, config)
    training_data, validation_data = build_data(config)
    videos = build_videos(config, validation_data, "validation", next(model.parameters()).device)
    decoder = frozen_decoder(run, config, model, training_data)
    return config, videos, functools.partial(decode, Latents(config, model), decoder)


# -- Text -----------------------------------------------------------------------------------------------------------


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_head(titles: Sequence[str]) -> list[str]:
    """The two lines that begin a Markdown table."""
    return [table_row(titles), "|" + " --- |" * len(titles)]


def spread(values: Sequence[float], digits: int) -> str:
    """ "mean", or "mean ± standard deviation" for several seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def percent(evaluations: Results, key: str, sign: str = "%") -> str:
    """`spread` of a fraction in 0..1 over several evaluations, in per cent."""
    return spread([100 * e[key] for e in evaluations], 1) + sign


def about(config: Config) -> str:
    """A config in one line: its preset, the fields changed from it, and its sizes."""
    data, training = config.data, config.train
    changed = differences(config, PRESETS.get(config.preset, Config()))
    other = "".join(f", {name} {ours}" for name, (ours, _) in changed.items() if not name.startswith("data.root"))
    return (
        f"Preset `{config.preset}`{other}: {data.canvas}x{data.canvas} frames, {data.frames_in} -> {data.frames_out}, "
        f"d = {config.d:,}, {training.steps:,} steps of {training.batch} videos"
    )


def named_seeds(seeds: Sequence[int]) -> str:
    """ "seed 0", or "seeds 0, 1" with what is shown of them."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
