"""CATER: what an inferred z tells of the actions (figure 2), and the spectra of the representations (figure 4)."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.data.cater import CLASSES
from vjvcr_fast.data.files import progress, write_atomic
from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.evaluation.evaluate import Subject, measured_once
from vjvcr_fast.evaluation.metrics import mean_average_precision
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.paper import figures
from vjvcr_fast.paper.side_by_side import Evaluation, Rows, finish_rows
from vjvcr_fast.paper.table1 import about, machine, named_seeds, run_folder, runs_of, spread
from vjvcr_fast.training.build import build_model, fill_cache
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.latents import Latents
from vjvcr_fast.training.loop import DivergedError
from vjvcr_fast.training.step import actions, split_frames

FIGURE2_FILES = ("figure2.md", "figure2.json", "figure2.png")
FIGURE4_FILES = ("figure4.md", "figure4.json", "figure4.png")

COMPARED = ("vj-vcr", "generative")  # rows of Table 1
# Figure 2: mAP in per cent. Figure 4, at the end of training: singular values and the first 500's part of their sum.
PAPER_FIGURE2 = {"vj-vcr": 67.4, "generative": 53.8, "random": 39.6}
PAPER_FIGURE4 = {
    "vj-vcr": {"sigma_1": 5.8e3, "sigma_500": 85.0, "sigma_1000": 46.0, "first_500": 0.62},
    "generative": {"sigma_1": 8.5e3, "sigma_500": 47.0, "sigma_1000": 13.0, "first_500": 0.87},
}
INDICES = (1, 500, 1000)
ROWS_ARE = "encoder outputs of all frames of the validation videos, one row a video and time step, not centred"


class Codes(NamedTuple):
    """z: (n, 14 T_y) float32, inferred; given: the ground truth of the same shape; label: (n, 14) bool, the actions in
    the target frames; energy: (n,), of z; energy_given: (n,), of the ground truth."""

    z: Tensor
    given: Tensor
    label: Tensor
    energy: Tensor
    energy_given: Tensor


def figure2(config: Config, out: Path, seeds: Sequence[int], processes: int = 1) -> str:
    """Figure 2: mAP of a linear probe from z* to actions, for VJ-VCR, the generative model and random z; every seed.

    Writes to `out`: a run folder for each row and seed, and FIGURE2_FILES. What is finished is not run again.
    Returns the table as Markdown. Raises as `train` and `evaluate_actions`; ImportError without matplotlib.
    """
    results = _results(config, out, seeds, processes)
    maps = {row: [100 * e["map"] for e in results[row]] for row in COMPARED}
    maps["random"] = [100 * e["map_random"] for e in results[COMPARED[0]]]
    titles = {row: ROWS[row].title for row in COMPARED} | {"random": "random z"}
    summary = {
        "preset": config.preset,
        "config": config.to_dict(),
        "seeds": list(seeds),
        "machine": machine(config),
        "paper": PAPER_FIGURE2,
        "ours": maps,
        "runs": {row: [_without_spectra(e) for e in results[row]] for row in COMPARED},
    }
    text = _figure2_text(config, seeds, results, maps, titles)
    write_atomic(out / "figure2.json", json.dumps(summary, indent=1) + "\n")
    write_atomic(out / "figure2.md", text)
    bars = {titles[name]: (values, PAPER_FIGURE2[name]) for name, values in maps.items()}
    figures.bars(out / "figure2.png", bars, "mAP of z* -> actions, %")
    return text


def figure4(config: Config, out: Path, seeds: Sequence[int], processes: int = 1) -> str:
    """Figure 4, for the first seed: singular values of encoder outputs and their cumulative sum, at the beginning and
    at the end of training. Shares its runs with `figure2`; writes FIGURE4_FILES; returns a table as Markdown."""
    results = {row: found[0] for row, found in _results(config, out, seeds[:1], processes).items()}
    spectra = {
        f"{ROWS[row].title}, {when}": results[row][f"singular_values_{key}"]
        for row in COMPARED
        for key, when in (("start", "before training"), ("end", "after"))
    }
    figures.spectrum(out / "figure4.png", spectra)
    d, rows = config.d, results[COMPARED[0]]["spectrum_rows"]
    shown = [i for i in INDICES if i <= d] if d >= INDICES[-1] else [1, max(d // 4, 1), max(d // 2, 1)]
    head = ["encoder outputs", *(f"sigma_{i}" for i in shown), f"sum of the first {max(d // 4, 1)}"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for title, values in spectra.items():
        part = reference.cumulative_spectrum(torch.tensor(values))[max(d // 4, 1) - 1].item()
        lines.append(f"| {title} | " + " | ".join(f"{values[i - 1]:.3g}" for i in shown) + f" | {part:.0%} |")
    for row, said in PAPER_FIGURE4.items():
        numbers = ", ".join(f"{name} {value:g}" for name, value in said.items())
        lines += ["", f"The paper's {ROWS[row].title}, at the end, d = 2048: {numbers}."]
    notes = ["", f"{about(config)}; seed {seeds[0]}. Rows: {ROWS_ARE}: {rows:,} of them. No collapse: {1 / 4:.0%}."]
    text = "\n".join(["# Figure 4: spectra", "", *lines, *notes]) + "\n"
    write_atomic(out / "figure4.json", json.dumps({"paper": PAPER_FIGURE4, "ours": spectra, "rows": rows}) + "\n")
    write_atomic(out / "figure4.md", text)
    return text


def evaluate_actions(run: Path, config: Config | None = None) -> dict[str, Any]:
    """Infers z* of the run in the folder `run`, probes it and measures its spectra, once: `evaluate.measured_once`.
    Writes its actions.json. Raises: as that; DivergedError; ConfigError where the latent is not "actions"."""
    asked = config or Config.load(run / "config.json")
    if asked.latent.kind != "actions":
        raise ConfigError(f"{run}: latent.kind={asked.latent.kind}: only actions can be probed for actions")
    return measured_once(run, config, "actions.json", _measure)


ACTIONS = Evaluation(evaluate_actions, "actions.json")


def _measure(subject: Subject) -> dict[str, Any]:
    config, model = subject.config, subject.model
    train, held_out = (extract(model, videos, config) for videos in (subject.fitted, subject.held_out))
    scores = probe(train.z, train.label, held_out.z, config)
    generator = torch.Generator().manual_seed(config.train.seed)
    random = [torch.rand(codes.z.shape, generator=generator).to(codes.z) for codes in (train, held_out)]
    scores_random = probe(random[0], train.label, random[1], config)
    mean, each = mean_average_precision(scores, held_out.label)
    start = build_model(config, held_out.z.device).eval()
    spectra = {name: spectrum(of, subject.held_out, config) for name, of in (("start", start), ("end", model))}
    return {
        "row": config.model.row,
        "map": mean,
        "map_by_class": dict(zip(CLASSES, each, strict=True)),
        "map_scikit_learn": mean_average_precision(scores, held_out.label, interpolated=False)[0],
        "map_random": mean_average_precision(scores_random, held_out.label)[0],
        "map_of_the_ground_truth": _map(train.given, train.label, held_out.given, held_out.label, config),
        "share_of_positives": held_out.label.float().mean().item(),
        "energy": held_out.energy.mean().item(),
        "energy_given": held_out.energy_given.mean().item(),
        "videos": [len(train.z), len(held_out.z)],
        **{f"singular_values_{name}": [round(s, 4) for s in values.tolist()] for name, values in spectra.items()},
        "spectrum_rows": len(held_out.z) * (config.data.frames_in + config.data.frames_out),
    }


@torch.no_grad()
def extract(model: EnergyModel, videos: VideoClips | Any, config: Config) -> Codes:
    """z* of every video once, `evaluate.probe_batch` at a time, the model in evaluation mode and full precision:
    gradient descent on the hidden term, or the pixel term of a model without one. Raises DivergedError."""
    latents, size = Latents(config, model), config.evaluate.probe_batch
    columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
    training = model.training
    model.eval()
    with progress(total=len(videos), desc="z*", unit="video") as bar:
        for at in range(0, len(videos), size):
            clips = videos.batch(at, min(size, len(videos) - at))
            x, y = split_frames(clips, config)
            truth = actions(clips, config)
            assert truth is not None
            h_x, h_y = model.encoder(x), model.encode_targets(y) if model.terms.hidden else None
            energy, z = model.latent_energy(h_x, h_y, y), latents.infer(x, y).z
            assert z is not None
            found = (z, truth.flatten(1), truth.any(dim=2), energy(z), energy(truth.flatten(1)))
            for column, part in zip(columns, found, strict=True):
                column.append(part)
            bar.update(len(z))
    model.train(training)
    codes = Codes(*map(torch.cat, columns))
    if not (codes.z.isfinite().all() and codes.energy.isfinite().all()):
        raise DivergedError("the model's representations are not finite: there is nothing to probe")
    return codes


def probe(z: Tensor, label: Tensor, z_validation: Tensor, config: Config) -> Tensor:
    """Scores (n_validation, 14) of the paper's probe: linear, binary cross-entropy with logits, Adam, on z as it is."""
    settings = config.evaluate
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        linear = nn.Linear(z.shape[1], label.shape[1]).to(z.device)
        orders = [torch.randperm(len(z)) for _ in range(settings.actions_epochs)]
    optimizer = torch.optim.Adam(linear.parameters(), settings.actions_lr, fused=True)
    target = label.float()
    for order in orders:
        for index in order.to(z.device).split(settings.actions_batch):
            F.binary_cross_entropy_with_logits(linear(z[index]), target[index]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return linear(z_validation)


@torch.no_grad()
def spectrum(model: EnergyModel, videos: VideoClips | Any, config: Config) -> Tensor:
    """Singular values of the encoder's outputs for all frames of all videos, (d,) float64, from the d x d products."""
    product, size = torch.zeros(config.d, config.d, dtype=torch.float64), config.evaluate.probe_batch
    for at in range(0, len(videos), size):
        x, y = split_frames(videos.batch(at, min(size, len(videos) - at)), config)
        for h in (model.encoder(x), model.encode_targets(y)):
            rows = h.flatten(0, 1).double()
            product = product.to(rows.device) + rows.mT @ rows
    return torch.linalg.eigvalsh(product).clamp_min(0).sqrt().flip(0)


def _map(z: Tensor, label: Tensor, z_validation: Tensor, label_validation: Tensor, config: Config) -> float:
    return mean_average_precision(probe(z, label, z_validation, config), label_validation)[0]


def _results(config: Config, out: Path, seeds: Sequence[int], processes: int) -> Rows:
    """The evaluation of every run; {row: [one a seed]}. Runs that are there go on or are kept."""
    if config.latent.kind != "actions":
        raise ConfigError(f"latent.kind={config.latent.kind}: figures 2 and 4 need actions, as the preset cater has")
    figures.require_matplotlib()
    if config.data.cache != "off":
        fill_cache(config)
    head = ["| model | mAP of z* -> actions, % |", "| --- | --- |"]
    results = finish_rows(
        runs_of(config, out, COMPARED, seeds),
        ACTIONS,
        processes,
        head,
        lambda row, found: f"| {ROWS[row].title} | {spread([100 * e['map'] for e in found], 1)} |",
    )
    metrics = {row: read_metrics(run_folder(out, row, seeds[0]) / "metrics.jsonl") for row in COMPARED}
    figures.curves(out / "action-curves.png", metrics)
    return results


def _without_spectra(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if not key.startswith("singular_values")}


def _figure2_text(
    config: Config,
    seeds: Sequence[int],
    results: dict[str, list[dict[str, Any]]],
    maps: dict[str, list[float]],
    titles: dict[str, str],
) -> str:
    first = results[COMPARED[0]][0]
    lines = ["| z | mAP, % | paper's | scikit-learn's AP, % | energy of z* | of the true actions |", "|" + " --- |" * 6]
    for name, values in maps.items():
        rest = ["", "", ""]
        if name in results:
            found = results[name]
            other = spread([100 * e["map_scikit_learn"] for e in found], 1)
            rest = [other, *(f"{statistics.mean(e[key] for e in found):.2e}" for key in ("energy", "energy_given"))]
        lines.append(f"| {titles[name]} | {spread(values, 1)} | {PAPER_FIGURE2[name]:g} | " + " | ".join(rest) + " |")
    truth = spread([100 * e["map_of_the_ground_truth"] for e in results[COMPARED[0]]], 1)
    seconds = {k: sum(e[f"{k}_seconds"] for es in results.values() for e in es) for k in ("train", "evaluate")}
    settings = config.evaluate
    notes = [
        f"{about(config)}; {named_seeds(seeds)}.",
        f"Training data: {first['data']}; validation: {first['validation_data']}. Labels: the actions in the target "
        f"frames, {first['share_of_positives']:.0%} positive.",
        "mAP: VOC's, interpolated at all points, as CATER's own; mean over the classes with a positive; scikit-learn's "
        f"is not interpolated. Probe: linear, Adam {settings.actions_lr:g}, batches of {settings.actions_batch}, "
        f"{settings.actions_epochs} epochs, on z* as it is; on the true actions in the place of z* it reaches {truth}. "
        "Random z: uniform in [0, 1], where z* is sought.",
        f"{len(seeds) * len(results)} runs on {machine(config)['name']}: {seconds['train']:.0f} s of training, "
        f"{seconds['evaluate']:.0f} s of evaluation.",
    ]
    return "\n".join(["# Figure 2: actions from inferred latents", "", *lines, "", *notes]) + "\n"
