"""Puts measured numbers into the README and the guides and draws the accuracy figure, from the files that hold them:

    python benchmarks/report.py

Each part of a page between `<!-- NAME -->` and `<!-- /NAME -->` is written here and nowhere else; a test checks
that pages and files agree.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
LOSSES = RESULTS / "losses-cpu.json"
DECODE = RESULTS / "decode-cpu.json"
DISTRIBUTED = RESULTS / "distributed-cpu.json"
LATENTS = RESULTS / "latents-cpu.json"
TRAINING = RESULTS / "training-cpu.json"
SCALING = RESULTS / "scaling-cpu.json"
DOCS = ROOT / "docs" / "results"
ACCURACY = DOCS / "accuracy.png"
SCALED = DOCS / "scaling-cpu.png"

Results = Row = dict[str, Any]


# -- The README -----------------------------------------------------------------------------------------------------


def losses() -> str:
    """Ours against the eager reference and the fastest plain PyTorch, one line a shape."""
    results = json.loads(LOSSES.read_text())
    lines = [
        "| (N, T, d) | vs reference, eager | vs reference, compiled | vs best plain PyTorch | peak extra memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_shape: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        by_shape.setdefault(row["N, T, d"], {})[row["provider"]] = row
    for shape, providers in by_shape.items():
        ours, compiled = providers["ours"], providers["compiled reference"].get("median_ms")
        against = f"{compiled / ours['median_ms']:.1f}x" if compiled else "not timed"
        copies = f"{ours['copies']:.1f} copies of h"
        lines.append(f"| ({shape}) | {ours['x eager']:.1f}x | {against} | {ours['x plain']:.1f}x | {copies} |")
    machine = f"{results['processor']}, {results['threads']} threads, torch {results['torch']}"
    return "\n".join([*lines, "", f"Forward and backward, float32, medians of one run on {machine}."])


def losses_gpu(path: Path) -> str:
    """Ours on a GPU, one line a shape and precision, and a link to the file."""
    results = json.loads(path.read_text())
    titles = ["(N, T, d)", "precision", "time", "vs two reads, one write", "vs reference, eager"]
    titles += ["vs reference, compiled", "vs Gram form, compiled", "peak extra memory"]
    lines = []
    for (shape, precision), providers in by_provider(results["rows"]).items():
        ours = providers["ours"]
        ratios = [_ratio(providers, name) for name in ("eager reference", "compiled reference", "compiled gram form")]
        copies = f"{ours['copies']:.1f} copies of h" if "copies" in ours else ""
        lines.append((f"({shape})", precision, _us(ours), _times(ours.get("over floor")), *ratios, copies))
    where = f"[{path.name}]({path.relative_to(ROOT).as_posix()})"
    return f"{_markdown(titles, lines)}\n\n{_conditions(results)} File: {where}."


def decode() -> str:
    """What the decoders, the cache and the training loop reach, in ratios."""
    results = json.loads(DECODE.read_text())
    row = {row["what"]: row for row in results["rows"]}
    lines = []
    for name in ("decord", "torchcodec"):
        ratio = f"{row[f'{name}, ours']['x directly']:.2f}x"
        lines.append(("frames of random windows", f"{name}, against the library called directly", ratio))
    cached = f"{row['clips, cache']['x stream']:,.0f}x"
    lines.append(("batches of windows", "from the cache, against decoding on all cores", cached))
    training = row["training, cache"]
    lines.append(
        ("videos/s of training", "from the cache, against decoding on the same cores", f"{training['x stream']:.1f}x")
    )
    lines.append(("share of a training step", "waiting for data from the cache", f"{training['waits']:.1%}"))
    machine = f"{results['processor']}, {results['threads']} threads"
    where = f"[{DECODE.name}]({DECODE.relative_to(ROOT).as_posix()})"
    about = f"480x320 H.264 with one keyframe, as CLEVRER's; `pytest benchmarks/bench_decode.py` on {machine}: {where}."
    return f"{_markdown(['what', 'how', 'measured'], lines)}\n\n{about}"


def distributed() -> str:
    """Bytes that each route moved, one line a shape and number of processes."""
    results = json.loads(DISTRIBUTED.read_text())
    lines: dict[tuple[str, int], dict[str, Row]] = {}
    for row in results["rows"]:
        lines.setdefault((row["N, T, d"], row["processes"]), {})[row["route"]] = row
    titles = ["(N, T, d)", "processes", "gathering", "time", "features", "covariance", "auto, of gathering"]
    cells = []
    for (shape, processes), routes in lines.items():
        moved = [_megabytes(routes.get(name)) for name in ("gather", "time", "features", "covariance")]
        auto = next(row for row in routes.values() if row["auto"])
        cells.append((f"({shape})", str(processes), *moved, f"{auto['of gathering']:.0%}"))
    where = f"[{DISTRIBUTED.name}](../../{DISTRIBUTED.relative_to(ROOT).as_posix()})"
    about = (
        "Megabytes that a process received on average, forward and backward, float32, as the kernel counted them "
        "on the loopback interface; in bold what `auto` takes, by the busiest process: with one time step the route "
        "over time sends everything to one of them. Routes that move more than 60 MB were not run. "
        f"`pytest benchmarks/bench_distributed.py`: {where}."
    )
    return f"{_markdown(titles, cells)}\n\n{about}"


def _megabytes(row: Row | None) -> str:
    if row is None:
        return ""
    shown = f"{row['MB each']:.3g}"
    return f"**{shown}**" if row["auto"] else shown


def training() -> str:
    """A whole step of every preset, ours against the reference way; and telemetry's part in it."""
    results, cells = json.loads(TRAINING.read_text()), []
    for row in results["rows"]:
        if "x reference" in row:
            compiled = f"{row['x compiled reference']:.2f}x" if "x compiled reference" in row else ""
            who = (row["preset"], row["latent"], row["provider"])
            cells.append((*who, f"{row['x reference']:.2f}x", compiled, row.get("target", "")))
    titles = ("preset", "latent", "provider", "vs reference", "vs compiled reference", "goal")
    (telemetry,) = (row for row in results["rows"] if "x without" in row)
    speed = f"{telemetry['x without']:.2f}"
    about = f"With {telemetry['provider']} training has {speed} of its speed without; what differs from 1 is noise."
    return f"{_markdown(titles, cells)}\n\n{_measured(results, TRAINING)} {about}"


