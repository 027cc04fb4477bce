"""What the pages of tables and figures share."""

import subprocess
from pathlib import Path

import pytest

import vjvcr_fast
from vjvcr_fast.paper.machine import checkout
from vjvcr_fast.paper.pages import percent, table_head, table_row

ROOT = Path(__file__).parents[2]


def test_the_commit_of_a_checkout() -> None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode or not (ROOT / ".git").exists():
        pytest.skip("the tests do not run in a git checkout")
    assert checkout().removesuffix("-dirty") == git.stdout[:10]


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vjvcr_fast, "__file__", str(tmp_path / "vjvcr_fast" / "__init__.py"))
    assert checkout.__wrapped__() == f"of version {vjvcr_fast.__version__}"


def test_markdown() -> None:
    assert table_head(["a", "b"]) == ["| a | b |", "| --- | --- |"]
    assert table_row(["1", ""]) == "| 1 |  |"
    assert percent([{"map": 0.5}, {"map": 0.7}], "map") == "60.0 ± 14.1%"
