"""SIGReg in place of VCR: the energy, its directions from step to step, and whole runs.

tests/training/test_processes.py has it over several processes.
"""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_chunked import assert_equal, batch, in_chunks, model, one_pass
from test_training import Probe, assert_same_run, logged, send
from tolerances import COMPILED_TRAINING, FLOAT32, FLOAT64, relative

import vjvcr_fast
from vjvcr_fast import native, reference
from vjvcr_fast.cli import main
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.losses import SIGRegLoss, projections
from vjvcr_fast.losses.projections import splitmix
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.checkpoint import read_metrics
from vjvcr_fast.training.loop import StopRequestedError, train

pytestmark = pytest.mark.usefixtures("digits", "one_thread")


@pytest.fixture
def config(tiny: Config) -> Config:
    return override(tiny, {"model.regulariser": "sigreg", "train.probe_every": 1})


def directions(seed: int, step: int, d: int) -> torch.Tensor:
    """Those of a model's `step`-th training step, counted from 0."""
    seed_of_step, compiled = splitmix(seed, torch.tensor(step)), native.MISSING is None
    return projections.drawn(seed_of_step, d, 1024, torch.device("cpu"), compiled).double()


@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder", "generative-vcr"])
def test_it_takes_the_place_of_vcr(row: str) -> None:
    """The other terms are those of a model with VCR. Each training step has directions of its own."""
    plain, (x, y, _) = model(row), batch()
    of = model(row, sigreg=SIGRegLoss(seed=7), sigreg_weight=0.3)
    others = plain(x, y)
    h = torch.cat([of.encoder(x), of.encode_targets(y)], dim=1)
    for step in range(2):
        found = of(x, y)
        right = reference.sigreg(h, directions(7, step, h.shape[2]))
        assert relative(found.sigreg, right) <= FLOAT64
        assert found.variance == found.covariance == others.sigreg == 0
        rest = others.loss - of.alpha * others.variance - of.beta * others.covariance
        assert relative(found.loss, rest + 0.3 * right) <= FLOAT32
        assert (found.hidden, found.pixel) == (others.hidden, others.pixel)
    assert of.sigreg.step == 2


@pytest.mark.parametrize("chunk", [1, 3, 12])
def test_in_chunks(chunk: int) -> None:
    """Each way counts one step."""
    of, inputs = model("vj-vcr-decoder", sigreg=SIGRegLoss(), sigreg_weight=0.3), batch()
    right = one_pass(of, *inputs)
    of.sigreg.step.zero_()
    assert_equal(in_chunks(of, *inputs, chunk), right, 1e-12)
    assert of.sigreg.step == 1


def test_what_a_config_makes(config: Config) -> None:
    built = build_model(override(config, {"train.seed": 3, "model.sigreg_weight": 0.2}), torch.device("cpu"))
    assert (built.sigreg.seed, built.sigreg.directions, built.sigreg_weight) == (3, 1024, 0.2)
    assert build_model(override(config, {"model.regulariser": "vcr"}), torch.device("cpu")).sigreg is None
    with pytest.raises(ConfigError, match=r"^model\.regulariser=sigreg: must be vcr where model\.row=generative"):
        override(config, {"model.row": "generative"})


def test_from_the_command_line(tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of its own folder, which is loaded like any other."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *tiny_options, "--regulariser", "sigreg", "--evaluate"]) == 0
    run = Path("runs/moving-mnist-mini-vj-vcr-sigreg-seed0")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    weight = Config.load(run / "config.json").model.sigreg_weight
    for row in rows:
        assert row["variance"] == row["covariance"] == 0
        assert row["loss"] == pytest.approx(row["hidden"] + weight * row["sigreg"])
    assert vjvcr_fast.load(run, device="cpu").encode(torch.rand(2, 2, 1, 16, 16)).shape == (2, 2, 32)


def test_the_loss_goes_down(tmp_path: Path, config: Config) -> None:
    changes = {"train.steps": 60, "train.log_every": 10, "train.validate_every": 60, "train.lr": 3e-3}
    train(override(config, {**changes, "train.probe_every": 0}), tmp_path)
    loss = [*logged(tmp_path, "loss").values()]
    assert loss[-1] < 0.8 * loss[0]


@pytest.mark.parametrize("step", [5, 7])
def test_a_resumed_run_goes_on_with_its_directions(tmp_path: Path, config: Config, step: int) -> None:
    """Bit for bit as if it had never been stopped. Validation counts nothing."""
    train(config, tmp_path / "whole", Probe())
    with pytest.raises(StopRequestedError):
        train(config, tmp_path / "stopped", Probe(step, send(signal.SIGTERM)))
    assert checkpoint.load(tmp_path / "stopped" / "last.pt")["model"]["sigreg.step"] == step
    train(config, tmp_path / "stopped", Probe())
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_terms_that_an_older_version_did_not_log(tmp_path: Path, tiny: Config, monkeypatch: Any) -> None:
    """A run that it stopped between log lines goes on; the next line is of the steps from here on."""
    config = override(tiny, {"train.probe_every": 1})
    with pytest.raises(StopRequestedError):
        train(config, tmp_path / "run", Probe(7, send(signal.SIGTERM)))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert len(state["history"]) == 2
    checkpoint.save(tmp_path / "run" / "last.pt", state | {"history": [row[:-1] for row in state["history"]]})
    train(config, tmp_path / "run", Probe())
    train(config, tmp_path / "whole", Probe())
    ours, right = (logged(tmp_path / run, "validation_loss") for run in ("run", "whole"))
    assert ours == right
    assert logged(tmp_path / "run", "loss").keys() == {5, 10, 12}


@pytest.mark.slow
def test_compiled_is_the_same_training(tmp_path: Path, config: Config) -> None:
    for choice in ("off", "on"):
        changes = {"train.compile": choice, "train.log_every": 1, "train.probe_every": 0}
        train(override(config, changes), tmp_path / choice)
    eager, compiled = (logged(tmp_path / choice, "loss") for choice in ("off", "on"))
    for step in (1, 2, 3):
        assert compiled[step] == pytest.approx(eager[step], rel=COMPILED_TRAINING)
    assert checkpoint.load(tmp_path / "on" / "last.pt")["model"]["sigreg.step"] == 12
