"""Runs survive being killed at any moment, a full disk, losses that are not finite, checkpoints of other versions."""

import json
import math
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from processes import command, finished
from test_training import CPU, assert_same_run, logged, metrics
from tolerances import FLOAT32, relative

from vjvcr_fast import reference
from vjvcr_fast.cli import INTERRUPTED, REQUEUE, main
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.training import checkpoint, loop
from vjvcr_fast.training import step as one_step
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.checkpoint import CheckpointError
from vjvcr_fast.training.loop import DivergedError, train
from vjvcr_fast.training.nonfinite import skip_if_not_finite
from vjvcr_fast.training.telemetry import NAMES, Telemetry, collapse_measures, statistics

pytestmark = pytest.mark.usefixtures("digits", "one_thread")


def options(out: Path, **changes: Any) -> list[str]:
    values = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [
        *("train", "--preset", "moving-mnist-mini", "--out", str(out)),
        *(f"--{name}={value}" for name, value in values.items()),
    ]


# -- Killed, asked to stop ------------------------------------------------------------------------------------------

KILLED = {"train__steps": 160, "train__validate_every": 3, "train__log_every": 7, "train__telemetry_every": 20}


@pytest.fixture
def flushed() -> Iterator[None]:
    """Denormal numbers are flushed to zero, as in a process of the command."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def survives(tmp_path: Path, kills: int, **changes: Any) -> None:
    """A run that is killed `kills` times at random moments comes out as one that was never killed."""
    changes = {**KILLED, **changes}
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(kills)
    assert main(options(whole, **changes)) == 0
    steps = [0]
    for _ in range(kills):
        process = command(options(killed, **changes))
        target = steps[-1] + draw.randint(
            1, max(1, (changes["train__steps"] - steps[-1]) * 2 // (kills - len(steps) + 3))
        )
        end = time.monotonic() + 60
        while last_step(killed) < target and process.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        process.kill()
        finished(process)
        steps.append(last_step(killed))
        assert not [*killed.glob("last.pt.*"), *killed.glob("*.tmp")]
    assert steps[-1] > steps[0]
    code, said = finished(command(options(killed, **changes)))
    assert code == 0, said
    assert_same_run(killed, whole)


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    return max((row["step"] for row in checkpoint.read_metrics(file)), default=0) if file.exists() else 0


def test_killed_twice(tmp_path: Path, flushed: None) -> None:
    survives(tmp_path, 2, train__steps=60)


@pytest.mark.slow
def test_killed_eight_times(tmp_path: Path, flushed: None) -> None:
    survives(tmp_path, 8, model__row="vj-vcr-decoder")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_a_code_of_its_own(
    tmp_path: Path, number: signal.Signals, flushed: None
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = command(options(run, train__steps=100_000))
    while last_step(run) < 5:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(number)
    code, said = finished(process)
    assert code == REQUEUE == 75
    assert code not in (0, 1, 2, INTERRUPTED)
    step = checkpoint.load(run / "last.pt")["step"]
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 100_000
    for out in (run, whole):
        assert main(options(out, train__steps=step + 7)) == 0
    assert_same_run(run, whole)
    assert said.endswith(f"vjvcr-fast: stopped at step {step} of 100000; run the same command again to continue\n")


# -- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept(tmp_path: Path, tiny: Config, keep: int) -> None:
    train(override(tiny, {"train.keep": keep}), tmp_path)
    kept = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}.pt" for step in (4, 8, 12)][-keep:]
    assert checkpoint.load(tmp_path / "checkpoints" / kept[0])["step"] == int(kept[0][5:13])


def test_where_there_are_no_links(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    train(tiny, tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in kept] == ["step-00000008.pt", "step-00000012.pt"]
    assert kept[1].read_bytes() == (tmp_path / "last.pt").read_bytes()


def test_another_version_does_not_go_on(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "GENERATION", 1)
    train(tiny, tmp_path)
    monkeypatch.undo()
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"last\.pt: made by version 0\.1\.0, whose steps are not those of this one"
    ):
        train(override(tiny, {"train.steps": 20}), tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resume_as_asked(tmp_path: Path, tiny: Config) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint, and resume=must"):
        train(tiny, tmp_path, resume="must")
    train(tiny, tmp_path, resume="never")
    with pytest.raises(ConfigError, match="holds a run, and resume=never"):
        train(tiny, tmp_path, resume="never")
    train(override(tiny, {"train.steps": 14}), tmp_path, resume="must")
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 14
    with pytest.raises(ConfigError, match="resume=yes: must be one of auto, never, must"):
        train(tiny, tmp_path, resume="yes")  # type: ignore[arg-type]


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Simulated by the kernel's limit on the size of a file, which a checkpoint exceeds and a log does not."""
    assert main(options(tmp_path, train__steps=4)) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.pt")}
    least = min(map(len, before.values()))
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (least // 2, limits[1]))
    try:
        code = main(options(tmp_path, train__steps=12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1
    said = capsys.readouterr().err
    line = said.splitlines()[-1]
    assert line.startswith(f"vjvcr-fast: {tmp_path}/")
    assert "cannot be written" in line
    assert "the one that was there is whole" in line
    assert "Traceback" not in said
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.pt")} == before
    assert main(options(tmp_path, train__steps=12)) == 0
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 12


# -- Losses that are not finite -------------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, *batches: int, value: float = math.nan) -> None:
    """Sets a pixel of every video of these training batches to `value`."""
    original = one_step.split_frames

    def poisoned(videos: Any, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = original(videos, config)
        if torch.is_grad_enabled() and any(same_videos(videos, config, number) for number in batches):
            x = x.clone()
            x[:, 0, 0, 0, 0] = value
        return x, y

    monkeypatch.setattr(one_step, "split_frames", poisoned)


def same_videos(videos: Any, config: Config, number: int) -> bool:
    data = loop.build_data(config)[0]
    wanted = loop.build_videos(config, data, "train", CPU).batch(number * config.train.batch, config.train.batch)
    return bool(wanted.frames.equal(videos.frames))


def test_a_rollback_passes_the_batch_over(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """After step 10 fails, training goes on from the checkpoint of step 8 with the batch after that of step 10."""
    poison(monkeypatch, 9)
    config = override(tiny, {"train.on_nonfinite": "rollback", "train.steps": 16})
    train(config, tmp_path)
    assert logged(tmp_path, "rolled_back_from") == {8: 10}
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["step"], state["batch"]) == (16, 18)
    assert all(math.isfinite(value) for row in metrics(tmp_path) for value in row.values())
    assert [row["step"] for row in metrics(tmp_path) if "loss" in row] == [5, 10, 15, 16]


def test_rollbacks_end(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *range(9, 40))
    with pytest.raises(
        DivergedError, match=r"not finite at step 9; the last good state is .*3 rollbacks to it have not"
    ):
        train(override(tiny, {"train.on_nonfinite": "rollback"}), tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 8


def test_no_rollback_without_a_checkpoint(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 1)
    with pytest.raises(DivergedError, match="not finite at step 2; no checkpoint had been written"):
        train(override(tiny, {"train.on_nonfinite": "rollback"}), tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_update_changes_nothing(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    poison(monkeypatch, 6, 7, value=value)
    train(override(tiny, {"train.on_nonfinite": "skip"}), tmp_path)
    assert logged(tmp_path, "skipped") == {5: 0, 10: 2, 12: 0}
    assert all(math.isfinite(v) for row in metrics(tmp_path) for v in row.values())
    state = checkpoint.load(tmp_path / "last.pt")
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {10}


def test_skipping_everything_stops(tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, *range(5, 12))
    with pytest.raises(DivergedError, match=r"loss, .* not finite at step 6; the last good state is .*, of step 4"):
        train(override(tiny, {"train.on_nonfinite": "skip"}), tmp_path)


def test_where_nothing_is_skipped_skipping_is_no_change(tmp_path: Path, tiny: Config) -> None:
    train(tiny, tmp_path / "stop")
    train(override(tiny, {"train.on_nonfinite": "skip"}), tmp_path / "skip")
    assert logged(tmp_path / "skip", "loss") == logged(tmp_path / "stop", "loss")


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_what_is_skipped(tiny: Config, bad: float | None) -> None:
    """A gradient that is not finite although the loss is; and a finite loss and gradient, which are not skipped."""
    model = build_model(tiny, CPU)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = [buffer.clone() for buffer in model.buffers()]
    loss = model(torch.rand(4, 2, 1, 16, 16), torch.rand(4, 3, 1, 16, 16)).loss
    loss.backward()
    first = next(model.parameters())
    assert first.grad is not None
    if bad is not None:
        first.grad[0] = bad
    assert skip_if_not_finite(loss, model, buffers, optimizer, None).item() == (bad is not None)
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert bool(changed) == (bad is None)


def test_weights_that_are_not_finite_are_not_kept(
    tmp_path: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights become infinite after the last step whose loss is finite, just before a validation."""
    step = torch.optim.Adam.step

    def breaks(self: Any, *args: Any) -> Any:
        done = step(self, *args)
        if next(iter(self.state.values()))["step"] == 8:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.inf)
        return done

    monkeypatch.setattr(torch.optim.Adam, "step", breaks)
    monkeypatch.setattr(loop, "validate", lambda *_: 1.0)
    with pytest.raises(DivergedError, match=r"the weights not finite at step 8; the last good state is .*, of step 4"):
        train(tiny, tmp_path)


# -- Telemetry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 3, 5), (4, 2, 9), (5, 1, 1), (300, 6, 4)])
def test_telemetry_is_its_definition(shape: tuple[int, int, int]) -> None:
    h = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 7
    _, t, d = shape
    mean, least, correlation = statistics(h).tolist()
    std = h.std(dim=0)
    assert mean == pytest.approx(std.mean().item())
    assert least == pytest.approx(std.mean(dim=0).min().item())
    off = [torch.corrcoef(h[:, i].mT).reshape(d, d)[~torch.eye(d, dtype=torch.bool)] for i in range(t)]
    rms = [o.square().mean().sqrt().item() if d > 1 else 0.0 for o in off]
    assert correlation == pytest.approx(sum(rms) / t, abs=1e-6)
    with Telemetry() as telemetry:
        telemetry.measure(3, h.float())
        [(step, numbers)] = telemetry.collect()
        assert telemetry.collect() == []
    rows = h.flatten(0, 1)
    rows = rows[:: -(-len(rows) // 1024)]
    assert step == 3
    assert [*numbers] == [*NAMES, "rank_me"]
    assert relative(torch.tensor(numbers["rank_me"]), reference.rank_me(rows)) <= 100 * FLOAT32
    assert collapse_measures(h.float()) == numbers


def test_telemetry_takes_what_the_loss_takes() -> None:
    """Without a time axis, in pieces along time, narrower types and autocast; and refuses the same."""
    h = torch.randn(32, 5, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = collapse_measures(h.float())
    assert collapse_measures([h[:, :2], h[:, 2:]]) == pytest.approx(whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert collapse_measures(h) == pytest.approx(whole)
    assert collapse_measures(h[:, 0]) == pytest.approx(collapse_measures(h[:, :1]))
    with pytest.raises(ValueError, match=r"h has shape \(1, 5, 6\).*N >= 2 is needed"):
        collapse_measures(h[:1])
    with Telemetry() as telemetry, pytest.raises(TypeError, match=r"a torch\.Tensor or a sequence"):
        telemetry.measure(1, None)  # type: ignore[arg-type]


def test_telemetry_of_a_collapse() -> None:
    h = torch.randn(64, 4, 1) * torch.ones(8)
    with Telemetry() as telemetry:
        telemetry.measure(1, torch.cat([h, torch.zeros(64, 4, 1)], dim=2))
        [(_, numbers)] = telemetry.collect()
        assert numbers["feature_std_least"] == 0
        assert numbers["feature_correlation"] == pytest.approx((8 * 7 / (9 * 8)) ** 0.5, rel=1e-4)
        assert numbers["rank_me"] == pytest.approx(1.0, abs=1e-2)
        telemetry.measure(2, torch.full((4, 2, 3), math.nan))
        assert math.isnan(telemetry.collect()[0][1]["rank_me"])


def test_telemetry_changes_nothing_and_resumes(tmp_path: Path, tiny: Config) -> None:
    train(tiny, tmp_path / "without")
    config = override(tiny, {"train.telemetry_every": 3})
    train(config, tmp_path / "with")
    assert [*logged(tmp_path / "with", "rank_me")] == [3, 6, 9, 12]
    rest = [row for row in metrics(tmp_path / "with") if "rank_me" not in row]
    assert rest == metrics(tmp_path / "without")
    train(override(config, {"train.steps": 8}), tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert logged(tmp_path / "parts", "rank_me") == logged(tmp_path / "with", "rank_me")


# -- A thousand steps -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_memory_is_flat(tmp_path: Path, tiny: Config, mode: str) -> None:
    """With validations, checkpoints, telemetry and logs, memory does not grow after the first 300 steps."""
    page, resident = os.sysconf("SC_PAGE_SIZE"), []

    def look(*_: Any) -> dict[str, float]:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20)
        return {"resident": resident[-1]}

    changes = {"train.steps": 1_000, "train.validate_every": 20, "train.telemetry_every": 10, "train.probe_every": 50}
    train(override(tiny, {**changes, "train.on_nonfinite": mode, "train.log": "tensorboard"}), tmp_path, look)
    settled, end = max(resident[3:8]), max(resident[-5:])
    print(json.dumps(resident))
    assert end - settled < 5  # MiB: a leak of one batch a step would be 20
