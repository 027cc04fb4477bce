"""Trains and evaluates the runs of a table, a figure or a sweep: one after the other, or several at once.

A table is rows x seeds, and each pair of them is one run. Tables and figures call `finish_rows`. `run_jobs` runs
commands of this package side by side, each in its own process; sweeps use it directly.
"""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vjvcr_fast.config import Config, ConfigError, override, resolve_device
from vjvcr_fast.data.files import cores, one_line, progress
from vjvcr_fast.evaluation.evaluate import kept
from vjvcr_fast.evaluation.probes import training_probe
from vjvcr_fast.paper import ReproduceError, figures
from vjvcr_fast.paper.store import Kept, Store
from vjvcr_fast.training.build import build_data, fill_cache
from vjvcr_fast.training.checkpoint import exists, load_last, read_metrics
from vjvcr_fast.training.loop import StopRequestedError, asked_to_stop, claim, train

Results = list[dict[str, Any]]  # the evaluations of a row's runs, one per seed


class Evaluation(NamedTuple):
    """How a run is evaluated. measure: evaluates the run in a folder, once. file: the result's name in that folder."""

    measure: Callable[[Path, Config], dict[str, Any]]
    file: str


class Table(NamedTuple):
    """The finished runs of a table or figure. runs: row -> run folder -> config, results: row -> evaluations. taken:
    the runs that were not trained here, whose folders have no checkpoints."""

    config: Config
    out: Path
    seeds: Sequence[int]
    runs: dict[str, dict[Path, Config]]
    results: dict[str, Results]
    taken: dict[Path, Kept]

    def first_run(self, row: str) -> tuple[Path, Config]:
        """The folder and config of the row's run with the first seed."""
        return next(iter(self.runs[row].items()))


class Job(NamedTuple):
    """A command of this package that trains one run. arguments: what follows `vjvcr-fast`. log: gets its output."""

    run: Path
    steps: int
    arguments: tuple[str, ...]
    log: Path


def processes_for(asked: str, config: Config) -> int:
    """How many runs to train at once. "auto": one per core on a CPU, one on a GPU.

    Raises ConfigError if `asked` is neither "auto" nor a positive number.
    """
    if asked == "auto":
        return cores() if resolve_device(config.train.device).type == "cpu" else 1
    if not (asked.isascii() and asked.isdigit() and int(asked) >= 1):
        raise ConfigError(f"--processes={asked}: must be auto or at least 1")
    return int(asked)


def prepare(config: Config) -> None:
    """Does what comes before any run: decodes video files into the cache, unless `data.cache` is off.

    Raises ImportError if matplotlib is missing: better before hours of training than after. Else as `fill_cache`.
    """
    figures.require_matplotlib()
    if config.data.dataset != "moving-mnist" and config.data.cache != "off":
        fill_cache(config)


def finish_rows(
    config: Config,
    out: Path,
    seeds: Sequence[int],
    processes: int,
    rows: Mapping[str, Config],
    evaluation: Evaluation,
    head: Sequence[str],
    line: Callable[[str, Results], str],
    store: Store | None = None,
) -> Table:
    """Trains and evaluates all rows for all seeds, `processes` runs at a time. Finished runs are not run again.

    rows: name -> config without the seed. Prints `head`, then `line(row, evaluations)` for each row as it finishes.
    store: a run that is finished neither in `out` nor there is trained, and then added there.

    Raises:
        ConfigError: if a folder holds a run of another config, or a longer one.
        ReproduceError: with several processes, if runs failed; the other runs are finished first.
        StopRequestedError: if asked to stop.
        As `prepare`.
    """
    figures.require_matplotlib()
    runs = {row: {out / f"{row}-seed{s}": override(of, {"train.seed": s}) for s in seeds} for row, of in rows.items()}
    configs = {run: config for of_row in runs.values() for run, config in of_row.items()}
    found: dict[Path, dict[str, Any]] = {}

    def add(run: Path, result: dict[str, Any], show: Callable[[str], None]) -> None:
        found[run] = result
        if store and run not in taken:
            store.add(run, configs[run], evaluation.file, result)
        for row, of_row in runs.items():
            if run in of_row and found.keys() >= of_row.keys():
                show(line(row, [found[run] for run in of_row]))

    here = {run: result for run, of in configs.items() if (result := finished(of, run, evaluation))}
    taken = _taken(config, configs, here, evaluation, store)
    ready = here | {run: kept.evaluation for run, kept in taken.items()}
    waiting = {run: config_of_run for run, config_of_run in configs.items() if run not in ready}
    _check_sources(config, here, bool(waiting))
    if waiting:
        prepare(config)
    say = functools.partial(print, flush=True)
    say("\n".join(head))
    for run in configs:
        if run in ready:
            add(run, ready[run], say)
    if processes == 1 or len(waiting) == 1:
        for run, config_of_run in waiting.items():
            add(run, finish_run(config_of_run, run, evaluation), say)
    elif waiting:
        _finish_at_once(waiting, processes, lambda run, show: add(run, evaluation.measure(run, configs[run]), show))
    of_rows = {row: [found[run] for run in of_row] for row, of_row in runs.items()}
    return Table(config, out, seeds, runs, of_rows, taken)


