"""Puts measured numbers into the README, from the committed files that hold them: `python benchmarks/report.py`.

Each part of the README between `<!-- NAME -->` and `<!-- /NAME -->` is written here and nowhere else; a test checks
that README and files agree.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LOSSES = ROOT / "benchmarks" / "results" / "losses-cpu.json"
TABLE1 = ROOT / "docs" / "results" / "table1-moving-mnist-mini.md"


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


def table1() -> str:
    """Table 1, without its title."""
    return TABLE1.read_text().split("\n", 2)[2].strip()


PARTS: dict[str, Callable[[], str]] = {"losses": losses, "table1": table1}


def render(readme: str) -> str:
    """readme with every part replaced. Raises ValueError for a part whose markers are missing."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"README.md: no '<!-- {name} -->' ... '<!-- /{name} -->'")
        text = f"\n{make()}\n\n"
        readme = pattern.sub(lambda m, text=text: m[1] + text + m[2], readme)
    return readme


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
