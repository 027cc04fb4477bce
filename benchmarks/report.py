"""Writes the measured tables into README.md and docs/, and draws the figures of docs/benchmarks.md:

    python benchmarks/report.py

What lies between `<!-- NAME -->` and `<!-- /NAME -->` in a page is made here from a committed file: change the file or
the columns below, not the page. A test fails where page and file differ.
"""

import json
import re
from collections.abc import Callable, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "results"

Row = dict[str, Any]
Cell = Callable[[Row], str]
Column = tuple[str, Cell]  # (title, makes the cell of a row)
Part = Callable[[Path], str]  # makes a part of a page, given the page's folder


# -- Rows to Markdown -----------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(*keys: Any, form: str = "{}") -> Cell:
    """The cell row[keys[0]][keys[1]]... in the form of str.format; empty if the row has no such value, or None."""

    def cell(row: Any) -> str:
        for key in keys:
            row = row.get(key)
            if row is None:
                return ""
        return form.format(row)

    return cell


def pivot(rows: Sequence[Row], column: str, *keys: str) -> list[Row]:
    """Joins the rows that agree in `keys`: {key: value, ..., row[column]: row, ...} for each combination of values."""
    joined: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        same = {key: row[key] for key in keys}
        joined.setdefault(tuple(same.values()), same)[row[column]] = row
    return list(joined.values())


# -- Benchmarks -----------------------------------------------------------------------------------------------------


def benchmark(name: str, columns: Sequence[Column], select: Callable[[list[Row]], list[Row]] = list) -> Part:
    """The table of benchmarks/results/{name}-cpu.json, and a line with the machine, commit, command and file."""

    def make(folder: Path) -> str:
        file = RESULTS / f"{name}-cpu.json"
        if not file.exists():
            return f"Not measured yet: `pytest benchmarks/bench_{name}.py --full`."
        results = json.loads(file.read_text())
        machine = f"{results['processor']}, {results['threads']} threads, torch {results['torch']}"
        made = f"commit {results['commit'][:10]}: `{results['command']}`, [{file.name}]({relpath(file, folder)})"
        return f"{table(select(results['rows']), columns)}\n\nOne run on {machine}, {made}."

    return make


SHAPE = ("(N, T, d)", show("N, T, d", form="({})"))


def by_shape(key: str) -> Callable[[list[Row]], list[Row]]:
    """Makes a row {provider: row} for each shape that has `key`. "compiled" is the compiled reference's time over ours,
    if it was timed."""

    def select(rows: list[Row]) -> list[Row]:
        shapes = pivot([row for row in rows if key in row], "provider", key)
        for shape in shapes:
            compiled = shape["compiled reference"].get("median_ms")
            shape["compiled"] = compiled and compiled / shape["ours"]["median_ms"]
        return sorted(shapes, key=lambda shape: -shape["ours"]["x eager"])

    return select


of_vcr, of_vicreg = by_shape("N, T, d"), by_shape("N, d")


RATIOS = [
    ("vs reference, eager", show("ours", "x eager", form="{:.1f}x")),
    ("vs reference, compiled", show("compiled", form="{:.1f}x")),
    ("vs best plain PyTorch", show("ours", "x plain", form="{:.1f}x")),
]
MEMORY = ("peak extra memory", show("ours", "copies", form="{:.1f} copies of h"))
LOSSES = [
    SHAPE,
    *RATIOS,
    ("compiled, vs best plain", show("ours compiled", "x plain", form="{:.1f}x")),
    ("of product", show("ours", "of product", form="{:.0%}")),
    MEMORY,
    ("goals", show("ours", "target")),
]
SIGREG = [
    SHAPE,
    *RATIOS[:2],
    ("drawing directions, vs eager", show("ours, drawing", "x eager", form="{:.1f}x")),
    ("in torch, vs eager", show("in torch", "x eager", form="{:.1f}x")),
    ("peak extra memory, reference", show("eager reference", "copies", form="{:.0f} copies of h")),
    ("ours", show("ours", "copies", form="{:.1f}")),
    ("goals", show("ours", "target")),
]
VICREG = [("(N, d)", show("N, d", form="({})")), *LOSSES[1:]]


def smallest(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row["x plain"])[:10]


GRID = [
    SHAPE,
    ("vs best plain PyTorch", show("x plain", form="{:.2f}x")),
    ("which is", show("fastest")),
    ("vs reference, eager", show("x eager", form="{:.1f}x")),
    ("ours", lambda row: f"{1e3 * row['ours, ms']:,.0f} us"),
]
GRID_FIGURE = DOCS / "losses-grid-cpu.png"


def grid(folder: Path) -> str:
    text = benchmark("losses_grid", GRID, smallest)(folder)
    title = "How many times as fast as plain PyTorch ours is, for every shape of the grid"
    return f"{text}\n\n![{title}]({relpath(GRID_FIGURE, folder)})" if GRID_FIGURE.exists() else text