def _named(config: Config) -> bool:
    """Whether data of one's own were asked for. (VJVCR_DATA may be the folder of digits when videos are wanted.)"""
    folder = os.environ.get("VJVCR_DATA") if config.data.dataset == "moving-mnist" else None
    return bool(config.data.root or config.data.download or folder)


def _check_sources(config: Config, here: Mapping[Path, dict[str, Any]], more: bool) -> None:
    """Raises ConfigError if runs that are finished here are of other data than one another, or than the data now, if
    `more` runs are to come or the data are named. Data are compared by their descriptions."""
    if not here:
        return
    now = build_data(config)[0].source if more or _named(config) else next(iter(here.values()))["data"]
    for run, evaluation in here.items():
        if evaluation["data"] != now:
            raise ConfigError(
                f"{run} was trained on {evaluation['data']}; the others' data are {now}: set --data.root or "
                "VJVCR_DATA, or choose another --out"
            )


def _taken(
    config: Config,
    configs: Mapping[Path, Config],
    here: Mapping[Path, dict[str, Any]],
    evaluation: Evaluation,
    store: Store | None,
) -> dict[Path, Kept]:
    """What `store` has of the runs that are not finished here, unless it is of other data than the rest, or than those
    that are named."""
    asked = {run: of for run, of in configs.items() if run not in here} if store else {}
    taken = {run: kept for run, of in asked.items() if store and (kept := store.take(run, of, evaluation.file))}
    sources = {e["data"] for e in (*here.values(), *(kept.evaluation for kept in taken.values()))}
    if taken and (_named(config) or len(sources) > 1 or len(taken) < len(asked)):
        source = build_data(config)[0].source
        for run, kept in [*taken.items()]:
            if (theirs := kept.evaluation["data"]) != source:
                print(f"not taken after all: {kept.file} is of {theirs}; here are {source}", file=sys.stderr)
                del taken[run]
    return taken


def _finish_at_once(
    waiting: Mapping[Path, Config], processes: int, done: Callable[[Path, Callable[[str], None]], None]
) -> None:
    """Trains and evaluates runs, `processes` at a time. done: as of `run_jobs`. Raises as `finish_rows`."""
    config = next(iter(waiting.values()))
    if config.data.dataset == "moving-mnist":
        build_data(config)  # if there are no digits, this says so once, before any process starts
    jobs = []
    for run, of in waiting.items():
        arguments = ("train", "--config", str(run / "config.json"), "--out", str(run), "--evaluate")
        jobs.append(Job(run, of.train.steps, arguments, run / "run.log"))
    failed = run_jobs(jobs, processes, done)
    if failed:
        reasons = "; ".join(f"{job.log}: {reason}" for job, reason in failed.items())
        raise ReproduceError(f"{len(failed)} of {len(jobs)} runs failed: {reasons}")


