"""CATER: mAP from an inferred z to the actions (figure 2), spectra of the representations (figure 4), and the mAP that
a network reaches which is trained on the actions themselves (ceiling).

Both figures use the same runs. The probe and the spectra are in latent_probes.py, the ceiling in ceiling.py.
"""

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from vjvcr_fast import reference
from vjvcr_fast.config import Config, ConfigError, differences, override, resolve_device
from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.evaluation.ceiling import actions_ceiling, linear_ceilings
from vjvcr_fast.evaluation.latent_probes import evaluate_actions
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.models.simvp import SimVPEncoder
from vjvcr_fast.paper import figures, pages
from vjvcr_fast.paper.jobs import Evaluation, Results, Table, finish_rows, prepare
from vjvcr_fast.paper.store import Store
from vjvcr_fast.runs import load_run
from vjvcr_fast.training.build import build_data, build_model, build_videos

ACTIONS = Evaluation(evaluate_actions, "actions.json")
FIGURE2_FILES = ("figure2.md", "figure2.json", "figure2.png")
FIGURE4_FILES = ("figure4.md", "figure4.json", "figure4.png")
CEILING_FILES = ("ceiling.md", "ceiling.json")

COMPARED = ("vj-vcr", "generative")  # rows of Table 1
# Figure 2: mAP in per cent. Figure 4: singular values after training, and the share of the first 500 in their sum.
PAPER_FIGURE2 = {"vj-vcr": 67.4, "generative": 53.8, "random": 39.6}
PAPER_FIGURE4 = {
    "vj-vcr": {"sigma_1": 5.8e3, "sigma_500": 85.0, "sigma_1000": 46.0, "first_500": 0.62},
    "generative": {"sigma_1": 8.5e3, "sigma_500": 47.0, "sigma_1000": 13.0, "first_500": 0.87},
}
INDICES = (1, 500, 1000)
FRAMES = ("data.canvas", "data.frames_in", "data.frames_out", "data.stride")  # what a model must share with a ceiling
ROWS_ARE = "encoder outputs of all frames of the validation videos, one row a video and time step, not centred"


def figure2(config: Config, out: Path, seeds: Sequence[int], processes: int = 1, store: Store | None = None) -> str:
    """Makes figure 2: mAP from z* to actions, for VJ-VCR, the generative model and random z, for every seed.

    Writes to `out` a folder for each run, and FIGURE2_FILES. processes: how many runs are trained at once. Runs that
    are finished, in `out` or in the store, are not run again. Returns a table as Markdown.

    Raises ConfigError if the latent is not "actions"; else as `finish_rows`.
    """
    table = _finished(config, out, seeds, processes, store)
    results, settings = table.results, config.evaluate
    ours, first = results[COMPARED[0]], results[COMPARED[0]][0]
    maps = {row: [100 * e["map"] for e in found] for row, found in results.items()}
    maps["random"] = [100 * e["map_random"] for e in ours]
    titles = {row: ROWS[row].title for row in COMPARED} | {"random": "random z"}
    lines = pages.table_head(["z", "mAP, %", "paper's", "scikit-learn's AP, %", "energy of z*", "of the true actions"])
    for name, values in maps.items():
        rest = ["", "", ""]
        if name in results:
            energies = (statistics.mean(e[key] for e in results[name]) for key in ("energy", "energy_given"))
            rest = [pages.percent(results[name], "map_scikit_learn", ""), *(f"{energy:.2e}" for energy in energies)]
        lines.append(pages.table_row([titles[name], pages.spread(values, 1), f"{PAPER_FIGURE2[name]:g}", *rest]))
    notes = [
        f"Training data: {first['data']}; validation: {first['validation_data']}. Labels: the actions in the target "
        f"frames, {first['share_of_positives']:.0%} positive.",
        "mAP: VOC's, interpolated at all points, as CATER's own; mean over the classes with a positive; scikit-learn's "
        f"is not interpolated. Probe: linear, Adam {settings.actions_lr:g}, batches of {settings.actions_batch}, "
        f"{settings.actions_epochs} epochs, on z* as it is; on the true actions in the place of z* it reaches "
        f"{pages.percent(ours, 'map_of_the_ground_truth', '')}. Random z: uniform in [0, 1], where z* is sought.",
    ]
    runs = {
        row: [{key: value for key, value in e.items() if not key.startswith("singular_values")} for e in found]
        for row, found in results.items()
    }
    bars = {titles[name]: (values, PAPER_FIGURE2[name]) for name, values in maps.items()}
    figures.bars(out / "figure2.png", bars, "mAP of z* -> actions, %")
    numbers = {"paper": PAPER_FIGURE2, "ours": maps, "runs": runs}
    return pages.write_table(table, "figure2", "Figure 2: actions from inferred latents", lines, notes, **numbers)


