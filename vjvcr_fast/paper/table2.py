"""Table 2 and figure 3: stochastic MovingMNIST, with each of the latents of `config.LATENTS`.

The probes, from z* to the direction and to the digit, are in latent_probes.py. `table2` and `figure3` use the same
runs: they train what is missing and write our numbers beside the paper's.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from vjvcr_fast.config import LATENTS, Config, ConfigError, latent
from vjvcr_fast.data.moving_mnist import DIRECTIONS, MovingMNIST, Videos
from vjvcr_fast.evaluation.evaluate import frame_errors
from vjvcr_fast.evaluation.latent_probes import evaluate_latents
from vjvcr_fast.paper import figures, pages
from vjvcr_fast.paper.jobs import Evaluation, Results, Table, finish_rows
from vjvcr_fast.paper.store import Store
from vjvcr_fast.training.step import split_frames

TABLE2 = Evaluation(evaluate_latents, "latents.json")
TABLE2_FILES = ("table2.md", "table2.json", "latent-curves.png")
FIGURE3_FILES = ("figure3.md", "figure3.json", "figure3.png", "futures.gif")
# The latent of futures.gif, pixels of a clip there, and how long it shows a frame.
ANIMATED, WIDTH, MILLISECONDS = "sparse-high", 96, 350
CLIPS = 2  # per direction, in figure 3

# The paper's Table 2: accuracy of z* -> direction and of z* -> digit.
MEASURED = ("direction_accuracy", "digit_accuracy")
PAPER_TABLE2 = {"discrete": (0.797, 0.114), "sparse-high": (0.947, 0.316), "sparse-low": (0.995, 0.576)}
COLUMNS = ["latent", "z* -> direction ψ", "paper's", "converged", "z* -> digit", "paper's", "converged"]
HEAD = pages.table_head([*COLUMNS, "measured zeros", "explained"])


def table2(config: Config, out: Path, seeds: Sequence[int], processes: int = 1, store: Store | None = None) -> str:
    """Makes Table 2: every latent, and a model without one for chance, for every seed. Returns it as Markdown.

    Writes to `out` a folder for each run, and TABLE2_FILES. processes: how many runs are trained at once. Runs that are
    finished, in `out` or in the store, are not run again.

    Raises ConfigError if config's videos are not stochastic; else as `finish_rows`.
    """
    table = _finished(config, out, seeds, processes, store)
    results, settings = table.results, config.evaluate
    first = results["discrete"][0]
    usage = ", ".join(f"{share:.0%}" for share in sorted(first["usage"], reverse=True))
    weights = [f"{e['weight']:.2g}" for name in ("sparse-high", "sparse-low") for e in results[name]]
    notes = [
        f"Digits: {first['data']}. Accuracies are of {settings.validation_videos:,} videos of validation digits. "
        f"Linear classifiers on z* as it is: Adam {settings.probe_lr:g}, batches of {settings.probe_batch}, "
        f"{settings.probe_epochs} epochs of {settings.probe_videos:,} videos (the paper does not state how many); "
        "converged: the same map trained to its end.",
        f"Heads of the discrete latent, seed {seeds[0]}, chosen by {usage} of the videos; heads out of use "
        f"{'are revived' if config.latent.revive else 'are left so'}. L1 weights, "
        f"{'calibrated while training' if config.latent.calibrate else 'fixed'}: {', '.join(weights)}.",
        "Explained: the part of the variance of h_y that Pred(h_x, z*) explains.",
    ]
    lines = [*HEAD, *(_line(config, name, results[name]) for name in (*PAPER_TABLE2, "none"))]
    numbers = {name: _numbers(name, evaluations) for name, evaluations in results.items()}
    heading = "Table 2, stochastic MovingMNIST: ours beside the paper's"
    text = pages.write_table(table, "table2", heading, lines, notes, rows=numbers)
    pages.draw_curves(table, "latent-curves.png")
    return text


def figure3(config: Config, out: Path, seeds: Sequence[int], processes: int = 1, store: Store | None = None) -> str:
    """Makes figure 3 for the first seed: decoded futures of validation clips that move in all directions.

    Uses the runs of `table2` that are in `out`; it needs their weights, which the store has not. Trains a decoder on
    the frozen predictions of each, and writes FIGURE3_FILES to `out`.
    Returns the PSNR of every model as Markdown. Raises as `table2`.
    """
    table = _finished(config, out, seeds[:1], processes)
    predictions, db, seed = {}, {}, seeds[0]
    for name in LATENTS:
        run_config, videos, future = pages.futures_of(table, name)
        x, y = split_frames(one_of_each_direction(cast(MovingMNIST, videos), CLIPS), run_config)
        predictions[title(config, name)] = future(x, y)
        if name == ANIMATED:  # futures of the first clip, at the z* that explain the targets of all
            first = x[:1].expand_as(x)
            films = [torch.cat(of, dim=1) for of in ((x, y), (first, future(first, y)))]
            scale = max(1, WIDTH // x.shape[-1])
            enlarged = [film.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2) for film in films]
            figures.film(out / "futures.gif", enlarged, MILLISECONDS)
        errors = frame_errors(videos, run_config, future)
        db[name], black = errors["psnr"], errors["psnr_of_black"]
    figures.futures(out / "figure3.png", y, predictions, [f"ψ = {k} · 72°" for k in range(DIRECTIONS)])
    lines = pages.table_head(["latent", "PSNR of the decoded future, dB"])
    lines += [pages.table_row([title(config, name), f"{value:.1f}"]) for name, value in db.items()]
    notes = [
        f"{pages.about(config)}; seed {seed}.",
        f"PSNR per frame, clipped to [0, 1], averaged over {config.evaluate.validation_videos:,} videos of validation "
        f"digits; a black frame has {black:.1f}. Decoders are trained on the frozen predictions, "
        f"{config.evaluate.decoder_steps:,} steps. z* is inferred from the target frames that the prediction is "
        "compared with. The paper shows its figure 3 without numbers: without a latent the five futures superpose.",
    ]
    numbers = {"seed": seed, "psnr": db, "psnr_of_black": black}
    heading = "Figure 3: decoded futures without and with a latent"
    return pages.write_page(out, "figure3", heading, lines, notes, numbers)


def title(config: Config, name: str) -> str:
    """What tables and figures call the latent `name`, a key of LATENTS."""
    settings = latent(config, name).latent
    return {
        "none": "no latent",
        "discrete": f"discrete, one-hot of {settings.heads}",
        "sparse": f"sparse, {settings.zeros:.0%} zeros",
    }[settings.kind]


def one_of_each_direction(videos: MovingMNIST, count: int) -> Videos:
    """The first `count` videos of each direction, ordered psi_0, ..., psi_4, psi_0, ..."""
    direction = videos.batch(0, 100 * count).direction.cpu()
    of_each = [(direction == k).nonzero()[:count, 0] for k in range(DIRECTIONS)]
    return videos.batch_at(torch.stack(of_each, dim=1).flatten())


def _finished(config: Config, out: Path, seeds: Sequence[int], processes: int, store: Store | None = None) -> Table:
    if not config.data.stochastic:
        raise ConfigError("data.stochastic=False: table2 and fig3 need stochastic videos: --data.stochastic true")
    rows, line = {name: latent(config, name) for name in LATENTS}, functools.partial(_line, config)
    return finish_rows(config, out, seeds, processes, rows, TABLE2, HEAD, line, store)


def _numbers(name: str, evaluations: Results) -> dict[str, Any]:
    shared = ("data", "direction_chance", "digit_chance")
    ours = {key: [e[key] for e in evaluations] for key in evaluations[0] if key not in (*shared, "evaluate")}
    paper = dict(zip(MEASURED, PAPER_TABLE2.get(name, ()), strict=False))
    return {"paper": paper, "ours": ours, **{key: evaluations[0][key] for key in shared}}


def _line(config: Config, name: str, evaluations: Results) -> str:
    percent = functools.partial(pages.percent, evaluations)
    if name == "none":
        direction, digit = percent("direction_chance"), percent("digit_chance")
        return f"| no latent: chance | {direction} | | | {digit} | | | | {percent('explained')} |"
    cells = [title(config, name)]
    for key, theirs in zip(MEASURED, PAPER_TABLE2[name], strict=True):
        cells += [percent(key), f"{theirs:.1%}", percent(f"{key}_converged")]
    return pages.table_row([*cells, percent("zeros") if "zeros" in evaluations[0] else "", percent("explained")])
