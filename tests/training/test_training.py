"""The training loop: it learns, stops and goes on bit for bit, never waits for the device, and fails in one line."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import BFLOAT16_TRAINING, COMPILED_TRAINING, COMPILED_TRAINING_LATER, FLOAT32
from torch.utils._python_dispatch import TorchDispatchMode

from vjvcr_fast.cli import REQUEUE, main
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.data.digits import Digits
from vjvcr_fast.evaluation.evaluate import evaluate_run
from vjvcr_fast.evaluation.probes import training_probe
from vjvcr_fast.models.energy import ROWS, EnergyModel
from vjvcr_fast.runs import load_run
from vjvcr_fast.training import build, checkpoint, loop
from vjvcr_fast.training import step as one_step
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.checkpoint import CheckpointError, read_metrics
from vjvcr_fast.training.loop import DivergedError, StopRequestedError, train

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("digits", "one_thread")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the time, so that two runs of a config can be compared."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("videos_per_second", "data_wait")} for row in rows]


def logged(run: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in metrics(run) if name in row}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs are equal, except for the time they took and the config, whose `train.steps` may differ."""
    assert metrics(a) == metrics(b)
    for name in ("last.pt", "best.pt"):
        ours, theirs = ({**checkpoint.load(run / name), "config": None, "seconds": None} for run in (a, b))
        assert same(ours, theirs), name


class Probe:
    """A probe that performs `action` when it is called for the n-th time."""

    def __init__(self, n: int = 0, action: Any = None) -> None:
        self.left, self.action = n, action

    def __call__(self, model: EnergyModel, config: Config, digits: Digits) -> dict[str, float]:
        self.left -= 1
        if self.left == 0:
            self.action()
        return {"speed_mse": 0.5}


def send(*numbers: int) -> Any:
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