def training_in_short() -> str:
    """What of `training` the README says."""
    results = json.loads(TRAINING.read_text())
    ours = {(r["preset"], r["latent"]): r["x reference"] for r in results["rows"] if r["provider"] == "ours"}
    plain, sparse = ours["moving-mnist-mini", "none"], ours["moving-mnist-stochastic-mini", "sparse"]
    return (
        f"A whole training step is {plain:.2f}x as fast as the same written plainly (eager, reference losses, a "
        f"DataLoader) for\n`moving-mnist-mini` on {results['threads']} CPU threads, {sparse:.1f}x for "
        "`moving-mnist-stochastic-mini` with a sparse latent (the goal was 3x):\n"
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )


def parts() -> str:
    """What share of our step each part takes."""
    results = json.loads(TRAINING.read_text())
    rows = [row for row in results["rows"] if row["provider"] == "parts"]
    names = [name for name, value in rows[0].items() if isinstance(value, float) and name != "busy_elsewhere"]
    cells = [(row["preset"], row["latent"], *(f"{row[name]:.1%}" for name in names)) for row in rows]
    return f"{_markdown(('preset', 'latent', *names), cells)}\n\n{_measured(results, TRAINING)}"


def latents() -> str:
    """Inference of z*, ours against loops in plain torch."""
    results, cells = json.loads(LATENTS.read_text()), []
    for row in results["rows"]:
        ratio = row.get("x G and r")
        cells.append(
            (row["hidden, T_y x d"], row["provider"], f"{row['x eager']:.2f}x", f"{ratio:.2f}x" if ratio else "")
        )
    titles = ("hidden, T_y x d", "provider", "vs the first of its shape", "vs G and r")
    return f"{_markdown(titles, cells)}\n\n{_measured(results, LATENTS)}"


