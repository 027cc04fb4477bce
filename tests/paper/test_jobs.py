"""Several runs of a table at once: same numbers as one by one, finished runs are kept, failed ones are named."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import TINY, wait_for_steps

from vjvcr_fast.cli import main
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.paper import figures, jobs
from vjvcr_fast.paper import table1 as paper
from vjvcr_fast.paper.jobs import Job

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = ["--preset", "moving-mnist-mini", *(f"--{name}={value}" for name, value in TINY.items())]
RUNS = [f"{row}-seed0" for row in ROWS]


def table(out: Path, processes: int) -> list[str]:
    return ["reproduce", "table1", "--out", str(out), "--processes", str(processes), *OPTIONS]


def evaluations(out: Path) -> dict[str, dict[str, Any]]:
    """The evaluations of the runs that have one, without times and what depends on them."""
    found = {name: out / name / "evaluation.json" for name in RUNS}
    read = {name: json.loads(file.read_text()) for name, file in found.items() if file.exists()}
    times = ("train_seconds", "evaluate_seconds", "best")
    return {name: {k: v for k, v in of.items() if k not in times} for name, of in read.items()}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("there is nothing left to do")


@pytest.mark.usefixtures("digits")
def test_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If one of four runs fails, it is named. The others are finished and kept, with the numbers of one process."""
    for owner, name in ((paper, "figure5"), (figures, "curves"), (figures, "spectrum"), (figures, "probes")):
        monkeypatch.setattr(owner, name, lambda *_: None)  # two seconds each time
    out = tmp_path / "two"
    started: list[str] = []

    def start(job: Job, at_once: int) -> forked.Started:
        started.append(job.run.name)
        wrong = ("--data.root", "/there/is/none") if job.run.name == RUNS[1] else ()
        return forked.Started((*job.arguments, *wrong), job.log)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_start", start)
        assert main(table(out, 2)) == 1
    shown = capsys.readouterr()
    log = out / RUNS[1] / "run.log"
    assert f"1 of 4 runs failed: {log}: --data.root: /there/is/none" in shown.err
    assert f"{RUNS[1]} failed: --data.root: /there/is/none" in shown.err
    assert started == RUNS
    done = evaluations(out)
    assert [*done] == [RUNS[0], *RUNS[2:]]
    printed = shown.out.splitlines()
    assert sum(line.startswith("| model |") for line in printed) == 1
    assert sum(line.startswith(f"| {terms.title} |") for terms in ROWS.values() for line in printed) == 3

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_start", never)  # a single run needs no process of its own
        assert main(table(out, 2)) == 0
        assert {name: evaluations(out)[name] for name in done} == done
        patch.setattr(jobs, "train", never)
        capsys.readouterr()
        assert main(table(out, 2)) == 0
        assert "| model |" in capsys.readouterr().out
    assert main(table(tmp_path / "one", 1)) == 0
    assert evaluations(tmp_path / "one") == evaluations(out)


def test_a_process_of_a_run(tmp_path: Path) -> None:
    """A job runs in its own session, with its share of the cores; its output is in its log."""
    job = Job(tmp_path, 1, ("info",), tmp_path / "new" / "run.log")
    process = jobs._start(job, 1000)
    assert os.getsid(process.pid) == process.pid
    assert process.wait(60) == 0
    assert ", 1 threads" in job.log.read_text()


@pytest.mark.usefixtures("digits")
def test_a_stop_reaches_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On SIGTERM the two running jobs write checkpoints and say at which step; the others do not start."""
    monkeypatch.setattr(jobs, "_start", forked.start)
    running = [tmp_path / name for name in RUNS[:2]]

    def stop() -> None:
        try:
            for run in running:
                wait_for_steps(run)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert main([*table(tmp_path, 2), "--train.steps=100000", "--train.validate_every=50000"]) == 75
    thread.join()
    assert "run the same command again" in capsys.readouterr().err
    for run in running:
        assert (run / "last.pt").exists()
        assert "stopped at step" in (run / "run.log").read_text()
    assert not (tmp_path / RUNS[2] / "last.pt").exists()


def test_fewer_jobs_than_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[int] = []

    def start(job: Job, at_once: int) -> forked.Started:
        shares.append(at_once)
        return forked.Started(("--version",), job.log)

    monkeypatch.setattr(jobs, "_start", start)
    assert jobs.run_jobs([Job(tmp_path / name, 4, (), tmp_path / f"{name}.log") for name in "ab"], 8) == {}
    assert shares == [2, 2]


@pytest.mark.usefixtures("digits")
def test_no_run_goes_on_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one run cannot be measured, say because the disk is full, the others are stopped."""
    processes = []

    def start(job: Job, at_once: int) -> forked.Started:
        steps = 4 if job.run.name == "short" else 100_000
        processes.append(forked.Started((*job.arguments, f"--train.steps={steps}"), job.log))
        return processes[-1]

    def done(run: Path, show: Any) -> None:
        wait_for_steps(tmp_path / "long")
        raise OSError("no room")

    monkeypatch.setattr(jobs, "_start", start)
    runs = [tmp_path / name for name in ("short", "long")]
    of = [Job(run, 4, ("train", *OPTIONS, "--out", str(run)), run / "run.log") for run in runs]
    with pytest.raises(OSError, match="no room"):
        jobs.run_jobs(of, 2, done)
    assert [process.poll() for process in processes] == [0, 75]


@pytest.mark.slow
def test_as_a_command(tmp_path: Path) -> None:
    """With real processes: after SIGTERM (checkpoints, exit code 75) the same command reaches the same numbers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    long = ["--train.steps=80", "--train.validate_every=40"]
    command = [sys.executable, "-m", "vjvcr_fast", *table(tmp_path / "two", 2), *long]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "two" / RUNS[0]
    try:
        wait_for_steps(first)
    finally:
        process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    assert "run the same command again" in error
    assert (first / "last.pt").exists()
    assert "stopped at step" in (first / "run.log").read_text()
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert main([*table(tmp_path / "one", 1), *long]) == 0
    assert evaluations(tmp_path / "two") == evaluations(tmp_path / "one")