def figure4(config: Config, out: Path, seeds: Sequence[int], processes: int = 1, store: Store | None = None) -> str:
    """Makes figure 4 for the first seed: singular values of the encoder's outputs, before and after training.

    Uses the runs of `figure2` and writes FIGURE4_FILES to `out`. Returns a table as Markdown. Raises as `figure2`.
    """
    table = _finished(config, out, seeds[:1], processes, store)
    spectra = {
        f"{ROWS[row].title}, {when}": found[0][f"singular_values_{key}"]
        for row, found in table.results.items()
        for key, when in (("start", "before training"), ("end", "after"))
    }
    figures.spectrum(out / "figure4.png", spectra)
    d, rows, quarter = config.d, table.results[COMPARED[0]][0]["spectrum_rows"], max(config.d // 4, 1)
    shown = INDICES if d >= INDICES[-1] else (1, quarter, max(d // 2, 1))
    lines = pages.table_head(["encoder outputs", *(f"sigma_{i}" for i in shown), f"sum of the first {quarter}"])
    for title, values in spectra.items():
        part = reference.cumulative_spectrum(torch.tensor(values))[quarter - 1].item()
        lines.append(pages.table_row([title, *(f"{values[i - 1]:.3g}" for i in shown), f"{part:.0%}"]))
    for row, said in PAPER_FIGURE4.items():
        numbers = ", ".join(f"{name} {value:g}" for name, value in said.items())
        lines += ["", f"The paper's {ROWS[row].title}, at the end, d = 2048: {numbers}."]
    notes = [f"{pages.about(config)}; seed {seeds[0]}. Rows: {ROWS_ARE}: {rows:,} of them. No collapse: {1 / 4:.0%}."]
    found = {"paper": PAPER_FIGURE4, "ours": spectra, "rows": rows}
    return pages.write_page(out, "figure4", "Figure 4: spectra", lines, notes, found, indent=None)


def ceiling(config: Config, out: Path, seeds: Sequence[int], processes: int = 1, store: Store | None = None) -> str:
    """Measures which mAP can be asked of figure 2 at these pixels and with these videos.

    A small network is trained on the actions in the target frames of half and of all training videos.
    Where `figure2` has made VJ-VCR's run of the first seed in `out`, of such frames, and with SimVP's encoder, two more
    networks are trained: one together with a new encoder of the run's sizes, and one on the run's h_y. Linear probes
    read h_y too. Writes CEILING_FILES to `out` and returns a table as Markdown. processes, store: not used; all is
    done here.

    Raises ConfigError if the latent is not "actions"; else as `prepare`.
    """
    _check(config)
    prepare(config)
    train, validation = build_data(config)
    device, run = resolve_device(config.train.device), out / f"{COMPARED[0]}-seed{seeds[0]}"
    fitted, held_out = (cast(VideoClips, build_videos(config, of, "probe", device)) for of in (train, validation))
    configs, made = [override(config, {"train.seed": seed}) for seed in seeds], _made(run, config)
    lines = pages.table_head(["what is read", "training videos", "mAP, %", "on the training videos"])
    print("\n".join(lines), flush=True)

    def measure(
        what: str, count: int, encoders: Sequence[SimVPEncoder] = (), frozen: bool = False
    ) -> list[dict[str, Any]]:
        pairs = itertools.zip_longest(configs, encoders)
        found = [actions_ceiling(of, fitted, held_out, count, encoder, frozen) for of, encoder in pairs]
        maps = (pages.percent(found, key, "") for key in ("map", "map_fitted"))
        lines.append(pages.table_row([what, f"{count:,}", *maps]))
        print(lines[-1], flush=True)
        return found

    counts = sorted({max(len(fitted) // parts, 1) for parts in (2, 1)})
    supervised = {count: measure("the frames", count) for count in counts}
    encoded, linear = {}, {}
    if made:
        trained, model = made
        if isinstance(model.encoder, SimVPEncoder):
            like = (override(trained, {"train.seed": seed}) for seed in seeds)
            news = [cast(SimVPEncoder, build_model(of, device).encoder) for of in like]
            encoded["new"] = measure("the frames, with a new encoder of the run's sizes", counts[-1], news)
            runs = [model.encoder] * len(seeds)
            encoded[run.name] = measure(f"h_y of {run.name}", counts[-1], runs, frozen=True)
        linear = linear_ceilings(model, fitted, held_out, config)
    side = config.data.canvas
    notes = [
        f"A small network is trained on the actions in each target frame of {side}x{side} pixels. Training data: "
        f"{train.source}; validation: {validation.source}; {pages.named_seeds(seeds)}.",
        *(f"A linear probe with a ridge on {name} of {run.name}: {100 * value:.1f}." for name, value in linear.items()),
    ]
    described = {"data": dataclasses.asdict(config.data) | {"root": "", "cache": ""}, "machine": pages.machine(config)}
    numbers = described | {"seeds": [*seeds], "supervised": supervised, "encoded": encoded, "linear": linear}
    return pages.write_page(out, "ceiling", "What the target frames tell about the actions", lines, notes, numbers)


def _made(run: Path, config: Config) -> tuple[Config, EnergyModel] | None:
    """A run's config and model if it is of these frames; else None, and says on stderr why."""
    if not (run / "best.pt").exists():
        print(f"h_y is not read: there is no {run / 'best.pt'}; fig2 --results off makes it", file=sys.stderr)
        return None
    device = {"train.device": config.train.device}
    trained, model = load_run(run, override(Config.load(run / "config.json"), device))
    others = [name for name in differences(trained, config) if name in FRAMES]
    if others:
        print(f"h_y is not read: {run} is a run of another {', '.join(others)}", file=sys.stderr)
    return None if others else (trained, model)


def _check(config: Config) -> None:
    if config.latent.kind != "actions":
        raise ConfigError(f"latent.kind={config.latent.kind}: figures 2 and 4 need actions: use the preset cater")


def _finished(config: Config, out: Path, seeds: Sequence[int], processes: int, store: Store | None) -> Table:
    _check(config)
    rows, head = {row: override(config, {"model.row": row}) for row in COMPARED}, ["model", "mAP of z* -> actions, %"]
    table = finish_rows(config, out, seeds, processes, rows, ACTIONS, pages.table_head(head), _line, store)
    pages.draw_curves(table, "action-curves.png")
    return table


def _line(row: str, evaluations: Results) -> str:
    return pages.table_row([ROWS[row].title, pages.percent(evaluations, "map", "")])
