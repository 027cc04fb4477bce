"""Table 1: the four models of `models.energy.ROWS`, probed for speed, on MovingMNIST or CLEVRER. Also figure 5.

The probes are in evaluation/probes.py. `table1` trains what is missing, evaluates it and writes our numbers beside the
paper's.
"""

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.evaluation.evaluate import evaluate_run
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.jobs import Evaluation, Results, Table, finish_rows
from vjvcr_fast.paper.pages import draw_curves, futures_of, spread, table_head, table_row, write_table
from vjvcr_fast.paper.store import Store
from vjvcr_fast.training.step import split_frames

TABLE1 = Evaluation(evaluate_run, "evaluation.json")
IN_FIGURE5 = ("vj-vcr", "generative")
TABLE1_FILES = ("table1.md", "table1.json", "figure5.png", "curves.png", "spectrum.png", "probes.png")

# The paper's Table 1: speed MSE, with the PSNR in dB for MovingMNIST and the RankMe for CLEVRER.
PAPER_TABLE1: dict[str, dict[str, dict[str, float]]] = {
    "moving-mnist": {
        "vj-vcr": {"speed_mse": 0.04, "psnr": 19.5},
        "vj-vcr-decoder": {"speed_mse": 0.04, "psnr": 21.2},
        "generative-vcr": {"speed_mse": 0.10, "psnr": 22.9},
        "generative": {"speed_mse": 0.15, "psnr": 22.8},
    },
    "clevrer": {
        "vj-vcr": {"speed_mse": 0.19, "rank_me": 423.7},
        "vj-vcr-decoder": {"speed_mse": 0.19, "rank_me": 359.8},
        "generative-vcr": {"speed_mse": 0.22, "rank_me": 427.4},
        "generative": {"speed_mse": 0.23, "rank_me": 160.2},
    },
}
TERMS = {**ROWS, "sigreg": ROWS["vj-vcr"]._replace(title="JEPA with SIGReg", vcr=False)}  # not a row of the paper
TITLES = {"moving-mnist": "MovingMNIST", "clevrer": "CLEVRER"}

# Measured quantity -> the title of its column, digits after the point. The paper's column follows if it has one.
COLUMNS = {
    "speed_mse": ("speed MSE", 3),
    "speed_mse_standardised": ("standardised", 3),
    "speed_mse_least_squares": ("least squares", 3),
    "psnr": ("PSNR", 1),
    "rank_me": ("RankMe", 1),
}
# What table1.json has of every run, and what it has once per row.
MEASURED: tuple[str, ...] = ("speed_mse", "speed_mse_standardised", "speed_mse_least_squares")
MEASURED += ("speed_mse_of_the_mean", "speed_mse_by_epoch", "speed_mse_standardised_by_epoch")
MEASURED += ("psnr", "rank_me", "feature_std", "step", "train_seconds", "evaluate_seconds")
DESCRIBED = ("data", "validation_data", "decoder", "rank_me_rows")


def table1(config: Config, out: Path, seeds: Sequence[int], processes: int = 1, store: Store | None = None) -> str:
    """Makes Table 1 for the data set of `config`: four rows, every seed. Returns it as Markdown.

    If `config` asks for SIGReg, it has a fifth row: the first one's model, with SIGReg instead of VCR.

    Writes to `out` a folder for each run, and TABLE1_FILES. Prints each row as it finishes. processes: how many runs
    are trained at once. Runs that are finished, in `out` or in the store, are not run again. Figure 5 is left out if
    a run that it shows is of the store: it needs their weights.

    Raises ConfigError if the speeds of the data set are not known; else as `finish_rows`.
    """
    if not config.data.has_speed:
        raise ConfigError(f"data.dataset={config.data.dataset}: table 1 measures speeds, and none is known there")
    regulariser, config = config.model.regulariser, override(config, {"model.regulariser": "vcr"})
    rows = {row: override(config, {"model.row": row}) for row in ROWS}
    if regulariser == "sigreg":
        rows["sigreg"] = override(rows["vj-vcr"], {"model.regulariser": "sigreg"})
    head, line = table_head(_titles(config)), functools.partial(_line, config)
    table = finish_rows(config, out, seeds, processes, rows, TABLE1, head, line, store)
    results = table.results
    lines = [*head, *(line(row, found) for row, found in results.items())]
    title = f"Table 1, {TITLES[config.data.dataset]}: ours beside the paper's"
    numbers = {row: _numbers(config, row, found) for row, found in results.items()}
    notes = _notes(config, results["vj-vcr"])
    if "sigreg" in rows:
        notes.append(f"{TERMS['sigreg'].title}: not a row of the paper. Its weight is {config.model.sigreg_weight:g}.")
    lacking = [run.name for row in IN_FIGURE5 if (run := table.first_run(row)[0]) in table.taken]
    if lacking:
        notes.append(f"Figure 5 is not drawn: the weights of {', '.join(lacking)} are not here; --results off trains.")
    else:
        figure5(table, out / "figure5.png")
    text = write_table(table, "table1", title, lines, notes, rows=numbers)
    draw_curves(table, "curves.png")
    figures.spectrum(out / "spectrum.png", {row: found[0]["singular_values"] for row, found in results.items()})
    mean = statistics.mean(e["speed_mse_of_the_mean"] for e in results["vj-vcr"])
    figures.probes(out / "probes.png", {TERMS[row].title: found for row, found in results.items()}, mean)
    return text


