"""The figures of docs/benchmarks.md and docs/math.md, which `python benchmarks/report.py` draws from results/."""

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure


def accuracy(paths: Sequence[Path], out: Path) -> None:
    """Relative errors of loss and gradient against N, d and T, log-log, one panel each; a column of panels a file."""
    figure = Figure(figsize=(12, 3.4 * len(paths)), layout="constrained")
    axes = figure.subplots(len(paths), 3, squeeze=False, sharey=True)
    for line, path in zip(axes, paths, strict=True):
        results = json.loads(path.read_text())
        for axis, size in zip(line, "NdT", strict=True):
            rows = [row for row in results["rows"] if row["sweep"] == size]
            for i, series in enumerate(dict.fromkeys(row["provider"] for row in rows)):
                points = [row for row in rows if row["provider"] == series]
                for what, style in (("gradient", "-o"), ("loss", "--^")):
                    x, y = [row[size] for row in points], [row[f"{what} error"] for row in points]
                    axis.plot(x, y, style, color=f"C{i}", markersize=3, linewidth=1, label=f"{series}: {what}")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(f"{size}  ({rows[0]['fixed']})")
            axis.grid(alpha=0.3)
        line[0].set_ylabel(f"relative error, {'CPU' if results['cuda'] is None else results['device']}")
        line[2].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def scaling(path: Path, out: Path) -> None:
    """Time, over ours at the smallest size, memory and error against d, N and T, log-log."""
    rows = json.loads(path.read_text())["rows"]
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(3, 3, sharex="col")
    for column, sweep in enumerate(("d", "N", "T")):
        of_sweep = [row for row in rows if row["sweep"] == sweep]
        unit = min((row for row in of_sweep if row["provider"] == "ours"), key=lambda row: row[sweep])["median_ms"]
        for i, name in enumerate(dict.fromkeys(row["provider"] for row in of_sweep)):
            points = sorted((row for row in of_sweep if row["provider"] == name), key=lambda row: row[sweep])
            x = [row[sweep] for row in points]
            lines = (
                [row["median_ms"] / unit for row in points],
                [r["copies"] for r in points],
                [r["error"] for r in points],
            )
            for axis, y in zip(axes[:, column], lines, strict=True):
                style = {"linewidth": 2.5, "alpha": 0.5} if name == "ours" else {"linewidth": 1}
                axis.plot(x, y, "-o", color=f"C{i}", markersize=3, label=name, **style)
        for axis, what in zip(
            axes[:, column], ("time, ours at the left = 1", "peak memory, copies of h", "error"), strict=True
        ):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(what)
        fixed = ", ".join(f"{size} = {of_sweep[0][size]}" for size in "NTd" if size != sweep)
        axes[2, column].set_xlabel(f"{sweep}  ({fixed})")
    axes[0, 0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def roofline(paths: Sequence[Path], out: Path) -> None:
    """What a provider reaches of the machine's product rate against the flops that a byte allows; the roof is the rate
    of a copy, then that of a product. A panel a file; work is the floor's, whatever a provider really does."""
    figure = Figure(figsize=(6 * len(paths), 4.6), layout="constrained")
    for axis, path in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths, strict=True):
        results = json.loads(path.read_text())
        rows = [row for row in results["rows"] if row.get("of product", 0) > 1e-3]  # the others are all overhead
        names = list(dict.fromkeys(row["provider"] for row in rows))
        ridge = 1e3 * results["product_tflop_per_s"]["fp32"] / results["copy_gb_per_s"]
        most = 2 * max(row["flop_per_byte"] for row in rows)
        least = min(ridge, *(row["flop_per_byte"] for row in rows)) / 2
        axis.plot([least, ridge, most], [least / ridge, 1, 1], "k-", linewidth=1, label="copy, product of this machine")
        labelled: list[tuple[float, float]] = []
        for i, name in enumerate(names):
            points = [row for row in rows if row["provider"] == name]
            x, y = [row["flop_per_byte"] for row in points], [row["of product"] for row in points]
            ours = name == "ours"
            axis.plot(x, y, "o" if ours else ".", color=f"C{i}", markersize=7 if ours else 5, label=name)
            for row in points if ours else []:
                shape = row.get("N, T, d") or row.get("hidden, T_y x d")
                at = (row["flop_per_byte"], row["of product"])
                # Of points that lie on one another the first has its label.
                if all(max(at[0] / x, x / at[0]) > 1.2 or max(at[1] / y, y / at[1]) > 1.15 for x, y in labelled):
                    labelled.append(at)
                    axis.annotate(f"({shape})", at, (5, -2), textcoords="offset points", fontsize=6)
        axis.set(xscale="log", yscale="log", xlabel="flops a byte, both of the floor", title=path.stem)
        axis.grid(alpha=0.3)
        axis.margins(x=0.12)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.axes[0].set_ylabel("share of the rate of a product, float32")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
