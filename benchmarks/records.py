"""What the files in results/ hold besides times: unavoidable work, goals, the measured commit; and their names.

A row is a flat dict for one shape, precision and provider (one of the ways that are compared).
"""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import pivot

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]

# -- Floors: work that no method can avoid --------------------------------------------------------------------------


def floor_bytes(n: int, t: int, d: int, element_size: int) -> int:
    """Of the loss: reading h (N, T, d) twice and writing its gradient once."""
    return 3 * n * t * d * element_size


def floor_flops(n: int, t: int, d: int) -> int:
    """Of the loss: the smaller form's two products for each time step. The first is symmetric and counts half."""
    return 3 * n * d * min(n, d) * t


def latent_floor_bytes(n: int, latent: int, hidden: int, width: int) -> int:
    """Of inferring z* through the MLP: reading weights, start and targets once, and writing z*."""
    return 4 * (n * (hidden + width + latent) + hidden * (hidden + width + latent) + width)


def latent_floor_flops(n: int, latent: int, hidden: int, width: int, steps: int) -> int:
    """Of inferring z* through the MLP: three products a step, and once the symmetric G, and r."""
    return 2 * n * hidden * (3 * hidden + 2 * latent) * steps + width * hidden * (hidden + 2 * n)


def achieved(milliseconds: float, nbytes: float, flops: float, copy: float, product: float) -> Row:
    """The floor's bytes and flops per second, and their shares of this machine's own rates.

    copy: bytes/s of a copy. product: flop/s of a matrix product. What the code really moved and computed is not known.
    """
    bytes_s, flops_s = (1e3 * work / milliseconds for work in (nbytes, flops))
    rates = {"_gb_per_s": bytes_s / 1e9, "_tflop_per_s": flops_s / 1e12, "_flop_per_byte": flops / nbytes}
    return rates | {"of copy": bytes_s / copy, "of product": flops_s / product}


# -- Goals ----------------------------------------------------------------------------------------------------------


def goals(row: Row, least: dict[str, float]) -> Row:
    """The row with a "target" that says, for every key of `least`, whether the row's value reaches that bound."""
    said = [
        f"{key} >= {bound:g}: {'met' if row[key] >= bound else 'missed'} ({row[key]:.3g})"
        for key, bound in least.items()
    ]
    return row | ({"target": "; ".join(said)} if said else {})


CATER, CLEVRER, MOVING_MNIST, TALL = "160, 100, 2048", "256, 26, 2048", "256, 15, 512", "2600000, 1, 64"
ALL = ("fp32", "tf32", "bf16")
NAMES = {CATER: "CATER", CLEVRER: "CLEVRER", MOVING_MNIST: "MovingMNIST", TALL: "(2.6M, 1, 64)"}
COMPILED = ("compiled reference", "compiled gram form")


# Goals for `ours` on a GPU: shape, precisions, a key of `metrics`, and its bound. A ratio ("x ...") should be at least
# that, anything else at most that.
TARGETS = [
    (CATER, ("tf32", "bf16"), "time over floor", 1.6),
    (CATER, ("fp32",), "us", 420),
    (CATER, ALL, "x eager reference", 30),
    (CATER, ALL, "x compiled reference", 8),
    (CATER, ALL, "x compiled gram form", 1.5),
    (CATER, ALL, "copies above input and gradient", 1.2),
    (CLEVRER, ALL, "x eager reference", 15),
    (CLEVRER, ALL, "x compiled reference", 5),
    (MOVING_MNIST, ALL, "x eager reference", 5),
    (MOVING_MNIST, ALL, "x compiled reference", 2),
    (TALL, ("tf32", "bf16"), "x eager reference", 3),
    (TALL, ("tf32", "bf16"), "time over floor", 1.6),  # CATER's: "bound by two reads and a write" has no number
]


def metrics(providers: dict[str, Row]) -> dict[str, float]:
    """What the goals are about, of ours for one shape and precision. Values that were not measured are missing."""
    ours = providers.get("ours", {})
    found = {"copies above input and gradient": ours["copies"] - 1} if "copies" in ours else {}
    if "us" in ours:
        found |= {"us": ours["us"], "time over floor": ours["us"] / ours["floor_us"]}
        others = ("eager reference", *COMPILED)
        found |= {f"x {name}": providers[name]["us"] / ours["us"] for name in others if "us" in providers.get(name, {})}
    return found


