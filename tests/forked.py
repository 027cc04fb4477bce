"""Runs of a table or sweep in forked processes, for tests.

They fork from a process that has imported torch (tests/processes.py); a new process would need two seconds each. How
the package itself starts them is tested in tests/paper/test_jobs.py.
"""

import os
import sys
from pathlib import Path

import torch
from processes import _FORKED

from vjvcr_fast.cli import main
from vjvcr_fast.data.digits import Digits, load_digits
from vjvcr_fast.paper.jobs import Job
from vjvcr_fast.training import build


class Started:
    """The part of subprocess.Popen that `jobs.run_jobs` uses."""

    def __init__(self, arguments: tuple[str, ...], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        digits = None if build.load_digits is load_digits else build.load_digits("")
        self.process = _FORKED.Process(target=_command, args=(arguments, log, digits))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self.process.join()


def start(job: Job, at_once: int) -> Started:
    """Replaces `jobs._start`."""
    return Started(job.arguments, job.log)


def _command(arguments: tuple[str, ...], log: Path, digits: Digits | None) -> None:
    """digits: the ones to use without a root, if a test has replaced them."""
    os.setsid()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    if digits is not None:
        build.load_digits = lambda root, download=False: load_digits(root, download=download) if root else digits
    sys.exit(main(arguments))