@pytest.fixture
def probed(tiny: Config) -> Config:
    return override(tiny, {"train.probe_every": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Path]:
    """Gives the uninterrupted run of a config, to compare with or to copy. Each is made once."""
    made: dict[str, Path] = {}

    def of(config: Config) -> Path:
        key = config.to_json()
        if key not in made:
            run = tmp_path_factory.mktemp("whole")
            train(config, run, Probe())
            made[key] = run
        return made[key]

    return of


@pytest.fixture
def trained(tmp_path: Path, tiny: Config, whole: Callable[[Config], Path]) -> Path:
    """A copy of the run of `tiny`. As in the original, last.pt and the newest kept checkpoint are one file."""
    run = Path(shutil.copytree(whole(tiny), tmp_path / "trained"))
    (run / "last.pt").unlink()
    os.link(run / "checkpoints" / "step-00000012.pt", run / "last.pt")
    return run


# -- Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_the_loss_goes_down(tmp_path: Path, tiny: Config, row: str) -> None:
    changes = {"model.row": row, "train.steps": 60, "train.log_every": 10, "train.validate_every": 60, "train.lr": 3e-3}
    train(override(tiny, changes), tmp_path)
    loss = [*logged(tmp_path, "loss").values()]
    assert loss[-1] < 0.8 * loss[0]
    has = ROWS[row]
    for name, on in {"hidden": has.hidden, "pixel": has.pixel, "variance": has.vcr, "covariance": has.vcr}.items():
        assert all((value > 0) == on for value in logged(tmp_path, name).values())


def test_what_a_run_writes(tmp_path: Path, tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny, tmp_path / "run")
    files = {"config.json", "metrics.jsonl", "last.pt", "best.pt", "checkpoints"}
    assert {f.name for f in (tmp_path / "run").iterdir()} == files
    kept = sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000008.pt", "step-00000012.pt"]
    assert (tmp_path / "run" / "checkpoints" / kept[1]).samefile(tmp_path / "run" / "last.pt")
    assert Config.load(tmp_path / "run" / "config.json") == tiny
    assert [*logged(tmp_path / "run", "loss")] == [5, 10, 12]
    assert [*logged(tmp_path / "run", "validation_loss")] == [4, 8, 12]
    shown = capsys.readouterr().err
    assert "vj-vcr (cpu)" in shown
    assert "12/12" in shown
    assert "videos/s=" in shown
    assert "hidden=" in shown


def test_the_same_config_gives_the_same_run(tmp_path: Path, tiny: Config, whole: Callable[[Config], Path]) -> None:
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # whatever the caller's random numbers are
        train(tiny, tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train(override(tiny, {"train.seed": 1}), tmp_path / "c")
    assert metrics(tmp_path / "c") != metrics(tmp_path / "a")


def test_logged_terms_are_means_since_the_last_line(
    tmp_path: Path, tiny: Config, whole: Callable[[Config], Path]
) -> None:
    train(override(tiny, {"train.log_every": 1}), tmp_path)
    each = [*logged(tmp_path, "loss").values()]
    means = [sum(part) / len(part) for part in (each[:5], each[5:10], each[10:])]
    assert [*logged(whole(tiny), "loss").values()] == pytest.approx(means, rel=FLOAT32)


def test_the_rate_is_that_of_training_alone(tmp_path: Path, probed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with a clock that only steps, probes and validations move, also across a stop and a validation."""
    now = 0.0

    def takes(seconds: float, result: Any) -> Any:
        def spend(*args: Any) -> Any:
            nonlocal now
            now += seconds
            return result(*args)

        return spend

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(one_step, "split_frames", takes(2.0, one_step.split_frames))
    monkeypatch.setattr(loop, "validate", takes(50.0, lambda *_: 1.0))
    for probe in (Probe(7, send(signal.SIGINT)), Probe()):
        with contextlib.suppress(StopRequestedError):
            train(probed, tmp_path, takes(100.0, probe))
    rates = [r["videos_per_second"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert rates == [probed.train.batch / 2] * 3


@pytest.mark.parametrize(("row", "decay"), [("vj-vcr", 0.5), ("generative", 0.25)])
def test_weight_decay_is_the_rows(
    tmp_path: Path, tiny: Config, row: str, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    adam, seen = torch.optim.Adam, []

    def record(*args: Any, **settings: Any) -> torch.optim.Adam:
        seen.append(settings["weight_decay"])
        return adam(*args, **settings)

    monkeypatch.setattr(torch.optim, "Adam", record)
    changes = {"model.row": row, "train.weight_decay": 0.5, "train.weight_decay_generative": 0.25, "train.steps": 1}
    train(override(tiny, changes), tmp_path)
    assert seen == [decay]


def rates(config: Config, run: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate of every step of a run."""
    step, seen = torch.optim.Adam.step, []

    def record(self: torch.optim.Adam, *args: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", record)
        train(config, run)
    return seen


def test_warm_up(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(tiny, {"train.warmup": 6, "train.lr": 7e-3})
    right = [1e-3 * min(i, 7) for i in range(1, 13)]
    assert rates(config, tmp_path / "whole", monkeypatch) == pytest.approx(right)
    first = rates(override(config, {"train.steps": 4}), tmp_path / "parts", monkeypatch)
    assert first + rates(config, tmp_path / "parts", monkeypatch) == pytest.approx(right)
    assert metrics(tmp_path / "parts")[-1] == metrics(tmp_path / "whole")[-1]
    assert rates(tiny, tmp_path / "without", monkeypatch) == [1e-3] * 12


def test_the_development_split_shares_nothing(tiny: Config) -> None:
    development = override(tiny, {"data.split": "development"})
    data = {config.data.split: build_data(config) for config in (tiny, development)}
    assert data["development"][0].fingerprint() != data["validation"][0].fingerprint()
    videos = [
        build_videos(config, data["validation"][1], "validation", torch.device("cpu")).batch(0, 4)
        for config in (tiny, development)
    ]
    assert not videos[0].speed.equal(videos[1].speed)  # the same digits, but another stream


def test_bfloat16(tmp_path: Path, tiny: Config) -> None:
    for precision in ("fp32", "bf16"):
        train(override(tiny, {"train.precision": precision, "model.row": "vj-vcr-decoder"}), tmp_path / precision)
    first, second = (logged(tmp_path / precision, "loss")[5] for precision in ("fp32", "bf16"))
    assert first != second
    assert second == pytest.approx(first, rel=BFLOAT16_TRAINING)
    state = checkpoint.load(tmp_path / "bf16" / "last.pt")
    assert {v.dtype for v in state["model"].values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.slow
def test_compiled_is_the_same_training(tmp_path: Path, tiny: Config) -> None:
    for choice in ("off", "on"):
        changes = {"train.compile": choice, "model.row": "vj-vcr-decoder", "train.log_every": 1}
        changes |= {"model.padding": "replicate", "model.unpool": "learned"}  # as the presets
        train(override(tiny, changes), tmp_path / choice)
    eager, compiled = (logged(tmp_path / choice, "loss") for choice in ("off", "on"))
    for step in (1, 2, 3):
        assert compiled[step] == pytest.approx(eager[step], rel=COMPILED_TRAINING)
    assert compiled[12] == pytest.approx(eager[12], rel=COMPILED_TRAINING_LATER)


# -- No step waits for the device -----------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: values read by the host, and results whose shape depends on values."""

    OPS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal")
    READS = ("tolist", "cpu", "numpy")  # on a CPU tensor these read without dispatch

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in self.READS:
            patch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.OPS
        return func(*args, **(kwargs or {}))

    def _counted(self, method: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(*args, **kwargs)

        return read


@pytest.mark.parametrize("row", ["vj-vcr-decoder", "generative"])
def test_no_step_waits_for_the_device(tmp_path: Path, tiny: Config, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start, the last log line and the last validation may wait, so 12 steps must wait as often as 6 do."""
    counts = []
    for steps in (6, 12):
        changes = {"train.steps": steps, "train.log_every": 1000, "train.validate_every": 1000, "model.row": row}
        with monkeypatch.context() as patch, Waits(patch) as waits:
            train(override(tiny, changes), tmp_path / str(steps))
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


# -- Validation and checkpoints -------------------------------------------------------------------------------------


def test_best_is_the_state_of_least_validation_loss(
    tmp_path: Path, probed: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {4: 3.0, 8: 1.0, 12: 2.0}
    measured = iter(losses.values())
    monkeypatch.setattr(loop, "validate", lambda *_: next(measured))
    with pytest.raises(StopRequestedError):  # also across a stop
        train(probed, tmp_path, Probe(9, send(signal.SIGINT)))
    train(probed, tmp_path, Probe())
    assert logged(tmp_path, "validation_loss") == losses
    best, last = checkpoint.load(tmp_path / "best.pt"), checkpoint.load(tmp_path / "last.pt")
    assert (best["step"], best["best"]) == (8, 1.0)
    assert (last["step"], last["best"]) == (12, 1.0)


def test_best_gives_its_validation_loss_again(trained: Path, tiny: Config) -> None:
    config, model = load_run(trained)
    losses = logged(trained, "validation_loss")
    step = checkpoint.load(trained / "best.pt")["step"]
    assert losses[step] == min(losses.values())
    _, held_out = build_data(config)
    assert not model.training
    videos = build_videos(config, held_out, "validation", CPU)
    assert loop.validate(model, videos, config, Latents(config, model)) == losses[step]


def test_validation_changes_nothing(tiny: Config) -> None:
    model = build_model(tiny, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, held_out = build_data(tiny)
    videos = build_videos(tiny, held_out, "validation", CPU)
    first, second = (loop.validate(model, videos, tiny, Latents(tiny, model)) for _ in range(2))
    assert first == second
    assert model.training
    assert same(before, dict(model.state_dict()))
    assert all(p.grad is None for p in model.parameters())


def test_probe_during_training(tmp_path: Path, tiny: Config, whole: Callable[[Config], Path]) -> None:
    train(override(tiny, {"train.probe_every": 3}), tmp_path / "with", training_probe)
    assert [*logged(tmp_path / "with", "speed_mse")] == [3, 6, 9, 12]
    assert all(0 < mse < math.inf for mse in logged(tmp_path / "with", "speed_mse").values())
    rest = [row for row in metrics(tmp_path / "with") if "speed_mse" not in row]
    assert rest == metrics(whole(tiny))  # looking changes nothing


def test_tensorboard(tmp_path: Path, tiny: Config) -> None:
    """Also after a crash: the steps that are trained again replace those that were there."""

    def crash() -> None:
        raise MemoryError

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = override(tiny, {"train.log": "tensorboard", "train.probe_every": 1, "model.row": "vj-vcr-decoder"})
    with pytest.raises(MemoryError):
        train(config, tmp_path, Probe(7, crash))
    train(config, tmp_path, Probe())
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {*events.Tags()["scalars"]} > {"loss", "hidden", "pixel", "variance", "covariance", "validation_loss"}
    for name in ("loss", "validation_loss"):
        shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert shown == [*logged(tmp_path, name).items()]
    images = events.Images("videos")
    assert [image.step for image in images] == [4, 8, 12]
    # Eight videos of two lines (target, prediction), five frames of 16 pixels side by side.
    assert (images[0].height, images[0].width) == (8 * 2 * 16, 5 * 16)


def points(file: Path) -> list[dict[str, Any]]:
    """What an offline run of wandb keeps of its curves, in the order in which it was logged."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, record, found = DataStore(), Record(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append({name: value for name, value in row.items() if not name.startswith("_")})
    return found


@pytest.mark.slow
def test_wandb(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline. A run that goes on keeps its identity, and logs telemetry at the step it was measured at."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = override(tiny, {"train.log": "wandb", "train.telemetry_every": 4, "model.row": "vj-vcr-decoder"})
    train(override(config, {"train.steps": 8}), tmp_path)
    time.sleep(1.1)  # wandb names its folders by the second
    train(config, tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{(tmp_path / 'wandb-id').read_text().strip()}"}
    rows = [row for file in files for row in points(file)]
    numbers = [row for row in rows if "videos/size" not in row]
    assert numbers == [pytest.approx(row) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert {4, 8, 12} == {row["step"] for row in numbers if "rank_me" in row}
    images = [row for row in rows if "videos/size" in row]
    assert [row["step"] for row in images] == [4, 8, 12]
    assert (images[0]["videos/height"], images[0]["videos/width"]) == (8 * 2 * 16, 5 * 16)


@pytest.mark.slow
def test_wandb_without_an_account(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refused(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ConfigError, match=r"^train.log=wandb: No API key .*; WANDB_MODE=offline needs no account$"):
        train(override(tiny, {"train.log": "wandb"}), tmp_path / "run")


# -- Stopping and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "row", "number"),
    [
        (1, "vj-vcr-decoder", signal.SIGTERM),
        (5, "vj-vcr", signal.SIGINT),
        (7, "vj-vcr-decoder", signal.SIGINT),
        (8, "vj-vcr", signal.SIGHUP),
    ],
)
def test_stopped_and_resumed_is_never_stopped(
    tmp_path: Path, probed: Config, whole: Callable[[Config], Path], row: str, step: int, number: signal.Signals
) -> None:
    """Stopped after the first step, at a log line, between log lines (whose means go on) and at a validation."""
    config = override(probed, {"model.row": row})
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and number == signal.SIGHUP:
        pytest.skip("these tests run under nohup: SIGHUP is ignored")
    handlers = [signal.getsignal(s) for s in signals]
    said = f"stopped at step {step} of 12; run the same command again to continue"
    with pytest.raises(StopRequestedError, match=said):
        train(config, tmp_path / "stopped", Probe(step, send(number)))
    assert [signal.getsignal(s) for s in signals] == handlers
    assert checkpoint.load(tmp_path / "stopped" / "last.pt")["step"] == step
    torch.rand(7)
    train(config, tmp_path / "stopped", Probe())
    assert_same_run(tmp_path / "stopped", whole(config))


@pytest.mark.parametrize("step", [3, 6, 11])
def test_crashed_and_resumed_is_never_crashed(
    tmp_path: Path, probed: Config, whole: Callable[[Config], Path], step: int
) -> None:
    """It goes on from the last checkpoint, or from the start, and replaces the lines written after that."""

    def crash() -> None:
        with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1')
        raise MemoryError

    with pytest.raises(MemoryError):
        train(probed, tmp_path / "crashed", Probe(step, crash))
    assert (tmp_path / "crashed" / "last.pt").exists() == (step > 4)
    train(probed, tmp_path / "crashed", Probe())
    assert_same_run(tmp_path / "crashed", whole(probed))


def test_a_second_interrupt_interrupts_at_once(tmp_path: Path, probed: Config) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(probed, tmp_path, Probe(6, send(signal.SIGINT, signal.SIGINT)))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4


def test_a_finished_run_is_left_as_it_is(trained: Path, tiny: Config) -> None:
    before = {file.name: file.read_bytes() for file in trained.rglob("*.*")}
    train(tiny, trained)
    assert {file.name: file.read_bytes() for file in trained.rglob("*.*")} == before


def test_a_run_can_be_prolonged(tmp_path: Path, tiny: Config, whole: Callable[[Config], Path]) -> None:
    train(override(tiny, {"train.steps": 8}), tmp_path / "more")
    train(tiny, tmp_path / "more")
    assert checkpoint.load(tmp_path / "more" / "last.pt")["step"] == 12
    assert Config.load(tmp_path / "more" / "config.json") == tiny
    assert logged(tmp_path / "more", "validation_loss") == logged(whole(tiny), "validation_loss")


def test_going_on_with_another_config_is_refused(trained: Path, tiny: Config) -> None:
    before = (trained / "config.json").read_text()
    changed = {"train.lr": 0.5, "train.log_every": 6, "model.row": "generative", "evaluate.probe_epochs": 9}
    other = override(tiny, {**changed, "train.log": "wandb"})
    with pytest.raises(ConfigError) as error:
        train(other, trained)
    changes = "model.row vj-vcr -> generative, train.lr 0.001 -> 0.5, train.log_every 5 -> 6"
    assert str(error.value) == f"{trained} holds a run of another config ({changes}); choose another --out"
    assert (trained / "config.json").read_text() == before
    train(override(tiny, {"evaluate.probe_epochs": 9, "train.log": "none", "train.steps": 13}), trained)
    assert checkpoint.load(trained / "last.pt")["step"] == 13


def test_a_run_without_a_checkpoint_binds_nobody(tmp_path: Path, tiny: Config) -> None:
    """After a first call that failed, for example on missing digits, a corrected one can take the folder."""
    (tmp_path / "config.json").write_text(override(tiny, {"train.lr": 0.5, "data.root": "typo"}).to_json())
    train(tiny, tmp_path)
    assert Config.load(tmp_path / "config.json") == tiny


def test_going_on_with_other_digits_is_refused(
    trained: Path, tiny: Config, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = override(tiny, {"train.steps": 13, "data.root": "moved"})
    with monkeypatch.context() as patch:
        other = dataclasses.replace(digits, images=digits.images.flip(1), source="MNIST t10k")
        patch.setattr(build, "load_digits", lambda *_, **__: other)
        for goes_on in (lambda: train(longer, trained), lambda: evaluate_run(trained)):
            with pytest.raises(ConfigError) as error:
                goes_on()
            message = f"{trained} was trained on blobs: 40 digits; here are MNIST t10k: set --data.root or VJVCR_DATA"
            assert str(error.value).startswith(message)
            assert Config.load(trained / "config.json") == tiny
    with pytest.raises(ConfigError, match=r"has 12 steps, train\.steps=3; choose another --out"):
        train(override(tiny, {"train.steps": 3}), trained)
    assert Config.load(trained / "config.json") == tiny
    train(longer, trained)  # the same digits may be in another folder
    assert checkpoint.load(trained / "last.pt")["step"] == 13


def test_a_damaged_checkpoint_is_passed_over(
    trained: Path, tiny: Config, whole: Callable[[Config], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Training goes on from the checkpoint before it, and the run comes out the same."""
    last = trained / "last.pt"
    content = last.read_bytes()
    at = content.index(checkpoint.load(last)["model"]["predictor.layers.0.weight"].numpy().tobytes()) + 3
    last.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])  # one bit of one weight
    capsys.readouterr()
    train(tiny, trained)
    earlier = trained / "checkpoints" / "step-00000008.pt"
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert said[0].startswith(f"{last}: damaged: its content is not what was written, by its checksum; going on from ")
    assert said[-1].endswith(f"going on from {earlier}")
    assert_same_run(trained, whole(tiny))


def test_damaged_checkpoints_stop_a_resume(trained: Path, tiny: Config) -> None:
    file = trained / "last.pt"
    whole, metrics_before = file.read_bytes(), (trained / "metrics.jsonl").read_text()
    for one in (file, *(trained / "checkpoints").iterdir()):
        one.unlink()
        one.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"^{file}: damaged"):
        train(tiny, trained)
    other = build_model(override(tiny, {"model.hidden": 8}), CPU)
    checkpoint.save(file, {"model": other.state_dict(), "step": 4})
    with pytest.raises(CheckpointError, match=f"^{file}: its model is not this run's"):
        train(tiny, trained)
    assert (trained / "metrics.jsonl").read_text() == metrics_before


def test_training_works_outside_the_main_thread(tmp_path: Path, tiny: Config) -> None:
    thread = threading.Thread(target=train, args=(tiny, tmp_path))
    thread.start()
    thread.join()
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 12


# -- Divergence -----------------------------------------------------------------------------------------------------


def last_good_state(run: Path) -> bool:
    """Whether every number of the model in last.pt is finite."""
    state = checkpoint.load(run / "last.pt")["model"]
    return all(value.isfinite().all() for value in state.values())


def break_the_weights(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Makes every training loss NaN from batch number `after` on."""
    original, seen = one_step.split_frames, iter(range(10**6))

    def poisoned(videos: Any, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = original(videos, config)
        return (x * math.nan, y) if torch.is_grad_enabled() and next(seen) >= after else (x, y)

    monkeypatch.setattr(one_step, "split_frames", poisoned)


def test_divergence_at_a_log_line(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_weights(monkeypatch, after=8)
    with pytest.raises(DivergedError) as error:
        train(tiny, tmp_path)
    kept = f"the last good state is {tmp_path / 'last.pt'}"
    terms = "loss, hidden, variance, covariance"
    assert str(error.value) == f"{terms} not finite at step 9; {kept}, of step 8"
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 8
    assert last_good_state(tmp_path)


def test_divergence_before_any_checkpoint(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_weights(monkeypatch, after=1)
    with pytest.raises(DivergedError) as error:
        train(override(tiny, {"train.validate_every": 1000}), tmp_path)
    assert str(error.value).endswith("not finite at step 2; no checkpoint had been written")
    assert not (tmp_path / "last.pt").exists()


def test_divergence_never_reaches_a_checkpoint(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation between log lines names the step that was not finite, as a log line does."""
    break_the_weights(monkeypatch, after=5)
    with pytest.raises(DivergedError, match=r"^loss, .* not finite at step 6; the last good state is "):
        train(tiny, tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4
    assert last_good_state(tmp_path)
    assert all(math.isfinite(value) for row in metrics(tmp_path) for value in row.values())


def test_divergence_and_a_stop(tmp_path: Path, probed: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_weights(monkeypatch, after=5)
    with pytest.raises(DivergedError, match="not finite at step 6"):
        train(probed, tmp_path, Probe(7, send(signal.SIGINT)))
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4


def test_a_learning_rate_far_too_large(tmp_path: Path, tiny: Config) -> None:
    with pytest.raises(DivergedError):
        train(override(tiny, {"train.lr": 1e30}), tmp_path)


# -- As a process ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_stopped_by_a_signal(tmp_path: Path, tiny_options: list[str], embedded_digits: None) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, "-m", "vjvcr_fast", "train", *tiny_options, "--out", str(run), "--steps", "1000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        while process.poll() is None and len(metrics(run)) < 3:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        shown = process.stderr.read() if process.stderr else ""
    step = checkpoint.load(run / "last.pt")["step"]
    assert process.returncode == REQUEUE, shown
    assert f"vjvcr-fast: stopped at step {step} of 1000000; run the same command again to continue" in shown
    assert "Traceback" not in shown
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 1_000_000
    for out in (run, whole):
        assert main(["train", *tiny_options, "--out", str(out), "--steps", str(step + 7)]) == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize("count", [16, 20])
def test_a_validation_takes_every_whole_batch(tiny: Config, digits: Any, count: int) -> None:
    config = override(tiny, {"train.validation_videos": count})
    model, asked = build_model(config, CPU), []
    videos = build_videos(config, build_data(config)[1], "validation", CPU)
    whole = videos.batch
    videos.batch = lambda start, n: asked.append((start, n)) or whole(start, n)
    loop.validate(model, videos, config, Latents(config, model))
    assert asked == [(0, 8), (8, 8)]