TRAINING = [
    *((title, show(title)) for title in ("preset", "latent", "provider")),
    ("vs reference", show("x reference", form="{:.2f}x")),
    ("vs compiled reference", show("x compiled reference", form="{:.2f}x")),
    ("spread", lambda row: f"{row['iqr_ms'] / row['median_ms']:.0%}"),
    ("peak memory", show("peak MB", form="{:.0f} MB")),
    ("energy of z*", show("energy of z*", form="{:+.1%}")),
    ("goal", show("target")),
]
STEP = ("data", "z*", "encoder", "predictor", "VCR", "backward and rest", "optimizer")
PARTS = [("preset", show("preset")), ("latent", show("latent")), *((name, show(name, form="{:.1%}")) for name in STEP)]
LATENTS = [
    ("hidden, T_y x d", show("hidden, T_y x d")),
    ("provider", show("provider")),
    ("vs the first of its shape", show("x eager", form="{:.2f}x")),
    ("vs G and r", show("x G and r", form="{:.2f}x")),
    ("of product", show("of product", form="{:.0%}")),
    ("peak memory", show("peak_mb", form="{:.1f} MB")),
]
DECODE = [
    ("what", show("what")),
    ("vs the library called directly", show("x directly", form="{:.2f}x")),
    ("vs decoding on all cores", show("x stream", form="{:.0f}x")),
]
BUSY = [
    ("process", show("how")),
    ("threads", show("threads")),
    ("quiet, of one thread", show(0, "x one thread", form="{:.2f}")),
    *((f"beside {n}", show(n, "x quiet", form="{:.1f}x")) for n in range(4)),
]


def megabytes(route: str) -> Cell:
    """What a process received by that route, in bold if `auto` takes it."""

    def cell(row: Row) -> str:
        bold = "**" if row.get(route, {}).get("auto") else ""
        return f"{bold}{show(route, 'MB each', form='{:.3g}')(row)}{bold}"

    return cell


DISTRIBUTED = [
    SHAPE,
    ("processes", show("processes")),
    ("gathering", megabytes("gather")),
    *((route, megabytes(route)) for route in ("time", "features", "covariance")),
]


# -- The paper's tables ---------------------------------------------------------------------------------------------


def paper(name: str, made: bool = False) -> Part:
    """docs/results/{name}.md without its title; `made` adds a line with the machine and the commit."""

    def make(folder: Path) -> str:
        text = (DOCS / f"{name}.md").read_text().split("\n", 2)[2].strip()
        if not made:
            return text
        file = DOCS / f"{name}.json"
        machine = json.loads(file.read_text())["machine"]
        where = f"{machine['name']}, torch {machine['torch']}, commit {machine['commit']}"
        return f"{text}\nMade on {where}: [{file.name}]({relpath(file, folder)})."

    return make


def columns_of(name: str, *titles: str) -> Part:
    """Some columns of the table in docs/results/{name}.md, without its notes."""

    def make(folder: Path) -> str:
        lines = [line for line in (DOCS / f"{name}.md").read_text().splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
        kept = [[row[rows[0].index(title)] for title in titles] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in kept)

    return make


# -- Pages ----------------------------------------------------------------------------------------------------------

PAGES: dict[Path, dict[str, Part]] = {
    ROOT / "README.md": {
        "table1": columns_of(
            "table1-moving-mnist-mini", "model", "D(h_y)", "D(y)", "VCR", "speed MSE", "paper's", "PSNR", "paper's PSNR"
        ),
    },
    ROOT / "docs" / "videos.md": {
        "table1-clevrer": paper("table1-clevrer-mini"),
        "study-clevrer": paper("study-clevrer-small", made=True),
        "study-clevrer-longer": paper("study-clevrer-longer", made=True),
        "figure2": paper("figure2-cater-small", made=True),
        "figure4": paper("figure4-cater-small"),
        "ceiling": paper("ceiling-cater-small", made=True),
    },
    ROOT / "docs" / "guides" / "several-gpus.md": {
        "distributed": benchmark("distributed", DISTRIBUTED, lambda r: pivot(r, "route", "N, T, d", "processes")),
    },
    ROOT / "docs" / "reproducing.md": {
        "table1": paper("table1-moving-mnist-mini", made=True),
        "table1-20000": paper("table1-20000-moving-mnist-mini", made=True),
        "table1-small": paper("table1-moving-mnist-small", made=True),
        "table1-long": paper("table1-long-moving-mnist-mini", made=True),
        "table2": paper("table2-moving-mnist-stochastic-mini", made=True),
        "table2-small": paper("table2-moving-mnist-stochastic-small", made=True),
        "study-discrete": paper("study-discrete-moving-mnist-stochastic-mini", made=True),
        "study-regime": paper("study-regime-moving-mnist-mini", made=True),
    },
    ROOT / "docs" / "studies.md": {
        "study": paper("study-moving-mnist-mini", made=True),
        "study-kernel": paper("study-kernel-moving-mnist-small", made=True),
        "study-decoder": paper("study-decoder-moving-mnist-mini", made=True),
        "study-kernel-latent": paper("study-kernel-latent-moving-mnist-stochastic-small", made=True),
        "study-sigreg": paper("study-sigreg-moving-mnist-mini", made=True),
        "table2-newton": paper("table2-newton-moving-mnist-stochastic-mini", made=True),
        "row-sigreg": paper("study-sigreg-table1-moving-mnist-mini", made=True),
    },
    ROOT / "docs" / "benchmarks.md": {
        "losses": benchmark("losses", LOSSES, of_vcr),
        "vicreg": benchmark("losses", VICREG, of_vicreg),
        "sigreg": benchmark("sigreg", SIGREG, of_vcr),
        "grid": grid,
        "training": benchmark("training", TRAINING, lambda rows: [r for r in rows if "ours" in r["provider"]]),
        "parts": benchmark("training", PARTS, lambda rows: [r for r in rows if r["provider"] == "parts"]),
        "latents": benchmark("latents", LATENTS, lambda rows: [r for r in rows if "heads" not in r["hidden, T_y x d"]]),
        "decode": benchmark("decode", DECODE, lambda rows: [r for r in rows if r["what"].endswith(("ours", "cache"))]),
        "busy": benchmark("busy", BUSY, lambda rows: pivot(rows, "busy", "how", "threads")),
    },
}


def rendered(text: str, page: Path) -> str:
    """The page's text with all its parts made anew. Raises ValueError if the markers of one are missing."""
    for name, part in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page.name}: no '<!-- {name} -->' ... '<!-- /{name} -->'")
        made = f"\n{part(page.parent)}\n\n"
        text = pattern.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text


