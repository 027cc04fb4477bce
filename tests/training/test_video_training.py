"""Training and evaluating on video files, from the command line to Table 1."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import clevrer_files
import pytest
import torch
from conftest import TINY_SIMVP

from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, ConfigError, override, preset
from vjvcr_fast.evaluation.latent_probes import evaluate_latents
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.models.simvp import SimVPEncoder
from vjvcr_fast.paper import table1 as paper
from vjvcr_fast.training.build import build_data, build_model, build_videos, cache_folder, fill_cache
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.loop import train
from vjvcr_fast.training.step import split_frames

pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
pytest.importorskip("decord", reason="the extra video is not installed: no decoder")
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = TINY_SIMVP | {
    "data.frames_in": 2,
    "data.frames_out": 3,
    "data.stride": 1,
    "train.steps": 6,
    "train.validate_every": 3,
    "train.validation_videos": 8,
    "evaluate.probe_videos": 24,
    "evaluate.validation_videos": 12,
    "evaluate.probe_epochs": 2,
    "evaluate.probe_batch": 8,
    "evaluate.decoder_steps": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clevrer_files.make(tmp_path_factory.mktemp("clevrer"))


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "data"))


@pytest.fixture
def config(root: Path) -> Config:
    return override(preset("clevrer-mini"), TINY | {"data.root": str(root)})


def options(root: Path) -> list[str]:
    values = TINY | {"data.root": root}
    return ["--preset", "clevrer-mini", *(f"--{name}={value}" for name, value in values.items())]


def losses(run: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if name in row]


def test_presets_have_the_papers_numbers() -> None:
    full, mini = preset("clevrer"), preset("clevrer-mini")
    assert (full.data.frames_in, full.data.frames_out, full.data.canvas) == (6, 20, 64)
    assert (full.model.alpha, full.model.beta, full.train.batch, full.train.lr) == (1.0, 0.1, 256, 1e-3)
    assert (full.evaluate.probe_lr, full.evaluate.probe_lr_generative) == (1e-3, 1e-4)
    assert full.d == 2048
    for of in (full, mini):
        model = build_model(of, CPU)
        x = torch.rand(2, of.data.frames_in, 3, of.data.canvas, of.data.canvas)
        assert model.predict(x).shape == (2, of.data.frames_out, of.d)


def test_frames_become_floats_between_0_and_1(config: Config) -> None:
    part, _ = build_data(config)
    videos = build_videos(config, part, "train", CPU)
    x, y = split_frames(videos.batch(0, 4), config)
    assert (x.shape, y.shape) == ((4, 2, 3, 16, 16), (4, 3, 3, 16, 16))
    assert x.dtype == torch.float32
    frames = torch.cat([x, y], dim=1)
    assert frames.mul(255).round().byte().equal(videos.batch(0, 4).frames)
    assert 0 <= frames.min() < frames.max() <= 1


def test_only_what_is_trained_on_is_mirrored(config: Config) -> None:
    mirrored, (part, _) = override(config, {"data.mirror": True}), build_data(config)
    for stream, same in (("train", False), ("probe", True), ("decoder", True), ("validation", True)):
        frames = [build_videos(of, part, stream, CPU).batch(0, 8).frames for of in (config, mirrored)]
        assert frames[0].equal(frames[1]) == same


@pytest.mark.parametrize("row", ["vj-vcr", "generative-vcr"])
def test_a_stopped_run_goes_on_as_if_never_stopped(config: Config, tmp_path: Path, row: str) -> None:
    config = override(config, {"model.row": row})
    train(config, tmp_path / "whole")
    train(override(config, {"train.steps": 3}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "parts")[-1]
    states = [torch.load(tmp_path / run / "last.pt")["model"] for run in ("whole", "parts")]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_neither_cache_nor_decoder_nor_checkpointing_changes_a_run(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "decoded")
    train(override(config, {"model.checkpoint": True}), tmp_path / "recomputed")
    if shutil.which("ffmpeg"):
        train(override(config, {"data.decoder": "torchcodec"}), tmp_path / "torchcodec")
    fill_cache(config)
    train(config, tmp_path / "cached")
    train(override(config, {"data.cache": "off"}), tmp_path / "off")
    runs = [path for path in tmp_path.iterdir() if (path / "metrics.jsonl").exists()]
    assert len(runs) >= 4
    assert all(losses(run) == losses(tmp_path / "decoded") for run in runs)


def test_chunks_change_a_run_by_rounding_alone(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps, validation and telemetry the encoder sees a chunk at a time."""
    watched, seen, forward = override(config, {"train.telemetry_every": 3}), [], SimVPEncoder.forward

    def counted(self: SimVPEncoder, frames: torch.Tensor) -> torch.Tensor:
        seen.append(len(frames))
        return forward(self, frames)

    train(watched, tmp_path / "whole")
    monkeypatch.setattr(SimVPEncoder, "forward", counted)
    train(override(watched, {"train.chunk": 3}), tmp_path / "chunks")
    assert max(seen) == 3
    for name in ("loss", "validation_loss", "feature_std"):
        whole, chunks = (losses(tmp_path / run, name) for run in ("whole", "chunks"))
        assert whole
        assert chunks == pytest.approx(whole, rel=1e-4), name
    mixing = override(config, {"model.kind": "conv", "model.channels": "4,4,8", "train.chunk": 2})
    with pytest.raises(ConfigError, match=r"train\.chunk=2: .* encoder\.spatial\.0\.1 \(BatchNorm2d\)"):
        train(mixing, tmp_path / "conv")