def judged(rows: Sequence[Row], partial: bool = False) -> list[Row]:
    """A record {target, wanted, got, met} for every goal and precision; got and met are None if it was not measured.

    The last record is about all rows: `got` is the least ratio to the faster of the compiled two, and `met` is None if
    that ratio was reached where measured but is missing from some row, or if the rows are only a part.
    """
    measured = {
        (row["N, T, d"], row["precision"]): metrics(row) for row in pivot(rows, "provider", "N, T, d", "precision")
    }
    records = []
    for shape, precisions, what, bound in TARGETS:
        for precision in precisions:
            got = measured.get((shape, precision), {}).get(what)
            records.append(_record(f"{NAMES[shape]} {precision}: {what}", what, bound, got))
    compiled = [[found[f"x {name}"] for name in COMPILED if f"x {name}" in found] for found in measured.values()]
    least = min((ratio for ratios in compiled for ratio in ratios), default=None)
    last = _record("every row: x the faster of the compiled two", "x compiled", 1.0, least)
    if last["met"] and (partial or [] in compiled):
        last["met"] = None
    return [*records, last]


def _record(name: str, what: str, bound: float, got: float | None) -> Row:
    at_least = what.startswith("x ")
    met = None if got is None else got >= bound if at_least else got <= bound
    return {"target": name, "wanted": f"{'>=' if at_least else '<='} {bound:g}", "got": rounded(got), "met": met}


# -- Files ----------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def file_name(what: str, machine: Row) -> str:
    """The file for bench_{what}.py: losses-cpu.json, or gpu-{GPU}-torch{}-triton{}-{commit}.json."""
    if machine["cuda"] is None:
        return f"{what}-{slug(machine['device'])}.json"
    versions = f"torch{slug(machine['torch'])}-triton{slug(machine['triton'] or 'none')}"
    what = "gpu" if what == "losses_cuda" else f"{what}-gpu"
    return f"{what}-{slug(machine['device'])}-{versions}-{slug(machine['commit'][:10])}.json"


def of_a_full_run(path: Path) -> bool:
    """True if path holds the results of a --full run. A quick run, which measures less, does not replace them."""
    return path.is_file() and bool(json.loads(path.read_text()).get("full"))


def results(what: str, machine: Row, rows: Sequence[Row]) -> Row:
    """The content of a result file: the machine, the goals of a GPU, the rows with no leading underscore in a key."""
    clean = [{key.removeprefix("_"): rounded(value) for key, value in row.items()} for row in rows]
    targets = {"targets": judged(clean, "partial" in machine)} if what == "losses_cuda" else {}
    return {**machine, **targets, "rows": clean}


def dumps(results: Row) -> str:
    """JSON with one line per row, so that files and their diffs can be read."""
    tables = [name for name in ("targets", "rows") if name in results]
    text = json.dumps({k: v for k, v in results.items() if k not in tables}, indent=2).removesuffix("\n}")
    for name in tables:
        lines = ",\n".join("    " + json.dumps(record) for record in results[name])
        text += f',\n  "{name}": [\n{lines}\n  ]'
    return text + "\n}\n"


def rounded(value: Any) -> Any:
    """A float to four digits; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def commit(root: Path = ROOT) -> tuple[str, bool | None]:
    """(the commit of the checkout, whether there are changes on top of it).

    VJVCR_COMMIT in the environment is taken instead, for a copy of the tree without its history. Such a copy is
    otherwise of an "unknown" commit. In both cases nothing is known of changes: None.
    """
    own = git(root, "rev-parse", "--show-toplevel")
    given = os.environ.get("VJVCR_COMMIT")
    if not given and own and Path(own).resolve() == root.resolve():  # a copy may lie inside another project's checkout
        return git(root, "rev-parse", "HEAD"), bool(git(root, "status", "--porcelain"))
    return given or "unknown", None


def git(root: Path, *arguments: str) -> str:
    """What git prints; empty if it fails or is missing. It takes no lock, since others may work in the checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