# -- The page beside a GPU's file -----------------------------------------------------------------------------------


def gpu_report(results: Row) -> str:
    """The results of bench_losses_cuda.py: goals, times, and where compiled plain code is faster than ours."""
    rows, precision = results["rows"], ("precision", show("precision"))
    names = sorted(dict.fromkeys(row["provider"] for row in rows), key=lambda name: name.startswith("ours"))
    times = [SHAPE, precision, *((name, show(name, "us", form="{:,.1f} us")) for name in names)]
    times += [("ours / floor", show("ours", "over floor", form="{:.1f}x"))]
    times += [("ours: copies of h", show("ours", "copies", form="{:.3g}"))]
    met = {None: "not measured", True: "yes", False: "no"}
    goals = [("target", show("target")), ("wanted", show("wanted")), ("got", show("got", form="{:g}"))]
    goals += [("met", lambda row: met[row["met"]])]
    slower = [row for row in rows if row["provider"] == "ours" and row.get("x compiled", 1.0) < 1.0]
    noted = [row for row in rows if "note" in row]
    return f"""# Losses on {results["device"]}{" (a part)" if results.get("partial") else ""}

Forward and backward, medians of CUDA-graph replays, inputs out of the cache. fp32: precision "highest"; tf32: float32
with TF32 products. Copies of h: peak memory beyond the input, the gradient included. Floor: two reads of h and one
write at the bandwidth of a copy within the GPU's memory, {results.get("copy_gb_per_s")} GB/s. Products, TFLOP/s:
{results.get("product_tflop_per_s")}. torch {results["torch"]}, Triton {results["triton"]}, commit {results["commit"]}\
{" with changes" if results["dirty"] else ""}, {results["date"]}.

## Targets

{table(results["targets"], goals)}

## Times

{table(pivot(rows, "provider", "N, T, d", "precision"), times)}

## Compiled plain code is faster

{table(slower, [SHAPE, precision, ("ours against it", show("x compiled", form="{:.2f}x"))])}

## Notes

{table(noted, [SHAPE, precision, ("provider", show("provider")), ("note", show("note"))])}
"""


if __name__ == "__main__":
    import plots  # here, since checking the pages needs no matplotlib

    errors = {"relative error, loss": "loss error", "relative error, gradient": "gradient error"}
    plots.sweeps(RESULTS / "accuracy-cpu.json", errors, DOCS / "accuracy.png")
    growth = {"times as fast as the reference": "x reference", "peak memory, copies of h": "copies", "error": "error"}
    plots.sweeps(RESULTS / "scaling-cpu.json", growth, DOCS / "scaling-cpu.png")
    plots.gain(RESULTS / "losses-cpu.json", 256, DOCS / "gain-cpu.png")
    plots.roofline(RESULTS / "losses-cpu.json", DOCS / "roofline-cpu.png")
    if (RESULTS / "losses_grid-cpu.json").exists():
        plots.ratios(RESULTS / "losses_grid-cpu.json", GRID_FIGURE)
    for page in PAGES:  # after the figures, which they show where they are there
        page.write_text(rendered(page.read_text(), page))
