"""Actions as latents: training with the true actions, z* by gradient descent, the probe, figures 2 and 4."""

import json
import math
import shutil
from pathlib import Path

import cater_files
import pytest
import torch
from conftest import TINY_SIMVP

from vjvcr_fast import reference
from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, ConfigError, override, preset
from vjvcr_fast.data.cater import CLASSES
from vjvcr_fast.data.video.clips import Clips
from vjvcr_fast.evaluation import ceiling
from vjvcr_fast.evaluation.latent_probes import actions_probe, spectrum
from vjvcr_fast.evaluation.metrics import average_precision, mean_average_precision
from vjvcr_fast.paper import actions as module
from vjvcr_fast.paper import figures
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.loop import train
from vjvcr_fast.training.step import actions, split_frames
from vjvcr_fast.training.telemetry import COMPARED, action_energies

pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
pytest.importorskip("decord", reason="the extra video is not installed: no decoder")
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = TINY_SIMVP | {
    "data.frames_in": 4,
    "data.frames_out": 6,
    "data.stride": 3,
    "latent.iterations": 5,
    "train.steps": 4,
    "train.validate_every": 2,
    "train.validation_videos": 4,
    "evaluate.probe_batch": 16,
    "evaluate.actions_batch": 4,
    "evaluate.actions_epochs": 3,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cater_files.make(tmp_path_factory.mktemp("cater"), train=9, validation=6)


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Config:
    root = shutil.copytree(made, tmp_path / "data")
    return override(preset("cater-mini"), TINY | {"data.root": str(root)})


def videos(config: Config, split: int = 0):
    return build_videos(config, build_data(config)[split], "train", CPU)


# -- Average precision ----------------------------------------------------------------------------------------------


def naive_voc(scores: list[float], labels: list[bool]) -> float:
    """VOC's definition: at every recall that is reached, the largest precision at that recall or a larger one."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        taken = [y for s, y in zip(scores, labels, strict=True) if s >= threshold]
        points.append((sum(taken) / sum(labels), sum(taken) / len(taken)))
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[i:])
        before = recall
    return area


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_is_vocs_and_scikit_learns(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(30, generator=generator)
    if seed % 2:  # with ties
        scores = (scores * 6).floor()
    labels = torch.rand(30, generator=generator) < 0.3
    labels[0] = True
    assert average_precision(scores, labels).item() == pytest.approx(naive_voc(scores.tolist(), labels.tolist()))
    theirs = metrics.average_precision_score(labels.numpy(), scores.numpy())
    assert average_precision(scores, labels, interpolated=False).item() == pytest.approx(theirs)


def test_average_precision_of_what_one_knows() -> None:
    labels = torch.tensor([True, True, False, False])
    assert average_precision(torch.tensor([4.0, 3, 2, 1]), labels).item() == 1
    assert average_precision(torch.tensor([1.0, 2, 3, 4]), labels).item() == 0.5
    assert average_precision(torch.zeros(4), labels).item() == 0.5
    # The positives have ranks 1 and 4: precision is 1 up to recall 1/2, then 2/4.
    assert average_precision(torch.tensor([4.0, 1, 3, 2]), labels).item() == 0.75


def test_classes_without_a_positive_are_left_out_of_the_mean() -> None:
    scores, labels = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[True, False], [False, False]])
    mean, each = mean_average_precision(scores, labels)
    assert mean == 1
    assert each[0] == 1
    assert math.isnan(each[1])


# -- Training and inference -----------------------------------------------------------------------------------------


def test_presets_have_the_papers_numbers() -> None:
    full = preset("cater")
    assert (full.data.frames_in, full.data.frames_out, full.data.canvas, full.data.stride) == (50, 50, 128, 3)
    assert (full.model.alpha, full.model.beta, full.train.batch, full.d) == (1.0, 0.4, 160, 2048)
    assert (full.evaluate.actions_lr, full.evaluate.actions_batch) == (5e-4, 160)
    assert full.latent_dim == 14 * 50
    mini = preset("cater-mini")
    model = build_model(mini, CPU)
    x, z = torch.rand(2, 10, 3, 32, 32), torch.rand(2, 140)
    assert model.predict(x, z).shape == (2, 10, mini.d)


def test_z_of_pre_training_is_the_target_frames_actions(config: Config) -> None:
    loaded = videos(config)
    batch = loaded.batch(0, 5)
    given = actions(batch, config)
    assert given is not None
    assert given.equal(batch.target[:, :, 4:])
    model = build_model(config, CPU)
    inferred = Latents(config, model).infer(*split_frames(batch, config), given)
    assert inferred.z is not None
    assert inferred.z.equal(given.flatten(1))
    assert inferred.z.shape == (5, 14 * 6)


@pytest.mark.parametrize("row", ["vj-vcr", "generative", "vj-vcr-decoder"])
def test_z_star_lowers_the_energy_and_stays_in_the_box(config: Config, row: str) -> None:
    """The energy is the hidden term, or in a generative model the pixel term."""
    config = override(config, {"model.row": row, "latent.iterations": 30})
    model = build_model(config, CPU).eval()
    x, y = split_frames(videos(config).batch(0, 5), config)
    z = Latents(config, model).infer(x, y).z
    assert z is not None
    assert 0 <= z.min() < z.max() <= 1
    with torch.no_grad():
        h_y = model.encode_targets(y) if model.terms.hidden else None
        energy = model.latent_energy(model.encoder(x), h_y, y)
        assert (energy(z) < energy(torch.zeros_like(z))).all()
    if row == "generative":
        with torch.no_grad():
            right = reference.energy_per_sample(model.decoder(model.predict(x, z)), y)
        torch.testing.assert_close(energy(z), right)


def test_runs_resume_and_actions_need_cater(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "whole")
    train(override(config, {"train.steps": 2}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    states = [torch.load(tmp_path / run / "last.pt")["model"] for run in ("whole", "parts")]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "validation_loss" in row]
    with pytest.raises(ConfigError, match="only cater has actions"):
        override(preset("clevrer-mini"), {"latent.kind": "actions"})


def test_whether_z_is_used_is_logged(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path)
    (*_, row) = (row for row in read_metrics(tmp_path / "metrics.jsonl") if "validation_loss" in row)
    kinds = ("true", "other", "mean", "zero", "inferred")
    names = [f"{split}_energy_{z}" for split in ("train", "validation") for z in kinds]
    assert [*row] == ["step", "validation_loss", *names]
    model, held_out = build_model(config, CPU), videos(config, 1)
    found = action_energies(model, held_out, config, "its")
    assert model.training
    x, y = split_frames(held_out.batch(0, COMPARED), config)
    true = actions(held_out.batch(0, COMPARED), config).flatten(1)
    with torch.no_grad():
        h_y = model.eval().encode_targets(y)
        for name, z in (("true", true), ("zero", torch.zeros_like(true))):
            right = reference.energy_per_sample(model.predict(x, z), h_y).mean().item()
            assert found[f"its_energy_{name}"] == pytest.approx(right, rel=1e-5)
    assert found["its_energy_inferred"] < found["its_energy_zero"]


def test_a_probe_reads_what_is_there() -> None:
    """The probe finds labels that are linear in z; from random z it reaches about the share of positives."""
    config = override(preset("cater-mini"), {"evaluate.actions_epochs": 400, "evaluate.actions_lr": 5e-2})
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(400, 28, generator=generator)
    label = z[:, :14] > 0.7
    scores = actions_probe(z[:300], label[:300], z[300:], config)
    assert scores.shape == (100, 14)
    assert mean_average_precision(scores, label[300:])[0] > 0.95
    other = torch.rand(400, 28, generator=generator)
    assert mean_average_precision(actions_probe(other[:300], label[:300], other[300:], config), label[300:])[0] < 0.5


def test_the_spectrum_is_that_of_the_rows(config: Config) -> None:
    config = override(config, {"evaluate.probe_batch": 4})
    model, held_out = build_model(config, CPU).eval(), videos(config, 1)
    found = spectrum(model, held_out, config)
    x, y = split_frames(held_out.batch(0, len(held_out)), config)
    with torch.no_grad():
        rows = torch.cat([model.encoder(x).flatten(0, 1), model.encode_targets(y).flatten(0, 1)])
    right = reference.singular_values(rows.double())
    torch.testing.assert_close(found[: len(right)], right, rtol=1e-6, atol=1e-4)


# -- The figures ----------------------------------------------------------------------------------------------------


def test_figures_2_and_4(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = module.figure2(config, out, seeds=(0, 1))
    assert {*module.FIGURE2_FILES} <= {f.name for f in out.iterdir()}
    summary = json.loads((out / "figure2.json").read_text())
    for row in module.COMPARED:
        runs = [json.loads((out / f"{row}-seed{s}" / "actions.json").read_text()) for s in (0, 1)]
        assert summary["ours"][row] == [100 * run["map"] for run in runs]
        assert set(runs[0]["map_by_class"]) == set(CLASSES)
        assert runs[0]["videos"] == [9, 6]
    assert len(summary["ours"]["random"]) == 2
    for said in ("67.4", "53.8", "39.6", "scikit-learn", "CATER: 9 videos", "random z", "seeds 0, 1"):
        assert said in text
    text = module.figure4(config, out, seeds=(0, 1))
    spectra = json.loads((out / "figure4.json").read_text())
    assert len(spectra["ours"]) == 4
    assert spectra["rows"] == 6 * 10
    assert all(len(values) == config.d for values in spectra["ours"].values())
    for said in ("before training", "one row a video and time step", "No collapse: 25%", "5800"):
        assert said in text


def test_the_ceiling(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before figure 2 is made it is the supervised network's alone, afterwards that of its run's h_y as well."""
    monkeypatch.setattr(ceiling, "STEPS", 2)
    text = module.ceiling(config, tmp_path, seeds=(0, 1))
    assert [line.split(" | ")[1] for line in text.splitlines() if "| the frames |" in line] == ["4", "9"]
    found = json.loads((tmp_path / "ceiling.json").read_text())
    assert all(0 < of["map"] <= 1 for runs in found["supervised"].values() for of in runs)
    assert found["linear"] == {}
    assert "h_y is not read: there is no " in capsys.readouterr().err
    train(config, tmp_path / "vj-vcr-seed0")
    before = {name: (tmp_path / "vj-vcr-seed0" / name).read_bytes() for name in ("best.pt", "last.pt")}
    text = module.ceiling(config, tmp_path, seeds=(0,))
    for said in (
        "on the differences of h_y of vj-vcr-seed0",
        "| h_y of vj-vcr-seed0 | 9 |",
        "with a new encoder",
    ):
        assert said in text
    encoded = json.loads((tmp_path / "ceiling.json").read_text())["encoded"]
    assert encoded.keys() == {"new", "vj-vcr-seed0"}
    assert before == {name: (tmp_path / "vj-vcr-seed0" / name).read_bytes() for name in before}
    fewer = override(config, {"data.frames_out": config.data.frames_out - 1})
    assert module._made(tmp_path / "vj-vcr-seed0", fewer) is None
    assert "vj-vcr-seed0 is a run of another data.frames_out" in capsys.readouterr().err


def test_the_supervised_network_learns(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One action that a single frame shows and one that only differences show, of videos it has not seen."""
    monkeypatch.setattr(ceiling, "STEPS", 90)
    generator = torch.Generator().manual_seed(0)
    frames, active = torch.full((80, 6, 3, 16, 16), 60), torch.zeros(80, 14, 6)
    happens = torch.rand(80, 2, 6, generator=generator) < 0.15
    active[:, :2] = happens.float()
    frames[:, :, 0, 4:8, 4:8] += (120 * happens[:, 0]).view(80, 6, 1, 1)
    moved = happens[:, 1].cumsum(dim=1) % 2
    frames[:, :, 1, 10:14, 10:14] += (120 * moved).view(80, 6, 1, 1)
    clips = Clips(frames.to(torch.uint8), active)
    fitted, held_out = (Fixed(Clips(clips.frames[part], clips.target[part])) for part in (slice(60), slice(60, 80)))
    short = override(config, {"data.frames_in": 1, "data.frames_out": 5})
    found = ceiling.actions_ceiling(short, fitted, held_out, 60)
    assert found["map"] > 0.9, found


class Fixed:
    """Videos that are in memory."""

    device = CPU

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips.frames)

    def batch(self, start: int, n: int) -> Clips:
        return Clips(*(of[start : start + n] for of in self.clips))


def test_ridge_map_reads_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(300, 40, generator=generator) * 100 + 7
    label = features[:, :3] + 20 * torch.rand(300, 3, generator=generator) > 90
    others = torch.rand(300, 40, generator=generator)
    assert ceiling.ridge_map(features[:200], label[:200], features[200:], label[200:]) > 0.85
    assert ceiling.ridge_map(others[:200], label[:200], others[200:], label[200:]) < 0.5


def test_figure_of_bars(tmp_path: Path) -> None:
    figures.bars(tmp_path / "one.png", {"a": ([3.0], 4.0)}, "mAP")
    figures.bars(tmp_path / "two.png", {"a": ([3.0, 4.0], 4.0), "b": ([1.0, 2.0], 2.0)}, "mAP")
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_the_papers_numbers() -> None:
    assert module.PAPER_FIGURE2 == {"vj-vcr": 67.4, "generative": 53.8, "random": 39.6}
    end = module.PAPER_FIGURE4
    assert (*end["vj-vcr"].values(),) == (5.8e3, 85, 46, 0.62)
    assert (*end["generative"].values(),) == (8.5e3, 47, 13, 0.87)


def test_the_command_line(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "cater-mini", *(f"--{k}={v}" for k, v in (TINY | {"data.root": config.data.root}).items())]
    run = tmp_path / "run"
    assert main(["train", *options, "--out", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "map_scikit_learn" in shown
    assert "actions.json" in shown
    assert main(["reproduce", "fig2", "--preset", "clevrer-mini", "--data.root", config.data.root]) == 2
    assert "need actions" in capsys.readouterr().err
