"""A training step beside busy processes: what OpenMP's waiting threads cost, and what the command does about it.

    pytest benchmarks/bench_busy.py

Each case is a process of its own that trains the small VJ-VCR model (channels 8, 16, 32, batches of 64) while 0 to 3
other processes keep a core busy each. "torch's own" leaves OpenMP as torch has it. "the command" starts as `vjvcr-fast`
does (vjvcr_fast/__main__.py), with two threads and with one. Ratios are of median times, to the same process on a quiet
machine. The loss after the steps must be the same for all cases with as many threads.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vjvcr_fast.__main__ import WAIT

BUSY = (0, 1, 2, 3)
ONE = "the command, one thread"
CASES = {"torch's own": (2, {}), "the command": (2, WAIT), ONE: (1, WAIT)}
LIMIT = 3.5  # the most that "the command" may slow down beside two busy processes

STEP = """
import json, statistics, sys, time
import torch
from vjvcr_fast.config import override, preset
from vjvcr_fast.training.build import build_data, build_videos
from vjvcr_fast.training.processes import Processes
from vjvcr_fast.training.step import Step
torch.set_num_threads(int(sys.argv[1]))
config = override(preset("moving-mnist-mini"), {"train.device": "cpu", "model.row": "vj-vcr"})
torch.manual_seed(0)
step, videos = Step(config, Processes(torch.device("cpu"))), build_videos(config, build_data(config)[0], "train", "cpu")
times = []
for _, clips in zip(range(28), videos.batches(0, config.train.batch)):
    start = time.perf_counter()
    loss = step(clips)[0]
    times.append(time.perf_counter() - start)
print(json.dumps({"ms": 1e3 * statistics.median(times[3:]), "loss": loss.item()}))
"""


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keeps `number` processes computing."""
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def steps(threads: int, settings: dict[str, str]) -> dict[str, Any]:
    """{"ms": the median time of a step, "loss": the last step's}, from a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", STEP, str(threads)]
    done = subprocess.run(command, env=clean | settings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_beside_busy_processes(report: Any, full: bool) -> None:
    pytest.importorskip("mlxtend")
    rows, losses = [], {}
    for name, (threads, settings) in CASES.items():
        for number in BUSY if full else BUSY[:3]:
            with busy(number):
                found = steps(threads, settings)
            quiet = rows[-number]["_ms"] if number else found["ms"]
            losses.setdefault(threads, set()).add(found["loss"])
            row = {"how": name, "threads": threads, "busy": number, "x quiet": found["ms"] / quiet}
            rows.append(row | {"_ms": found["ms"]})
    alone = {row["busy"]: row["_ms"] for row in rows if row["how"] == ONE}
    report([row | {"x one thread": row["_ms"] / alone[row["busy"]]} for row in rows])
    assert all(len(found) == 1 for found in losses.values()), losses
    for row in rows:
        if row["how"] != "torch's own" and row["busy"] == 2:
            assert row["x quiet"] <= LIMIT, row
