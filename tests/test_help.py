"""Help that helps: options in groups with the defaults that hold, presets side by side, the word that was meant."""

import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_cli import code_of, fails
from test_embed import made_run

from vjvcr_fast.cli import main
from vjvcr_fast.config import PRESETS, fields, shown
from vjvcr_fast.data.digits import ENVIRONMENT

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert code_of([*arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


# -- Groups and defaults --------------------------------------------------------------------------------------------


def test_options_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = [line[:-1] for line in shown.splitlines() if re.fullmatch(r"[a-z]+:", line)]
    assert titles == ["options", "data", "model", "latent", "training", "evaluation"]
    parts = re.split(r"^[a-z]+:$", shown, flags=re.MULTILINE)[2:]
    for part, group in zip(parts, ("data", "model", "latent", "train", "evaluate"), strict=True):
        assert {name.split(".")[0] for name in fields() if f"--{name}" in part} == {group}
    assert "  --data.frames_in, --frames-in X\n" in shown
    assert "  --evaluate.validation_videos X\n" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], ["preset moving-mnist-mini", "optimizer steps; 21,500", "(default: 1200)"]),
        (["train", "--preset", "cater"], ["preset cater", "(default: 480)", "(default: 32,64,64,64)"]),
        (["train", "--data", "clevrer"], ["preset clevrer-mini", "(default: 800)"]),
        (["scan"], ["preset clevrer-mini"]),
        (["reproduce", "fig2"], ["preset cater-mini", "folder of CLEVRER's videos"]),
        (["reproduce", "all"], ["preset moving-mnist-mini"]),
        (["evaluate"], ["preset moving-mnist-mini", "(default: 8192)"]),
        (["evaluate", "run"], ["those of run", "(default: 48)"]),
        (["train", "--config", "run/config.json"], ["those of run/config.json", "(default: 12)"]),
    ],
)
def test_defaults_are_those_that_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    """Wherever --help stands."""
    made_run(tmp_path / "run", TINY)
    for order in ([*arguments, "--help"], [arguments[0], "-h", *arguments[1:]]):
        text = helped(capsys, *order)
        for part in says:
            assert part in text, text


def test_help_of_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "preset='catr': must be one of" in fails(capsys, ["train", "--preset", "catr", "--help"])
    assert "none: not the folder of a run" in fails(capsys, ["evaluate", "none", "--help"])


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {name: values for name, *values in (line.split() for line in lines if not line.startswith(" "))}
    for i, config in enumerate(PRESETS.values()):
        for field, values in rows.items():
            assert values[i] == shown(attrgetter(field)(config))
    assert all(len(set(values)) > 1 for values in rows.values())
    assert {"data.dataset", "model.channels", "train.steps"} <= rows.keys()
    assert "train.lr" not in rows  # the same in all
    head = lines[: len(lines) - len(rows)]
    starts = [part.start() for part in re.finditer(r"\S+", head[0])]
    columns = [[line[a:b].strip() for line in head] for a, b in pairwise([*starts, 999])]
    assert ["".join(column) for column in columns] == [*PRESETS]


def test_two_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "clevrer", "clevrer-mini"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^data.canvas +64 +32$", shown, re.MULTILINE)
    assert "data.dataset" not in shown
    assert "did you mean clevrer-mini?" in fails(capsys, ["presets", "clever-mini"])


def test_one_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to compare it with: every field is shown."""
    assert main(["presets", "clevrer"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in lines[1:]] == [*fields()]


# -- The word that was meant ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["tarin"], "train"),
        (["Evaluate"], "evaluate"),
        (["--verison"], "--version"),
        (["reproduce", "tabel1"], "table1"),
        (["simulate", "clever", "--out", "x"], "clevrer"),
        (["train", "--resume", "atuo"], "auto"),
        (["train", "--STEPS", "3"], "--steps"),
        (["train", "--data.rot", "x"], "--data.root"),
        (["train", "--preset", "moving-minst"], "moving-mnist"),
        (["train", "--latent", "spars-high"], "sparse-high"),
        (["train", "--row", "generativ-vcr"], "generative-vcr"),
        (["train", "--dataset", "CLEVRER"], "clevrer"),
        (["train", "--download", "fasle"], "false"),
        (["train", "--latent.method", "newtn"], "newton"),
    ],
)
def test_a_typo_proposes_the_right_word(capsys: pytest.CaptureFixture[str], arguments: list[str], meant: str) -> None:
    assert re.search(rf"did you mean {re.escape(meant)}( or [^?]+)?\?", fails(capsys, arguments))


def test_a_typo_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.json").write_text('{"train": {"stesp": 3}}')
    assert "c.json: train.stesp: no such field; did you mean train.steps?" in fails(
        capsys, ["train", "--config=c.json"]
    )


def test_a_word_like_no_other_has_no_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["zzzz"], ["train", "--preset", "zzzz"], ["train", "--row", "zzzz"], ["reproduce", "zzzz"]):
        assert "did you mean" not in fails(capsys, arguments)


# -- Which option is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["moving-mnist", "clevrer", "cater", "folder"])
def test_an_error_names_the_option_of_the_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    train = ["train", "--data", dataset, "--out", "run", "--cache", "off"]
    for folder in ("nowhere", "empty"):
        Path("empty").mkdir(exist_ok=True)
        assert fails(capsys, [*train, "--data.root", folder], 1).startswith(f"vjvcr-fast: --data.root: {folder}: ")
        monkeypatch.setenv(ENVIRONMENT, folder)
        assert fails(capsys, train, 1).startswith(f"vjvcr-fast: {ENVIRONMENT}: {folder}: ")
        monkeypatch.delenv(ENVIRONMENT)


def test_an_error_names_no_option_that_was_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    """`scan` takes the folder without one."""
    assert fails(capsys, ["scan", "nowhere"], 1) == "vjvcr-fast: nowhere: no such folder\n"


def test_interrupted_during_import(tmp_path: Path) -> None:
    """Ctrl-C while torch is imported, here a torch that takes a minute for it."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "vjvcr_fast", "train"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **streams) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT
