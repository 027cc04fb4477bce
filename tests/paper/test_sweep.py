"""`vjvcr-fast sweep`: what its file means; entries that run, resume, fail and stop; and the summary."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import TINY, wait_for_steps

from vjvcr_fast.cli import main
from vjvcr_fast.config import ConfigError, override, preset
from vjvcr_fast.paper import jobs, sweep

FIELDS = json.dumps(TINY)  # JSON is YAML


def written(folder: Path, text: str) -> Path:
    file = folder / "some.yaml"
    file.write_text(f"preset: moving-mnist-mini\nset: {FIELDS}\n{text}")
    return file


def test_the_file(tmp_path: Path) -> None:
    text = "list: {as it is: {}, large: {model.pool: 1}}\ngrid: {train.lr: [1e-3, 2.0e-3]}\nseeds: [3, 4]"
    found = sweep.read(written(tmp_path, text))
    assert [*found.settings] == ["as it is, lr=1e-3", "as it is, lr=0.002", "large, lr=1e-3", "large, lr=0.002"]
    assert [entry.folder for entry in found.entries[:2]] == ["as-it-is-lr-1e-3-seed3", "as-it-is-lr-1e-3-seed4"]
    last = found.entries[-1].config
    assert (last.model.pool, last.train.lr, last.train.seed, last.data.canvas) == (1, 2e-3, 4, 16)
    assert found.seeds == (3, 4)


def test_a_file_without_settings_is_one(tmp_path: Path) -> None:
    (entry,) = sweep.read(written(tmp_path, "")).entries
    assert (entry.setting, entry.folder, entry.changes) == ("as it is", "as-it-is-seed0", {})


def test_a_runs_config_is_a_base(tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "config.json").write_text(tiny.to_json())
    file = tmp_path / "some.yaml"
    file.write_text("config: config.json\nlist: {small: {model.hidden: 8}}")
    (entry,) = sweep.read(file).entries
    assert (entry.config.model.hidden, entry.config.data.canvas) == (8, 16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("list: {a: {model.pol: 1}}", ["a: model.pol", "no such field"]),
        ("list: {a: {model.pool: 3}}", ["a: model and data do not fit"]),
        ("list: {a b: {}, a-b: {}}", ["two entries have the folder a-b-seed0"]),
        ("list: [a]", ["list: a mapping is expected, not list"]),
        ("list: {a: 1}", ["list: a: a mapping is expected, not int"]),
        ("grid: {train.lr: 1}", ["train.lr: a list of at least one value"]),
        ("grid: {train.lr: []}", ["train.lr: a list of at least one value"]),
        ("seeds: [x]", ["seeds='x': must be a whole number"]),
        ("seeds: [1, 1]", ["two entries have the folder"]),
        ("set: {train.seed: 1}", ["set: train.seed=1", "seeds:"]),
        ("list: {a: {train.seed: 1}}", ["list: a: train.seed=1", "seeds:"]),
        ("grid: {train.seed: [1, 2]}", ["grid: train.seed=[1, 2]", "seeds:"]),
        ("grids: {}", ["grids: no such key", "grid"]),
        ("config: x", ["preset or config"]),
        ("seeds: [", ["not a readable YAML file"]),
    ],
)
def test_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: list[str]) -> None:
    assert main(["sweep", str(written(tmp_path, text)), "--list"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in ["some.yaml", *says])


@pytest.mark.parametrize(
    "arguments", [["missing.yaml"], ["some.yaml", "--processes", "0"], ["some.yaml", "--entry", "1"]]
)
def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    written(tmp_path, "")
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *arguments]) == 2


@pytest.mark.usefixtures("digits", "one_thread")
def test_a_sweep_runs_fails_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_start", forked.start)
    text = "list: {a: {}, b: {model.hidden: 8}, none: {data.root: /there/is/none}}\nseeds: [0, 1]"
    file, out = written(tmp_path, text), tmp_path / "out"
    asked = ["sweep", str(file), "--out", str(out), "--processes", "3"]
    assert main(asked) == 1
    error = capsys.readouterr().err
    assert "2 of 6 entries failed, see sweep.log in none-seed0, none-seed1" in error
    assert "/there/is/none" in error
    before = (out / "a-seed0" / "evaluation.json").stat().st_mtime_ns
    assert json.loads((out / "sweep.json").read_text())["settings"]["none"]["evaluations"] == []

    file.write_text(file.read_text().replace(", none: {data.root: /there/is/none}", ""))
    monkeypatch.setattr(jobs, "_start", None)  # what is finished starts no process again
    assert main(asked) == 0
    assert (out / "a-seed0" / "evaluation.json").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    summary = json.loads((out / "sweep.json").read_text())
    assert [*summary["settings"]] == ["a", "b"]
    assert summary["settings"]["b"]["changes"] == {"model.hidden": 8}
    ours = [e["speed_mse"] for e in summary["settings"]["a"]["evaluations"]]
    assert len(set(ours)) == 2
    assert f"| a | 2 of 2 | {sum(ours) / 2:.3f} ± " in shown
    assert all((out / name).stat().st_size > 0 for name in sweep.SWEEP_FILES)

    file.write_text(file.read_text().replace("model.hidden: 8", "model.hidden: 12"))
    text = sweep.summarise(sweep.read(file), out)
    assert "| a | 2 of 2 |" in text
    assert "| b | 0 of 2 |" in text


@pytest.mark.usefixtures("digits", "one_thread")
def test_one_entry_alone(tmp_path: Path, tiny: Any) -> None:
    file = written(tmp_path, "seeds: [5, 6]\nmeasure: [psnr]")
    assert main(["sweep", str(file), "--out", str(tmp_path), "--entry", "1"]) == 0
    assert (tmp_path / "as-it-is-seed6" / "evaluation.json").exists()
    assert not (tmp_path / "as-it-is-seed5").exists()
    text = sweep.summarise(sweep.read(file), tmp_path)
    assert text.startswith("| setting | seeds | psnr |")
    assert "| as it is | 1 of 2 |" in text


def test_what_cannot_be_measured_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(written(tmp_path, "measure: [psnr, foo]")), "--list"]) == 2
    assert "measure: foo: must be one of speed_mse, " in capsys.readouterr().err


def test_a_run_is_measured_by_what_its_latent_can_tell() -> None:
    def file(name: str, **changes: Any) -> str:
        latent = {f"latent.{key}": value for key, value in changes.items()}
        return sweep.evaluation_of(override(preset(name), latent)).file

    assert file("moving-mnist-stochastic-mini") == "evaluation.json"
    assert file("moving-mnist-stochastic-mini", kind="sparse") == "latents.json"
    assert file("moving-mnist-mini", kind="sparse") == "evaluation.json"  # one direction: nothing to tell
    assert file("clevrer-mini", kind="sparse") == "evaluation.json"
    assert file("cater-mini", kind="sparse") == "evaluation.json"
    assert file("cater-mini") == "actions.json"


def test_nothing_finished(tmp_path: Path) -> None:
    assert "Nothing is finished." in sweep.summarise(sweep.read(written(tmp_path, "")), tmp_path)


def test_more_processes_than_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--processes=0"):
        sweep.run_all(written(tmp_path, ""), tmp_path, "0")


@pytest.mark.slow
def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    file = written(tmp_path, "list: {a: {train.steps: 20000}}")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vjvcr_fast", "sweep", str(file), "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_steps(out / "a-seed0")
    finally:
        process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "run the same command again" in error
    assert "stopped at step" in (out / "a-seed0" / "sweep.log").read_text()


@pytest.mark.slow
def test_torchrun_takes_an_entry(tmp_path: Path) -> None:
    file = written(tmp_path, "")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "vjvcr_fast", "sweep", str(file), "--out", str(tmp_path), "--entry", "0"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "as-it-is-seed0" / "evaluation.json").exists()
