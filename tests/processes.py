"""Processes for the tests: of torch.distributed, and of the command line.

All are forked from one process that has imported torch. It is started once in a test run. A process then takes 0.1 s
instead of 2 s.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vjvcr_fast.training import build

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["pytest", "torch.distributed", "torch._dynamo", "vjvcr_fast.cli", "tqdm", "mlxtend.data"]
)


def _process(rank: int, world: int, folder: str, work: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    try:
        torch.save(work(rank, world), f"{folder}/{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends before them


def in_processes(work: Any, world: int, folder: Path) -> list[Any]:
    """Runs work(rank, world) in `world` processes of a gloo group. Returns their results by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(_process, (world, str(folder), work), world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def free_port() -> int:
    with socket.socket() as open_one:
        open_one.bind(("127.0.0.1", 0))
        return int(open_one.getsockname()[1])


def _command(arguments: list[str], environment: dict[str, str], folder: str, seconds: dict[str, float]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    from vjvcr_fast.__main__ import main
    from vjvcr_fast.data.digits import Digits
    from vjvcr_fast.training import build, processes

    digits = Digits(**torch.load(f"{folder}/digits.pt"))
    build.load_digits = lambda *_, **__: digits
    for constant, value in seconds.items():
        assert hasattr(processes, constant)
        setattr(processes, constant, value)
    sys.argv = ["vjvcr-fast", *arguments]
    sys.exit(main())


class Command:
    """`vjvcr-fast ARGUMENTS` as a process, with the same digits as this process (blobs, with the fixture `digits`)."""

    def __init__(self, *given: Any) -> None:
        self.kept = tempfile.TemporaryDirectory()
        self.folder = Path(self.kept.name)
        torch.save(vars(build.load_digits("")), self.folder / "digits.pt")
        self.process = _FORKED.Process(target=_command, args=(*given[:2], str(self.folder), *given[2:]), daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def command(arguments: list[str], rank: int | None = None, world: int = 1, port: int = 0, **seconds: float) -> Command:
    """Starts `vjvcr-fast ARGUMENTS` on one thread; with a rank, as a launcher starts one of `world` processes.

    seconds: new values for the constants of training/processes.py.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        launched = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return Command(arguments, environment, seconds)


def commands(arguments: list[str], world: int, **seconds: float) -> list[Command]:
    """The same command in `world` processes of one run."""
    port = free_port()
    return [command(arguments, rank, world, port, **seconds) for rank in range(world)]


def finished(process: "Command | subprocess.Popen[str]", timeout: float = 120.0) -> tuple[int, str]:
    """Waits for the process. Returns its exit code and stderr. Kills it and raises an error after `timeout` seconds."""
    if isinstance(process, Command):
        process.process.join(timeout)
        code = process.poll()
        if code is None:
            process.kill()
            raise TimeoutError(f"{process.pid} runs after {timeout} s")
        return code, (process.folder / "stderr").read_text()
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, said
