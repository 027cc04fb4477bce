"""Table 2 and figure 3: the probes on problems with a known answer, z* of tiny runs, and both from end to end."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_evaluation import fail, image, stopped_at_the_third
from tolerances import FLOAT32
from torch import Tensor

from vjvcr_fast.config import LATENTS, Config, ConfigError, latent, override
from vjvcr_fast.evaluation import evaluate, latent_probes
from vjvcr_fast.evaluation.latent_probes import (
    adam_classifier,
    chance,
    converged_classifier,
    evaluate_latents,
    extract_codes,
)
from vjvcr_fast.paper import figures, jobs, table2
from vjvcr_fast.paper.pages import spread
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import CheckpointError
from vjvcr_fast.training.loop import DivergedError, train
from vjvcr_fast.training.step import split_frames

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("digits", "one_thread")


# -- Classifiers ----------------------------------------------------------------------------------------------------


def clusters(n: int, seed: int, scale: float = 1.0, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    """z (n, 4) around the four unit vectors, and which of them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    z = torch.eye(4)[labels] + noise * torch.randn(n, 4, generator=generator)
    return scale * z, labels


def test_adam_classifier_learns(tiny: Config) -> None:
    config = override(tiny, {"evaluate.probe_epochs": 20, "evaluate.probe_lr": 1e-2})
    curve = adam_classifier(clusters(512, 1), clusters(128, 2), 4, config)
    assert len(curve) == 20
    assert curve[-1] == 1.0


def test_adam_classifier_is_its_seeds_alone(tiny: Config) -> None:
    sets = clusters(64, 1, noise=1.0), clusters(64, 2, noise=1.0)
    before = torch.get_rng_state()
    first = adam_classifier(*sets, 4, tiny)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert adam_classifier(*sets, 4, tiny) == first
    assert adam_classifier(*sets, 4, override(tiny, {"train.seed": 1})) != first


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_converged_classifier_knows_no_scale(scale: float) -> None:
    assert converged_classifier(clusters(256, 1, scale), clusters(128, 2, scale), 4) == 1.0
    noisy = [converged_classifier(clusters(256, 1, s, 1.0), clusters(512, 2, s, 1.0), 4) for s in (1.0, scale)]
    assert noisy[0] == pytest.approx(noisy[1], abs=2 / 512)
    assert 0.4 < noisy[0] < 0.7  # Bayes: 0.55


def test_converged_classifier_ignores_what_never_moves() -> None:
    (z, labels), (z_validation, labels_validation) = clusters(256, 1), clusters(128, 2)
    train = torch.cat([z, torch.zeros(256, 3)], dim=1), labels
    validation = torch.cat([z_validation, 100 * torch.ones(128, 3)], dim=1), labels_validation
    assert converged_classifier(train, validation, 4) == 1.0


def test_chance() -> None:
    train, validation = torch.tensor([2, 2, 1, 0]), torch.tensor([2, 1, 1, 2, 0])
    assert chance(train, validation) == pytest.approx(2 / 5)


