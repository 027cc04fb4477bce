"""The paper's tables and figures, one call each: train what is missing, evaluate, write ours beside the paper's."""

import json
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast import __version__
from vjvcr_fast.config import PRESETS, Config, ConfigError, differences, override, resolve_device
from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.evaluation import figures
from vjvcr_fast.evaluation.evaluate import decode, evaluate_run, frozen_decoder, load_run
from vjvcr_fast.evaluation.probes import training_probe
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.training.build import build_digits, build_videos
from vjvcr_fast.training.checkpoint import load, read_metrics
from vjvcr_fast.training.latents import Latents
from vjvcr_fast.training.loop import claim, split_frames, train

Evaluation = Callable[[Path, Config], dict[str, Any]]

TABLE1_FILES = ("table1.md", "table1.json", "figure5.png", "curves.png", "spectrum.png")

# Table 1, MovingMNIST half: speed MSE and PSNR (dB).
PAPER_TABLE1 = {
    "vj-vcr": (0.04, 19.5),
    "vj-vcr-decoder": (0.04, 21.2),
    "generative-vcr": (0.10, 22.9),
    "generative": (0.15, 22.8),
}


def finish_run(config: Config, run: Path, evaluate: Evaluation = evaluate_run) -> dict[str, Any]:
    """Trains what is missing of a run and evaluates it; returns its evaluation.

    Raises ConfigError where `run` holds a run of another config, or a longer one.
    """
    last = run / "last.pt"
    trained = load(last)["step"] if last.exists() else 0
    if trained > config.train.steps:
        raise ConfigError(f"{run} has {trained} steps, train.steps={config.train.steps}; choose another --out")
    claim(run, config)
    if trained < config.train.steps:
        train(config, run, probe=training_probe)
    return evaluate(run, config)


def table1(config: Config, out: Path, seeds: Sequence[int]) -> str:
    """Table 1 (MovingMNIST): all four rows, every seed; returns the table as Markdown.

    Writes to `out`: a run folder for each row and seed, table1.md, table1.json, figure5.png, curves.png, spectrum.png.
    Rows and seeds that are finished are not run again.

    Raises: as `train` and `evaluate_run`; ImportError without matplotlib.
    """
    figures.require_matplotlib()
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for seed in seeds:
        for row in ROWS:
            asked = override(config, {"model.row": row, "train.seed": seed})
            results[row].append(finish_run(asked, _run(out, row, seed)))
    summary = {
        "preset": config.preset,
        "config": config.to_dict(),
        "seeds": list(seeds),
        "machine": machine(config),
        "rows": {row: _summary(row, evaluations) for row, evaluations in results.items()},
    }
    text = _markdown(config, results, seeds)
    write_atomic(out / "table1.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(out / "table1.md", text)
    runs = {row: _run(out, row, seeds[0]) for row in ROWS}
    figure5(runs, out / "figure5.png")
    figures.curves(out / "curves.png", {row: read_metrics(run / "metrics.jsonl") for row, run in runs.items()})
    figures.spectrum(out / "spectrum.png", {row: results[row][0]["singular_values"] for row in ROWS})
    return text


def figure5(runs: dict[str, Path], path: Path) -> None:
    """Three validation clips: input, target, and the decoded futures of VJ-VCR and of the generative baseline."""
    predictions = {}
    for row in ("vj-vcr", "generative"):
        config, model = load_run(runs[row])
        training_digits, validation_digits = build_digits(config)
        device = next(model.parameters()).device
        x, y = split_frames(build_videos(config, validation_digits, "validation", device).batch(0, 3), config)
        decoder = frozen_decoder(runs[row], config, model, training_digits)
        predictions[ROWS[row].title] = decode(Latents(config, model), decoder, x, y)
    figures.clips(path, x, y, predictions)


def machine(config: Config) -> dict[str, str]:
    """What the numbers were made on."""
    device = resolve_device(config.train.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = {"torch": torch.__version__, "python": platform.python_version(), "vjvcr_fast": __version__}
    return {"device": device.type, "name": name, **versions}


def _run(out: Path, row: str, seed: int) -> Path:
    return out / f"{row}-seed{seed}"


def _summary(row: str, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    mse, db = PAPER_TABLE1[row]
    measured = ("speed_mse", "speed_mse_least_squares", "speed_mse_of_the_mean", "psnr", "rank_me")
    keys = (*measured, "step", "train_seconds", "evaluate_seconds")
    ours = {key: [e[key] for e in evaluations] for key in keys}
    first = evaluations[0]
    about = {key: first[key] for key in ("digits", "decoder", "rank_me_rows")}
    return {"title": ROWS[row].title, "paper": {"speed_mse": mse, "psnr": db}, "ours": ours, **about}


def _markdown(config: Config, results: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> str:
    first = results["vj-vcr"][0]
    data = config.data
    head = ["model", "D(h_y)", "D(y)", "VCR", "speed MSE", "paper's", "least squares", "PSNR", "paper's PSNR", "RankMe"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    for row, evaluations in results.items():
        terms, (paper_mse, paper_psnr) = ROWS[row], PAPER_TABLE1[row]
        cells = [
            terms.title,
            *("yes" if on else "no" for on in (terms.hidden, terms.pixel, terms.vcr)),
            spread([e["speed_mse"] for e in evaluations], 3),
            f"{paper_mse:.2f}",
            spread([e["speed_mse_least_squares"] for e in evaluations], 3),
            spread([e["psnr"] for e in evaluations], 1) + (" (post hoc)" if not terms.pixel else ""),
            f"{paper_psnr:.1f}",
            spread([e["rank_me"] for e in evaluations], 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    mean = spread([e["speed_mse_of_the_mean"] for e in results["vj-vcr"]], 3)
    seconds = {k: sum(e[f"{k}_seconds"] for es in results.values() for e in es) for k in ("train", "evaluate")}
    notes = [
        f"{about(config)}; {named_seeds(seeds)}.",
        f"Digits: {first['digits']}. Speeds: uniform in {data.speed[0]:g} to {data.speed[1]:g} pixels/frame; MSE in "
        f"(pixels/frame)^2; predicting the mean gives {mean}. The paper does not state its unit: compare orderings.",
        f"Speed MSE: linear probe on the predicted target frames, Adam {config.evaluate.probe_lr:g}, "
        f"{config.evaluate.probe_epochs} epochs; least squares: the exact linear probe. PSNR in dB per frame, clipped "
        f"to [0, 1], averaged; a black frame has {first['psnr_of_black']:.1f}. RankMe: {first['rank_me_rows']}.",
        f"{len(seeds) * len(results)} runs on {machine(config)['name']}: {seconds['train']:.0f} s of training, "
        f"{seconds['evaluate']:.0f} s of evaluation.",
    ]
    return "\n".join(["# Table 1, MovingMNIST: ours beside the paper's", "", *lines, "", *notes]) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """ "mean", or "mean ± standard deviation" of several seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def about(config: Config) -> str:
    """A config in a line: its preset, what was changed in it, and its sizes."""
    data, training, d = config.data, config.train, config.model.channels[-1] * config.model.pool**2
    changed = differences(config, PRESETS.get(config.preset, Config()))
    other = "".join(f", {name} {ours}" for name, (ours, _) in changed.items() if not name.startswith("data.root"))
    return (
        f"Preset `{config.preset}`{other}: {data.canvas}x{data.canvas} frames, {data.frames_in} -> {data.frames_out}, "
        f"d = {d}, {training.steps:,} steps of {training.batch} videos"
    )


def named_seeds(seeds: Sequence[int]) -> str:
    """ "seed 0", or all of several and what they are good for."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
