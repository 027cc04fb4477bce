"""Probes against problems with a known answer, PSNR by hand, and whole evaluations of tiny runs."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import DEPENDENT_FEATURES, FLOAT32, FLOAT64, SPECTRUM, relative
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.evaluation import evaluate, probes
from vjvcr_fast.evaluation.evaluate import evaluate_run, frame_errors, frozen_decoder
from vjvcr_fast.evaluation.metrics import grain, psnr
from vjvcr_fast.evaluation.probes import (
    Features,
    adam_probe,
    extract,
    least_squares_probe,
    mean_predictor,
    standardised,
)
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.paper import figures, jobs
from vjvcr_fast.paper import table1 as paper
from vjvcr_fast.paper.jobs import finish_run
from vjvcr_fast.runs import load_run
from vjvcr_fast.training import checkpoint, loop
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import CheckpointError
from vjvcr_fast.training.loop import DivergedError, train
from vjvcr_fast.training.step import split_frames

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("digits", "one_thread")


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("called, though nothing was left to do")


# -- PSNR -----------------------------------------------------------------------------------------------------------


def test_psnr_by_hand() -> None:
    target = torch.full((2, 3, 1, 4, 4), 0.5)
    error = torch.tensor([[0.1, 0.01, 0.2], [0.5, 0.25, 0.05]])
    expected = torch.tensor([[20.0, 40.0, 13.9794], [6.0206, 12.0412, 26.0206]])  # -20 log10(error)
    for sign in (1, -1):
        measured = psnr(target + sign * error[..., None, None, None], target)
        assert measured.shape == (2, 3)
        assert torch.allclose(measured, expected, atol=1e-3)


def test_psnr_averages_squares_inside_a_frame_and_decibels_between() -> None:
    prediction = torch.zeros(2, 1, 1, 2)
    prediction[0, 0, 0, 0] = 0.2  # MSE 0.02
    assert psnr(prediction, torch.zeros_like(prediction)).tolist() == pytest.approx([-10 * math.log10(0.02), 100])


def test_psnr_clips_the_prediction() -> None:
    target = torch.tensor([0.0, 1.0]).view(1, 1, 2)
    assert psnr(torch.tensor([-3.0, 7.0]).view(1, 1, 2), target).item() == 100
    assert psnr(torch.tensor([-3.0, 0.0]).view(1, 1, 2), target).item() == pytest.approx(-10 * math.log10(0.5))


def test_a_perfect_frame_is_100_decibels() -> None:
    frame = torch.rand(4, 1, 8, 8)
    assert psnr(frame, frame).tolist() == [100.0] * 4


def test_psnr_does_not_hide_nan() -> None:
    assert psnr(torch.full((1, 2, 2), math.nan), torch.zeros(1, 2, 2)).isnan()


# -- Probes ---------------------------------------------------------------------------------------------------------

WEIGHTS = torch.linspace(-1, 2, 6)


def linear(n: int, seed: int, noise: float = 0.0, change: Callable[[Tensor], Tensor] = lambda x: x) -> Features:
    """Six features of different sizes, and a speed that is linear in them; `change` maps what the probe sees."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 3]) + 5
    speed = x @ WEIGHTS + 3 + noise * torch.randn(n, generator=generator)
    return Features(change(x), speed, torch.empty(0))


def test_least_squares_recovers_a_linear_map() -> None:
    assert least_squares_probe(linear(50, 1), linear(40, 2)) < 1e-9  # float32 inputs, squared


def test_least_squares_is_the_exact_solution() -> None:
    train, validation = linear(50, 1, noise=1.0), linear(40, 2, noise=1.0)
    x, x_validation = (F.pad(f.values.double(), (0, 1), value=1.0) for f in (train, validation))
    weights = torch.linalg.lstsq(x, train.speed.double()[:, None]).solution
    expected = (x_validation @ weights)[:, 0].sub(validation.speed).square().mean()
    assert least_squares_probe(train, validation) == pytest.approx(expected.item(), rel=FLOAT64)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat([x, x[:, :3]], dim=1),
        lambda x: torch.cat([x, 2 * x[:, :1] - x[:, 1:2]], dim=1),
        lambda x: torch.cat([x, torch.full((len(x), 2), 0.1)], dim=1),
        lambda x: torch.cat([torch.zeros(len(x), 40), x], dim=1),
    ],
    ids=["copies", "dependent", "constant", "zero"],
)
def test_least_squares_with_dependent_and_constant_features(change: Callable[[Tensor], Tensor]) -> None:
    plain = least_squares_probe(linear(50, 1, noise=1.0), linear(40, 2, noise=1.0))
    train, validation = (linear(n, seed, 1.0, change) for n, seed in ((50, 1), (40, 2)))
    assert least_squares_probe(train, validation) == pytest.approx(plain, rel=DEPENDENT_FEATURES)


