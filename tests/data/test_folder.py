"""Any folder of videos: which files are found, their split and windows; training and evaluating on them."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_SIMVP
from videos import Kind, cut, make_video, read_number

from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, ConfigError, override, preset
from vjvcr_fast.data.folder import ClipFolder, FolderError, load_split, videos_below
from vjvcr_fast.data.video.clips import Source
from vjvcr_fast.data.video.decode import VideoError
from vjvcr_fast.training.checkpoint import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {**TINY_SIMVP, "data.dataset": "folder", "data.frames_in": 2, "data.frames_out": 3, "data.stride": 1}
SETTINGS = {"train.steps": 4, "train.validate_every": 2, "train.validation_videos": 8, "evaluate.validation_videos": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five videos of three kinds and sizes."""
    pytest.importorskip("av")
    pytest.importorskip("decord")
    folder = tmp_path_factory.mktemp("made")
    kinds: list[str | Kind] = ["h264", "h264-mkv", "vp8", Kind("libx264", "mov", 38, 50), "mpeg4"]
    return [make_video(folder, kind, 12 + 4 * i, first=20 * i) for i, kind in enumerate(kinds)]


@pytest.fixture
def root(made: list[Path], tmp_path: Path) -> Path:
    """They, in folders of folders, with a trap beside each."""
    top = tmp_path / "videos"
    for i, path in enumerate(made):
        place = top / ("a" if i < 2 else "b c/d") / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    shutil.copy(made[0], top / ".hidden.mp4")
    (top / ".cache").mkdir()
    shutil.copy(made[0], top / ".cache" / "x.mp4")
    (top / "vjvcr-cache").mkdir()
    shutil.copy(made[0], top / "vjvcr-cache" / "x.mp4")
    (top / "notes.txt").write_text("not a video")
    (top / "a" / "loop").symlink_to(top, target_is_directory=True)
    return top


def names(split: list[Source]) -> list[str]:
    return [source.name for source in split]


def test_files_are_known_by_their_suffix(root: Path) -> None:
    found = videos_below(root)
    assert len(found) == 5
    assert found == sorted(found)
    assert not any(part.startswith(".") or part == "vjvcr-cache" for path in found for part in path.parts[-3:])


def test_splits_are_by_name_and_stay(root: Path, made: list[Path]) -> None:
    train, validation = (load_split(root, split, 2, 3).sources for split in ("train", "validation"))
    assert {*names(train), *names(validation)} == {p.relative_to(root).as_posix() for p in videos_below(root)}
    assert len(validation) == 1
    moved = root.rename(root.with_name("elsewhere"))
    for i in range(60):
        os.link(made[0], moved / f"new-{i}.mp4")
    again = load_split(moved, "train", 2, 3).sources
    assert {*names(train)} <= {*names(again)}
    assert 0 < 65 - len(again) < 20


