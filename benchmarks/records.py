"""Records of measurements, without measuring: floors, targets, names of result files, the commit they belong to.

A row is a flat dict of one shape, precision and provider; `us` is the median time of a forward and backward pass in
microseconds. Of the rows of a CUDA device the targets are judged here.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from report import by_provider

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
SOURCES = ("vjvcr_fast", "kernels", "csrc", "benchmarks")  # folders whose code a measurement depends on
CODE = (".py", ".cpp", ".cu", ".cuh", ".h")

# -- Floors ---------------------------------------------------------------------------------------------------------


def floor_bytes(n: int, t: int, d: int, element_size: int) -> int:
    """Read h (N, T, d) twice and write its gradient once."""
    return 3 * n * t * d * element_size


def floor_flops(n: int, t: int, d: int) -> int:
    """Of the smaller form's two products a time step; of the first, which is symmetric, half."""
    return 3 * n * d * min(n, d) * t


def latent_floor_bytes(n: int, latent: int, hidden: int, width: int) -> int:
    """Inference of z* through the MLP: its weights, what it starts from and the targets read once, z* written."""
    return 4 * (n * (hidden + width + latent) + hidden * (hidden + width + latent) + width)


def latent_floor_flops(n: int, latent: int, hidden: int, width: int, steps: int) -> int:
    """Three products a step, G and r once; G is symmetric."""
    return 2 * n * hidden * (3 * hidden + 2 * latent) * steps + width * hidden * (hidden + 2 * n)


def achieved(milliseconds: float, nbytes: float, flops: float, copy: float, product: float) -> Row:
    """What a time means: the floor's bytes and flops a second, whatever the code really moved and computed, and their
    shares of the machine's own rates (bytes/s of a copy, flop/s of a product)."""
    bytes_s, flops_s = (1e3 * work / milliseconds for work in (nbytes, flops))
    rates = {"_gb_per_s": bytes_s / 1e9, "_tflop_per_s": flops_s / 1e12, "_flop_per_byte": flops / nbytes}
    return rates | {"of copy": bytes_s / copy, "of product": flops_s / product}


# -- Targets --------------------------------------------------------------------------------------------------------

CATER, CLEVRER, MOVING_MNIST, TALL = "160, 100, 2048", "256, 26, 2048", "256, 15, 512", "2600000, 1, 64"
ALL = ("fp32", "tf32", "bf16")
NAMES = {CATER: "CATER", CLEVRER: "CLEVRER", MOVING_MNIST: "MovingMNIST", TALL: "(2.6M, 1, 64)"}
COMPILED = ("compiled reference", "compiled gram form")


class Target(NamedTuple):
    """What `ours` (the default call) is to reach for one shape: `what` is a key of `metrics`; at least or at most
    `bound`."""

    shape: str
    precisions: tuple[str, ...]
    what: str
    relation: str
    bound: float


TARGETS = [
    Target(CATER, ("tf32", "bf16"), "time over floor", "<=", 1.6),
    Target(CATER, ("fp32",), "us", "<=", 420),
    Target(CATER, ALL, "x eager reference", ">=", 30),
    Target(CATER, ALL, "x compiled reference", ">=", 8),
    Target(CATER, ALL, "x compiled gram form", ">=", 1.5),
    Target(CATER, ALL, "copies above input and gradient", "<=", 1.2),
    Target(CLEVRER, ALL, "x eager reference", ">=", 15),
    Target(CLEVRER, ALL, "x compiled reference", ">=", 5),
    Target(MOVING_MNIST, ALL, "x eager reference", ">=", 5),
    Target(MOVING_MNIST, ALL, "x compiled reference", ">=", 2),
    Target(TALL, ("tf32", "bf16"), "x eager reference", ">=", 3),
    # "Bound by two reads and a write" has no number of its own: CATER's.
    Target(TALL, ("tf32", "bf16"), "time over floor", "<=", 1.6),
]


def metrics(providers: dict[str, Row]) -> dict[str, float]:
    """Of ours, for one shape and precision; what was not measured is missing."""
    ours = providers.get("ours", {})
    found = {}
    if "copies" in ours:
        found["copies above input and gradient"] = ours["copies"] - 1
    if "us" not in ours:
        return found
    found |= {"us": ours["us"], "time over floor": ours["us"] / ours["floor_us"]}
    others = ("eager reference", *COMPILED)
    return found | {
        f"x {name}": providers[name]["us"] / ours["us"] for name in others if "us" in providers.get(name, {})
    }


