"""The entry of the command: what OpenMP reads is set before torch is loaded, and only what the user has not set."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vjvcr_fast import __main__ as entry
from vjvcr_fast import cli
from vjvcr_fast.config import Config, override

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what `main` sets is gone afterwards
    for name in (*entry.WAIT, "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, entry.WAIT),
        ({"GOMP_SPINCOUNT": "7"}, {**entry.WAIT, "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {}),
    ],
)
def test_what_the_user_has_not_set(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], then: dict[str, str]
) -> None:
    os.environ.update(given)
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(dict(os.environ)) or 3)
    assert entry.main() == 3
    assert {name: value for name, value in seen[0].items() if name in entry.WAIT} == then


def test_torch_is_loaded_later() -> None:
    code = "import sys; import vjvcr_fast.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("channels", "own", "chosen", "threads"),
    [("4,4,8", True, "", 1), ("4,4,64", True, "", 2), ("4,4,8", True, "2", 2), ("4,4,8", False, "", 2)],
)
def test_a_small_network_takes_one_thread(
    monkeypatch: pytest.MonkeyPatch, tiny: Config, channels: str, own: bool, chosen: str, threads: int
) -> None:
    """Of a process of its own, where the user has not chosen a number; a caller's process is left alone."""
    now = [2]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.append(n))
    if chosen:
        os.environ["OMP_NUM_THREADS"] = chosen
    arguments = cli._parser().parse_args(["train"])
    arguments.own_process = own
    cli.use_one_thread(arguments, override(tiny, {"model.channels": channels}))
    assert now[-1] == threads


@pytest.mark.parametrize("given", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept(given: dict[str, str]) -> None:
    """Unless the user has set glibc's allocator up. Otherwise every page of a large block is cleared anew each time."""
    code = """
import resource, torch
from vjvcr_fast.cli import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))  # a small block may have taken a part of the freed one
"""
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35):
        pytest.skip("another C library, or one that refuses the threshold")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 20) == bool(given), done.stdout