def figure5(table: Table, path: Path) -> None:
    """Draws figure 5: three validation clips, with their futures as VJ-VCR and the generative model decode them."""
    predictions = {}
    for row in IN_FIGURE5:
        config, videos, future = futures_of(table, row)
        x, y = split_frames(videos.batch(0, 3), config)
        predictions[ROWS[row].title] = future(x, y)
    figures.clips(path, x, y, predictions)


def _numbers(config: Config, row: str, evaluations: Results) -> dict[str, Any]:
    ours = {key: [e[key] for e in evaluations] for key in MEASURED}
    described = {key: evaluations[0][key] for key in DESCRIBED}
    paper = PAPER_TABLE1[config.data.dataset].get(row, {})
    return {"title": TERMS[row].title, "paper": paper, "ours": ours, **described}


def _titles(config: Config) -> list[str]:
    titles = ["model", "D(h_y)", "D(y)", "VCR"]
    for name, (title, _) in COLUMNS.items():
        titles.append(title)
        if name in PAPER_TABLE1[config.data.dataset]["vj-vcr"]:
            titles.append("paper's" if name == "speed_mse" else f"paper's {title}")
    return titles


def _line(config: Config, row: str, evaluations: Results) -> str:
    terms, paper = TERMS[row], PAPER_TABLE1[config.data.dataset]
    cells = [terms.title, *("yes" if on else "no" for on in (terms.hidden, terms.pixel, terms.vcr))]
    for name, (_, digits) in COLUMNS.items():
        post_hoc = " (post hoc)" if name == "psnr" and not terms.pixel else ""
        cells.append(spread([e[name] for e in evaluations], digits) + post_hoc)
        if name in paper["vj-vcr"]:
            cells.append(f"{paper[row][name]:.{1 if digits == 1 else 2}f}" if row in paper else "")
    return table_row(cells)


def _notes(config: Config, evaluations: Results) -> list[str]:
    data, settings, first = config.data, config.evaluate, evaluations[0]
    mean = spread([e["speed_mse_of_the_mean"] for e in evaluations], 3)
    if data.dataset == "moving-mnist":
        source = f"Digits: {first['data']}"
        speeds = f"uniform in {data.speed[0]:g} to {data.speed[1]:g} pixels/frame; MSE in (pixels/frame)^2"
        trivial = f"a black frame has {first['psnr_of_black']:.1f}"
    else:
        source = f"Training data: {first['data']}; validation: {first['validation_data']}"
        speeds = "of the fastest visible object in the last target frame; MSE in the annotations' (scene units/s)^2"
        trivial = f"the last input frame, repeated, has {first['psnr_of_last_frame']:.1f}"
    rates = f"Adam {settings.probe_lr:g}"
    if settings.probe_lr_generative != settings.probe_lr:
        rates += f" ({settings.probe_lr_generative:g} for generative models)"
    return [
        f"{source}. Speeds: {speeds}; predicting the mean gives {mean}. The paper does not state its unit: compare "
        "orderings.",
        f"Speed MSE: linear probe on the predicted target frames, {rates}, {settings.probe_epochs} epochs; "
        "standardised: the same on features of mean 0 and variance 1; least squares: the exact linear probe. PSNR in "
        f"dB per frame, clipped to [0, 1], averaged; {trivial}. "
        f"RankMe: {first['rank_me_rows']}.",
    ]
