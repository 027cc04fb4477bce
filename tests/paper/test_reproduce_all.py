"""`reproduce all`: its page, parts that fail or lack data (the others are still made), and stopping it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, wait_for_steps

from vjvcr_fast.cli import main
from vjvcr_fast.paper import ReproduceError, figures, reproduce_all
from vjvcr_fast.paper.reproduce_all import PARTS, Made, Part

ONE = ["--processes", "1"]  # at a time; several are those of tests/paper/test_jobs.py
OPTIONS = [f"--{name}={value}" for name, value in TINY.items()]
OF_DIGITS = tuple(part for part in PARTS if not part.files)
LACKING = tuple(part for part in PARTS if part.files == "cater")


def in_this_process(command: Sequence[str], log: Path) -> Made:
    """Replaces `reproduce_all._run`."""
    began = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file):
        assert main(command) == 0
    return reproduce_all._spent(log, time.perf_counter() - began, 51.0)


@pytest.mark.usefixtures("digits", "one_thread")
@pytest.mark.parametrize("run", [in_this_process, pytest.param(reproduce_all._run, marks=pytest.mark.slow)])
def test_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Any) -> None:
    monkeypatch.setattr(reproduce_all, "_run", run)
    for name in ("spectrum", "probes"):  # they take a second, and the page has them not
        monkeypatch.setattr(figures, name, lambda *_: None)
    monkeypatch.setattr(reproduce_all, "PARTS", (OF_DIGITS[0], *LACKING))
    monkeypatch.setattr(reproduce_all.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "all"
    assert main(["reproduce", "all", "--out", str(out), "--seeds", "0,1", *ONE, *OPTIONS]) == 0
    page = (out / "summary.md").read_text()
    assert "## Table 1, MovingMNIST, and figure 5" in page
    assert "| VJ-VCR with decoder | yes | yes | yes |" in page
    assert "± " in page
    assert "left out: no mujoco, av, pebble to simulate videos: pip install 'vjvcr_fast[simulate,video]'" in page
    assert "## Figure 2" not in page
    assert page in capsys.readouterr().out
    for image in ("figure5.png", "curves.png"):
        assert f"(mnist/{image})" in page
        assert (out / "mnist" / image).stat().st_size > 0
    first = json.loads((out / "mnist" / "cost.json").read_text())["table1"]
    assert first["seconds"] > 1
    assert first["memory"] > 50

    began = (out / "mnist" / "vj-vcr-seed1" / "evaluation.json").stat().st_mtime_ns
    assert main(["reproduce", "all", "--out", str(out), "--seeds", "0,1", *ONE, *OPTIONS]) == 0
    assert (out / "mnist" / "vj-vcr-seed1" / "evaluation.json").stat().st_mtime_ns == began
    assert json.loads((out / "mnist" / "cost.json").read_text())["table1"]["seconds"] > first["seconds"]


def test_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Part("Broken", "table1", "moving-mnist", "broken", ())
    monkeypatch.setattr(reproduce_all, "PARTS", (broken, LACKING[0]))
    monkeypatch.setattr(reproduce_all.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReproduceError, match="1 of 2 parts failed"):
        reproduce_all.reproduce_all(tmp_path, [0], {"data.root": "/there/is/none"}, {})
    page = (tmp_path / "summary.md").read_text()
    assert "| Broken | " in page
    assert "exit code 1" in page
    assert "## Broken" not in page


def test_folders_that_are_given_are_used(tmp_path: Path) -> None:
    assert reproduce_all._data("cater", "cater-small", tmp_path, {"cater": "/somewhere"}, {}) == "/somewhere"


@pytest.mark.parametrize(("root", "strided"), [("cater-videos", True), ("mine", False)])
def test_of_simulated_videos_every_frame_is_taken(tmp_path: Path, monkeypatch, root: str, strided: bool) -> None:
    asked: list[str] = []
    monkeypatch.setattr(reproduce_all, "_run", lambda command, log: asked.extend(command))
    part = next(part for part in PARTS if part.files == "cater")
    reproduce_all._make(part, "cater-small", tmp_path, {}, str(tmp_path / root), [])
    assert ("--data.stride=1" in asked) == strided


def test_full_presets_simulate_nothing(tmp_path: Path) -> None:
    left_out = reproduce_all._data("cater", "cater", tmp_path, {}, {})
    assert left_out == "left out: give the folder of its videos, --cater DIR"


@pytest.mark.parametrize("scale", [None, "small"])
def test_commands_of_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str | None) -> None:
    """Presets, simulated videos and results of the scale; the mini presets of video files are shortened."""
    asked: list[str] = []
    monkeypatch.setattr(reproduce_all, "_run", lambda command, log: asked.append(" ".join(command)) or Made(1, 1, "no"))
    monkeypatch.setattr(reproduce_all.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(reproduce_all.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(reproduce_all.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(reproduce_all, "_data", lambda name, preset, *_: f"videos-of-{preset}")
    with pytest.raises(ReproduceError):
        reproduce_all.reproduce_all(tmp_path, [0], {}, {}, scale=scale, store="kept")
    ending = scale or "mini"
    for part, command in zip(PARTS, asked, strict=True):
        assert f"{part.target} --preset {part.preset}-{ending} " in command
        assert "--results kept" in command
        assert (f"--data.root=videos-of-{part.preset}-{ending}" in command) == bool(part.files)
        assert ("--train.steps=" in command) == (part.files != "" and scale is None)


def test_videos_that_could_not_be_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed simulation counts as a failure, and the page shows what it took."""
    monkeypatch.setattr(reproduce_all, "PARTS", LACKING)
    monkeypatch.setattr(reproduce_all.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(reproduce_all.SIMULATED, "cater-mini", ["--videos", "none"])
    with pytest.raises(ReproduceError, match="1 of 3 parts failed"):
        reproduce_all.reproduce_all(tmp_path, [0], {}, {})
    page = (tmp_path / "summary.md").read_text()
    assert (
        "| videos in the format of cater | 0.0 min |" in page or "| videos in the format of cater | 0.1 min |" in page
    )
    assert "left out: its videos were not simulated, see cater-videos.log" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "moving-mnist"], "has presets of its own"),
        (["--clevrer", "/there/is/none"], "--clevrer=/there/is/none: no such folder"),
        (["--train.lr", "x"], "train.lr='x'"),
        (["--seeds", "1,1"], "must be different"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["reproduce", "all", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_every_part_is_a_command_with_these_files() -> None:
    from vjvcr_fast.cli_reproduce import TARGETS
    from vjvcr_fast.config import PRESETS

    for part in PARTS:
        assert part.target in TARGETS
        assert {part.preset, f"{part.preset}-mini", f"{part.preset}-small"} <= set(PRESETS)
        assert not part.files or {f"{part.preset}-mini", f"{part.preset}-small"} <= set(reproduce_all.SIMULATED)


@pytest.mark.slow
def test_a_stop_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vjvcr_fast", "reproduce", "all", "--out", str(tmp_path), *OPTIONS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--train.steps=100000", "--train.validate_every=50000"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = tmp_path / "mnist" / "vj-vcr-seed0"
    try:
        wait_for_steps(run)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert "run the same command again" in error
    assert (run / "last.pt").exists()
