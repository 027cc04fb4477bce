"""Training with latents: z* of a batch, calibration of the L1 weight, revival of heads, and resumed runs."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import Probe, Waits, assert_same_run, break_the_weights, logged, send
from tolerances import FLOAT32

from vjvcr_fast import native
from vjvcr_fast.config import LATENTS, Config, ConfigError, latent, override
from vjvcr_fast.data.moving_mnist import Videos
from vjvcr_fast.evaluation.evaluate import evaluate_run
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.runs import load_run
from vjvcr_fast.training import checkpoint, loop
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.calibration import DEAD, GAIN, LEAST, MOST, NOISE, DuringForward, Latents
from vjvcr_fast.training.loop import DivergedError, StopRequestedError, train
from vjvcr_fast.training.step import split_frames

CPU = torch.device("cpu")
KINDS = ["discrete", "sparse-high"]
pytestmark = pytest.mark.usefixtures("digits", "one_thread")


def batch(config: Config, n: int = 16) -> Videos:
    return build_videos(config, build_data(config)[0], "train", CPU).batch(0, n)


def latents_of(config: Config) -> tuple[Latents, EnergyModel]:
    model = build_model(config, CPU)
    return Latents(config, model), model


# -- z* of a batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LATENTS)
def test_inference_leaves_the_model_as_it_was(tiny_stochastic: Config, name: str, training: bool) -> None:
    config = latent(tiny_stochastic, name)
    latents, model = latents_of(config)
    model.train(training)
    x, y = split_frames(batch(config), config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = (latents.infer(x, y) for _ in range(2))
    assert first.measured.equal(second.measured)
    assert len(first.measured) == len(latents.names)
    assert all(module.training is training for module in model.modules())
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    if first.z is not None:
        assert first.z.equal(second.z)
        assert not first.z.requires_grad


def test_without_a_latent_there_is_no_z(tiny_stochastic: Config) -> None:
    latents, model = latents_of(tiny_stochastic)
    x, y = split_frames(batch(tiny_stochastic), tiny_stochastic)
    assert latents.infer(x, y).z is None
    assert latents.names == []
    model.eval()
    assert latents.predict(x, y).equal(model.predict(x))


def test_discrete_takes_the_head_of_least_energy(tiny_stochastic: Config) -> None:
    config = latent(tiny_stochastic, "discrete")
    latents, model = latents_of(config)
    x, y = split_frames(batch(config), config)
    model.eval()
    z, measured = latents.infer(x, y)
    with torch.no_grad():
        h_y = model.encode_targets(y)
        each = torch.stack(
            [(model.predict(x, one.expand(16, -1)) - h_y).square().mean(dim=(1, 2)) for one in torch.eye(3)], dim=1
        )
    assert z is not None
    assert z.argmax(dim=1).equal(each.argmin(dim=1))
    means = dict(zip(latents.names, measured.tolist(), strict=True))
    assert means["latent_energy"] == pytest.approx(each.min(dim=1).values.mean().item(), rel=FLOAT32)
    assert [means[f"head_{i}"] for i in range(3)] == pytest.approx(z.mean(dim=0).tolist())


def test_sparse_lowers_the_energy_and_measures_its_zeros(tiny_stochastic: Config) -> None:
    config = override(latent(tiny_stochastic, "sparse-high"), {"latent.weight": 1e-3, "latent.iterations": 40})
    latents, model = latents_of(config)
    x, y = split_frames(batch(config), config)
    model.eval()
    z, measured = latents.infer(x, y)
    assert z is not None
    assert z.shape == (16, 6)
    means = dict(zip(latents.names, measured.tolist(), strict=True))
    assert means["zeros"] == pytest.approx((z == 0).float().mean().item())
    with torch.no_grad():
        h_y = model.encode_targets(y)
        hidden = (model.predict(x, z) - h_y).square().mean(dim=(1, 2))
        at_zero = (model.predict(x, torch.zeros_like(z)) - h_y).square().mean(dim=(1, 2))
    energy = hidden + 1e-3 * z.abs().sum(dim=1)
    assert means["latent_energy"] == pytest.approx(energy.mean().item(), rel=FLOAT32)
    assert (energy <= at_zero + 1e-6).all()
    assert energy.mean() < at_zero.mean()


def test_settings_reach_the_inference(tiny_stochastic: Config) -> None:
    sparse = override(latent(tiny_stochastic, "sparse-low"), {"latent.weight": 1e-4})
    x, y = split_frames(batch(sparse), sparse)
    usual = latents_of(sparse)[0].infer(x, y).z
    changes = {"weight": 10.0, "iterations": 1, "method": "ista", "step_rule": "fixed", "nonnegative": True}
    for name, value in changes.items():
        changed = latents_of(override(sparse, {f"latent.{name}": value}))[0].infer(x, y).z
        assert usual is not None
        assert changed is not None
        assert not changed.equal(usual), name
        assert name != "nonnegative" or (changed.min() == 0 and usual.min() < 0)
        assert name != "weight" or (changed == 0).all()


# -- Training -------------------------------------------------------------------------------------------------------


NEWTON = {"latent.kind": "sparse", "latent.method": "newton", "latent.tolerance": 0.1}


@pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")
def test_newton_trains(tmp_path: Path, tiny_stochastic: Config) -> None:
    train(override(tiny_stochastic, NEWTON), tmp_path)
    assert [*logged(tmp_path, "zeros")] == [5, 10, 12]


@pytest.mark.parametrize(
    ("changes", "operators", "why"),
    [
        ({}, False, "it needs the compiled operators, which are not wanted"),
        ({"model.row": "vj-vcr-decoder"}, True, "it needs an energy in closed form"),
        ({"model.row": "generative"}, True, "it needs an energy in closed form"),
    ],
)
def test_newton_is_refused_before_the_first_step(
    tmp_path: Path,
    tiny_stochastic: Config,
    changes: dict[str, Any],
    operators: bool,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "MISSING", None if operators else "not wanted")
    config = override(tiny_stochastic, {**NEWTON, **changes})
    with pytest.raises(ConfigError, match=rf"^latent.method=newton: {why}.*; choose --latent.method fista$") as error:
        train(config, tmp_path)
    assert str(error.value).isprintable()
    assert not (tmp_path / "metrics.jsonl").exists()
    latents, _ = latents_of(config)  # its model can still be loaded
    x, y = split_frames(batch(config), config)
    with pytest.raises(ConfigError, match=r"choose --latent\.method fista$"):
        latents.infer(x, y)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_extended_is_never_ended(tmp_path: Path, tiny_stochastic: Config, name: str) -> None:
    """Ended between log lines: the weight is adapted, or heads are revived, as if it had gone on."""
    config = latent(tiny_stochastic, name)
    train(override(config, {"train.steps": 8}), tmp_path / "extended")
    for run in ("extended", "whole"):
        train(config, tmp_path / run)
    ours, right = (checkpoint.load(tmp_path / run / "last.pt") for run in ("extended", "whole"))
    assert ours["latent_weight"] == right["latent_weight"]
    assert all(map(torch.equal, ours["model"].values(), right["model"].values()))
    assert logged(tmp_path / "extended", "latent_energy")[10] == logged(tmp_path / "whole", "latent_energy")[10]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder", "generative"])
def test_training(tmp_path: Path, tiny_stochastic: Config, name: str, row: str) -> None:
    config = override(latent(tiny_stochastic, name), {"model.row": row})
    train(config, tmp_path)
    expected = {"discrete": ["head_0", "head_1", "head_2", "revived"], "sparse-high": ["zeros", "latent_weight"]}
    for measured in ("latent_energy", *expected[name]):
        assert [*logged(tmp_path, measured)] == [5, 10, 12]
    if name == "discrete":
        shares = [sum(logged(tmp_path, f"head_{i}")[step] for i in range(3)) for step in (5, 10, 12)]
        assert shares == pytest.approx([1.0] * 3)
    else:
        columns = checkpoint.load(tmp_path / "last.pt")["model"]["predictor.latent_in.weight"].norm(dim=0)
        assert columns.tolist() == pytest.approx([1.0] * 6, rel=FLOAT32)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder", "generative"])
def test_representations_are_made_once(tiny_stochastic: Config, name: str, row: str) -> None:
    """Inferring z* from the representations that the update sees gives the same z*, energy, gradients and statistics as
    inferring it first."""
    config = latent(override(tiny_stochastic, {"model.row": row}), name)
    x, y = split_frames(batch(config), config)
    found = []
    for during in (False, True):
        latents, model = latents_of(config)
        inference, calls = DuringForward(latents), []
        for encoder in filter(None, (model.encoder, model.twin)):
            encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        z, measured = (inference, None) if during else latents.infer(x, y)
        terms = model(x, y, z)
        terms.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((terms, inference.measured if during else measured, gradients, [*model.buffers()], len(calls)))
    (before, *first), (after, *second) = found
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a, rtol=FLOAT32, atol=1e-6)
    for a, b in zip(first[:-1], second[:-1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
    assert (first[-1], second[-1]) == ((4, 2) if row != "generative" else (2, 1))


def test_the_predictor_alone_decays(tiny_stochastic: Config) -> None:
    latents, model = latents_of(latent(tiny_stochastic, "sparse-high"))
    encoder, predictor = latents.parameters()
    assert "weight_decay" not in encoder
    assert predictor["weight_decay"] == 1e-3
    assert {id(p) for p in predictor["params"]} == {id(p) for p in model.predictor.parameters()}
    assert len(encoder["params"]) + len(predictor["params"]) == len([*model.parameters()])
    for name in ("none", "discrete"):
        latents, model = latents_of(latent(tiny_stochastic, name))
        assert all(a is b for a, b in zip(latents.parameters(), model.parameters(), strict=True))


def test_every_latent_starts_from_the_same_encoder(tiny_stochastic: Config) -> None:
    encoders = [latents_of(latent(tiny_stochastic, name))[1].encoder.state_dict() for name in LATENTS]
    assert all(value.equal(encoders[0][key]) for other in encoders for key, value in other.items())


@pytest.mark.parametrize("name", KINDS)
def test_validation_is_at_z_star(tiny_stochastic: Config, name: str) -> None:
    config = latent(tiny_stochastic, name)
    latents, model = latents_of(config)
    videos = build_videos(config, build_data(config)[1], "validation", CPU)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measured = loop.validate(model, videos, config, latents)
    assert model.training
    assert all(value.equal(before[key]) for key, value in model.state_dict().items()), "held-out videos left a trace"
    model.eval()
    with torch.no_grad():
        losses = []
        for start in (0, 8):
            x, y = split_frames(videos.batch(start, 8), config)
            losses.append(model(x, y, latents.infer(x, y).z).loss.item())
    assert measured == pytest.approx(sum(losses) / 2, rel=FLOAT32)


@pytest.mark.parametrize("name", KINDS)
def test_no_step_waits_for_the_device(
    tmp_path: Path, tiny_stochastic: Config, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for steps in (6, 12):
        changes = {"train.steps": steps, "train.log_every": 1000, "train.validate_every": 1000}
        with monkeypatch.context() as patch, Waits(patch) as waits:
            train(override(latent(tiny_stochastic, name), changes), tmp_path / str(steps))
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("step", [5, 7, 8])
def test_stopped_and_resumed_is_never_stopped(tmp_path: Path, tiny_stochastic: Config, name: str, step: int) -> None:
    """Stopped at a log line, where the weight or the heads have just changed, between two, and at a validation."""
    config = override(latent(tiny_stochastic, name), {"train.probe_every": 1, "train.steps": 18})
    with pytest.raises(StopRequestedError):
        train(config, tmp_path / "stopped", Probe(step, send(signal.SIGINT)))
    torch.rand(7)
    train(config, tmp_path / "stopped", Probe())
    train(config, tmp_path / "whole", Probe())
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    changed = logged(tmp_path / "whole", "revived" if name == "discrete" else "latent_weight")
    assert len({*changed.values()}) > 1, "nothing was there to resume"


@pytest.mark.parametrize("name", KINDS)
def test_divergence_is_seen(
    tmp_path: Path, tiny_stochastic: Config, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_the_weights(monkeypatch, after=8)
    with pytest.raises(DivergedError, match=r"^loss, hidden, .* not finite at step 9; the last"):
        train(latent(tiny_stochastic, name), tmp_path)


def test_tensorboard_shows_predictions_at_z_star(tmp_path: Path, tiny_stochastic: Config) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = {"train.log": "tensorboard", "model.row": "vj-vcr-decoder"}
    train(override(latent(tiny_stochastic, "sparse-high"), changes), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {*events.Tags()["scalars"]} > {"latent_energy", "zeros", "latent_weight"}
    assert [image.step for image in events.Images("videos")] == [4, 8, 12]


@pytest.mark.parametrize("name", KINDS)
def test_the_usual_evaluation_works_at_z_star(tmp_path: Path, tiny_stochastic: Config, name: str) -> None:
    train(latent(tiny_stochastic, name), tmp_path)
    result = evaluate_run(tmp_path)
    assert 0 < result["psnr"] < 100
    assert 0 < result["speed_mse"] < math.inf


# -- Calibration ----------------------------------------------------------------------------------------------------


def adam(model: EnergyModel) -> torch.optim.Optimizer:
    """After one update, so that it has moments."""
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_the_weight_follows_the_zeros(tiny_stochastic: Config) -> None:
    config = override(latent(tiny_stochastic, "sparse-high"), {"latent.weight": 0.5})
    latents, model = latents_of(config)
    optimizer = adam(model)
    assert latents.adapt(5, {"zeros": 0.5}, optimizer) == {"latent_weight": 0.5}  # what the steps before it had
    assert latents.weight == pytest.approx(0.5 * math.exp(GAIN * 0.3))
    assert latents.adapt(10, {"zeros": 0.8}, optimizer)["latent_weight"] == latents.weight
    for zeros, bound in ((0.0, MOST), (1.0, LEAST)):
        for step in range(200):
            latents.adapt(step, {"zeros": zeros}, optimizer)
        assert latents.weight == bound


def test_a_given_weight_stays(tmp_path: Path, tiny_stochastic: Config) -> None:
    config = override(latent(tiny_stochastic, "sparse-high"), {"latent.weight": 0.5, "latent.calibrate": False})
    train(config, tmp_path)
    assert {*logged(tmp_path, "latent_weight").values()} == {0.5}


def test_the_probe_infers_as_training_does(tmp_path: Path, tiny_stochastic: Config) -> None:
    probed = {}
    steps = iter((5, 10))

    def probe(model: EnergyModel, config: Config, data: Any) -> dict[str, float]:
        probed[next(steps)] = config.latent.weight
        return {}

    train(override(latent(tiny_stochastic, "sparse-high"), {"train.probe_every": 5}), tmp_path, probe)
    used = logged(tmp_path, "latent_weight")  # by the steps up to this line
    assert probed == {5: used[10], 10: used[12]}


def test_evaluation_has_the_weight_of_the_checkpoint(tmp_path: Path, tiny_stochastic: Config) -> None:
    config = latent(tiny_stochastic, "sparse-high")
    train(config, tmp_path)
    kept = checkpoint.load(tmp_path / "best.pt")["latent_weight"]
    assert kept != config.latent.weight
    assert load_run(tmp_path)[0] == override(config, {"latent.weight": kept})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zeros"), [("sparse-high", 0.8), ("sparse-low", 0.2)])
def test_calibration_finds_the_fraction(tmp_path: Path, tiny_stochastic: Config, name: str, zeros: float) -> None:
    """It starts from a weight that is far too small, or far too large."""
    for weight in (1e-7, 1e-2):
        changes = {"train.steps": 300, "latent.weight": weight, "train.validate_every": 300, "latent.iterations": 30}
        run = tmp_path / str(weight)
        train(override(latent(tiny_stochastic, name), {**changes, "train.batch": 32}), run)
        last = [*logged(run, "zeros").values()][-10:]
        assert sum(last) / 10 == pytest.approx(zeros, abs=0.05)


# -- Heads ----------------------------------------------------------------------------------------------------------


def weights(model: EnergyModel) -> list[list[torch.Tensor]]:
    return [[p.detach().clone() for p in head.parameters()] for head in model.predictor.last]  # type: ignore[union-attr]


def usage(*shares: float) -> dict[str, float]:
    return {f"head_{i}": share for i, share in enumerate(shares)}


def test_heads_out_of_use_become_the_most_used(tiny_stochastic: Config) -> None:
    config = latent(tiny_stochastic, "discrete")
    latents, model = latents_of(config)
    optimizer = adam(model)
    before = weights(model)
    enough = 1.01 * DEAD / 3
    assert latents.adapt(5, usage(0.0, 1 - enough, enough), optimizer) == {"revived": 1}
    after = weights(model)
    for ours, source, moved in zip(before[2], before[1], after[0], strict=True):
        assert 0.5 * NOISE < ((moved - source).std() / source.std()).item() < 2 * NOISE
        assert not ours.equal(moved)
    assert all(a.equal(b) for i in (1, 2) for a, b in zip(before[i], after[i], strict=True))
    heads = [[*head.parameters()] for head in model.predictor.last]  # type: ignore[union-attr]
    for ours, theirs in zip(heads[0], heads[1], strict=True):
        for name, moment in optimizer.state[theirs].items():
            assert optimizer.state[ours][name].equal(moment)
            assert optimizer.state[ours][name] is not moment
    assert latents.adapt(10, usage(0.3, 0.3, 0.4), optimizer) == {"revived": 0}
    assert latents.adapt(15, usage(0.0, 0.0, 1.0), optimizer) == {"revived": 2}
    assert not weights(model)[0][0].equal(weights(model)[1][0]), "two copies must differ to part"


def test_revival_is_its_seeds_alone(tiny_stochastic: Config) -> None:
    found = []
    for seed, step in ((0, 5), (0, 5), (0, 10)):
        torch.manual_seed(seed)
        latents, model = latents_of(latent(tiny_stochastic, "discrete"))
        optimizer = adam(model)
        torch.rand(len(found))
        state = torch.get_rng_state()
        latents.adapt(step, usage(0.0, 0.5, 0.5), optimizer)
        assert torch.get_rng_state().equal(state)
        found.append(weights(model)[0][0])
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_the_papers_heads_are_left_alone(tiny_stochastic: Config) -> None:
    latents, model = latents_of(override(latent(tiny_stochastic, "discrete"), {"latent.revive": False}))
    before = weights(model)
    assert latents.adapt(5, usage(0.0, 0.0, 1.0), adam(build_model(tiny_stochastic, CPU))) == {}
    assert all(a.equal(b) for x, y in zip(before, weights(model), strict=True) for a, b in zip(x, y, strict=True))
