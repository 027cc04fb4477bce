"""Every snippet of the guides runs: blocks of a page one after another in one folder, as a reader would."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [*GUIDES, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "examples" / "README.md"]
NEEDS = {"own-videos": ("av", "decord", "safetensors", "tqdm", "tensorboard"), "adding-a-kernel": ("triton",)}
NEEDS |= {"several-gpus": ("mlxtend", "tqdm", "tensorboard"), "sweeps": ("mlxtend", "tqdm", "yaml", "matplotlib")}
NEEDS["cluster"] = NEEDS["training"] = (*NEEDS["sweeps"], "tensorboard")
NEEDS["latents"] = NEEDS["several-gpus"]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


RUN_PYTHON = "import runpy, sys; [runpy.run_path(file, run_name='__main__') for file in sys.argv[1:]]"


def commands(folder: Path, guide: Path) -> Iterator[list[str]]:
    """What runs a guide's blocks, written into a folder: bash for each of its own, python once for those in a row.

    A python block that starts with a file's name in a comment is that file, for later blocks to use. A text block is
    what the command before it prints, see `shown`."""
    python: list[str] = []
    for number, (language, text) in enumerate(blocks(guide.read_text())):
        named = re.match(r"# (\w+\.py)\n", text)
        file = folder / (named[1] if named else f"block_{number}.{language}")
        assert language in ("python", "bash", "text"), f"block {number}: {language!r} does not run"
        if language == "text":
            continue
        file.write_text(text if language == "python" else f"set -euo pipefail\n{text}")
        if "init_process_group" in text:
            continue  # a script of several processes, started by a later block
        if language == "python":
            python.append(file.name)
            continue
        if python:
            yield [sys.executable, "-c", RUN_PYTHON, *python]
            python = []
        yield ["bash", file.name]
    if python:
        yield [sys.executable, "-c", RUN_PYTHON, *python]


def shown(guide: Path) -> dict[str, list[str]]:
    """The lines that a guide says its commands print, all or some of them: {the command's file: lines}."""
    found, last = dict[str, list[str]](), ""
    for number, (language, text) in enumerate(blocks(guide.read_text())):
        if language == "text":
            found[last] = text.splitlines()
        last = f"block_{number}.{language}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_block_runs(guide: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(guide.stem, ()):
        pytest.importorskip(package)
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if guide.stem == "cluster":
        folders.insert(0, slurm.install(tmp_path / "slurm"))
    environment = {**os.environ, "PATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    for command in commands(tmp_path, guide):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr[-3000:]}"
        lines = shown(guide).get(command[-1], [])
        assert [line for line in lines if line in done.stdout.splitlines()] == lines, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_guide_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [guide.name for guide in GUIDES if f"docs/guides/{guide.name}" not in readme] == []