def finish_run(config: Config, run: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Trains what is missing of a run, evaluates it and returns its evaluation.

    Raises ConfigError if `run` holds a run of another config, or a longer one.
    """
    train_run(config, run)
    return evaluation.measure(run, config)


def train_run(config: Config, run: Path) -> None:
    """Trains what is missing of a run. Raises as `finish_run`."""
    if not _complete(config, run):
        train(config, run, probe=training_probe if config.data.has_speed else None)


def finished(config: Config, run: Path, evaluation: Evaluation) -> dict[str, Any] | None:
    """The evaluation of a run that is trained and evaluated under this config, else None. Raises as `finish_run`."""
    return kept(run, config, evaluation.file) if _complete(config, run) else None


def _complete(config: Config, run: Path) -> bool:
    """True if all steps of a run are trained. Writes config.json into a new run. Raises as `finish_run`."""
    trained = load_last(run)[1]["step"] if exists(run) else 0
    if trained > config.train.steps:
        raise ConfigError(f"{run} has {trained} steps, train.steps={config.train.steps}; choose another --out")
    claim(run, config)
    return trained == config.train.steps


def run_jobs(
    jobs: Sequence[Job], at_once: int, done: Callable[[Path, Callable[[str], None]], None] | None = None
) -> dict[Job, str]:
    """Runs all jobs, at most `at_once` side by side, and shows their progress. Returns the failed jobs, in the
    order of `jobs`, each with the reason.

    done: called when a job succeeds, with its run and a function that prints text above the progress bars. Each
    process gets an equal share of the cores. Without a terminal, progress is a line for each job every 30 seconds.

    Raises StopRequestedError on SIGTERM or Ctrl-C, after the running jobs have written their checkpoints.
    """
    waiting, failed, next_report, at_once = list(jobs), {}, 0.0, min(at_once, len(jobs))
    running: dict[Job, tuple[subprocess.Popen[bytes], Any]] = {}
    with _bar(len(jobs), "finished", unit="run") as total, asked_to_stop() as stop:

        def show(text: str, file: Any = None) -> None:
            total.write(text, file=file or sys.stdout)
            (file or sys.stdout).flush()

        try:
            while (waiting or running) and not stop():
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job] = _start(job, at_once), _bar(job.steps, job.run.name, leave=False)
                time.sleep(0.1)
                for job, (process, bar) in [*running.items()]:
                    if process.poll() is None:
                        continue
                    del running[job]
                    bar.close()
                    total.update()
                    if process.returncode:
                        failed[job] = _reason(job.log, process.returncode)
                        show(f"{job.run.name} failed: {failed[job]}", sys.stderr)
                    elif done:
                        done(job.run, show)
                if time.monotonic() >= next_report:
                    next_report = time.monotonic() + (30 if total.disable else 1)
                    for job, (_, bar) in running.items():
                        _report(job, bar)
        finally:  # they have a session of their own, and would go on alone
            for process, bar in running.values():
                process.terminate()
                bar.close()
            for process, _ in running.values():
                process.wait()
        if stop():
            raise StopRequestedError("stopped; run the same command again to continue")
    return {job: failed[job] for job in jobs if job in failed}


def spawn(arguments: Sequence[str], **settings: Any) -> "subprocess.Popen[bytes]":
    """Starts `vjvcr-fast ARGUMENTS`. settings: as for subprocess.Popen.

    The process gets its own session, so that Ctrl-C in the terminal does not reach it. We forward the signal instead,
    once: a second one would end the process without a checkpoint.
    """
    return subprocess.Popen([sys.executable, "-m", "vjvcr_fast", *arguments], start_new_session=True, **settings)


def _start(job: Job, at_once: int) -> "subprocess.Popen[bytes]":
    job.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    with job.log.open("wb") as log:
        return spawn(job.arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def _reason(log: Path, code: int) -> str:
    """The last line of a job's log, or its exit code."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1].split("\r")[-1].removeprefix("vjvcr-fast: ")) if lines else f"exit code {code}"


def _bar(total: int, name: str, **settings: Any) -> Any:
    return progress(total=total, desc=name, dynamic_ncols=True, disable=not sys.stderr.isatty(), **settings)


def _report(job: Job, bar: Any) -> None:
    """Shows how far a running job is, from its metrics.jsonl: on its bar, or as a line if the bar is disabled."""
    rows = read_metrics(job.run / "metrics.jsonl")
    step = rows[-1]["step"] if rows else 0
    loss = next((f"loss {row['loss']:.4f}" for row in reversed(rows) if "loss" in row), "")
    state = "evaluating" if step == job.steps else loss
    bar.update(step - bar.n)
    bar.set_postfix_str(state)
    if step and bar.disable:
        print(f"{job.run.name}: step {step:,} of {job.steps:,}, {state}", file=sys.stderr, flush=True)
