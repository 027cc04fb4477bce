"""Table 2 and figure 3: stochastic MovingMNIST with the latents of `config.LATENTS`, ours beside the paper's."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from vjvcr_fast.config import LATENTS, Config, ConfigError, latent, override
from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.data.moving_mnist import DIRECTIONS, MovingMNIST, Videos
from vjvcr_fast.evaluation.evaluate import decode, frozen_decoder, mean_psnr
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.codes import evaluate_latents
from vjvcr_fast.paper.side_by_side import Evaluation, Rows, finish_rows
from vjvcr_fast.paper.table1 import about, machine, named_seeds, spread
from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import build_data, build_videos
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.latents import Latents
from vjvcr_fast.training.step import split_frames

TABLE2 = Evaluation(evaluate_latents, "latents.json")
TABLE2_FILES = ("table2.md", "table2.json", "latent-curves.png")
FIGURE3_FILES = ("figure3.md", "figure3.json", "figure3.png")
CLIPS = 2  # of each direction, in figure 3

# Table 2: accuracy of z* -> direction and of z* -> digit.
PAPER_TABLE2 = {"discrete": (0.797, 0.114), "sparse-high": (0.947, 0.316), "sparse-low": (0.995, 0.576)}


def table2(config: Config, out: Path, seeds: Sequence[int], processes: int = 1) -> str:
    """Table 2: every latent and, for chance and figure 3, none; every seed. Returns the table as Markdown.

    processes: how many runs go side by side. Writes to `out`: a run folder for each latent and seed, and TABLE2_FILES.
    What is finished is not run again.

    Raises: ConfigError where config's videos are not stochastic; as `finish_rows`; ImportError without matplotlib.
    """
    figures.require_matplotlib()
    results = _finished(config, out, seeds, processes)
    summary = {
        "preset": config.preset,
        "config": config.to_dict(),
        "seeds": list(seeds),
        "machine": machine(config),
        "rows": {name: _summary(name, evaluations) for name, evaluations in results.items()},
    }
    text = _markdown(config, results, seeds)
    write_atomic(out / "table2.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(out / "table2.md", text)
    metrics = {name: read_metrics(run_folder(out, name, seeds[0]) / "metrics.jsonl") for name in LATENTS}
    figures.curves(out / "latent-curves.png", metrics)
    return text


def figure3(config: Config, out: Path, seeds: Sequence[int], processes: int = 1) -> str:
    """Figure 3, for the first seed: decoded futures of validation clips in all directions, without and with a latent.

    Uses and makes the same runs as `table2`, trains a decoder on the frozen predictions of each, and writes
    FIGURE3_FILES to `out`. Returns the PSNR of every model as Markdown. Raises: as `table2`.
    """
    figures.require_matplotlib()
    _finished(config, out, seeds[:1], processes)
    predictions, db, black = {}, {}, 0.0
    for name in LATENTS:
        run = run_folder(out, name, seeds[0])
        run_config, model = load_run(run, latent(override(config, {"train.seed": seeds[0]}), name))
        training_data, validation_data = build_data(run_config)
        videos = build_videos(run_config, validation_data, "validation", next(model.parameters()).device)
        decoder = frozen_decoder(run, run_config, model, training_data)
        future = functools.partial(decode, Latents(run_config, model), decoder)
        x, y = split_frames(one_of_each_direction(cast(MovingMNIST, videos), CLIPS), run_config)
        predictions[title(config, name)] = future(x, y)
        db[name] = mean_psnr(videos, run_config, future)
        black = mean_psnr(videos, run_config, lambda x, y: x.new_zeros(()))
    names = [f"ψ = {k} · 72°" for k in range(DIRECTIONS)]
    figures.futures(out / "figure3.png", y, predictions, names)
    numbers = {"seed": seeds[0], "psnr": db, "psnr_of_black": black}
    write_atomic(out / "figure3.json", json.dumps(numbers, indent=1) + "\n")
    text = _figure_markdown(config, db, black, seeds[0])
    write_atomic(out / "figure3.md", text)
    return text


def run_folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-seed{seed}"


def title(config: Config, name: str) -> str:
    """Of a latent in tables and figures."""
    settings = latent(config, name).latent
    return {
        "none": "no latent",
        "discrete": f"discrete, one-hot of {settings.heads}",
        "sparse": f"sparse, {settings.zeros:.0%} zeros",
    }[settings.kind]


def one_of_each_direction(videos: MovingMNIST, count: int) -> Videos:
    """The first `count` videos of each direction, in turn: psi_0, ..., psi_4, psi_0, ..."""
    direction = videos.batch(0, 100 * count).direction.cpu()
    of_each = [(direction == k).nonzero()[:count, 0] for k in range(DIRECTIONS)]
    return videos.batch_at(torch.stack(of_each, dim=1).flatten())


def _finished(config: Config, out: Path, seeds: Sequence[int], processes: int) -> Rows:
    """The evaluations of the runs of every latent, which are trained first where they have to be."""
    if not config.data.stochastic:
        raise ConfigError("data.stochastic=False: table2 and fig3 are about stochastic videos, --data.stochastic true")
    runs = {
        name: {run_folder(out, name, s): latent(override(config, {"train.seed": s}), name) for s in seeds}
        for name in LATENTS
    }
    return finish_rows(runs, TABLE2, processes, HEAD, functools.partial(_line, config))


def _summary(name: str, evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    shared = ("data", "direction_chance", "digit_chance")
    ours = {key: [e[key] for e in evaluations] for key in evaluations[0] if key not in (*shared, "evaluate")}
    paper = dict(zip(("direction_accuracy", "digit_accuracy"), PAPER_TABLE2.get(name, ()), strict=False))
    return {"paper": paper, "ours": ours, **{key: evaluations[0][key] for key in shared}}


COLUMNS = ["latent", "z* -> direction ψ", "paper's", "converged", "z* -> digit", "paper's", "converged"]
COLUMNS += ["measured zeros", "explained"]
HEAD = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]


def _line(config: Config, name: str, evaluations: list[dict[str, Any]]) -> str:
    def percent(key: str) -> str:
        return spread([100 * e[key] for e in evaluations], 1) + "%"

    if name == "none":
        chance = [percent(f"{label}_chance") for label in ("direction", "digit")]
        return f"| no latent: chance | {chance[0]} | | | {chance[1]} | | | | {percent('explained')} |"
    cells = [title(config, name)]
    for key, theirs in zip(("direction_accuracy", "digit_accuracy"), PAPER_TABLE2[name], strict=True):
        cells += [percent(key), f"{theirs:.1%}", percent(f"{key}_converged")]
    cells += [percent("zeros") if "zeros" in evaluations[0] else "", percent("explained")]
    return "| " + " | ".join(cells) + " |"


def _markdown(config: Config, results: Rows, seeds: Sequence[int]) -> str:
    lines = [*HEAD, *(_line(config, name, results[name]) for name in (*PAPER_TABLE2, "none"))]
    first = results["discrete"][0]
    usage = ", ".join(f"{share:.0%}" for share in sorted(first["usage"], reverse=True))
    weights = [f"{e['weight']:.2g}" for name in ("sparse-high", "sparse-low") for e in results[name]]
    seconds = {k: sum(e[f"{k}_seconds"] for es in results.values() for e in es) for k in ("train", "evaluate")}
    how = "calibrated while training" if config.latent.calibrate else "fixed"
    notes = [
        f"{about(config)}; {named_seeds(seeds)}.",
        f"Digits: {first['data']}. Accuracies are of {config.evaluate.validation_videos:,} videos of validation "
        f"digits. Linear classifiers on z* as it is: Adam {config.evaluate.probe_lr:g}, batches of "
        f"{config.evaluate.probe_batch}, {config.evaluate.probe_epochs} epochs of {config.evaluate.probe_videos:,} "
        "videos (the paper does not state how many); converged: the same map trained to its end.",
        f"Heads of the discrete latent, seed {seeds[0]}, chosen by {usage} of the videos; heads out of use "
        f"{'are revived' if config.latent.revive else 'are left so'}. L1 weights, {how}: {', '.join(weights)}.",
        "Explained: the part of the variance of h_y that Pred(h_x, z*) explains.",
        f"{len(seeds) * len(results)} runs on {machine(config)['name']}: {seconds['train']:.0f} s of training, "
        f"{seconds['evaluate']:.0f} s of evaluation.",
    ]
    return "\n".join(["# Table 2, stochastic MovingMNIST: ours beside the paper's", "", *lines, "", *notes]) + "\n"


def _figure_markdown(config: Config, db: dict[str, float], black: float, seed: int) -> str:
    lines = ["| latent | PSNR of the decoded future, dB |", "| --- | --- |"]
    lines += [f"| {title(config, name)} | {value:.1f} |" for name, value in db.items()]
    notes = [
        f"{about(config)}; seed {seed}.",
        f"PSNR per frame, clipped to [0, 1], averaged over {config.evaluate.validation_videos:,} videos of validation "
        f"digits; a black frame has {black:.1f}. Decoders are trained on the frozen predictions, "
        f"{config.evaluate.decoder_steps:,} steps. z* is inferred from the target frames that the prediction is "
        "compared with. The paper shows its figure 3 without numbers: without a latent the five futures superpose.",
    ]
    return "\n".join(["# Figure 3: decoded futures without and with a latent", "", *lines, "", *notes]) + "\n"