def scaling() -> str:
    """Ours against the reference as sizes grow, and what the choice of the form costs."""
    results, cells = json.loads(SCALING.read_text()), []
    shapes: dict[tuple[str, str], dict[str, Row]] = {}
    for row in results["rows"]:
        shapes.setdefault((row["sweep"], f"({row['N']}, {row['T']}, {row['d']})"), {})[row["provider"]] = row
    for (sweep, shape), providers in shapes.items():
        ours, reference = providers["ours"], providers["eager reference"]
        gram, covariance = (providers[f"ours, {form} form"]["x reference"] for form in ("Gram", "covariance"))
        memory = f"{reference['copies']:.1f} -> {ours['copies']:.1f}"
        numbers = (f"{ours['x reference']:.2f}x", f"{gram:.2f}x", f"{covariance:.2f}x", f"{ours['choice']:.2f}")
        cells.append((sweep, shape, *numbers, memory, f"{ours['error']:.0e}"))
    titles = ("varies", "(N, T, d)", "ours", "Gram form", "covariance form", "choice", "copies of h", "error")
    worst = max(providers["ours"]["choice"] for providers in shapes.values())
    about = (
        "Ratios are against the eager reference; choice is the time of the form that `auto` takes over that of the "
        f"faster one, {worst:.2f} at worst; copies of h are the peak beyond it, the reference's and ours; the error is "
        "relative, of loss or gradient, whichever is larger."
    )
    return f"{_markdown(titles, cells)}\n\n{about} {_measured(results, SCALING)}"


def _measured(results: Results, path: Path) -> str:
    """Where, by which command, and the file."""
    where = f"{results['processor']}, {results['threads']} threads, torch {results['torch']}"
    link = f"[{path.name}](../{path.relative_to(ROOT).as_posix()})"
    return f"Medians of one run on {where}: `{results['command']}`, {link}."


def table(path: Path) -> str:
    """A table of the paper, without its title."""
    return path.read_text().split("\n", 2)[2].strip()


PARTS: dict[str, Callable[[], str]] = {
    "losses": losses,
    "table1": lambda: table(DOCS / "table1-moving-mnist-mini.md"),
    "table1-clevrer": lambda: table(DOCS / "table1-clevrer-mini.md"),
    "figure2": lambda: table(DOCS / "figure2-cater-mini.md"),
    "decode": decode,
    "training": training_in_short,
    "table2": lambda: table(DOCS / "table2-moving-mnist-stochastic-mini.md"),
}
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "docs" / "guides" / "several-gpus.md": {"distributed": distributed},
    ROOT / "docs" / "benchmarks.md": {"training": training, "scaling": scaling, "parts": parts, "latents": latents},
}
GPU = re.compile(r"(<!-- losses-gpu -->\n)(.*?)(<!-- /losses-gpu -->)", re.DOTALL)


def rendered(text: str, parts: dict[str, Callable[[], str]], page: str) -> str:
    """text with every part replaced. Raises ValueError for one whose markers are missing."""
    for name, make in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page}: no '<!-- {name} -->' ... '<!-- /{name} -->'")
        made = f"\n{make()}\n\n"
        text = pattern.sub(lambda m, made=made: m[1] + made + m[2], text)
    return text


def render(readme: str, newest: bool = False) -> str:
    """readme with every part replaced. The GPU's is replaced where it has markers: from the file that it links to, or,
    if it links to none or `newest` is asked for, from the last one measured, so that a run on another GPU alone changes
    nothing. Raises ValueError for another part whose markers are missing, and for markers without a file."""
    readme = rendered(readme, PARTS, "README.md")
    found = GPU.search(readme)
    if not found:
        return readme
    named = re.search(r"benchmarks/results/(gpu-[\w.-]+\.json)", found[2])
    path = RESULTS / named[1] if named and not newest else last_gpu_file()
    if path is None or not path.is_file():
        raise ValueError("README.md has '<!-- losses-gpu -->', but its file in benchmarks/results/ is missing")
    text = f"\n{losses_gpu(path)}\n\n"
    return GPU.sub(lambda m: m[1] + text + m[3], readme)


