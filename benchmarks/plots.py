"""The figures of docs/benchmarks.md and docs/math.md, which `python benchmarks/report.py` draws from results/."""

import json
from pathlib import Path

from matplotlib.figure import Figure


def sweeps(file: Path, quantities: dict[str, str], out: Path) -> None:
    """Draws what a benchmark measured as d, N and T grow: a column of panels for each of the three, a row for each of
    the quantities (label -> key), a line for each provider. All axes are logarithmic."""
    rows = json.loads(file.read_text())["rows"]
    figure = Figure(figsize=(12, 1.5 + 2.5 * len(quantities)), layout="constrained")
    axes = figure.subplots(len(quantities), 3, sharex="col", sharey="row")
    for column, size in zip(axes.T, ("d", "N", "T"), strict=True):
        swept = sorted((row for row in rows if row["sweep"] == size), key=lambda row: row[size])
        for axis, key in zip(column, quantities.values(), strict=True):
            for provider in dict.fromkeys(row["provider"] for row in rows):
                points = [(row[size], row[key]) for row in swept if row["provider"] == provider]
                width = 3 if provider == "ours" else 1  # it lies under one of its forms
                axis.plot(*zip(*points, strict=True), "-o", markersize=3, linewidth=width, label=provider)
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        fixed = ", ".join(f"{other} = {swept[0][other]}" for other in "NTd" if other != size)
        column[-1].set_xlabel(f"{size}  ({fixed})")
    for axis, label in zip(axes[:, 0], quantities, strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
