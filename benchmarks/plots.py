"""The figures of docs/benchmarks.md and docs/math.md, which `python benchmarks/report.py` draws from results/."""

import json
from pathlib import Path

from matplotlib.figure import Figure

LEAST_INTENSITY = 1.0  # flops a byte


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
    _save(figure, out)


def roofline(file: Path, out: Path) -> None:
    """Draws how much of the unavoidable work each provider did a second, against flops a byte of that work, under what
    this machine's copies and products allow. A point is a shape. Shapes with next to no work are left out."""
    results = json.loads(file.read_text())
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    rows = [row for row in results["rows"] if row.get("flop_per_byte", 0.0) >= LEAST_INTENSITY]
    styles = {"ours": "o", "compiled smaller form": "s", "eager reference": "x"}
    for provider, style in styles.items():
        points = [(row["flop_per_byte"], 1e3 * row["tflop_per_s"]) for row in rows if row["provider"] == provider]
        if points:
            axis.plot(*zip(*points, strict=True), style, markersize=5, label=provider)
    copy, products = results["copy_gb_per_s"], results["product_tflop_per_s"]
    most = 1e3 * products["fp32"]
    ends = [min(row["flop_per_byte"] for row in rows), most / copy, max(row["flop_per_byte"] for row in rows)]
    axis.plot(ends, [min(most, copy * x) for x in ends], "k-", linewidth=1, label="copies and products of this machine")
    if "torch.mm" in products:
        axis.axhline(1e3 * products["torch.mm"], color="k", linestyle=":", linewidth=1, label="torch.mm")
    axis.set(xscale="log", yscale="log", xlabel="unavoidable flops a byte", ylabel="unavoidable GFLOP/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, out)


def ratios(file: Path, out: Path) -> None:
    """Draws how many times as fast as plain PyTorch ours is, against the size of h. A point is a shape of the grid."""
    rows = json.loads(file.read_text())["rows"]
    figure = Figure(figsize=(12, 4), layout="constrained")
    titles = {"x plain": "times as fast as the best plain PyTorch", "x eager": "times as fast as the eager reference"}
    for axis, (key, title) in zip(figure.subplots(1, 2, sharex=True), titles.items(), strict=True):
        for form, style in (("N < d: Gram form", "o"), ("N >= d: covariance form", "s")):
            points = []
            for row in rows:
                n, t, d = map(int, row["N, T, d"].split(", "))
                if (n < d) == form.startswith("N < d"):
                    points.append((n * t * d, row[key]))
            axis.plot(*zip(*points, strict=True), style, markersize=5, label=form)
        axis.axhline(1.0, color="k", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="N T d", ylabel=title)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    _save(figure, out)


def gain(file: Path, n: int, out: Path) -> None:
    """Draws the README's picture: time and peak memory against d for batches of n, ours and plain PyTorch. Of shapes
    with the same d it shows the one with the most time steps."""
    shapes: dict[int, tuple[int, dict[str, dict[str, float]]]] = {}
    rows = [row for row in json.loads(file.read_text())["rows"] if "+" not in row.get("N, T, d", "+")]
    for row in rows:
        batch, steps, d = map(int, row["N, T, d"].split(", "))
        if batch == n and steps >= shapes.get(d, (0,))[0]:
            shown = shapes[d][1] if d in shapes and shapes[d][0] == steps else {}
            shapes[d] = (steps, shown | {row["provider"]: row})
    lines = {"eager reference": "plain PyTorch", "compiled smaller form": "smaller products, compiled"}
    lines["ours"] = "vjvcr_fast"
    titles = {"x eager": "times as fast as plain PyTorch", "copies": "peak memory, in copies of h"}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for provider, label in lines.items():
            points = [(d, found[provider][key]) for d, (_, found) in sorted(shapes.items())]
            axis.plot(*zip(*points, strict=True), "-o", markersize=4, linewidth=2, label=label)
        axis.set(yscale="log", xlabel=f"features d  (batches of {n})", title=title)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    figure.axes[1].legend(fontsize=9)
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