def test_other_videos_are_refused(config: Config, root: Path, tmp_path: Path) -> None:
    train(override(config, {"train.steps": 3}), tmp_path / "run")
    for path in clevrer_files.paths(root, "train", 5):
        path.unlink()
    with pytest.raises(ConfigError, match="was trained on CLEVRER: 6 videos; here are CLEVRER: 5 videos"):
        train(config, tmp_path / "run")


def test_the_share_of_waiting_is_logged(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path)
    shares = [row["data_wait"] for row in read_metrics(tmp_path / "metrics.jsonl") if "data_wait" in row]
    assert len(shares) == 3
    assert all(0 <= share <= 1 for share in shares)


def test_sparse_latents_train_with_a_swin_predictor(config: Config, tmp_path: Path) -> None:
    config = override(config, {"latent.kind": "sparse", "latent.dim": 3, "latent.iterations": 3, "train.steps": 2})
    train(config, tmp_path)
    assert losses(tmp_path)
    with pytest.raises(ConfigError, match="probed on stochastic moving-mnist only"):
        evaluate_latents(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latent.kind": "discrete"}, "latent.kind=discrete"),
        ({"data.stochastic": True}, "data.stochastic=True"),
        ({"model.channels": "4,4,4,4,4,4"}, "size=16"),
        ({"model.channels": "4,5"}, "channels=(4, 5)"),
        ({"model.window": 3}, "window=3"),
        ({"model.heads": 3}, "heads=3"),
        ({"data.workers": -2}, "data.workers=-2"),
        ({"data.decode_timeout": 0}, "data.decode_timeout=0"),
        ({"data.decoder": "ffmpeg"}, "data.decoder='ffmpeg'"),
        ({"data.on_bad_video": "ignore"}, "data.on_bad_video='ignore'"),
    ],
)
def test_what_does_not_fit_is_named(config: Config, change: dict, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(config, change)
    assert said in str(error.value)


def test_table1_of_clevrer(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "table"
    text = paper.table1(config, out, seeds=(0,))
    assert {f.name for f in out.iterdir() if f.is_file()} == {*paper.TABLE1_FILES}
    lines = [line for line in text.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head[4:] == ["speed MSE", "paper's", "standardised", "least squares", "PSNR", "RankMe", "paper's RankMe"]
    summary = json.loads((out / "table1.json").read_text())
    for line, row in zip(lines[2:], ROWS, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ours, said = summary["rows"][row]["ours"], paper.PAPER_TABLE1["clevrer"][row]
        assert cells[4] == paper.spread(ours["speed_mse"], 3)
        assert cells[9] == paper.spread(ours["rank_me"], 1)
        assert (float(cells[5]), float(cells[10])) == (said["speed_mse"], said["rank_me"])
        assert summary["rows"][row]["data"] == "CLEVRER: 6 videos"
    for said in ("0.0001 for generative models", "fastest visible object", "scene units/s", "CLEVRER: 3 videos"):
        assert said in text


def test_speeds_are_those_of_the_annotations(config: Config) -> None:
    part, _ = build_data(config)
    videos = build_videos(config, part, "train", CPU)
    names = [part.sources[w.source].name for w in videos.sampler.windows(0, 12)]
    assert videos.batch(0, 12).speed.tolist() == [1.0 + int(name[-9:-4]) % 4 for name in names]


# -- The command line -----------------------------------------------------------------------------------------------


def test_cache_train_and_evaluate(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["cache", "--preset", "clevrer-mini", f"--data.root={root}", "--canvas=16", "--stride=1", "--workers=0"])
        == 0
    )
    shown = capsys.readouterr().out
    assert f"{root}/vjvcr-cache/train-16x16: 6 videos written, 0 were there" in shown
    again = ["cache", "--verify", "--preset", "clevrer-mini", f"--data.root={root}", "--canvas=16", "--stride=1"]
    assert main(again) == 0
    assert "0 videos written, 6 were there" in capsys.readouterr().out
    run = tmp_path / "run"
    assert main(["train", *options(root), "--out", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert "rank_me" in capsys.readouterr().out


def test_bad_videos_stop_or_are_listed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, _ = clevrer_files.paths(root, "train", 3)
    bad.write_bytes(b"")
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", *options(root), *out]) == 1
    assert f"vjvcr-fast: {bad}: " in capsys.readouterr().err
    assert main(["train", *options(root), *out, "--on-bad-video", "skip"]) == 0
    err = capsys.readouterr().err
    assert "1 left out, unreadable:" in err
    assert str(bad) in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--preset", "clevrer-mini"], 2, "data.root is empty and VJVCR_DATA not set"),
        (["train", "--preset", "clevrer-mini", "--data.root", "nowhere"], 1, "nowhere: no such folder"),
        (["cache", "--preset", "moving-mnist"], 2, "nothing to cache"),
        (["cache", "--data.root", "nowhere"], 1, "nowhere: no such folder"),
        (["simulate", "clevrer", "--out", "x", "--videos", "0"], 2, "videos"),
        (["simulate", "clevrer", "--out", "x", "--size", "480"], 2, "--size"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VJVCR_DATA", raising=False)
    assert main(arguments) == code
    line = capsys.readouterr().err.strip()
    assert said in line
    assert "\n" not in line


INTERRUPTED = """
import os, signal, sys
from vjvcr_fast import cli
from vjvcr_fast.data.video import cache
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background processes ignore Ctrl-C
real, counted = cache._sum, []
def interrupt(frames):
    counted.append(frames)
    if len(counted) == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return real(frames)
cache._sum = interrupt
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ctrl_c_in_the_middle_of_caching_leaves_what_is_done(root: Path) -> None:
    """Ctrl-C reaches the workers too. What was decoded before it is kept, and the next call does the rest."""
    arguments = ["cache", "--preset", "clevrer-mini", f"--data.root={root}", "--canvas=16", "--stride=1", "--workers=1"]
    command = [sys.executable, "-c", INTERRUPTED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert done.stderr.rstrip().endswith("stopped; run the same command again to continue")
    assert "Traceback" not in done.stderr
    config = override(preset("clevrer-mini"), TINY | {"data.root": str(root)})
    filled = fill_cache(config)
    assert (filled["train"].kept, filled["train"].written) == (3, 3)
    folder = cache_folder(config, "train")
    assert folder is not None
    assert (folder / "frames.u8").stat().st_size == 6 * clevrer_files.FRAMES * 3 * 16 * 16
    assert fill_cache(config, verify=True)["train"] == (0, 6, {})
