"""Processes of torch.distributed for the tests: of a function, and of the command line."""

import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


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
    """What work(rank, world) returns in each of `world` processes of a gloo group."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(_process, (world, str(folder), work), world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def free_port() -> int:
    with socket.socket() as open_one:
        open_one.bind(("127.0.0.1", 0))
        return int(open_one.getsockname()[1])


def command(arguments: list[str], rank: int | None = None, world: int = 1, port: int = 0) -> "subprocess.Popen[str]":
    """`vjvcr-fast ARGUMENTS` as a process, on one thread; with a rank, as a launcher starts one of several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if rank is not None:
        launched = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
        environment |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
    start = [sys.executable, "-m", "vjvcr_fast", *arguments]
    return subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def commands(arguments: list[str], world: int) -> "list[subprocess.Popen[str]]":
    """The same command in `world` processes that find one another."""
    port = free_port()
    return [command(arguments, rank, world, port) for rank in range(world)]


def finished(process: "subprocess.Popen[str]", timeout: float = 120.0) -> tuple[int, str]:
    """Its exit code and what it said on stderr; ended after `timeout` seconds."""
    try:
        _, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, said
