"""A trained run at work: `vjvcr_fast.load`, and `vjvcr-fast embed` from video files to safetensors."""

import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_SIMVP
from tolerances import FLOAT32, relative
from videos import Kind, cut, make_video

import vjvcr_fast
from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.data.video.decode import open_video
from vjvcr_fast.evaluation import embed as embedding
from vjvcr_fast.runs import load_run
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SIMVP = {**TINY_SIMVP, "model.kind": "simvp", "data.dataset": "folder", "data.frames_in": 2, "data.frames_out": 3}


def made_run(folder: Path, changes: dict[str, Any]) -> Path:
    """A run as training leaves one, of a model as it was drawn."""
    config = override(Config(preset="tiny"), changes)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    checkpoint.save(
        folder / "best.pt", {"model": build_model(config, CPU).state_dict(), "step": 1, "latent_weight": 0.1}
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run", SIMVP)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    pytest.importorskip("decord")
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder, "h264", 23)
    make_video(folder, Kind("libx264", "mkv", 38, 50), 11, first=40)
    make_video(folder, "mpeg4", 4, first=60)  # too short
    return folder


# -- In Python ------------------------------------------------------------------------------------------------------


def test_three_lines(run: Path) -> None:
    model = vjvcr_fast.load(run)
    frames = torch.randint(0, 256, (2, 4, 3, 20, 28), dtype=torch.uint8)
    h = model.encode(frames)
    assert (h.shape, h.dtype) == ((2, 4, model.d), torch.float32)
    assert not model.model.training
    assert h.requires_grad  # to be trained further
    resized = F.interpolate(frames.flatten(0, 1), size=16, mode="bilinear", antialias=True).float() / 255
    _, right = load_run(run)
    assert relative(h, right.encoder(resized.unflatten(0, (2, 4)))) <= FLOAT32


