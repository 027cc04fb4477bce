"""VCR over several processes: the bytes that each route moves, measured, against gathering everything.

    pytest benchmarks/bench_distributed.py

gloo processes on this machine, one thread each, forward and backward in float32. Bytes are what the kernel counted on
the loopback interface meanwhile, headers and acknowledgements included, over the number of processes. Loss and gradient
of every route are checked against those of the gathered batch first. Times are of processes that share cores: ratios
to gathering, and no more than a hint.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from records import Row

from vjvcr_fast.losses import vcr_loss
from vjvcr_fast.losses.distributed import Shards, bytes_moved, choose

SHAPES = {
    "MovingMNIST": (256, 15, 512),
    "CLEVRER": (256, 26, 1024),
    "one step": (256, 1, 8192),
    "VICReg": (4096, 1, 64),
}
ROUTES = ("gather", "time", "features", "covariance")
ROUNDS, SAME, HEADERS = 3, 1e-5, 1.1  # HEADERS: what may come on top of the bytes of the formula
MOST = 60e6  # bytes: a route that moves more for a shape is left out, and never the least

pytestmark = pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="counts bytes in /proc/net/dev")


def loopback() -> int:
    """Bytes received on the loopback interface, by all processes of this machine."""
    (line,) = (row for row in Path("/proc/net/dev").read_text().splitlines() if row.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    rows = [row for name, shape in SHAPES.items() for row in _routes(name, shape, rank, world)]
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def _routes(name: str, shape: tuple[int, int, int], rank: int, world: int) -> list[Row]:
    n, steps, d = shape
    samples = [n // world] * world
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.6
    h = whole.split(samples)[rank].clone().requires_grad_()
    auto = choose("auto", "auto", "auto", [h], Shards(None, rank, tuple(samples)))
    rows: list[Row] = []
    truth: Any = None
    for route in ROUTES:
        floor = bytes_moved(route, samples, steps, d, torch.float32)
        if floor > MOST:
            continue
        found = _step(h, route)
        truth = truth or found
        for ours, theirs in zip(found, truth, strict=True):
            assert (ours - theirs).norm() <= SAME * theirs.norm(), f"{name} {route}"
        dist.barrier()
        before, start = loopback(), time.perf_counter()
        for _ in range(ROUNDS):
            _step(h, route)
        dist.barrier()
        moved, seconds = (loopback() - before) / ROUNDS / world, (time.perf_counter() - start) / ROUNDS
        rows.append({"N, T, d": f"{n}, {steps}, {d}", "processes": world, "route": route, "MB each": moved / 1e6})
        rows[-1] |= {"busiest, by the formula": floor / 1e6, "of gathering": moved / 1e6 / rows[0]["MB each"]}
        rows[-1] |= {"time of gathering": 1.0, "auto": "yes" if route == auto else "", "_seconds": seconds}
        rows[-1]["time of gathering"] = seconds / rows[0]["_seconds"]
    return [{k: v for k, v in row.items() if k != "_seconds"} for row in rows]


def _step(h: torch.Tensor, route: Any) -> tuple[torch.Tensor, torch.Tensor]:
    terms = vcr_loss(h, alpha=0.5, beta=0.1, group=dist.group.WORLD, samples="equal", route=route)
    return terms.loss.detach(), torch.autograd.grad(terms.loss, h)[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("world", [2, 4] if metafunc.config.getoption("--full") else [2])


def test_bytes(world: int, report: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder), nprocs=world)
        rows = torch.load(f"{folder}/rows.pt")
    report(rows)
    for row in rows:
        assert row["MB each"] <= HEADERS * row["busiest, by the formula"] + 0.1
    for shape in dict.fromkeys(row["N, T, d"] for row in rows):
        of_shape = [row for row in rows if row["N, T, d"] == shape]
        least = min(row["busiest, by the formula"] for row in of_shape)
        assert next(row for row in of_shape if row["auto"])["busiest, by the formula"] == least
