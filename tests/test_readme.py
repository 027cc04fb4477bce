"""The code of the README and of docs/videos.md runs, and the tables of all pages are those of the committed files."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import clevrer_files
import pytest
import tolerances
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402


def blocks(page: str = "README.md") -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_latents() -> None:
    names: dict[str, Any] = {}
    exec(blocks("docs/guides/latents.md")[0], names)
    assert names["energy"].shape == (64,)
    assert (names["steps"] > 0).all()


def test_drop_in_and_equivalent_agree() -> None:
    drop_in, equivalent = blocks()
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
    for block in blocks("docs/videos.md"):
        exec(block, names)
    assert names["frames"].shape == (26, 3, 64, 64)
    assert names["batch"].frames.shape == (4, 26, 3, 64, 64)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_committed_files(page: Path) -> None:
    assert report.rendered(page.read_text(), page) == page.read_text(), "run `python benchmarks/report.py`"


def test_every_rendered_file_is_of_a_clean_commit() -> None:
    """Benchmarks whose tables we show were run on a commit, without changes on top of it."""
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        measured = json.loads(file.read_text())
        assert re.fullmatch(r"[0-9a-f]{40}", measured["commit"]), file.name
        assert not measured["dirty"], file.name


def test_a_missing_marker_is_named() -> None:
    with pytest.raises(ValueError, match=r"README\.md: no '<!-- table1 -->'"):
        report.rendered("no markers", ROOT / "README.md")


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert target.startswith("https://") or (ROOT / target).exists()


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