def test_frames_of_any_kind(run: Path) -> None:
    model = vjvcr_fast.load(str(run), device="cpu")
    frames = torch.randint(0, 256, (2, 5, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        h = model.encode(frames)
        for same in (frames.float() / 255, frames.double() / 255, frames.transpose(3, 4).contiguous().transpose(3, 4)):
            assert relative(model.encode(same), h) <= FLOAT32
        assert relative(model.predict(frames[:, :2]), model.model.predict(model.prepare(frames[:, :2]))) <= FLOAT32


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("encode", (2, 3, 16, 16), r"frames have shape \(2, 3, 16, 16\): \(N, T, C, H, W\) with C = 3 is needed"),
        ("encode", (2, 3, 4, 16, 16), r"\(2, 3, 4, 16, 16\)"),
        ("predict", (2, 3, 3, 16, 16), r"x has 3 frames: the run's 2 are needed"),
    ],
)
def test_other_shapes_are_refused(run: Path, name: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        getattr(vjvcr_fast.load(run), name)(torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_whole_numbers_of_unknown_scale_are_refused(run: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"frames are {dtype}: uint8, or floating point"):
        vjvcr_fast.load(run).encode(torch.ones(1, 2, 3, 16, 16, dtype=dtype))


def test_of_a_run_on_grey_digits(tmp_path: Path) -> None:
    model = vjvcr_fast.load(made_run(tmp_path / "digits", TINY))
    colours = torch.rand(2, 2, 3, 16, 16)
    luma = 0.299 * colours[:, :, :1] + 0.587 * colours[:, :, 1:2] + 0.114 * colours[:, :, 2:]
    assert relative(model.encode(colours), model.encode(luma)) <= FLOAT32


def test_of_a_run_with_a_latent(tmp_path: Path) -> None:
    latent = {"latent.kind": "sparse", "latent.dim": 4, "latent.iterations": 5}
    model = vjvcr_fast.load(made_run(tmp_path / "latent", {**TINY, **latent}))
    x, y = torch.rand(3, 2, 1, 16, 16), torch.rand(3, 3, 1, 16, 16)
    assert model.predict(x, y).shape == (3, 3, model.d)
    with pytest.raises(ValueError, match=r"the run has a latent \(sparse\): y is needed"):
        model.predict(x)


def test_what_is_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'none' / 'config.json'}: not a readable config file"):
        vjvcr_fast.load(tmp_path / "none")
    (run / "best.pt").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(CheckpointError, match=f"^{run / 'best.pt'}: damaged"):
        vjvcr_fast.load(run)
    (run / "best.pt").unlink()
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        vjvcr_fast.load(run)


# -- From files -----------------------------------------------------------------------------------------------------


def table(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """By the format's own library."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("stride", [1, 2])
def test_embedded_is_what_the_model_makes_of_the_frames(tmp_path: Path, videos: Path, stride: int) -> None:
    run, out = made_run(tmp_path / "run", {**SIMVP, "data.stride": stride}), tmp_path / "new" / "features.safetensors"
    assert main(["embed", str(run), str(videos), "--out", str(out), "--batch", "3", "--every", "2"]) == 0
    tensors, about = table(out)
    names, model = json.loads(about["videos"]), vjvcr_fast.load(run)
    assert [Path(name).suffix for name in names] == [".mp4", ".mkv"]
    expected = [(i, stride * s) for i, n in enumerate((23, 11)) for s in range(0, -(-n // stride) - 4, 2)]
    assert [*zip(tensors["video"].tolist(), tensors["start"].tolist(), strict=True)] == expected
    assert {k: v.shape[1:] for k, v in tensors.items() if v.ndim > 1} == {
        "h_x": (2, model.d), "h_y": (3, model.d), "predicted": (3, model.d)
    }  # fmt: skip
    for row, (i, start) in enumerate(expected):
        frames = open_video(names[i]).frames(range(start, start + 5 * stride, stride), size=16)[None]
        with torch.no_grad():
            assert relative(tensors["h_x"][row], model.encode(frames[:, :2])[0]) <= FLOAT32
            assert relative(tensors["h_y"][row], model.encode(frames[:, 2:])[0]) <= FLOAT32
            assert relative(tensors["predicted"][row], model.predict(frames[:, :2])[0]) <= FLOAT32
    assert about["checkpoint"] == checkpoint.digest(run / "best.pt")
    assert (about["latent"], about["stride"]) == ("none", str(stride))


def test_nothing_grows_with_the_windows(
    tmp_path: Path, run: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than a batch of features at a time; windows follow one another without overlap by default."""
    most = []
    features = embedding._features

    def seen(trained: Any, frames: torch.Tensor) -> Any:
        most.append(len(frames))
        return features(trained, frames)

    monkeypatch.setattr(embedding, "_features", seen)
    config = Config.load(run / "config.json")
    done = embedding.embed(run, [videos], tmp_path / "f.safetensors", config, batch=2)
    assert (done.windows, len(done.videos), done.bad) == (4 + 2, 2, {})
    assert most == [2, 2, 2]
    content = (tmp_path / "f.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert (8 + length) % 8 == 0
    assert len(content) == 8 + length + max(ends)


def test_with_a_latent(tmp_path: Path, videos: Path) -> None:
    latent = {"latent.kind": "sparse", "latent.dim": 4, "latent.iterations": 5}
    run, out = made_run(tmp_path / "run", {**SIMVP, **latent}), tmp_path / "f.safetensors"
    assert main(["embed", str(run), str(videos), "--out", str(out)]) == 0
    tensors, about = table(out)
    assert about["latent"] == "sparse"
    model = vjvcr_fast.load(run)
    frames = open_video(json.loads(about["videos"])[0]).frames(range(5), size=16)[None]
    assert relative(tensors["predicted"][0], model.predict(frames[:, :2], frames[:, 2:])[0].detach()) <= 1e-3


def test_with_a_saved_model(tmp_path: Path, run: Path, videos: Path) -> None:
    pytest.importorskip("safetensors")
    folder = tmp_path / "saved"
    vjvcr_fast.load(run).save_pretrained(folder)
    for model, name in ((run, "ours"), (folder, "theirs")):
        assert main(["embed", str(model), str(videos), "--out", str(tmp_path / name)]) == 0
    ours, theirs = table(tmp_path / "ours"), table(tmp_path / "theirs")
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert theirs[1]["checkpoint"] == checkpoint.digest(folder / "model.safetensors")


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    assert main(["embed", *arguments]) == code
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vjvcr-fast")]
    assert len(said) == 1
    return said[0]


def test_errors(tmp_path: Path, run: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "f.safetensors")]
    assert "no such file" in fails(capsys, [str(run), str(videos / "none.mp4"), *out], 1).lower()
    assert "not the folder of a run" in fails(capsys, [str(videos), str(videos), *out], 2)
    assert "--batch=0: must be at least 1" in fails(capsys, [str(run), str(videos), *out, "--batch", "0"], 2)
    (tmp_path / "empty").mkdir()
    assert "no videos" in fails(capsys, [str(run), str(tmp_path / "empty"), *out], 1)
    short = next(videos.glob("*.avi"))
    assert "1 videos, but none has 5 frames at stride 1" in fails(capsys, [str(run), str(short), *out], 1)
    assert "a folder; the name of a file is needed" in fails(capsys, [str(run), str(videos), "--out", str(tmp_path)], 2)
    assert not [*tmp_path.glob("*f.safetensors*")]


def test_a_video_is_not_overwritten(
    tmp_path: Path, run: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.mp4"
    own.write_bytes(next(videos.glob("*.mp4")).read_bytes())
    (tmp_path / "link.mp4").symlink_to(own)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    before = own.read_bytes()
    for out in (own, tmp_path / "link.mp4", bad):
        assert "is one of the videos" in fails(capsys, [str(run), str(own), str(bad), "--out", str(out)], 2)
    assert (own.read_bytes(), bad.read_bytes()) == (before, b"no video")


def test_a_video_that_changes_at_work_leaves_nothing_behind(
    tmp_path: Path, run: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its windows have their places in the file already, so not even "skip" can leave it out."""
    whole, own, look = next(videos.glob("*.mp4")), tmp_path / "own.mp4", embedding._clips
    own.write_bytes(whole.read_bytes())

    def cut_off(*arguments: Any) -> Any:
        found = look(*arguments)
        own.write_bytes(b"")
        return found

    monkeypatch.setattr(embedding, "_clips", cut_off)
    out = tmp_path / "f.safetensors"
    out.write_bytes(b"from before")
    arguments = [str(run), str(whole), str(own), "--out", str(out), "--on-bad-video", "skip"]
    assert str(own) in fails(capsys, arguments, 1)
    assert out.read_bytes() == b"from before"
    assert not [*tmp_path.glob(".*")]


def test_a_full_disk_is_an_error(
    tmp_path: Path, run: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    out = tmp_path / "f.safetensors"
    assert "No space left" in fails(capsys, [str(run), str(videos), "--out", str(out)], 1)
    assert not [*tmp_path.glob("*f.safetensors*")]


def test_a_bad_video_stops_or_is_left_out(
    tmp_path: Path, run: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = next(videos.glob("*.mp4"))
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(cut(whole, 0.6).read_bytes())
    cut(whole, 0.6).unlink()
    arguments = [str(run), str(bad), str(whole), "--out", str(tmp_path / "f.safetensors")]
    assert str(bad) in fails(capsys, arguments, 1)
    assert main(["embed", *arguments, "--on-bad-video", "skip"]) == 0
    captured = capsys.readouterr()
    assert f"left out: {bad}" in captured.err
    assert captured.out == f"{tmp_path / 'f.safetensors'}: 4 windows of 1 videos\n"
