"""The README's code runs, its two ways agree, and its numbers are those of the committed files."""

import importlib.util
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
