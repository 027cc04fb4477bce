"""A training step beside busy processes: what OpenMP's waiting threads cost, and what the command does about it.

    pytest benchmarks/bench_busy.py

Each case is a process of its own that trains the small VJ-VCR model (channels 8, 16, 32, batches of 64), while 0 to 3
other processes keep a core busy each. "torch's own" is a process that leaves OpenMP as torch has it, "the command" one
that starts as `vjvcr-fast` does (vjvcr_fast/__main__.py), with two threads and with one. Ratios are of medians, to the
same process on a quiet machine; the weights after the steps must be the same in all cases of as many threads.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vjvcr_fast.__main__ import WAIT

BUSY = (0, 1, 2, 3)
CASES = {"torch's own": (2, {}), "the command": (2, WAIT), "the command, one thread": (1, WAIT)}
LIMIT = 3.5  # of "the command", beside two busy processes
WARM_UP, STEPS = 3, 25

STEP = """
import json, sys, time
import torch
from vjvcr_fast.config import override, preset
from vjvcr_fast.data.digits import load_digits
from vjvcr_fast.training.build import build_data, build_videos
from vjvcr_fast.training.processes import Processes
from vjvcr_fast.training.step import Step
torch.set_num_threads(int(sys.argv[1]))
config = override(preset("moving-mnist-mini"), {"train.device": "cpu", "model.row": "vj-vcr"})
torch.manual_seed(0)
step, videos = Step(config, Processes(torch.device("cpu"))), build_videos(config, build_data(config)[0], "train", "cpu")
times = []
for _, clips in zip(range(int(sys.argv[2])), videos.batches(0, config.train.batch)):
    start = time.perf_counter()
    loss = step(clips)[0]
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": times, "loss": loss.item()}))
"""


@contextmanager
def busy(number: int) -> Iterator[None]:
    """While it is entered, `number` processes compute."""
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def steps(threads: int, settings: dict[str, str], count: int) -> dict[str, Any]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", STEP, str(threads), str(count)]
    done = subprocess.run(command, env=clean | settings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_beside_busy_processes(report: Any, full: bool) -> None:
    pytest.importorskip("mlxtend")
    rows, losses = [], {}
    for name, (threads, settings) in CASES.items():
        for number in BUSY if full else BUSY[:3]:
            with busy(number):
                found = steps(threads, settings, WARM_UP + STEPS)
            milliseconds = 1e3 * statistics.median(found["seconds"][WARM_UP:])
            quiet = rows[-number]["_ms"] if number else milliseconds
            losses.setdefault(threads, set()).add(found["loss"])
            row = {"how": name, "threads": threads, "busy": number, "x quiet": milliseconds / quiet}
            rows.append({**row, "x one thread": 0.0, "_ms": milliseconds})
    for row in rows:
        alone = next(r for r in rows if r["how"] == "the command, one thread" and r["busy"] == row["busy"])
        row["x one thread"] = row["_ms"] / alone["_ms"]
    report(rows)
    assert all(len(found) == 1 for found in losses.values()), losses
    for row in rows:
        if row["how"] != "torch's own" and row["busy"] == 2:
            assert row["x quiet"] <= LIMIT, row
