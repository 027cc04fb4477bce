"""The paper's tables and figures, one call each: train what is missing, evaluate, write ours beside the paper's."""

import contextlib
import functools
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import vjvcr_fast
from vjvcr_fast import __version__
from vjvcr_fast.config import PRESETS, Config, ConfigError, differences, override, resolve_device
from vjvcr_fast.data.files import cores, write_atomic
from vjvcr_fast.evaluation.evaluate import decode, evaluate_run, frozen_decoder
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.side_by_side import Evaluation, Rows, finish_rows
from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import build_data, build_videos, fill_cache
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.latents import Latents
from vjvcr_fast.training.step import split_frames

TABLE1 = Evaluation(evaluate_run, "evaluation.json")
TABLE1_FILES = ("table1.md", "table1.json", "figure5.png", "curves.png", "spectrum.png", "probes.png")

# Table 1: speed MSE, and of MovingMNIST the PSNR (dB), of CLEVRER the RankMe.
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
TITLES = {"moving-mnist": "MovingMNIST", "clevrer": "CLEVRER"}


def table1(config: Config, out: Path, seeds: Sequence[int], processes: int = 1) -> str:
    """Table 1, the half of `config.data.dataset`: all four rows, every seed; returns the table as Markdown.

    processes: how many runs go side by side. Writes to `out`: a run folder for each row and seed, and TABLE1_FILES.
    Runs that are finished are not run again. Prints each row when it is finished.

    Video files are decoded once, into the cache, unless `data.cache` is off.

    Raises: as `fill_cache` and `finish_rows`; ImportError without matplotlib.
    """
    if not config.data.has_speed:
        raise ConfigError(f"data.dataset={config.data.dataset}: table 1 measures speeds, and none is known there")
    figures.require_matplotlib()
    if config.data.dataset != "moving-mnist" and config.data.cache != "off":
        fill_cache(config)
    results = finish_rows(
        runs_of(config, out, ROWS, seeds), TABLE1, processes, _head(config), functools.partial(_line, config)
    )
    summary = {
        "preset": config.preset,
        "config": config.to_dict(),
        "seeds": list(seeds),
        "machine": machine(config),
        "rows": {row: _summary(config, row, evaluations) for row, evaluations in results.items()},
    }
    text = _markdown(config, results, seeds)
    write_atomic(out / "table1.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(out / "table1.md", text)
    runs = {row: run_folder(out, row, seeds[0]) for row in ROWS}
    figure5(runs, out / "figure5.png")
    figures.curves(out / "curves.png", {row: read_metrics(run / "metrics.jsonl") for row, run in runs.items()})
    figures.spectrum(out / "spectrum.png", {row: results[row][0]["singular_values"] for row in ROWS})
    mean = statistics.mean(e["speed_mse_of_the_mean"] for e in results["vj-vcr"])
    figures.probes(out / "probes.png", probe_curves(results), mean)
    return text


def probe_curves(results: Rows) -> dict[str, dict[str, list[list[float]]]]:
    """Of evaluations by row: the probes' MSE by epoch, for `figures.probes`."""
    protocols = {
        "Adam, features as they are": lambda e: e["speed_mse_by_epoch"],
        "Adam, features standardised": lambda e: e["speed_mse_standardised_by_epoch"],
        "least squares": lambda e: [e["speed_mse_least_squares"]],
    }
    rows = {row: ROWS[row].title for row in results}
    return {
        name: {title: [curve(e) for e in results[row]] for row, title in rows.items()}
        for name, curve in protocols.items()
    }


def figure5(runs: dict[str, Path], path: Path) -> None:
    """Three validation clips: input, target, and the decoded futures of VJ-VCR and of the generative baseline."""
    predictions = {}
    for row in ("vj-vcr", "generative"):
        config, model = load_run(runs[row])
        training_data, validation_data = build_data(config)
        device = next(model.parameters()).device
        x, y = split_frames(build_videos(config, validation_data, "validation", device).batch(0, 3), config)
        decoder = frozen_decoder(runs[row], config, model, training_data)
        predictions[ROWS[row].title] = decode(Latents(config, model), decoder, x, y)
    figures.clips(path, x, y, predictions)


def machine(config: Config) -> dict[str, str]:
    """What the numbers were made on."""
    device = resolve_device(config.train.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores()} CPU cores"
    name = f"{name}, {processor()}"
    versions = {
        "commit": checkout(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "vjvcr_fast": __version__,
    }
    return {"device": device.type, "name": name, **versions}


def processor() -> str:
    """The CPU's name, as Linux says it."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


@functools.cache
def checkout() -> str:
    """The commit of the checkout that this package runs from, "-dirty" with changes on top; else its version."""
    root = Path(vjvcr_fast.__file__).parents[1]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "--no-optional-locks", "-C", str(root)]
        top, commit, changes = (
            subprocess.run([*git, *asked], capture_output=True, text=True, check=True).stdout.strip()
            for asked in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
        if Path(top).resolve() == root.resolve():
            return f"{commit[:10]}-dirty" if changes else commit[:10]
    return f"of version {__version__}"


def runs_of(config: Config, out: Path, rows: Iterable[str], seeds: Sequence[int]) -> dict[str, dict[Path, Config]]:
    """Row of Table 1 -> run folder -> config, for `finish_rows`."""
    return {
        row: {run_folder(out, row, s): override(config, {"model.row": row, "train.seed": s}) for s in seeds}
        for row in rows
    }


def run_folder(out: Path, row: str, seed: int) -> Path:
    return out / f"{row}-seed{seed}"


def _summary(config: Config, row: str, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    measured = ("speed_mse", "speed_mse_standardised", "speed_mse_least_squares", "speed_mse_of_the_mean")
    curves = ("speed_mse_by_epoch", "speed_mse_standardised_by_epoch")
    keys = (*measured, *curves, "psnr", "rank_me", "feature_std", "step", "train_seconds", "evaluate_seconds")
    ours = {key: [e[key] for e in evaluations] for key in keys}
    first = evaluations[0]
    about = {key: first[key] for key in ("data", "validation_data", "decoder", "rank_me_rows")}
    return {"title": ROWS[row].title, "paper": PAPER_TABLE1[config.data.dataset][row], "ours": ours, **about}


# Columns: heading, digits after the point. A quantity that the paper has is followed by the paper's.
COLUMNS = {
    "speed_mse": ("speed MSE", 3),
    "speed_mse_standardised": ("standardised", 3),
    "speed_mse_least_squares": ("least squares", 3),
    "psnr": ("PSNR", 1),
    "rank_me": ("RankMe", 1),
}


def _markdown(config: Config, results: Rows, seeds: Sequence[int]) -> str:
    title = f"# Table 1, {TITLES[config.data.dataset]}: ours beside the paper's"
    lines = [_line(config, row, evaluations) for row, evaluations in results.items()]
    return "\n".join([title, "", *_head(config), *lines, "", *_notes(config, results, seeds)]) + "\n"


def _head(config: Config) -> list[str]:
    head = ["model", "D(h_y)", "D(y)", "VCR"]
    for name, (title, _) in COLUMNS.items():
        both = "paper's" if name == "speed_mse" else f"paper's {title}"
        head += [title, both] if name in PAPER_TABLE1[config.data.dataset]["vj-vcr"] else [title]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]


def _line(config: Config, row: str, evaluations: list[dict[str, Any]]) -> str:
    terms, paper = ROWS[row], PAPER_TABLE1[config.data.dataset][row]
    cells = [terms.title, *("yes" if on else "no" for on in (terms.hidden, terms.pixel, terms.vcr))]
    for name, (_, digits) in COLUMNS.items():
        post_hoc = " (post hoc)" if name == "psnr" and not terms.pixel else ""
        cells.append(spread([e[name] for e in evaluations], digits) + post_hoc)
        if name in paper:
            cells.append(f"{paper[name]:.{1 if digits == 1 else 2}f}")
    return "| " + " | ".join(cells) + " |"


def _notes(config: Config, results: Rows, seeds: Sequence[int]) -> list[str]:
    """What a reader needs to know of the numbers."""
    data, settings, first = config.data, config.evaluate, results["vj-vcr"][0]
    mean = spread([e["speed_mse_of_the_mean"] for e in results["vj-vcr"]], 3)
    seconds = {k: sum(e[f"{k}_seconds"] for es in results.values() for e in es) for k in ("train", "evaluate")}
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
        f"{about(config)}; {named_seeds(seeds)}.",
        f"{source}. Speeds: {speeds}; predicting the mean gives {mean}. The paper does not state its unit: compare "
        "orderings.",
        f"Speed MSE: linear probe on the predicted target frames, {rates}, {settings.probe_epochs} epochs; "
        "standardised: the same on features of mean 0 and variance 1; least squares: the exact linear probe. PSNR in "
        f"dB per frame, clipped to [0, 1], averaged; {trivial}. RankMe: "
        f"{first['rank_me_rows']}.",
        f"{len(seeds) * len(results)} runs on {machine(config)['name']}: {seconds['train']:.0f} s of training, "
        f"{seconds['evaluate']:.0f} s of evaluation.",
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """ "mean", or "mean ± standard deviation" of several seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def about(config: Config) -> str:
    """A config in a line: its preset, what was changed in it, and its sizes."""
    data, training = config.data, config.train
    changed = differences(config, PRESETS.get(config.preset, Config()))
    other = "".join(f", {name} {ours}" for name, (ours, _) in changed.items() if not name.startswith("data.root"))
    return (
        f"Preset `{config.preset}`{other}: {data.canvas}x{data.canvas} frames, {data.frames_in} -> {data.frames_out}, "
        f"d = {config.d:,}, {training.steps:,} steps of {training.batch} videos"
    )


def named_seeds(seeds: Sequence[int]) -> str:
    """ "seed 0", or all of several and what they are good for."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