def test_folders_that_say_so_are_the_splits(root: Path) -> None:
    (root / "a").rename(root / "val")
    (root / "b c").rename(root / "train")
    assert {name.split("/")[0] for name in names(load_split(root, "train", 2, 3).sources)} == {"train"}
    assert {name.split("/")[0] for name in names(load_split(root, "validation", 2, 3).sources)} == {"val"}
    assert len(load_split(root, None, 2, 3)) == 5


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_start_anywhere(root: Path, made: list[Path], stride: int) -> None:
    whole = load_split(root, None, 2, 2, stride)
    for source in whole.sources:
        frames = next(12 + 4 * i for i, path in enumerate(made) if path.name == Path(source.name).name)
        count = -(-frames // stride)
        assert source.frames == count
        assert source.starts.tolist() == [*range(count - 3)]
        assert source.targets.tolist() == [0.0] * (count - 3)
    assert whole.source == "folder of videos: 5 videos"


def test_short_videos_are_left_out_and_noted(root: Path, tmp_path: Path) -> None:
    whole = load_split(root, None, 10, 10)
    assert len(whole) == 3
    assert whole.notes[0].startswith("all: 2 with fewer than 20 frames at stride 1 left out: ")
    with pytest.raises(FolderError, match="5 videos for all, but none has 99 frames at stride 1"):
        load_split(root, None, 90, 9)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.ts").write_text("x")
    with pytest.raises(FolderError, match="1 videos for all, but none has 4 frames at stride 1; 1 cannot be read"):
        load_split(bad, None, 2, 2, on_bad="skip")


def test_clips_in_a_few_lines(root: Path) -> None:
    clips = ClipFolder(root, frames=4, size=(24, 40), seed=3)
    batch = next(clips.batches(step=0, n=6))
    assert (batch.frames.shape, batch.frames.dtype) == ((6, 4, 3, 24, 40), torch.uint8)
    for video in batch.frames:
        first = read_number(video[0])
        assert [read_number(frame) for frame in video] == [*range(first, first + 4)]
    everything = torch.cat([part.frames for part in clips.in_order(7)])
    assert len(everything) == sum(12 + 4 * i - 3 for i in range(5))
    numbers = [read_number(video[0]) for video in everything]
    assert sorted(numbers) == sorted(20 * i + k for i in range(5) for k in range(12 + 4 * i - 3))


def test_what_is_wrong_with_a_folder(tmp_path: Path, made: list[Path]) -> None:
    def says(path: Path, text: str, split: str | None = None) -> None:
        with pytest.raises(FolderError, match=f"^{path}: {text}"):
            load_split(path, split, 2, 3)

    says(tmp_path / "none", "no such folder")
    (tmp_path / "file").write_text("x")
    says(tmp_path / "file", "not a folder")
    (tmp_path / "empty").mkdir()
    says(tmp_path / "empty", r"no videos; of files named \*\.3gp, ")
    (tmp_path / "one").mkdir()
    shutil.copy(made[0], tmp_path / "one")
    says(tmp_path / "one", "only one video; training and validation need one each", "train")
    assert len(load_split(tmp_path / "one", None, 2, 3)) == 1


def test_a_bad_file_stops_or_is_left_out(root: Path) -> None:
    bad = cut(videos_below(root)[0], 0.5)
    with pytest.raises(VideoError, match=f"^{bad}: "):
        load_split(root, None, 2, 3)
    whole = load_split(root, None, 2, 3, on_bad="skip")
    assert (len(whole), [*whole.bad]) == (5, [bad.relative_to(root).as_posix()])


# -- Training, evaluating -------------------------------------------------------------------------------------------


def arguments(root: Path, **changes: object) -> list[str]:
    values = {**SMALL, **SETTINGS, **{k.replace("__", "."): v for k, v in changes.items()}}
    values.pop("data.dataset")
    return [f"--data.root={root}", *(f"--{name}={value}" for name, value in values.items())]


def test_train_and_evaluate(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the issue's command line, from the files and from the cache."""
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train", "--data", "folder", *arguments(root)]) == 0
    run = tmp_path / "runs" / "clevrer-mini-folder-vj-vcr-seed0"
    config = Config.load(run / "config.json")
    assert (config.preset, config.data.dataset) == ("clevrer-mini", "folder")
    assert config.latent == preset("clevrer-mini").latent
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "validation_loss" in row] == [2, 4]
    assert main(["cache", "--data", "folder", *[a for a in arguments(root) if a.startswith("--data.")]]) == 0
    assert main(["train", "--data", "folder", "--out", str(tmp_path / "cached"), *arguments(root)]) == 0
    ours, cached = ([row.get("loss") for row in read_metrics(r / "metrics.jsonl")] for r in (run, tmp_path / "cached"))
    assert ours == cached
    capsys.readouterr()
    assert main(["evaluate", str(run), "--evaluate.decoder-steps", "2"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["rank_me"] > 1
    assert result["psnr"] > 0
    assert result["data"] == "folder of videos: 4 videos"
    assert not any(name.startswith("speed") for name in result)
    assert "speed" not in capsys.readouterr().out


def test_a_run_with_a_latent_is_measured_at_what_is_inferred(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    run = tmp_path / "run"
    latent = ["--latent.kind=sparse", "--latent.dim=3", "--latent.iterations=3"]
    assert main(["train", "--data", "folder", "--out", str(run), *arguments(root), *latent]) == 0
    assert main(["evaluate", str(run), "--evaluate.decoder-steps", "2"]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert result["latent"] == "sparse"
    assert result["psnr"] > 0


def test_table1_needs_speeds(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["reproduce", "table1", "--data", "folder", "--out", str(tmp_path / "t"), f"--data.root={root}"]
    assert main(asked) == 2
    assert "data.dataset=folder: table 1 measures speeds, and none is known there" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_no_speed_to_probe(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.probe_every=100: must be 0 \(never\) where data\.dataset=folder"):
        override(preset("clevrer-mini"), {"data.dataset": "folder", "train.probe_every": 100})


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "folder", "--data.root", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 1
    assert re.fullmatch(r"(no cache.*\n)?vjvcr-fast: .*none: no such folder\n", capsys.readouterr().err)
    assert not (tmp_path / "o" / "last.pt").exists()
