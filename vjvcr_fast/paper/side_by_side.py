"""The runs of a table, figure or sweep: here, one after the other, or side by side, in a process each."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vjvcr_fast.config import Config, ConfigError, resolve_device
from vjvcr_fast.data.files import cores, one_line, progress
from vjvcr_fast.evaluation.evaluate import kept
from vjvcr_fast.evaluation.probes import training_probe
from vjvcr_fast.paper import ReproduceError
from vjvcr_fast.training.build import build_data
from vjvcr_fast.training.checkpoint import CheckpointError, exists, load_last, read_metrics
from vjvcr_fast.training.loop import StopRequestedError, asked_to_stop, claim, train

Rows = dict[str, list[dict[str, Any]]]  # name -> the evaluations of its runs


class Evaluation(NamedTuple):
    """measure: evaluates a run, once. file: what that writes into the run's folder."""

    measure: Callable[[Path, Config], dict[str, Any]]
    file: str


class Job(NamedTuple):
    """A run for a process of its own. arguments: of vjvcr-fast. log: the file that its output goes to."""

    name: str
    run: Path
    steps: int
    arguments: tuple[str, ...]
    log: Path


def processes_for(asked: str, config: Config) -> int:
    """How many runs go side by side. "auto": one a core on a CPU, one on a GPU. Raises ConfigError."""
    if asked == "auto":
        return cores() if resolve_device(config.train.device).type == "cpu" else 1
    if not (asked.isascii() and asked.isdigit() and int(asked) >= 1):
        raise ConfigError(f"--processes={asked}: must be auto or at least 1")
    return int(asked)


def finish_rows(
    rows: Mapping[str, Mapping[Path, Config]],
    evaluation: Evaluation,
    processes: int,
    head: Sequence[str],
    line: Callable[[str, list[dict[str, Any]]], str],
) -> Rows:
    """Trains and evaluates the runs of every row of a table, `processes` at a time. What is finished is kept.

    rows: row -> run folder -> config. Prints the table's `head` and, as a row finishes, its `line(row, evaluations)`.
    Returns row -> evaluations, in the order of `rows`.

    Raises: as `finish_run` for one process. With several, ReproduceError if runs failed, once the others are finished;
    ConfigError if a folder holds a run of another config; StopRequestedError.
    """
    found: dict[Path, dict[str, Any]] = {}
    configs = {run: config for runs in rows.values() for run, config in runs.items()}
    owner = {run: row for row, runs in rows.items() for run in runs}
    printed: list[str] = []

    def add(run: Path, result: dict[str, Any], show: Callable[[str], None]) -> None:
        found[run], row = result, owner[run]
        if all(run in found for run in rows[row]):
            if not printed:
                show("\n".join(head))
            printed.append(row)
            show(line(row, [found[run] for run in rows[row]]))

    def say(text: str) -> None:
        print(text, flush=True)

    waiting = dict(configs)
    for run, config in configs.items() if processes > 1 else ():
        result = kept(run, config, evaluation.file) if _complete(config, run) else None
        if result is not None:
            del waiting[run]
            add(run, result, say)
    if processes == 1 or len(waiting) == 1:
        for run, config in waiting.items():
            add(run, finish_run(config, run, evaluation), say)
    elif waiting:
        first = next(iter(waiting.values()))
        if first.data.dataset == "moving-mnist":  # missing digits are said once, and now
            build_data(first)
        jobs = []
        for run, config in waiting.items():
            claim(run, config)
            arguments = ("train", "--config", str(run / "config.json"), "--out", str(run), "--evaluate")
            jobs.append(Job(run.name, run, config.train.steps, arguments, run / "run.log"))
        failed = run_jobs(
            jobs, processes, lambda job, show: add(job.run, evaluation.measure(job.run, configs[job.run]), show)
        )
        if failed:
            reasons = "; ".join(f"{job.log}: {reason}" for job, reason in failed.items())
            raise ReproduceError(f"{len(failed)} of {len(configs)} runs failed: {reasons}")
    return {row: [found[run] for run in runs] for row, runs in rows.items()}


