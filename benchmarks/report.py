"""Puts measured numbers into the README and the pages of docs/ and draws their figures, from the files that hold them:

    python benchmarks/report.py

Each part of a page between `<!-- NAME -->` and `<!-- /NAME -->` is written here and nowhere else; a test checks
that pages and files agree.
"""

import json
import re
import statistics
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
BUSY = RESULTS / "busy-cpu.json"
DOCS = ROOT / "docs" / "results"
ACCURACY = DOCS / "accuracy.png"
SCALED = DOCS / "scaling-cpu.png"
ROOFLINE = DOCS / "roofline-cpu.png"
SHARED = DOCS / "study-shared-statistics.json"
STUDY = DOCS / "study-moving-mnist-mini.json"

Results = Row = dict[str, Any]


# -- The README -----------------------------------------------------------------------------------------------------


# What the README shows of the losses: the paper's shapes and small ones; docs/benchmarks.md has all.
SHOWN = ("160, 100, 2048", "256, 26, 2048", "256, 26, 1024", "256, 15, 512", "256, 15, 256", "128, 9, 256")
SHOWN += ("64, 8, 128", "32, 4, 64", "4096, 1, 64", "16384, 1, 64")


def losses() -> str:
    """Ours against the eager reference and the fastest plain PyTorch, one line a shape of SHOWN."""
    results = json.loads(LOSSES.read_text())
    lines = [
        "| (N, T, d) | vs reference, eager | vs reference, compiled | vs best plain PyTorch | peak extra memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_shape: dict[str, dict[str, dict]] = {}
    for row in results["rows"]:
        by_shape.setdefault(row["N, T, d"], {})[row["provider"]] = row
    for shape in SHOWN:
        providers = by_shape[shape]
        ours, compiled = providers["ours"], providers["compiled reference"].get("median_ms")
        against = f"{compiled / ours['median_ms']:.1f}x" if compiled else "not timed"
        copies = f"{ours['copies']:.1f} copies of h"
        lines.append(f"| ({shape}) | {ours['x eager']:.1f}x | {against} | {ours['x plain']:.1f}x | {copies} |")
    machine = f"{results['processor']}, {results['threads']} threads, torch {results['torch']}"
    missed = [
        f"({row['N, T, d']}) reaches {row['x eager']:.2f}x, its goal was {row['target']:g}x"
        for row in results["rows"]
        if row.get("met") == "no" and row["N, T, d"] in SHOWN
    ]
    goals = f" Short of their goals: {'; '.join(missed)}." if missed else " All goals are met."
    where = f"[{LOSSES.name}]({LOSSES.relative_to(ROOT).as_posix()})"
    return "\n".join([*lines, "", f"Forward and backward, float32, medians of one run on {machine}, {where}.{goals}"])


def losses_rates() -> str:
    """Of ours, a line a shape: ratios, spread, memory and the shares of the machine's own rates."""
    results = json.loads(LOSSES.read_text())
    cells = []
    for row in results["rows"]:
        if row["provider"] in ("ours", "ours compiled"):
            ratios = (f"{row['x eager']:.2f}x", f"{row['x plain']:.2f}x", f"{row['iqr_ms'] / row['median_ms']:.0%}")
            shares = (f"{row['copies']:.1f}", f"{row['of copy']:.0%}", f"{row['of product']:.0%}")
            goal = f">= {row['target']:g}x: {'met' if row['met'] == 'yes' else 'missed'}" if "target" in row else ""
            cells.append((f"({row['N, T, d']})", row["provider"], *ratios, *shares, goal))
    titles = (
        "(N, T, d)",
        "provider",
        "vs reference",
        "vs best plain",
        "spread",
        "copies of h",
        "of copy",
        "of product",
    )
    about = (
        "Spread: interquartile range over median; copies: peak memory beyond h, in copies of it; of copy, of product: "
        "bytes and flops of the floor (two reads of h and "
        "a write; the smaller form's products) a second, over this machine's rate of a copy and of a float32 product."
    )
    return f"{_markdown((*titles, 'goal, vs reference'), cells)}\n\n{about} {_measured(results, LOSSES)}"


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
    about = f"480x320 H.264 with one keyframe, as CLEVRER's. {_measured(results, DECODE)}"
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
            ratios = (f"{row['x reference']:.2f}x", compiled, f"{row['iqr_ms'] / row['median_ms']:.0%}")
            energy = f"{row['energy of z*']:+.1%}" if "energy of z*" in row else ""
            cells.append((*who, *ratios, f"{row['peak MB']:.0f} MB", energy, row.get("target", "")))
    titles = ("preset", "latent", "provider", "vs reference", "vs compiled reference", "spread", "peak memory")
    titles += ("energy of z*", "goal")
    (telemetry,) = (row for row in results["rows"] if "x without" in row)
    speed = f"{telemetry['x without']:.2f}"
    about = f"With {telemetry['provider']} training has {speed} of its speed without; what differs from 1 is noise."
    return f"{_markdown(titles, cells)}\n\n{_measured(results, TRAINING)} {about}"


def training_in_short() -> str:
    """What of `training` the README says."""
    results = json.loads(TRAINING.read_text())
    ours = {(r["preset"], r["latent"]): r for r in results["rows"] if r["provider"] == "ours"}
    plain, sparse = ours["moving-mnist-mini", "none"], ours["moving-mnist-stochastic-mini", "sparse"]
    goals = [row["target"].removeprefix("x reference >= ").replace(": ", "x, ") for row in (plain, sparse)]
    return (
        f"A whole training step is {plain['x reference']:.1f}x as fast as the same written plainly (eager, reference "
        f"losses, a DataLoader) for\n`moving-mnist-mini` on {results['threads']} CPU threads, "
        f"{sparse['x reference']:.1f}x for `moving-mnist-stochastic-mini` with a sparse latent\n(goals: {goals[0]}, "
        f"and {goals[1]}): [docs/benchmarks.md](docs/benchmarks.md)."
    )


def latents_in_short() -> str:
    """What of `latents` the README says."""
    results = json.loads(LATENTS.read_text())
    found = {(row["hidden, T_y x d"], row["provider"]): row["x eager"] for row in results["rows"]}
    case = "512, 12x512"
    where = f"[{LATENTS.name}]({LATENTS.relative_to(ROOT).as_posix()})"
    return (
        "With 512 hidden units, 12 x 512 outputs, 256 samples and 100 steps the operator is "
        f"{found[case, 'ours']:.1f}x as fast on {results['threads']} CPU\nthreads as the same steps through autograd, "
        f"{found[case, 'ours, tolerance 1e-4']:.1f}x where samples that have converged are frozen, "
        f"{found[case, 'ours, quasi-Newton, tolerance 1e-3']:.1f}x by the quasi-Newton\nmethod ({where}; smaller sizes "
        "and the closed form in plain torch are in\n[docs/benchmarks.md](docs/benchmarks.md))."
    )


def figure4() -> str:
    """The share of the singular values' sum that the first quarter of them holds, at the end of training."""
    results = json.loads((DOCS / "figure4-cater-mini.json").read_text())
    held = {title: sum(v[: len(v) // 4]) / sum(v) for title, v in results["ours"].items()}
    ours = {row: share for row in ("VJ-VCR", "generative") for title, share in held.items() if title.startswith(row)}
    paper = {row: results["paper"][key]["first_500"] for row, key in (("VJ-VCR", "vj-vcr"), ("generative",) * 2)}
    said = " and ".join(f"{ours[row]:.0%} for {row} (the paper's {paper[row]:.0%})" for row in ours)
    return (
        "The spectra (fig4) look as in the paper: the first quarter of the singular values holds this part of their "
        f"sum:\n{said}, where 25% is no collapse."
    )


def study() -> str:
    """The settings of docs/studies/settings.yaml: speed MSE of both models, a line a setting."""
    results = json.loads(STUDY.read_text())
    names = list(dict.fromkeys(name.rsplit(", row=", 1)[0] for name in results["settings"]))
    cells = []
    for name in names:
        line = [name]
        for row in ("vj-vcr", "generative"):
            found = results["settings"][f"{name}, row={row}"]["evaluations"]
            for key in ("speed_mse", "speed_mse_standardised", "speed_mse_least_squares"):
                line.append(_seeds([e[key] for e in found]))
        mean = statistics.mean(e["speed_mse_of_the_mean"] for e in found)
        cells.append((*line, f"{mean:.2f}"))
    titles = ["setting", *(f"{model}: {how}" for model in ("VJ-VCR", "gen.") for how in ("Adam", "std.", "l. sq."))]
    machine = results["machine"]
    about = (
        "Speed MSE on the development split, mean and in brackets the seeds' range, 2 seeds: the paper's probe (Adam), "
        "the same on standardised features, least squares; last, what predicting the mean gives. gen.: generative "
        f"without VCR. {machine['name']}, torch {machine['torch']}, commit {machine['commit']}: "
        "`vjvcr-fast sweep docs/studies/settings.yaml --processes 2`, [the file](results/study-moving-mnist-mini.json)."
    )
    return f"{_markdown((*titles, 'mean'), cells)}\n\n{about}"


def against_steps() -> str:
    """VJ-VCR's MSE over the generative model's as training goes on, and the paper's."""
    settings = json.loads(STUDY.read_text())["settings"]
    steps = {300: "steps 300", 600: "steps 600", 1_200: "as it is", 2_400: "steps 2400", 4_800: "steps 4800"}
    cells = []
    for name, key in (("Adam", "speed_mse"), ("Adam, standardised", "speed_mse_standardised"), ("least squares",) * 2):
        key = "speed_mse_least_squares" if key == "least squares" else key
        ours, theirs = (
            [statistics.mean(e[key] for e in settings[f"{of}, row={row}"]["evaluations"]) for of in steps.values()]
            for row in ("vj-vcr", "generative")
        )
        cells.append((name, *(f"{a:.3f} / {b:.3f} = {a / b:.2f}" for a, b in zip(ours, theirs, strict=True))))
    paper = json.loads((DOCS / "table1-moving-mnist-mini.json").read_text())["rows"]
    a, b = (paper[row]["paper"]["speed_mse"] for row in ("vj-vcr", "generative"))
    titles = ("probe", *(f"{count:,} steps" for count in steps))
    about = f"VJ-VCR's speed MSE / the generative model's, development split. The paper's: {a} / {b} = {a / b:.2f}."
    return f"{_markdown(titles, cells)}\n\n{about}"


def statistics_apart() -> str:
    """VJ-VCR with one set of running statistics for x and y, and with two."""
    one, two = (json.loads(path.read_text())["settings"] for path in (SHARED, STUDY))
    cells = []
    for name, before in one.items():
        after = two[name]["evaluations"]
        chosen = ", ".join(f"{e['step']:,}" for e in before), ", ".join(f"{e['step']:,}" for e in after)
        errors = (_seeds([e["speed_mse"] for e in found]) for found in (before, after))
        cells.append((name.rsplit(", row=", 1)[0], *errors, *chosen))
    titles = ("setting", "one set: speed MSE", "two sets", "one set: steps of the checkpoint taken", "two sets")
    where = f"[{SHARED.name}](results/{SHARED.name})"
    return f"{_markdown(titles, cells)}\n\nThe first, whose code is no more, is in {where}."


def _seeds(values: Sequence[float]) -> str:
    """Mean (least to most)."""
    return f"{statistics.mean(values):.3f} ({min(values):.2f}-{max(values):.2f})"


def reproduced(name: str) -> str:
    """A table of the paper as in the README, and what it was made on."""
    machine = json.loads((DOCS / f"{name}.json").read_text())["machine"]
    where = f"{machine['name']}, torch {machine['torch']}, commit {machine['commit']}"
    made = f"Made on {where}: [{name}.json](results/{name}.json)."
    return f"{table(DOCS / f'{name}.md')}\n{made}"


def in_one_sentence() -> str:
    """What `make train` shows."""
    results = json.loads((DOCS / "table1-moving-mnist-mini.json").read_text())
    ours = {row: of["ours"] for row, of in results["rows"].items()}
    mse = {row: statistics.mean(of["speed_mse"]) for row, of in ours.items()}
    worst = {row: max(of["speed_mse"]) for row, of in ours.items()}
    least = min(min(ours[row]["speed_mse"]) for row in ("generative", "generative-vcr"))
    order = "in every seed" if worst["vj-vcr"] < least and worst["vj-vcr-decoder"] < least else "on average"
    if max(mse["vj-vcr"], mse["vj-vcr-decoder"]) >= min(mse["generative"], mse["generative-vcr"]):
        raise ValueError("the sentence of the README no longer holds: write another")
    mean = statistics.mean(ours["vj-vcr"]["speed_mse_of_the_mean"])
    shown = {row: f"{value:.2f}" for row, value in mse.items()}
    return (
        f"In one sentence: after {results['config']['train']['steps']:,} small steps a linear probe tells a digit's "
        f"speed {order} better from VJ-VCR's\npredictions (MSE {shown['vj-vcr']}, with a decoder "
        f"{shown['vj-vcr-decoder']}) than from the generative model's (with VCR {shown['generative-vcr']},\n"
        f"without {shown['generative']}), where predicting the mean gives {mean:.2f}."
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
        who = (row["hidden, T_y x d"], row["provider"], f"{row['x eager']:.2f}x")
        ratio, share, peak = (row.get(name) for name in ("x G and r", "of product", "peak_mb"))
        shown = (f"{ratio:.2f}x" if ratio else "", f"{share:.0%}" if share else "", f"{peak:.1f} MB" if peak else "")
        cells.append((*who, *shown))
    titles = ("hidden, T_y x d", "provider", "vs the first of its shape", "vs G and r", "of product", "peak memory")
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


def busy() -> str:
    """A training step beside busy processes, against the same on a quiet machine."""
    results, cells = json.loads(BUSY.read_text()), {}
    for row in results["rows"]:
        cells.setdefault((row["how"], str(row["threads"])), {})[row["busy"]] = row["x quiet"]
    counts = sorted({row["busy"] for row in results["rows"]})
    alone = {row["how"]: row["x one thread"] for row in results["rows"] if row["busy"] == 0}
    lines = [
        (how, threads, f"{alone[how]:.2f}", *(f"{by_count[n]:.1f}x" for n in counts))
        for (how, threads), by_count in cells.items()
    ]
    titles = ("process", "threads", "quiet, of one thread", *(f"beside {n}" for n in counts))
    return f"{_markdown(titles, lines)}\n\n{_measured(results, BUSY)}"


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
    "one-sentence": in_one_sentence,
    "table1-clevrer": lambda: table(DOCS / "table1-clevrer-mini.md"),
    "figure2": lambda: table(DOCS / "figure2-cater-mini.md"),
    "training": training_in_short,
    "latents": latents_in_short,
    "figure4": figure4,
    "table2": lambda: table(DOCS / "table2-moving-mnist-stochastic-mini.md"),
}
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "docs" / "guides" / "several-gpus.md": {"distributed": distributed},
    ROOT / "docs" / "reproducing.md": {
        "table1": lambda: reproduced("table1-moving-mnist-mini"),
        "table2": lambda: reproduced("table2-moving-mnist-stochastic-mini"),
        "table2-fista": lambda: reproduced("table2-fista-moving-mnist-stochastic-mini"),
        "study": study,
        "statistics-apart": statistics_apart,
        "against-steps": against_steps,
    },
    ROOT / "docs" / "benchmarks.md": {
        "losses-rates": losses_rates,
        "training": training,
        "scaling": scaling,
        "parts": parts,
        "latents": latents,
        "decode": decode,
        "busy": busy,
    },
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


if __name__ == "__main__":
    README.write_text(render(README.read_text(), newest=True))
    for page, parts in PAGES.items():
        page.write_text(rendered(page.read_text(), parts, page.name))
    import plots  # not needed to check the pages, and needs matplotlib

    if files := sorted(RESULTS.glob("accuracy-*.json")):
        plots.accuracy(files, ACCURACY)
    plots.scaling(SCALING, SCALED)
    plots.roofline([LOSSES, LATENTS], ROOFLINE)