def test_least_squares_ignores_a_feature_that_was_constant_until_validation() -> None:
    train = linear(50, 1, change=lambda x: torch.cat([x, torch.full((len(x), 1), 0.1)], dim=1))
    validation = linear(40, 2, change=lambda x: torch.cat([x, torch.randn(len(x), 1)], dim=1))
    assert least_squares_probe(train, validation) < DEPENDENT_FEATURES


def test_least_squares_with_fewer_videos_than_features() -> None:
    def wide(n: int, seed: int) -> Features:
        x = torch.randn(n, 200, generator=torch.Generator().manual_seed(seed))
        return Features(x, x[:, 0], torch.empty(0))

    train = wide(50, 1)
    assert least_squares_probe(train, train) < 1e-9  # interpolates
    assert least_squares_probe(train, wide(500, 2)) < 2.0  # of minimum norm: near the 0.75 that is not in its span


def test_mean_predictor() -> None:
    empty = torch.empty(0)
    train = Features(torch.zeros(2, 1), torch.tensor([1.0, 3.0]), empty)
    validation = Features(torch.zeros(2, 1), torch.tensor([2.0, 5.0]), empty)
    assert mean_predictor(train, validation) == 4.5
    assert least_squares_probe(train, validation) == 4.5  # without information


def easy(n: int, seed: int) -> Features:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    return Features(x, x.sum(dim=1) + 0.5, torch.empty(0))


def test_adam_probe_learns(tiny: Config) -> None:
    config = override(tiny, {"evaluate.probe_epochs": 60, "evaluate.probe_lr": 1e-2})
    train, validation = easy(256, 1), easy(64, 2)
    curve = adam_probe(train, validation, config, seed=0)
    assert len(curve) == 60
    assert curve[0] < mean_predictor(train, validation) * 2
    assert curve[-1] < 0.01 * curve[0]


def test_standardised_features_have_no_scale(tiny: Config) -> None:
    train, validation = easy(256, 1), easy(64, 2)
    scale, shift = torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0]), torch.tensor([5.0, 0.0, -3.0, 0.2, 1.0])
    moved = [f._replace(values=f.values * scale + shift) for f in (train, validation)]
    ours, theirs = standardised(train, validation), standardised(*moved)
    torch.testing.assert_close(ours[0].values.mean(dim=0), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[0].values.std(dim=0), torch.ones(5))
    torch.testing.assert_close(ours[1].speed, validation.speed - train.speed.mean())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.values, b.values, atol=1e-3, rtol=1e-3)
    dead = train._replace(values=torch.cat([train.values, torch.ones(256, 1)], dim=1))
    assert standardised(dead, dead)[0].values[:, -1].abs().max() == 0


def test_adam_probe_is_its_seeds_alone(tiny: Config) -> None:
    train, validation = easy(256, 1), easy(64, 2)
    before = torch.get_rng_state()
    first = adam_probe(train, validation, tiny, seed=0)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert adam_probe(train, validation, tiny, seed=0) == first
    assert adam_probe(train, validation, tiny, seed=1) != first


# -- Features -------------------------------------------------------------------------------------------------------


def model_of(config: Config) -> EnergyModel:
    """With running statistics that are not those of a fresh model."""
    model = build_model(config, CPU)
    videos = build_videos(config, build_data(config)[0], "train", CPU)
    model(*split_frames(videos.batch(0, 16), config))
    return model