def finish_run(config: Config, run: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Trains what is missing of a run and evaluates it; returns its evaluation.

    Raises ConfigError where `run` holds a run of another config, or a longer one.
    """
    train_run(config, run)
    return evaluation.measure(run, config)


def train_run(config: Config, run: Path) -> None:
    """Trains what is missing of a run. Raises: as `finish_run`."""
    if not _complete(config, run):
        train(config, run, probe=training_probe if config.data.has_speed else None)


def _complete(config: Config, run: Path) -> bool:
    """Whether all steps of a run are trained. Raises: as `finish_run`."""
    trained = load_last(run)[1]["step"] if exists(run) else 0
    if trained > config.train.steps:
        raise ConfigError(f"{run} has {trained} steps, train.steps={config.train.steps}; choose another --out")
    claim(run, config)
    return trained == config.train.steps


def is_finished(config: Config, run: Path, evaluation: Evaluation) -> bool:
    """Whether a run is trained and evaluated under this config; False where that cannot be told."""
    try:
        return _complete(config, run) and kept(run, config, evaluation.file) is not None
    except (ConfigError, CheckpointError):
        return False


Show = Callable[[str], None]


def run_jobs(jobs: Sequence[Job], at_once: int, finished: Callable[[Job, Show], None]) -> dict[Job, str]:
    """Runs every job, `at_once` side by side with a line of progress each; returns the failed ones with the reason.

    finished: called with each job that succeeded and with what prints text between the lines of progress.
    Each process gets its share of the cores. Raises StopRequestedError on SIGTERM or Ctrl-C, once the running ones have
    written their checkpoints.
    """
    waiting, failed = list(jobs), {}
    running: dict[Job, subprocess.Popen[bytes]] = {}
    with _Lines(len(jobs), at_once) as lines, asked_to_stop() as stop:
        while (waiting or running) and not stop():
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = _start(job, at_once)
                lines.begin(job)
            time.sleep(0.1)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                lines.end(job)
                if code:
                    failed[job] = _reason(job.log, code)
                    lines.show(f"{job.name} failed: {failed[job]}", sys.stderr)
                else:
                    finished(job, lines.show)
            lines.update()
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        if stop():
            raise StopRequestedError("stopped; the same command goes on from there")
    return failed


def _start(job: Job, at_once: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    with job.log.open("wb") as log:
        # In a session of its own: Ctrl-C reaches it from here alone, and a second signal would end it at once.
        return subprocess.Popen(
            [sys.executable, "-m", "vjvcr_fast", *job.arguments],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def _reason(log: Path, code: int) -> str:
    """The last line of a job's log, or its exit code."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1].split("\r")[-1].removeprefix("vjvcr-fast: ")) if lines else f"exit code {code}"


class _Lines:
    """A bar for each running job, from its metrics.jsonl, and one for all; plain lines if stderr is no terminal."""

    def __init__(self, total: int, at_once: int) -> None:
        self.live = sys.stderr.isatty()
        self.all = self._bar(total, "finished", min(at_once, total), unit="run")
        self.running: dict[Job, tuple[int, Any]] = {}  # its place on the screen, its bar
        self.next = time.monotonic()

    def _bar(self, total: int, name: str, place: int, **settings: Any) -> Any:
        shown = {"total": total, "desc": name, "position": place, "dynamic_ncols": True, **settings}
        return progress(**shown, disable=not self.live)

    def begin(self, job: Job) -> None:
        place = min({*range(len(self.running) + 1)} - {taken for taken, _ in self.running.values()})
        self.running[job] = place, self._bar(job.steps, job.name, place, leave=False)

    def update(self) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + (1 if self.live else 30)
        for job, (_, bar) in self.running.items():
            rows = read_metrics(job.run / "metrics.jsonl")
            step = rows[-1]["step"] if rows else 0
            loss = next((f"loss {row['loss']:.4f}" for row in reversed(rows) if "loss" in row), "")
            state = "evaluating" if step == job.steps else loss
            bar.update(step - bar.n)
            bar.set_postfix_str(state)
            if step and not self.live:
                print(f"{job.name}: step {step:,} of {job.steps:,}, {state}", file=sys.stderr, flush=True)

    def end(self, job: Job) -> None:
        self.running.pop(job)[1].close()
        self.all.update()

    def show(self, text: str, file: Any = None) -> None:
        self.all.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        for bar in (*(bar for _, bar in self.running.values()), self.all):
            bar.close()
