"""The README's code runs, its two ways agree, and its numbers are those of the committed files."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import clevrer_files
import pytest
import tolerances
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_latents() -> None:
    names: dict[str, Any] = {}
    exec(blocks()[2], names)
    assert names["energy"].shape == (64,)
    assert (names["steps"] > 0).all()


def test_drop_in_and_equivalent_agree() -> None:
    drop_in, equivalent, *_ = blocks()
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(drop_in, names)
    ours, gradient = names["loss"].detach(), names["h_x"].grad
    exec(equivalent, names)
    (expected,) = torch.autograd.grad(names["loss"], names["h_x"])
    assert abs(ours - names["loss"]) <= tolerances.FLOAT32 * names["loss"]
    assert (gradient - expected).norm() <= tolerances.FLOAT32 * expected.norm()


def test_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("av", "decord"):
        pytest.importorskip(package)
    clevrer_files.write(tmp_path / "data", "train", 0, frames=60)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks()[3:5]:
        exec(block, names)
    assert names["frames"].shape == (26, 3, 64, 64)
    assert names["batch"].frames.shape == (4, 26, 3, 64, 64)


def test_numbers_are_those_of_the_committed_files() -> None:
    assert _report().render(README) == README, "run `python benchmarks/report.py`"


def test_numbers_of_the_guides_are_those_of_the_committed_files() -> None:
    report = _report()
    for page, parts in report.PAGES.items():
        assert report.rendered(page.read_text(), parts, page.name) == page.read_text(), "run `benchmarks/report.py`"


# What a measured number looks like: a ratio, a share, a time, a size, a decimal. Sizes of frames and arrays do not.
MEASURED = re.compile(r"\b\d[\d.,]*x(?!\w)|\d ?%|\d (?:s|ms|us|dB|GiB|MiB|MB|GB|TFLOP/s)\b|(?<![\w.,-])0\.\d+\b")
PROSE = {  # numbers that no benchmark has measured, and where they come from
    "paper's 79.7% is about four of five": "the paper",
    "128x128 in bfloat16 needs 7 GiB instead of 104": "tests/training/test_chunked.py counts it",
}


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))], ids=lambda p: p.name)
def test_no_measured_number_stands_outside_the_rendered_parts(page: Path) -> None:
    if ROOT / "docs" / "results" in page.parents:  # written by the commands that measured
        return
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->|```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if MEASURED.search(line) and not any(known in line for known in PROSE)]
    assert not lines, f"{page.name}: render these from a committed file (benchmarks/report.py)"


def test_every_rendered_file_is_of_a_clean_commit() -> None:
    """The tables of benchmarks come from a commit, without changes on top of it."""
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        measured = json.loads(file.read_text())
        assert re.fullmatch(r"[0-9a-f]{40}|tree-[0-9a-f]{10}", measured["commit"]), file.name
        assert not measured["dirty"], file.name


def test_a_missing_marker_is_named() -> None:
    with pytest.raises(ValueError, match="<!-- losses -->"):
        _report().render("no markers")


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("https://") or (ROOT / target).exists()


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
