"""VCR over several processes: the bytes that each route really moves, against gathering everything.

    pytest benchmarks/bench_distributed.py [--full]

gloo processes on this machine, one thread each; forward and backward in float32. Bytes are those that the kernel counts
on the loopback interface, with headers and acknowledgements, over the number of processes. Loss and gradient of
every route are compared with those of the gathered batch. The processes share cores, so take the times as a hint.
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

SHAPES = [(256, 15, 512), (256, 26, 1024), (256, 1, 8192), (4096, 1, 64)]  # MovingMNIST, CLEVRER, one step, VICReg
ROUTES = ("gather", "time", "features", "covariance")
ROUNDS, SAME, HEADERS = 3, 1e-5, 1.1  # HEADERS: how many times the bytes of the formula may move
MOST = 60e6  # bytes: a route that moves more is left out. It is never the one that moves the least.

pytestmark = pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="counts bytes in /proc/net/dev")


def loopback() -> int:
    """Bytes received on the loopback interface, by all processes of this machine."""
    (line,) = (row for row in Path("/proc/net/dev").read_text().splitlines() if row.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    rows = [row for shape in SHAPES for row in _routes(shape, rank, world)]
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.barrier()
    dist.destroy_process_group()


def _routes(shape: tuple[int, int, int], rank: int, world: int) -> list[Row]:
    samples = [shape[0] // world] * world
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.6
    h = whole.split(samples)[rank].clone().requires_grad_()
    expected = {route: bytes_moved(route, samples, *shape[1:], torch.float32) for route in ROUTES}
    auto = choose("auto", "auto", "auto", [h], Shards(None, rank, tuple(samples)))
    assert expected[auto] == min(expected.values())
    rows: list[Row] = []
    first: Any = None
    for route in (route for route in ROUTES if expected[route] <= MOST):
        outputs = _step(h, route)
        dist.barrier()
        before, start = loopback(), time.perf_counter()
        for _ in range(ROUNDS):
            _step(h, route)
        dist.barrier()
        moved, seconds = (loopback() - before) / ROUNDS / world, (time.perf_counter() - start) / ROUNDS
        first = first or (outputs, moved, seconds)
        for ours, gathered in zip(outputs, first[0], strict=True):
            assert (ours - gathered).norm() <= SAME * gathered.norm(), f"{shape} {route}"
        row = {"N, T, d": ", ".join(map(str, shape)), "processes": world, "route": route, "MB each": moved / 1e6}
        row |= {"busiest, by the formula": expected[route] / 1e6, "of gathering": moved / first[1]}
        rows.append(row | {"time of gathering": seconds / first[2], "auto": "yes" if route == auto else ""})
    return rows


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