@pytest.mark.parametrize("training", [True, False])
def test_extract_leaves_the_model_as_it_was(tiny: Config, training: bool) -> None:
    model = model_of(tiny).train(training)
    videos = build_videos(tiny, build_data(tiny)[1], "validation", CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (extract(model, videos, 24, tiny, encoded=True) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert model.training is training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert not any(f.requires_grad for f in first)


def test_extract_is_what_it_says(tiny: Config) -> None:
    model = model_of(tiny)
    videos = build_videos(tiny, build_data(tiny)[1], "validation", CPU)
    features = extract(model, videos, 24, tiny, encoded=True)  # in batches of 16 and 8
    batch = videos.batch(0, 24)
    model.eval()
    x, y = split_frames(batch, tiny)
    with torch.no_grad():
        assert relative(features.values, model.predict(x).flatten(1)) < FLOAT32
        assert relative(features.encoded, model.encode_targets(y).flatten(0, 1)) < FLOAT32
    assert features.speed.equal(batch.speed)
    later = extract(model, videos, 8, tiny, start=16)
    assert later.values.equal(features.values[16:])
    assert later.encoded.numel() == 0


def test_psnr_is_over_all_frames_and_videos(tiny: Config) -> None:
    config = override(tiny, {"model.row": "generative"})
    model = model_of(config).eval()
    videos = build_videos(config, build_data(config)[1], "validation", CPU)
    x, y = split_frames(videos.batch(0, 24), config)
    decode = functools.partial(evaluate.decode, Latents(config, model), model.decoder)
    decoded = decode(x, y)
    assert decoded.dtype == torch.float32
    assert 0 <= decoded.min() <= decoded.max() <= 1
    found = frame_errors(videos, config, decode)
    for name, frames in {"psnr": decoded, "psnr_of_black": 0 * y, "psnr_of_last_frame": x[:, -1:].expand_as(y)}.items():
        assert found[name] == pytest.approx(psnr(frames, y).mean().item(), rel=FLOAT32)
    total, count = grain(decoded, y)
    assert found["grain_by_step"] == pytest.approx((total / count).tolist(), rel=FLOAT32)


def test_grain_is_measured_on_black_ground_only() -> None:
    target = torch.zeros(1, 3, 1, 32, 32)
    target[:, 1, :, 4:12, 4:12] = 1  # in one frame: no ground in any
    drawn = target.clone()
    drawn[:, 1, :, 0:16, 0:16] += 0.3 * torch.rand(16, 16)  # within GRAIN_MARGIN of it
    total, count = grain(drawn, target)
    assert total.tolist() == [0, 0, 0]
    assert count == 2 * 32 * 31 - 2 * 16 * 16  # every difference with an end in the corner of 16x16 is left out
    drawn[:, 2, :, 20, 20] = 0.5
    assert grain(drawn, target)[0].tolist() == [0, 0, 4 * 0.5]


# -- A whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, tiny: Config) -> Path:
    train(tiny, tmp_path / "run")
    return tmp_path / "run"


def test_evaluation(run: Path, tiny: Config) -> None:
    result = evaluate_run(run)
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert result["row"] == "vj-vcr"
    assert result["data"] == "blobs: 40 digits"
    assert result["decoder"] == "post hoc"
    assert result["trained_steps"] == 12
    assert len(result["speed_mse_by_epoch"]) == tiny.evaluate.probe_epochs
    assert result["speed_mse"] == result["speed_mse_by_epoch"][-1]
    for name in ("speed_mse", "speed_mse_least_squares", "speed_mse_of_the_mean"):
        assert 0 < result[name] < math.inf
    assert 0 < result["psnr"] < 100
    assert len(result["grain_by_step"]) == 3
    assert result["grain"] == pytest.approx(sum(result["grain_by_step"]) / 3)
    assert 1 <= result["rank_me"] <= 32
    assert len(result["singular_values"]) == 32  # min(24 videos x 3 frames, d)
    assert result["singular_values"] == sorted(result["singular_values"], reverse=True)
    config, model = load_run(run)
    videos = build_videos(config, build_data(config)[1], "validation", CPU)
    rows = extract(model, videos, 24, config, encoded=True).encoded
    assert result["rank_me"] == pytest.approx(reference.rank_me(rows.double()).item(), rel=SPECTRUM)
    assert result["singular_values"] == pytest.approx(torch.linalg.svdvals(rows.double()).tolist(), abs=SPECTRUM)


def test_joint_decoders_are_not_trained_again(tmp_path: Path, tiny: Config) -> None:
    config = override(tiny, {"model.row": "generative"})
    train(config, tmp_path)
    assert evaluate_run(tmp_path)["decoder"] == "joint"
    assert not (tmp_path / "decoder.pt").exists()


def test_an_evaluation_is_not_made_twice(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate_run(run)
    monkeypatch.setattr(probes, "extract", fail)
    assert evaluate_run(run) == first


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k != "evaluate_seconds"}


def test_an_evaluation_is_the_same_again(run: Path) -> None:
    first = evaluate_run(run)
    for name in ("evaluation.json", "decoder.pt"):
        (run / name).unlink()
    torch.manual_seed(99)
    assert untimed(evaluate_run(run)) == untimed(first)


def test_a_run_trained_anew_is_another_evaluation(run: Path, tiny: Config) -> None:
    first = evaluate_run(run)
    for file in [run / "last.pt", run / "best.pt", *run.glob("checkpoints/*.pt")]:
        file.unlink()
    train(override(tiny, {"train.lr": 0.01}), run)
    result = evaluate_run(run)
    assert result["best"] != first["best"]
    assert result["psnr"] != first["psnr"], "nor is the decoder the old one"


def test_representations_that_are_not_finite(run: Path, tiny: Config) -> None:
    state = checkpoint.load(run / "best.pt")
    next(iter(state["model"].values())).fill_(float("nan"))
    checkpoint.save(run / "best.pt", state)
    with pytest.raises(DivergedError, match="not finite"):
        evaluate_run(run)
    assert not (run / "evaluation.json").exists()


def test_other_settings_are_another_evaluation(run: Path, tiny: Config) -> None:
    evaluate_run(run)
    result = evaluate_run(run, override(tiny, {"evaluate.probe_epochs": 4}))
    assert len(result["speed_mse_by_epoch"]) == 4
    assert json.loads((run / "evaluation.json").read_text()) == result
    assert len(evaluate_run(run)["speed_mse_by_epoch"]) == 3


def test_more_training_is_another_evaluation(run: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the post-hoc decoder too: it belongs to the encoder it was trained on."""
    evaluate_run(run)
    monkeypatch.setattr(loop, "validate", lambda *_: 0.0)
    train(override(tiny, {"train.steps": 40}), run)
    result = evaluate_run(run)
    assert (result["step"], result["trained_steps"]) == (16, 40)
    (run / "decoder.pt").unlink()
    (run / "evaluation.json").unlink()
    assert untimed(evaluate_run(run)) == untimed(result)


def test_a_failed_evaluation_leaves_no_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    frozen_decoder(run, *load_run(run), build_data(load_run(run)[0])[0])
    before = {file.name for file in run.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            evaluate_run(run)
    assert {file.name for file in run.iterdir()} == before
    evaluate_run(run)


def test_the_post_hoc_decoder_resumes(run: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(tiny, {"evaluate.decoder_steps": 10})  # saved at 4, 8 and 10
    other = run.with_name("whole")
    shutil.copytree(run, other)
    _, model = load_run(run)
    digits = build_data(tiny)[0]
    whole = frozen_decoder(other, config, model, digits)
    original, steps = evaluate.split_frames, iter(range(10**6))

    def interrupted(*args: Any) -> Any:
        if next(steps) == 6:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "split_frames", interrupted)
        with pytest.raises(KeyboardInterrupt):
            frozen_decoder(run, config, model, digits)
    assert checkpoint.load(run / "decoder.pt")["step"] == 4
    for resumed in (frozen_decoder(run, config, model, digits), frozen_decoder(run, config, model, digits)):
        assert not resumed.training
        for name, value in whole.state_dict().items():
            assert resumed.state_dict()[name].equal(value), name


def test_the_post_hoc_decoder_changes_nothing_in_the_model(run: Path, tiny: Config) -> None:
    _, model = load_run(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    frozen_decoder(run, tiny, model, build_data(tiny)[0])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_rng_state().equal(state)


def test_folders_that_hold_no_run(tmp_path: Path, run: Path, tiny: Config) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "none" / "config.json")):
        evaluate_run(tmp_path / "none")
    checkpoint.save(run / "best.pt", {"model": {}, "step": 1})
    with pytest.raises(CheckpointError, match=f"^{run / 'best.pt'}: its model is not this run's"):
        evaluate_run(run)
    (run / "best.pt").unlink()
    with pytest.raises(CheckpointError, match=f"^{run / 'best.pt'}: there is no such checkpoint"):
        evaluate_run(run)


# -- Figures --------------------------------------------------------------------------------------------------------


def image(path: Path) -> Tensor:
    """(H, W, C) of a figure that is not blank."""
    pixels = torch.from_numpy(pytest.importorskip("matplotlib.image").imread(path).copy())
    assert pixels.shape[-1] in (3, 4)
    assert pixels[..., :3].std() > 0.01
    assert all(100 < side < 5000 for side in pixels.shape[:2])
    return pixels


def test_figure_of_clips(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = []
    for clips, lines in ((1, 1), (3, 2)):
        path = tmp_path / f"{clips}.png"
        predictions = {f"model {i}": torch.rand(clips, 5, 1, 16, 16) for i in range(lines)}
        figures.clips(path, torch.rand(clips, 3, 1, 16, 16), torch.rand(clips, 5, 1, 16, 16), predictions)
        sizes.append(image(path).shape)
    assert sizes[1][1] == sizes[0][1]  # as wide: as many frames
    assert sizes[1][0] > 2 * sizes[0][0]


def test_figure_of_curves(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1 / s, "hidden": 0.5 / s, "pixel": 0.0} for s in (1, 2, 3)]
    rows += [{"step": 2, "validation_loss": 0.7}]
    figures.curves(tmp_path / "two.png", {"vj-vcr": rows, "generative": [{"step": 1, "pixel": 0.3}]})
    figures.curves(tmp_path / "one.png", {"generative": [{"step": 1, "pixel": 0.3}]})
    assert image(tmp_path / "two.png").shape[1] > 2 * image(tmp_path / "one.png").shape[1]


def test_figure_of_spectra(tmp_path: Path) -> None:
    figures.spectrum(tmp_path / "s.png", {"a": [3.0, 2.0, 1.0, 0.0], "b": [1.0, 0.1]})
    pixels = image(tmp_path / "s.png")
    assert pixels.shape[1] > pixels.shape[0]


# -- Table 1 --------------------------------------------------------------------------------------------------------


def stopped_at_the_third(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> list[str]:
    """Makes a table, which Ctrl-C ends as its third run begins; the list will name the runs that are trained."""
    trained: list[str] = []

    def counted(config: Config, run: Path, probe: Any) -> None:
        if len(trained) == 2:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(run.name)
        train(config, run, probe)

    monkeypatch.setattr(jobs, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        make()
    return trained


def test_table1(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a command that was stopped: what it had trained is not trained again."""
    trained = stopped_at_the_third(monkeypatch, lambda: paper.table1(tiny, tmp_path, seeds=(0, 3)))
    text = paper.table1(tiny, tmp_path, seeds=(0, 3))
    runs = [f"{row}-seed{s}" for row in ROWS for s in (0, 3)]
    assert trained == [*runs[:2], "stopped", *runs[2:]]
    assert (tmp_path / "table1.md").read_text() == text
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == {*paper.TABLE1_FILES}
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {f"{row}-seed{s}" for row in ROWS for s in (0, 3)}
    for name in ("figure5.png", "curves.png", "spectrum.png", "probes.png"):
        image(tmp_path / name)

    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    summary = json.loads((tmp_path / "table1.json").read_text())
    assert Config.from_dict(summary["config"]) == tiny
    assert summary["seeds"] == [0, 3]
    for line, (row, terms) in zip(lines, ROWS.items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ours = summary["rows"][row]["ours"]
        runs = [json.loads((tmp_path / f"{row}-seed{s}" / "evaluation.json").read_text()) for s in (0, 3)]
        assert ours["speed_mse"] == [run["speed_mse"] for run in runs]
        assert ours["speed_mse"][0] != ours["speed_mse"][1]
        assert cells[0] == terms.title
        assert cells[1:4] == ["yes" if on else "no" for on in terms[1:]]
        assert cells[4] == paper.spread(ours["speed_mse"], 3)
        assert cells[6] == paper.spread(ours["speed_mse_standardised"], 3)
        assert cells[7] == paper.spread(ours["speed_mse_least_squares"], 3)
        assert cells[8].startswith(paper.spread(ours["psnr"], 1))
        assert ("post hoc" in cells[8]) == (not terms.pixel)
        said = paper.PAPER_TABLE1["moving-mnist"][row]
        assert (float(cells[5]), float(cells[9])) == (said["speed_mse"], said["psnr"])
    for said in (
        "blobs: 40 digits",
        "seeds 0, 3: mean ± standard deviation",
        "predicting the mean gives",
        "12 steps of 8",
    ):
        assert said in text

    for owner, name in [(jobs, "train"), (probes, "extract")]:
        monkeypatch.setattr(owner, name, fail)
    for owner, name in [(paper, "figure5"), (figures, "spectrum"), (figures, "probes")]:  # drawn before
        monkeypatch.setattr(owner, name, lambda *_: None)
    assert paper.table1(tiny, tmp_path, seeds=(0, 3)) == text


def test_table1_with_sigreg(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth row, which is not the paper's; the four rows are those without it."""
    asked: list[dict[str, Config]] = []

    def finish_rows(config: Config, out: Path, seeds: Any, processes: int, rows: dict[str, Config], *_: Any) -> Any:
        assert config == tiny
        asked.append(rows)
        rows = {name: rows[name] for name in ("vj-vcr", "generative", "sigreg")}
        return finish(config, out, seeds, processes, rows, *_)

    finish = jobs.finish_rows
    monkeypatch.setattr(paper, "finish_rows", finish_rows)
    monkeypatch.setattr(paper, "figure5", lambda *_: None)
    text = paper.table1(override(tiny, {"model.regulariser": "sigreg"}), tmp_path, seeds=(0,))
    assert asked[0] == {
        **{row: override(tiny, {"model.row": row}) for row in ROWS},
        "sigreg": override(tiny, {"model.regulariser": "sigreg"}),
    }
    cells = next(line for line in text.splitlines() if line.startswith("| JEPA with SIGReg |")).split(" | ")
    ours = json.loads((tmp_path / "table1.json").read_text())["rows"]["sigreg"]["ours"]
    assert cells[1:6] == ["yes", "no", "no", f"{ours['speed_mse'][0]:.3f}", ""]
    assert "not a row of the paper" in text


def test_a_table_is_of_one_config(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "vj-vcr-seed0"
    finish_run(tiny, run, paper.TABLE1)
    monkeypatch.setattr(jobs, "train", fail)
    with pytest.raises(ConfigError, match=f"^{run} holds a run of another config .train.lr 0.001 -> 0.5.; choose ano"):
        paper.table1(override(tiny, {"train.lr": 0.5}), tmp_path, seeds=(0,))
    with pytest.raises(ConfigError, match=rf"^{run} has 12 steps, train\.steps=8; choose another --out"):
        paper.table1(override(tiny, {"train.steps": 8}), tmp_path, seeds=(0,))
    assert Config.load(run / "config.json") == tiny


def test_other_probe_settings_evaluate_the_same_runs(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_run(tiny, tmp_path, paper.TABLE1)
    monkeypatch.setattr(jobs, "train", fail)
    result = finish_run(override(tiny, {"evaluate.probe_epochs": 5}), tmp_path, paper.TABLE1)
    assert len(result["speed_mse_by_epoch"]) == 5


def test_spread() -> None:
    assert paper.spread([0.12345], 3) == "0.123"
    assert paper.spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"


def test_the_papers_numbers() -> None:
    numbers = {data: {row: (*of.values(),) for row, of in rows.items()} for data, rows in paper.PAPER_TABLE1.items()}
    assert {(*of,) for of in paper.PAPER_TABLE1["moving-mnist"].values()} == {("speed_mse", "psnr")}
    assert {(*of,) for of in paper.PAPER_TABLE1["clevrer"].values()} == {("speed_mse", "rank_me")}
    assert numbers == {
        "moving-mnist": {
            "vj-vcr": (0.04, 19.5),
            "vj-vcr-decoder": (0.04, 21.2),
            "generative-vcr": (0.10, 22.9),
            "generative": (0.15, 22.8),
        },
        "clevrer": {
            "vj-vcr": (0.19, 423.7),
            "vj-vcr-decoder": (0.19, 359.8),
            "generative-vcr": (0.22, 427.4),
            "generative": (0.23, 160.2),
        },
    }
