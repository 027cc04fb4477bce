"""The figures, drawn with matplotlib's object interface, which needs no display and changes no global state."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.reference import cumulative_spectrum

Points = Sequence[tuple[int, float]]  # (step, value)

# What learning curves show: the name in metrics.jsonl, and its title.
CURVES = {
    "hidden": "hidden term D(h_y)",
    "pixel": "pixel term D(y)",
    "variance": "variance hinge",
    "covariance": "covariance penalty",
    "sigreg": "SIGReg",
    "validation_loss": "validation energy, of each its own",
    "speed_mse": "speed MSE, training data",
    "rank_me": "RankMe of h_x, a batch",
    "zeros": "fraction of zeros in z*",
    "latent_weight": "L1 weight",
}


def require_matplotlib() -> Any:
    """Returns matplotlib's Figure. Raises ImportError, naming the extra to install, if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'vjvcr_fast[train]'") from None
    return Figure


def clips(path: Path, x: Tensor, y: Tensor, predictions: Mapping[str, Tensor]) -> None:
    """Like the paper's figure 5: for each clip its input and target frames, and below them each model's future.

    x: (clips, T_x, C, S, S). y and every prediction: (clips, T_y, C, S, S). All in [0, 1], C is 1 or 3.
    """
    lines = {"input | target": torch.cat([x, y], dim=1)}
    lines |= {title: torch.cat([torch.ones_like(x), video], dim=1) for title, video in predictions.items()}
    frames_in, frames = x.shape[1], x.shape[1] + y.shape[1]
    with _films(path, lines, 1) as (axis,):
        for t in range(frames):
            name, place = f"{'x' if t < frames_in else 'y'} {t + 1}", (t + 0.5) / frames
            axis.text(place, 1.1, name, transform=axis.transAxes, ha="center", fontsize=7)


def futures(path: Path, y: Tensor, predictions: Mapping[str, Tensor], titles: Sequence[str]) -> None:
    """Like the paper's figure 3: for each clip the target frames, and below them each model's decoded future.

    Every future is drawn twice: alone, and with the target over it in green. There, white is where both are, green
    where only the target is. y and every prediction: (clips, T_y, 1, S, S), in [0, 1]. titles: of the clips, which lie
    side by side. If there are more clips than titles, the others follow below.
    """
    lines = {"target": y}
    for title, video in predictions.items():
        lines |= {title: video, f"{title}, overlay": _overlay(video, y)}
    with _films(path, lines, len(titles)) as axes:
        for axis, name in zip(axes, titles, strict=True):
            axis.set_title(name, fontsize=8)


def curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Learning curves: a panel for each quantity that any run logged, a line for each run.

    runs: {title: the lines of its metrics.jsonl}.
    """
    present = [n for n in CURVES if any(row.get(n) for rows in runs.values() for row in rows)]
    with _panels(path, (3.2 * len(present), 2.8), len(present)) as axes:
        for axis, name in zip(axes[0], present, strict=True):
            for color, (title, rows) in enumerate(runs.items()):  # a run has the same colour in every panel
                points = [(row["step"], row[name]) for row in rows if row.get(name)]
                if points:
                    axis.plot(*zip(*points, strict=True), f"C{color}", label=title, linewidth=1.2)
            axis.set(xlabel="step", yscale="log")
            axis.set_title(CURVES[name], fontsize=9)
            axis.legend(fontsize=6)


def lines(path: Path | BytesIO, title: str, series: Mapping[str, Points], levels: Mapping[str, float]) -> None:
    """One panel of a run's curves. series: {label: points}. levels: {label: height} of dashed lines.

    The vertical axis is logarithmic if all values are positive and span more than a factor of ten.
    """
    with _panels(path, (3.9, 2.7), 1) as ((axis,),):
        for label, points in series.items():
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker="." if len(points) < 3 else None)
        for i, (label, height) in enumerate(levels.items()):
            axis.axhline(height, color="0.5", linewidth=0.9, linestyle=("--", ":")[i % 2], label=label)
        values = [value for points in series.values() for _, value in points]
        if min(values) > 0 and max(values) > 10 * min(values):
            axis.set(yscale="log")
        axis.set(xlabel="step")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        if len(series) + len(levels) > 1:
            axis.legend(fontsize=7)


def film(path: Path | BytesIO, videos: Sequence[Tensor], milliseconds: int) -> None:
    """An animation without end: clips side by side, and below each the same clip of the next tensor.

    path: GIF by its name, else WebP. That has losses, so colours may be slightly off, but is far smaller. videos: each
    (clips, T, C, S, S) in [0, 1]. A pixel of the file is one of the video. milliseconds: how long a frame is shown.
    """
    from PIL import Image

    rows = [_strips(video.transpose(0, 1).expand(-1, -1, 3, -1, -1)) for video in videos]  # each (T, S, width, 3)
    below = [torch.nn.functional.pad(row, (0, 0, 0, 0, 1, 0), value=1.0) for row in rows[1:]]  # a white line between
    frames = torch.cat([rows[0], *below], dim=1).mul(255).round().byte().cpu().numpy()
    first, *others = map(Image.fromarray, frames)
    buffer = BytesIO()
    kind = "gif" if isinstance(path, Path) and path.suffix == ".gif" else "webp"
    first.save(buffer, kind, save_all=True, append_images=others, duration=milliseconds, loop=0, quality=75)
    _write(path, buffer.getvalue())


def spectrum(path: Path | BytesIO, singular_values: Mapping[str, Sequence[float]]) -> None:
    """Like the paper's figure 4: singular values (log axis), and their cumulative sum over their total.

    A dashed straight line shows the cumulative sum without any collapse.
    """
    with _panels(path, (7.5, 3.0), 2) as ((left, right),):
        for title, values in singular_values.items():
            indices = range(1, len(values) + 1)
            left.plot(indices, values, label=title)
            right.plot(indices, cumulative_spectrum(torch.tensor(values)).tolist(), label=title)
        count = max(len(values) for values in singular_values.values())
        right.plot([0, count], [0, 1], "k--", linewidth=0.8, label="no collapse")
        left.set(yscale="log", xlabel="index", title="singular values of encoder outputs")
        right.set(xlabel="index", title="cumulative sum / total")
        right.legend(fontsize=7)


def bars(path: Path, values: Mapping[str, tuple[Sequence[float], float]], label: str) -> None:
    """Like the paper's figure 2: our mean, with the standard deviation over seeds, beside the paper's number.

    values: {title: (our values, one per seed; the paper's number)}. label: of the y axis.
    """
    with _panels(path, (1.7 * len(values) + 1.2, 3.0), 1) as ((axis,),):
        for i, (ours, theirs) in enumerate(values.values()):
            mean, std = statistics.mean(ours), statistics.stdev(ours) if len(ours) > 1 else None
            drawn = axis.bar(i - 0.2, mean, 0.38, yerr=std, color="C0", capsize=3, label=None if i else "ours")
            axis.bar_label(drawn, fmt="%.1f", fontsize=7)
            drawn = axis.bar(i + 0.2, theirs, 0.38, color="0.7", label=None if i else "paper's, on CATER")
            axis.bar_label(drawn, fmt="%.1f", fontsize=7)
        axis.set_xticks(range(len(values)), [*values], fontsize=8)
        axis.set(ylabel=label)
        axis.margins(y=0.15)
        axis.legend(fontsize=7)


def probes(path: Path, models: Mapping[str, Sequence[Mapping[str, Any]]], mean: float) -> None:
    """The speed probes' validation MSE against their epochs: a panel for each protocol, a line for each model.

    models: {title: evaluations, one per seed}. Lines are means over seeds, bands reach from the least to the most.
    mean: the MSE of predicting the mean, a dashed line. Least squares has no epochs, and its lines are flat.
    """
    protocols = {
        "Adam, features as they are": "speed_mse_by_epoch",
        "Adam, features standardised": "speed_mse_standardised_by_epoch",
        "least squares": "speed_mse_least_squares",
    }
    with _panels(path, (3.4 * len(protocols), 3.1), len(protocols), sharey=True) as (axes,):
        for axis, (title, key) in zip(axes, protocols.items(), strict=True):
            for i, (model, found) in enumerate(models.items()):
                x = range(1, len(found[0]["speed_mse_by_epoch"]) + 1)
                curves = [e[key] if isinstance(e[key], list) else [e[key]] * len(x) for e in found]
                by_epoch = [*zip(*curves, strict=True)]
                axis.plot(x, [statistics.mean(values) for values in by_epoch], f"C{i}", label=model, linewidth=1.2)
                least, most = ([function(values) for values in by_epoch] for function in (min, max))
                axis.fill_between(x, least, most, color=f"C{i}", alpha=0.15)
            axis.axhline(mean, color="0.5", linewidth=0.8, linestyle="--", label="predicting the mean")
            axis.set(xlabel="epochs of the probe", yscale="log")
            axis.set_title(title, fontsize=9)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("speed MSE, validation")
        axes[-1].legend(fontsize=6)


def settings(path: Path, columns: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A panel for each quantity and in it a line for each setting: a dot for each seed, a bar at their mean.

    columns: {quantity: {setting: values, one per seed}}.
    """
    lines = max(len(values) for values in columns.values())
    with _panels(path, (2.2 + 2.4 * len(columns), 0.9 + 0.26 * lines), len(columns)) as (axes,):
        for axis, (name, values) in zip(axes, columns.items(), strict=True):
            for line, found in enumerate(values.values()):
                axis.plot(found, [line] * len(found), "o", color="C0", markersize=3.5, alpha=0.7)
                if found:
                    axis.plot([statistics.mean(found)], [line], "|", color="C3", markersize=11)
            axis.set_yticks(range(len(values)), [*values] if axis is axes[0] else [], fontsize=7)
            axis.set_ylim(len(values) - 0.5, -0.5)
            axis.grid(axis="x", linewidth=0.4)
            axis.tick_params(axis="x", labelsize=7)
            axis.set_title(name, fontsize=8)


@contextmanager
def _panels(
    path: Path | BytesIO, size: tuple[float, float], columns: int, rows: int = 1, **options: Any
) -> Iterator[Any]:
    """Axes (rows, columns) of a new figure, which is written to `path` at the end, or into a buffer as WebP. size:
    in inches."""
    figure = require_matplotlib()(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **options)
    buffer = BytesIO()
    how: dict[str, Any] = {"format": "webp", "pil_kwargs": {"lossless": True}}
    figure.savefig(buffer, dpi=130, **({"format": path.suffix.lstrip(".")} if isinstance(path, Path) else how))
    _write(path, buffer.getvalue())


def _write(path: Path | BytesIO, content: bytes) -> None:
    if isinstance(path, Path):
        write_atomic(path, content)
    else:
        path.write(content)


@contextmanager
def _films(path: Path, lines: Mapping[str, Tensor], columns: int) -> Iterator[Any]:
    """Draws clips as blocks of lines, `columns` blocks side by side; yields the axes of the first row, for titles.

    lines: {title: a video of each clip, (clips, T, 1 or 3, S, S) in [0, 1]}.
    """
    clips, frames = next(iter(lines.values())).shape[:2]
    rows = -(-clips // columns) * len(lines)
    with _panels(path, (0.5 * frames * columns + 1.5, 0.52 * rows + 0.3), columns, rows) as axes:
        for axis in axes.flat:
            axis.set_axis_off()
            axis.set_anchor("E")  # leaves the space for the titles on the left
        for line, (title, videos) in enumerate(lines.items()):
            for clip, image in enumerate(_strips(videos.expand(-1, -1, 3, -1, -1))):
                axis = axes[clip // columns * len(lines) + line][clip % columns]
                axis.imshow(image.cpu().numpy(), interpolation="nearest")
                if clip % columns == 0:
                    beside = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
                    axis.annotate(title, (0, 0.5), xycoords="axes fraction", fontsize=7, **beside)
        yield axes[0]


def _overlay(video: Tensor, target: Tensor) -> Tensor:
    """(clips, T, 1, S, S) both -> (clips, T, 3, S, S): the video in grey, what it lacks of the target in green."""
    return torch.cat([video, torch.maximum(video, target), video], dim=2)


def _strips(videos: Tensor) -> Tensor:
    """(clips, T, 3, S, S) -> (clips, S, T (S + 1) - 1, 3): frames side by side, a white line between them."""
    padded = torch.nn.functional.pad(videos, (0, 1), value=1.0)
    return padded.permute(0, 3, 1, 4, 2).flatten(2, 3)[:, :, :-1]
