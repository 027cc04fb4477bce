"""The examples run, and show what they are for: features collapse without VCR, and vary with it."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
# Runs a script, given with its arguments. What it compiles becomes one graph, but no machine code, which takes long.
TRACED = """
import functools, runpy, sys, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str, cwd: Path) -> dict[str, dict[str, float]]:
    """Runs Python with these arguments. Returns the table that an example ends with, {"with VCR": {name: number}}."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr[-3000:]}"
    rows = re.findall(r"^(with|without)[ -]vcr *: (feature_std .*)$", done.stdout, re.IGNORECASE | re.MULTILINE)
    return {name: {k: float(v) for k, v in re.findall(r"(\w+) ([\d.]+)", row)} for name, row in rows}


def check(table: dict[str, dict[str, float]]) -> None:
    assert {*table} == {"with", "without"}
    assert table["without"]["feature_std"] < 0.01
    assert table["with"]["feature_std"] > 0.5
    assert table["with"]["rank_me"] > 2 * table["without"]["rank_me"]


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.slow
def test_plain_loop(tmp_path: Path) -> None:
    needs("mlxtend")
    plain = run(str(EXAMPLES / "plain_loop.py"), cwd=tmp_path)
    check(plain)
    compiled = run("-c", TRACED, str(EXAMPLES / "plain_loop.py"), "--compile", cwd=tmp_path)
    assert compiled["with"] == pytest.approx(plain["with"], abs=0.01)


def logged(file: Path) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file.open())]


@pytest.mark.slow
def test_lightning(tmp_path: Path) -> None:
    """Two processes train as one does on the whole batch: losses and telemetry are the same at every step logged."""
    needs("mlxtend", "pytorch_lightning")
    for devices in (1, 2):
        check(run(str(EXAMPLES / "lightning_loop.py"), f"--devices={devices}", "--out=logs", cwd=tmp_path))
    for name in ("without-vcr", "with-vcr"):
        one, two = (logged(tmp_path / "logs" / name / f"version_{k}" / "metrics.csv") for k in (1, 2))
        assert len(one) == 10
        assert [{*row} for row in one] == [{*row} for row in two]
        # Each process rounds sums of its own; training enlarges that, and flips a ReLU now and then. A loss of each
        # part of the batch would be off by 4% from the first step on.
        for rows, rel in ((slice(5), 1e-4), (slice(5, None), 1e-2)):
            for key in ("loss", "feature_std"):
                assert [row[key] for row in two[rows]] == pytest.approx([row[key] for row in one[rows]], rel=rel)


@pytest.mark.slow
def test_accelerate(tmp_path: Path) -> None:
    """Two processes end where one does."""
    needs("mlxtend", "accelerate")
    one, two = (run(*launcher, str(EXAMPLES / "accelerate_loop.py"), cwd=tmp_path) for launcher in ([], LAUNCH))
    check(one)
    assert two["with"] == pytest.approx(one["with"], abs=0.01)


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks(notebook: Path, tmp_path: Path) -> None:
    """Every cell runs; the last one asserts what the notebook shows."""
    needs("mlxtend", "matplotlib", "ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    content = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(content, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in content.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_no_outputs_and_their_links_lead_somewhere(notebook: Path) -> None:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert [link for link in re.findall(r"\]\(([^)#]+)", prose) if not (EXAMPLES / link).exists()] == []


def test_every_example_is_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    files = [*EXAMPLES.glob("*.py"), *NOTEBOOKS]
    assert [file.name for file in files if file.name not in readme] == []
    assert [file.name for file in files if len(file.read_text().splitlines()) > 100 and file.suffix == ".py"] == []