def judged(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A record {target, wanted, got, met} for each target and precision; got and met are None where the row was not
    measured. The last one is about all rows: its got is the least ratio, and it is not met while a row is missing."""
    grouped, records = by_provider(rows), []
    for target in TARGETS:
        for precision in target.precisions:
            got = metrics(grouped.get((target.shape, precision), {})).get(target.what)
            records.append(_record(f"{NAMES[target.shape]} {precision}: {target.what}", target, got))
    ratios = [_against_compiled(group) for group in grouped.values()]
    least = min((ratio for ratio in ratios if ratio is not None), default=None)
    last = _record("every row: x the faster of the compiled two", Target("", (), "", ">=", 1.0), least)
    if last["met"] and None in ratios:
        last["met"] = None
    return [*records, last]


def _against_compiled(providers: dict[str, Row]) -> float | None:
    found = metrics(providers)
    return min((found[f"x {name}"] for name in COMPILED if f"x {name}" in found), default=None)


def _record(name: str, target: Target, got: float | None) -> dict[str, Any]:
    met = None if got is None else got <= target.bound if target.relation == "<=" else got >= target.bound
    return {"target": name, "wanted": f"{target.relation} {target.bound:g}", "got": rounded(got), "met": met}


# -- Files ----------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def file_name(what: str, machine: dict[str, Any]) -> str:
    """Of the results of bench_{what}.py: losses-cpu.json, gpu-{GPU}-torch{}-triton{}-{commit}.json."""
    if machine["cuda"] is None:
        return f"{what}-{slug(machine['device'])}.json"
    versions = f"torch{slug(machine['torch'])}-triton{slug(machine['triton'] or 'none')}"
    what = "gpu" if what == "losses_cuda" else f"{what}-gpu"
    return f"{what}-{slug(machine['device'])}-{versions}-{short(machine['commit'])}.json"


def of_a_full_run(path: Path) -> bool:
    """Whether path holds the results of a --full run, which a quick one, of fewer points, is not to replace."""
    return path.is_file() and bool(json.loads(path.read_text()).get("full"))


def results(what: str, machine: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The content of a result file: the machine, the targets where there are any, and the rows, whose keys lose their
    leading underscore."""
    clean = [{key.removeprefix("_"): rounded(value) for key, value in row.items()} for row in rows]
    targets = {"targets": judged(clean)} if what == "losses_cuda" else {}
    return {**machine, **targets, "rows": clean}


def dumps(results: dict[str, Any]) -> str:
    """As JSON in which a record or row is a line: readable, and so are diffs."""
    tables = [name for name in ("targets", "rows") if name in results]
    text = json.dumps({k: v for k, v in results.items() if k not in tables}, indent=2).removesuffix("\n}")
    for name in tables:
        lines = ",\n".join("    " + json.dumps(record) for record in results[name])
        text += f',\n  "{name}": [\n{lines}\n  ]'
    return text + "\n}\n"


def rounded(value: Any) -> Any:
    """A float to four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


# -- The code that was measured -------------------------------------------------------------------------------------


def commit(root: Path = ROOT) -> str:
    """VJVCR_COMMIT from the environment, else the checkout's commit; in a copy of the tree without its history
    "tree-" and ten digits of a digest of the sources."""
    if given := os.environ.get("VJVCR_COMMIT"):
        return given
    own = git(root, "rev-parse", "--show-toplevel")
    if own and Path(own).resolve() == root.resolve():  # a copy may lie within another project's checkout
        return git(root, "rev-parse", "HEAD")
    return f"tree-{digest(root)}"


def dirty(root: Path = ROOT) -> bool | None:
    """Whether the checkout has changes beyond its commit; None where there is no telling."""
    if commit(root) != git(root, "rev-parse", "HEAD"):
        return None
    return bool(git(root, "status", "--porcelain"))


def short(commit: str) -> str:
    return commit[:10] if re.fullmatch(r"[0-9a-f]{40}", commit) else slug(commit)


def digest(root: Path) -> str:
    """Ten hexadecimal digits of all code under SOURCES and of the build files, their names included."""
    files = [path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in CODE]
    files += [root / name for name in ("pyproject.toml", "setup.py") if (root / name).is_file()]
    found = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:10]


def git(root: Path, *arguments: str) -> str:
    """What git says, empty where it fails or is missing. Takes no lock: others may work in the checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
