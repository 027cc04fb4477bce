"""Training on two hosts that torchrun joins over a network: the same weights as on one, also if a host vanishes and
comes back; and the bytes that go over the link. The hosts are network namespaces (tests/hosts.py)."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import torch
import torch.distributed as dist
from hosts import Host, two_hosts
from processes import commands, finished
from test_processes import losses, options
from tolerances import FLOAT32

from vjvcr_fast.cli import main
from vjvcr_fast.losses.distributed import bytes_moved
from vjvcr_fast.training import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.usefixtures("one_thread"),
]

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "cluster.md"
JOB = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "one,two", "OMP_NUM_THREADS": "1"}


def start(host: Host, script: Path, arguments: list[str], log: Path) -> "subprocess.Popen[str]":
    """Does on a host what the job script does on each. log: gets what is printed."""
    path = os.pathsep.join([str(script.parent / "slurm"), str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("a") as file:
        command = ["bash", str(script), *arguments]
        return host.start(command, env={**os.environ, **JOB, "PATH": path}, stdout=file, stderr=file)


def test_a_host_vanishes_and_comes_back(tmp_path: Path, embedded_digits: None) -> None:
    """With the guide's job script. The run goes on from its last checkpoint and ends with the weights, bit for bit, of
    two processes that nothing happened to, and with the losses of a single one."""
    settings = {"train__steps": 60, "train__validate_every": 20}
    again, log, script = tmp_path / "again", tmp_path / "log", tmp_path / "train.sbatch"
    written = re.search(r"^cat > train.sbatch <<'END'\n(.*?)^END$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert written is not None
    script.write_text(written[1])
    slurm.install(tmp_path / "slurm")
    with two_hosts(tmp_path) as (one, two):
        _, *arguments = options(again, **settings)
        first, second = (start(host, script, arguments, log) for host in (one, two))
        end = time.monotonic() + 120
        while not (again / "last.pt").exists():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.01)
        second.kill()
        second.wait()
        assert first.poll() is None
        second = start(two, script, arguments, log)
        assert [process.wait(timeout=120) for process in (first, second)] == [0, 0], log.read_text()
    said = log.read_text()
    assert [said.count(text) for text in ("VCR with N = 8", "trained: ")] == [2, 1], said  # started twice

    ends = [finished(process) for process in commands(options(tmp_path / "two", **settings), world=2)]
    assert [code for code, _ in ends] == [0, 0]
    ours, theirs = (checkpoint.load(tmp_path / run / "last.pt") for run in ("again", "two"))
    assert ours["step"] == theirs["step"] == 60
    for name, weight in theirs["model"].items():
        assert ours["model"][name].equal(weight), name
    assert main(options(tmp_path / "one", **settings)) == 0
    for name in ("loss", "validation_loss"):
        # Sixty updates of Adam: what each rounds differently adds up.
        found = [losses(tmp_path / run, name) for run in ("one", "again")]
        assert found[1] == pytest.approx(found[0], rel=FLOAT32 * 60), name


MEASURE = """
import gc, sys
import torch
import torch.distributed as dist
from vjvcr_fast.losses import vcr_loss

dist.init_process_group("gloo")
for shape in SHAPES:
    n = shape[0] // 2
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0))[dist.get_rank() * n :][:n].requires_grad_()
    for _ in range(2):  # the first connects the processes
        dist.barrier()
        print("before", flush=True)
        sys.stdin.readline()
        vcr_loss(h, alpha=0.5, beta=0.1, group=dist.group.WORLD, samples="equal").loss.backward()
        dist.barrier()
print("before", flush=True)
sys.stdin.readline()
gc.collect()
dist.destroy_process_group()
"""


def test_the_bytes_on_the_link(tmp_path: Path) -> None:
    """Those of the formula in vjvcr_fast/losses/distributed.py, by the counters of both network interfaces."""
    shapes = {(256, 15, 512): "time", (4096, 1, 64): "covariance"}
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.replace("SHAPES", repr([*shapes])))
    with two_hosts(tmp_path) as hosts:
        processes = []
        for rank, host in enumerate(hosts):
            launched = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "one", "MASTER_PORT": "29500"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, **launched}}
            processes.append(host.start([sys.executable, str(script)], **pipes))

        def reached() -> list[int]:
            """Waits until all processes are at the next line; returns the bytes that each host has received by then."""
            assert [process.stdout.readline() for process in processes] == ["before\n"] * 2
            return [host.received() for host in hosts]

        def go_on() -> None:
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()

        reached()
        for shape, route in shapes.items():
            go_on()
            before = reached()
            go_on()
            moved = [after - b for after, b in zip(reached(), before, strict=True)]
            expected = bytes_moved(route, [shape[0] // 2] * 2, *shape[1:], torch.float32)
            for count in moved:
                assert expected * 0.9 <= count <= expected * 1.1 + 20_000, (shape, moved, expected)