def last_gpu_file() -> Path | None:
    """The file of the GPU that was measured last."""
    files = sorted(RESULTS.glob("gpu-*.json"))
    return max(files, key=lambda path: json.loads(path.read_text())["date"], default=None)


# -- The table beside a GPU's file ----------------------------------------------------------------------------------


def gpu_report(results: Results) -> str:
    """All that was measured on a GPU: targets, times of every provider, rows where compiled plain code is faster."""
    met = {None: "not measured", True: "yes", False: "no"}
    targets = [(r["target"], r["wanted"], _number(r["got"]), met[r["met"]]) for r in results["targets"]]
    names = list(dict.fromkeys(row["provider"] for row in results["rows"]))
    names.sort(key=lambda name: name.startswith("ours"))
    times, notes, slower = [], [], []
    for (shape, precision), providers in by_provider(results["rows"]).items():
        ours = providers["ours"]
        over, copies = _times(ours.get("over floor")), _number(ours.get("copies"))
        times.append((f"({shape})", precision, *(_us(providers.get(name, {})) for name in names), over, copies))
        if ours.get("x compiled", 1.0) < 1.0:
            slower.append(f"- ({shape}) {precision}: {ours['x compiled']:.2f}x")
        notes += [f"- ({shape}) {precision}, {name}: {row['note']}" for name, row in providers.items() if "note" in row]
    products = ", ".join(f"{name} {rate}" for name, rate in results["product_tflop_per_s"].items())
    head = ("(N, T, d)", "precision", *names, "ours / floor", "ours: copies of h")
    return "\n".join(
        [
            f"# Losses on {results['device']}",
            "",
            f"{_conditions(results)} Triton {results['triton']}, commit {results['commit']}"
            f"{' with changes' if results['dirty'] else ''}, {results['date']}.",
            f"Copy within the GPU's memory: {results['copy_gb_per_s']} GB/s; products, TFLOP/s: {products}.",
            "",
            "## Targets",
            "",
            _markdown(("target", "wanted", "got", "met"), targets),
            "",
            "## Microseconds",
            "",
            _markdown(head, times),
            "",
            "Floor: two reads of h and one write at the bandwidth of the copy. Copies of h: peak memory beyond the "
            "input, the gradient included.",
            *_section("Compiled plain code is faster", slower),
            *_section("Notes", notes),
            "",
        ]
    )


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _conditions(results: Results) -> str:
    return (
        f"Forward and backward on {results['device']}, torch {results['torch']}: medians of CUDA-graph replays; inputs "
        'out of the cache; fp32 is "highest", tf32 float32 with TF32 products.'
    )


def by_provider(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(shape, precision) to provider to row."""
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((row["N, T, d"], row["precision"]), {})[row["provider"]] = row
    return grouped


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines))


def _us(row: Row) -> str:
    return f"{row['us']:,.0f} us" if row.get("us", 0) >= 100 else f"{row['us']:.1f} us" if "us" in row else ""


def _ratio(providers: dict[str, Row], name: str) -> str:
    other, ours = providers.get(name, {}), providers["ours"]
    return _times(other["us"] / ours["us"]) if "us" in other and "us" in ours else ""


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


# -- The accuracy figure --------------------------------------------------------------------------------------------


def accuracy(paths: Sequence[Path], out: Path) -> None:
    """Relative errors of loss and gradient against N, d and T, log-log, one panel each; a column of panels a file."""
    from matplotlib.figure import Figure

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


def scaling_figure(path: Path, out: Path) -> None:
    """Time, over ours at the smallest size, memory and error against d, N and T, log-log."""
    from matplotlib.figure import Figure

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


if __name__ == "__main__":
    README.write_text(render(README.read_text(), newest=True))
    for page, parts in PAGES.items():
        page.write_text(rendered(page.read_text(), parts, page.name))
    if files := sorted(RESULTS.glob("accuracy-*.json")):
        accuracy(files, ACCURACY)
    scaling_figure(SCALING, SCALED)
