"""Figures, drawn with matplotlib's object interface: no global state, no display."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.reference import cumulative_spectrum


def require_matplotlib() -> None:
    """Raises ImportError, naming the extra, where matplotlib is missing: better before hours of training than after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install 'vjvcr_fast[train]'") from None


def clips(path: Path, x: Tensor, y: Tensor, predictions: Mapping[str, Tensor]) -> None:
    """Like the paper's figure 5: for each clip the input and target frames and, below, every model's decoded future.

    x: (clips, T_x, C, S, S), y and every prediction: (clips, T_y, C, S, S), in [0, 1], C = 1 or 3.
    """
    number, frames_in, frames = len(x), x.shape[1], x.shape[1] + y.shape[1]
    lines = 1 + len(predictions)
    figure = _figure((0.6 * frames + 1.3, 0.6 * lines * number + 0.3))
    axes = figure.subplots(lines * number, frames, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for clip in range(number):
        for line, (title, video) in enumerate({"input | target": y, **predictions}.items()):
            row = axes[lines * clip + line]
            if line == 0:
                for t in range(frames_in):
                    _show(row[t], x[clip, t])
            for t in range(video.shape[1]):
                _show(row[frames_in + t], video[clip, t])
            row[0].text(-0.15, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=7)
    for t in range(frames):
        axes[0][t].set_title(f"{'x' if t < frames_in else 'y'} {t + 1}", fontsize=7)
    _save(figure, path)


def futures(path: Path, y: Tensor, predictions: Mapping[str, Tensor], titles: Sequence[str]) -> None:
    """Like the paper's figure 3: for each clip the target frames and, below, every model's decoded future, alone and
    with the target laid over it in green: white where both are, green where only the target is.

    y and every prediction: (clips, T_y, 1, S, S), in [0, 1]. titles: of the clips side by side; more clips than titles
    go on in further blocks.
    """
    strips = {"target": _strips(y.expand(-1, -1, 3, -1, -1))}
    for title, video in predictions.items():
        strips[title] = _strips(video.expand(-1, -1, 3, -1, -1))
        strips["overlay" + " " * len(strips)] = _strips(_overlay(video, y))
    columns, lines, width = len(titles), len(strips), 0.5 * y.shape[1]
    blocks = -(-len(y) // columns)
    figure = _figure((width * columns + 1.5, 0.52 * lines * blocks + 0.3))
    axes = figure.subplots(lines * blocks, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (title, images) in enumerate(strips.items()):
        for clip, image in enumerate(images):
            axis = axes[lines * (clip // columns) + line][clip % columns]
            axis.imshow(image.cpu().numpy(), interpolation="nearest")
            if clip % columns == 0:
                axis.text(-0.05, 0.5, title.strip(), transform=axis.transAxes, ha="right", va="center", fontsize=7)
    for axis, name in zip(axes[0], titles, strict=True):
        axis.set_title(name, fontsize=8)
    _save(figure, path)


def curves(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Learning curves from the metrics.jsonl rows of some runs: a panel for each quantity that any of them has."""
    names = {
        "hidden": "hidden term D(h_y)",
        "pixel": "pixel term D(y)",
        "variance": "variance hinge",
        "covariance": "covariance penalty",
        "validation_loss": "validation energy, of each its own",
        "speed_mse": "speed MSE, training data",
        "rank_me": "RankMe of h_x, a batch",
        "zeros": "fraction of zeros in z*",
        "latent_weight": "L1 weight",
    }
    present = [n for n in names if any(row.get(n) for rows in runs.values() for row in rows)]
    figure = _figure((3.2 * len(present), 2.8))
    for axis, name in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        for color, (title, rows) in enumerate(runs.items()):  # a model keeps its colour where others have no curve
            points = [(row["step"], row[name]) for row in rows if row.get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), f"C{color}", label=title, linewidth=1.2)
        axis.set(title=names[name], xlabel="step", yscale="log")
        axis.title.set_fontsize(9)
        axis.legend(fontsize=6)
    _save(figure, path)


def spectrum(path: Path, singular_values: Mapping[str, Sequence[float]]) -> None:
    """Like the paper's figure 4: singular values (log axis), and their cumulative sum over their total with the
    straight line of no collapse."""
    figure = _figure((7.5, 3.0))
    left, right = figure.subplots(1, 2)
    for title, values in singular_values.items():
        indices = range(1, len(values) + 1)
        left.plot(indices, values, label=title)
        right.plot(indices, cumulative_spectrum(torch.tensor(values)).tolist(), label=title)
    count = max(len(values) for values in singular_values.values())
    right.plot([0, count], [0, 1], "k--", linewidth=0.8, label="no collapse")
    left.set(yscale="log", xlabel="index", title="singular values of encoder outputs")
    right.set(xlabel="index", title="cumulative sum / total")
    right.legend(fontsize=7)
    _save(figure, path)


def bars(path: Path, values: Mapping[str, tuple[Sequence[float], float]], label: str) -> None:
    """Like the paper's figure 2: for each title our mean, with the standard deviation of several seeds, beside the
    paper's number. values: {title: (ours, one a seed; the paper's)}."""
    figure = _figure((1.7 * len(values) + 1.2, 3.0))
    axis = figure.subplots()
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
    _save(figure, path)


def probes(path: Path, curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], mean: float) -> None:
    """Probes' validation MSE against their epochs: a panel for each protocol, a line for each model.

    curves: {protocol: {model: for every seed the MSE after each epoch, or one number where there are no epochs}}; lines
    are means over seeds, bands the least and the most. mean: MSE of predicting the mean.
    """
    figure = _figure((3.4 * len(curves), 3.1))
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    epochs = max(len(curve) for models in curves.values() for found in models.values() for curve in found)
    for axis, (protocol, models) in zip(axes, curves.items(), strict=True):
        for i, (title, found) in enumerate(models.items()):
            repeated = [list(curve) * (epochs if len(curve) == 1 else 1) for curve in found]
            by_epoch = list(zip(*repeated, strict=True))
            x = range(1, len(by_epoch) + 1)
            axis.plot(x, [statistics.mean(values) for values in by_epoch], f"C{i}", label=title, linewidth=1.2)
            axis.fill_between(x, [min(v) for v in by_epoch], [max(v) for v in by_epoch], color=f"C{i}", alpha=0.15)
        axis.axhline(mean, color="0.5", linewidth=0.8, linestyle="--", label="predicting the mean")
        axis.set(title=protocol, xlabel="epochs of the probe", yscale="log")
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed MSE, validation")
    axes[-1].legend(fontsize=6)
    _save(figure, path)


def settings(path: Path, columns: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A panel for each quantity, a line for each setting: a dot a seed and a bar at their mean.

    columns: {quantity: {setting: values, one a seed}}.
    """
    lines = max(len(values) for values in columns.values())
    figure = _figure((2.2 + 2.4 * len(columns), 0.9 + 0.26 * lines))
    for axis, (name, values) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True):
        for line, (_, found) in enumerate(values.items()):
            axis.plot(found, [line] * len(found), "o", color="C0", markersize=3.5, alpha=0.7)
            if found:
                axis.plot([statistics.mean(found)], [line], "|", color="C3", markersize=11)
        axis.set_yticks(range(len(values)), [*values] if axis.get_subplotspec().is_first_col() else [], fontsize=7)
        axis.set_ylim(len(values) - 0.5, -0.5)
        axis.grid(axis="x", linewidth=0.4)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(name, fontsize=8)
    _save(figure, path)


def _figure(size: tuple[float, float]) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _overlay(video: Tensor, target: Tensor) -> Tensor:
    """(clips, T, 1, S, S) both -> (clips, T, 3, S, S): the video in grey, what it lacks of the target in green."""
    return torch.cat([video, torch.maximum(video, target), video], dim=2)


def _strips(videos: Tensor) -> Tensor:
    """(clips, T, 3, S, S) -> (clips, S, T (S + 1) - 1, 3): frames side by side, a white line between them."""
    padded = torch.nn.functional.pad(videos, (0, 1), value=1.0)
    return padded.permute(0, 3, 1, 4, 2).flatten(2, 3)[:, :, :-1]


def _show(axis: Any, frame: Tensor) -> None:
    """frame: (1, S, S) grey or (3, S, S) colour."""
    axis.imshow(frame.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=130)
    write_atomic(path, buffer.getvalue())
