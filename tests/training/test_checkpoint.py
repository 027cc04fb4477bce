"""The files of a run are whole or not there; anything but plain data is refused."""

import contextlib
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.checkpoint import CheckpointError, read_metrics

STATE = {"model": {"weight": torch.arange(600.0)}, "step": 3, "best": float("inf"), "name": "x", "list": [1, None]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    return path


def only(folder: Path, *names: str) -> bool:
    return {path.name for path in folder.iterdir()} == set(names)


def test_what_is_saved_comes_back(file: Path) -> None:
    state = checkpoint.load(file)
    assert state.pop("generation") == checkpoint.GENERATION
    assert state["model"]["weight"].equal(STATE["model"]["weight"])
    assert {k: v for k, v in state.items() if k != "model"} == {k: v for k, v in STATE.items() if k != "model"}
    assert only(file.parent, file.name)


def test_a_write_that_fails_half_way_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full_disk(state: Any, handle: Any) -> None:
        handle.write(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left.*the one that was there is whole"):
        checkpoint.save(file, {**STATE, "step": 4})
    assert file.read_bytes() == before
    assert only(file.parent, file.name)


def test_a_killed_process_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(a: Any, b: Any) -> None:
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(file, {**STATE, "step": 4})
    assert file.read_bytes() == before
    assert only(file.parent, file.name)


def test_text_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "table.md"
    write_atomic(path, "± first")
    write_atomic(path, "± second")
    assert path.read_text(encoding="utf-8") == "± second"
    assert only(path.parent, path.name)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_any_other_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "table.md", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "table.md").stat().st_mode) == 0o666 & ~mask


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("how", ["torch", "legacy torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    path, folder = tmp_path / "last.pt", tmp_path / "was-here"
    state = {**STATE, "extra": Evil(folder)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match=f"^{path}: damaged, or not a checkpoint of plain tensors: ") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert not folder.exists()


@pytest.mark.parametrize("size", [0, 1, 4, 40, 400, 1500, -1, -30])
def test_a_truncated_checkpoint(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"^{file}: ") as error:
        checkpoint.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", [60, 700, 1300, -40])
def test_a_damaged_checkpoint_is_an_error_or_loads(file: Path, at: int) -> None:
    """A flipped byte may hit padding and do nothing. Otherwise it raises CheckpointError and nothing else."""
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        checkpoint.load(file)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"PK\x03\x04", b"\x80\x02.", b"\x89PNG\r\n\x1a\n", b"{}", pickle.dumps([1, 2], protocol=2)],
)
def test_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        checkpoint.load(path)


@pytest.mark.parametrize("state", [torch.zeros(3), [1], {}, {"state_dict": {}}, {"model": {}}, {"step": 1}])
def test_plain_data_that_is_no_checkpoint_of_ours(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "best.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"^{path}: not a checkpoint of this project"):
        checkpoint.load(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'best.pt'}: there is no such checkpoint"):
        checkpoint.load(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: "):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("state", [{}, {"model": None}, {"model": {}}, {"model": {"weight": torch.zeros(3, 3)}}])
def test_the_model_of_another_run(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^best\.pt: its model is not this run's: ") as error:
        checkpoint.restore(Path("best.pt"), state, model=torch.nn.Linear(2, 2))
    assert "\n" not in str(error.value)


# -- metrics.jsonl --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', '{"step":', "{", "\n", "\0\0\0"])
def test_a_last_line_cut_off_is_dropped(tmp_path: Path, end: str) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    assert read_metrics(file) == rows
    assert read_metrics(file, up_to=2) == rows[:2]


def test_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