# -- Codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATENTS)
def test_codes(tiny_stochastic: Config, name: str) -> None:
    config = latent(tiny_stochastic, name)
    model = build_model(config, CPU)
    videos = build_videos(config, build_data(config)[1], "validation", CPU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    codes = extract_codes(model, videos, 24, config)  # in batches of 16 and 8
    assert model.training
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    batch = videos.batch(0, 24)
    x, y = split_frames(batch, config)
    model.eval()
    found = Latents(config, model)
    z = found.infer(x, y).z
    assert codes.direction.equal(batch.direction)
    assert codes.digit.equal(batch.digit)
    assert codes.z.shape == (24, {"none": 0, "discrete": 3}.get(name, 6))
    if z is not None:
        assert torch.allclose(codes.z, z, atol=1e-3)
    with torch.no_grad():
        h_y = model.encode_targets(y).flatten(1)
        hidden = (model.predict(x, z).flatten(1) - h_y).square().mean(dim=1)
    assert torch.allclose(codes.hidden, hidden, rtol=1e-3)
    assert codes.total.item() == pytest.approx((h_y - h_y.mean(dim=0)).square().mean().item(), rel=FLOAT32)


# -- A run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LATENTS)
def test_evaluation(tmp_path: Path, tiny_stochastic: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = latent(tiny_stochastic, name)
    train(config, tmp_path)
    result = evaluate_latents(tmp_path)
    assert json.loads((tmp_path / "latents.json").read_text()) == result
    assert result["kind"] == config.latent.kind
    assert result["data"] == "blobs: 40 digits"
    for label in ("direction", "digit"):
        for key in ("chance", "accuracy", "accuracy_converged"):
            assert 0 <= result[f"{label}_{key}"] <= 1
        curve = result[f"{label}_accuracy_by_epoch"]
        assert curve[-1] == result[f"{label}_accuracy"]
        assert len(curve) == (1 if name == "none" else 3)
        if name == "none":
            assert curve[-1] == result[f"{label}_accuracy_converged"] == result[f"{label}_chance"]
    assert 0 < result["hidden"] < math.inf
    assert result["explained"] < 1
    if name == "discrete":
        assert sum(result["usage"]) == pytest.approx(1)
        assert [sum(shares) for shares in result["usage_by_direction"]] == pytest.approx([1] * 5)
    elif name != "none":
        assert result["zeros"] == pytest.approx(1 - sum(result["nonzero"]) / 6, abs=1e-6)  # float32 means
        assert result["weight"] == checkpoint.load(tmp_path / "best.pt")["latent_weight"]

    with monkeypatch.context() as patch:
        patch.setattr(latent_probes, "extract_codes", fail)
        assert evaluate_latents(tmp_path) == result
    for key, value in {"method": "ista", "iterations": 7, "tolerance": 0.5}.items():  # z* found otherwise is not kept
        other = evaluate_latents(tmp_path, override(config, {f"latent.{key}": value}))
        assert (other[key], evaluate_latents(tmp_path)[key]) == (value, None)
    again = evaluate_latents(tmp_path, override(config, {"evaluate.probe_epochs": 2}))
    assert name == "none" or len(again["direction_accuracy_by_epoch"]) == 2


def test_representations_that_are_not_finite(tmp_path: Path, tiny_stochastic: Config) -> None:
    train(latent(tiny_stochastic, "sparse-low"), tmp_path)
    state = checkpoint.load(tmp_path / "best.pt")
    next(iter(state["model"].values())).fill_(float("nan"))
    checkpoint.save(tmp_path / "best.pt", state)
    with pytest.raises(DivergedError, match="not finite"):
        evaluate_latents(tmp_path)
    assert not (tmp_path / "latents.json").exists()


def test_a_run_of_another_latent(tmp_path: Path, tiny_stochastic: Config) -> None:
    train(latent(tiny_stochastic, "discrete"), tmp_path)
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'best.pt'}: its model is not this run's"):
        evaluate_latents(tmp_path, latent(tiny_stochastic, "sparse-low"))


# -- Table 2 --------------------------------------------------------------------------------------------------------


def test_table2_and_figure3(tmp_path: Path, tiny_stochastic: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 after its command was stopped once, then figure 3 from the same runs."""
    trained = stopped_at_the_third(monkeypatch, lambda: table2.table2(tiny_stochastic, tmp_path, seeds=(0, 3)))
    text = table2.table2(tiny_stochastic, tmp_path, seeds=(0, 3))
    runs = [f"{name}-seed{s}" for name in LATENTS for s in (0, 3)]
    assert trained == [*runs[:2], "stopped", *runs[2:]]
    assert (tmp_path / "table2.md").read_text() == text
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == {*table2.TABLE2_FILES}
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {f"{n}-seed{s}" for n in LATENTS for s in (0, 3)}
    image(tmp_path / "latent-curves.png")

    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    summary = json.loads((tmp_path / "table2.json").read_text())
    assert Config.from_dict(summary["config"]) == tiny_stochastic
    assert summary["seeds"] == [0, 3]
    for line, (name, theirs) in zip(lines, table2.PAPER_TABLE2.items(), strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        runs = [json.loads((tmp_path / f"{name}-seed{s}" / "latents.json").read_text()) for s in (0, 3)]
        ours = summary["rows"][name]["ours"]
        assert summary["rows"][name]["paper"] == dict(
            zip(("direction_accuracy", "digit_accuracy"), theirs, strict=True)
        )
        assert ours["direction_accuracy"] == [run["direction_accuracy"] for run in runs]
        assert cells[0] == table2.title(tiny_stochastic, name)
        assert cells[1] == spread([100 * a for a in ours["direction_accuracy"]], 1) + "%"
        assert cells[2] == f"{theirs[0]:.1%}"
        assert cells[4] == spread([100 * a for a in ours["digit_accuracy"]], 1) + "%"
        assert cells[5] == f"{theirs[1]:.1%}"
    assert lines[3].startswith("| no latent: chance |")
    for said in ("blobs: 40 digits", "seeds 0, 3: mean ± standard deviation", "12 steps of 8", "calibrated"):
        assert said in text

    monkeypatch.setattr(jobs, "train", fail)
    monkeypatch.setattr(latent_probes, "extract_codes", fail)
    assert table2.table2(tiny_stochastic, tmp_path, seeds=(0, 3)) == text
    check_figure3(tmp_path, tiny_stochastic, monkeypatch)


def check_figure3(tmp_path: Path, tiny_stochastic: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    text = table2.figure3(tiny_stochastic, tmp_path, seeds=(0,))
    assert (tmp_path / "figure3.md").read_text() == text
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == {*table2.TABLE2_FILES, *table2.FIGURE3_FILES}
    image(tmp_path / "figure3.png")
    film, data = Image.open(tmp_path / "futures.gif"), tiny_stochastic.data
    side = data.canvas * (table2.WIDTH // data.canvas)
    assert (film.format, film.n_frames) == ("GIF", data.frames_in + data.frames_out)
    assert film.size == (10 * (side + 1) - 1, 2 * side + 1)
    numbers = json.loads((tmp_path / "figure3.json").read_text())
    assert {*numbers["psnr"]} == {*LATENTS}
    assert all(0 < db < 100 for db in numbers["psnr"].values())
    for name, db in numbers["psnr"].items():
        assert f"| {table2.title(tiny_stochastic, name)} | {db:.1f} |" in text
        assert (tmp_path / f"{name}-seed0" / "decoder.pt").exists()
    monkeypatch.setattr(evaluate, "F", None)  # no decoder is trained again
    assert table2.figure3(tiny_stochastic, tmp_path, seeds=(0,)) == text


@pytest.mark.parametrize("make", [table2.table2, table2.figure3])
def test_videos_that_are_not_stochastic(tmp_path: Path, tiny: Config, make: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.stochastic=False: "):
        make(tiny, tmp_path, (0,))
    assert not [*tmp_path.iterdir()]


def test_the_papers_numbers() -> None:
    assert table2.PAPER_TABLE2 == {
        "discrete": (0.797, 0.114),
        "sparse-high": (0.947, 0.316),
        "sparse-low": (0.995, 0.576),
    }


# -- Figure 3 -------------------------------------------------------------------------------------------------------


def test_one_of_each_direction(tiny_stochastic: Config) -> None:
    videos = build_videos(tiny_stochastic, build_data(tiny_stochastic)[1], "validation", CPU)
    chosen = table2.one_of_each_direction(videos, 2)
    assert chosen.direction.tolist() == [0, 1, 2, 3, 4] * 2
    assert len({tuple(frames.flatten().tolist()) for frames in chosen.frames}) == 10


def test_figure_of_futures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = []
    for clips, models in ((5, 1), (10, 1), (5, 3)):
        path = tmp_path / f"{clips}-{models}.png"
        predictions = {f"model {i}": torch.rand(clips, 3, 1, 16, 16) for i in range(models)}
        figures.futures(path, torch.rand(clips, 3, 1, 16, 16), predictions, [f"ψ{k}" for k in range(5)])
        sizes.append(image(path).shape)
    assert sizes[0][1] == sizes[1][1] == sizes[2][1]
    assert sizes[1][0] > 1.5 * sizes[0][0]
    assert sizes[2][0] > 1.5 * sizes[0][0]


def test_the_overlay_is_green_where_only_the_target_is() -> None:
    target, decoded = torch.zeros(1, 1, 1, 4, 4), torch.zeros(1, 1, 1, 4, 4)
    target[..., 0, :2] = 1
    decoded[..., 0, 1:3] = 1
    (strip,) = figures._strips(figures._overlay(decoded, target))
    assert strip[0].tolist() == [[0, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]
