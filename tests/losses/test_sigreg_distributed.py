"""sigreg over several processes, whose samples are shares of one batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from test_sigreg import random
from tolerances import relative
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.losses import SIGRegLoss, projections, sigreg

SHARDS = {2: {"even": (4, 4), "uneven": (6, 2), "one": (1, 4)}, 4: {"even": (2, 2, 2, 2), "uneven": (1, 4, 2, 5)}}
DTYPES = {"float64": (torch.float64, 1e-6), "float32": (torch.float32, 1e-5), "bfloat16": (torch.bfloat16, 1e-2)}


def types(world: int) -> dict[str, tuple[torch.dtype, float]]:
    """Only float64 with more than two processes, because rounding does not depend on their number."""
    return DTYPES if world == 2 else {"float64": DTYPES["float64"]}


def shared(dtype: torch.dtype) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 5, dtype=torch.float64).to(dtype)


def inputs(samples: int, dtype: torch.dtype) -> list[Tensor]:
    return [random(samples, steps, 4, dtype=torch.float64, seed=steps).to(dtype) for steps in (2, 3)]


def _processes(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shards, samples in SHARDS[world].items():
        for name, (dtype, _) in types(world).items():
            for backend in ("auto", "torch"):
                model, x = shared(dtype), inputs(sum(samples), dtype)
                hs = [model(part.split(list(samples))[rank]) for part in x]
                given = samples if name == "float64" else None
                loss = sigreg(hs, seed=1, directions=40, group=dist.group.WORLD, samples=given, backend=backend)
                loss.backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
                dist.all_reduce(gradient)
                found[shards, name, backend] = loss.detach(), gradient / world  # the mean, which DDP takes
    leaf = random(3 + rank, 2, 5, dtype=torch.float64, seed=9).requires_grad_()
    module = SIGRegLoss(directions=40, group=dist.group.WORLD)
    (first,) = torch.autograd.grad(module(leaf), leaf, create_graph=True)
    found["second"] = leaf.detach(), torch.autograd.grad(first.square().sum(), leaf)[0]
    if world == 2:
        compiled = torch.compile(module.eval(), backend="eager")
        found["compiled"] = float(compiled(leaf)), float(module(leaf))
    alone = dist.new_group([rank], use_local_synchronization=True)
    found["alone"] = float(sigreg(leaf[:1], seed=1, group=alone)), float(sigreg(leaf[:1], seed=1))
    try:
        sigreg(leaf, seed=1, group=dist.group.WORLD, backend="reference")
    except ValueError as error:
        found["error"] = str(error)
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_are_like_one(world: int, tmp_path: Path) -> None:
    everyone = in_processes(_processes, world, tmp_path)
    for shards, samples in SHARDS[world].items():
        for name, (dtype, bound) in types(world).items():
            model = shared(dtype)
            h = torch.cat([model(part) for part in inputs(sum(samples), dtype)], dim=1).double()
            drawn = projections.drawn(1, 5, 40, h.device).double()
            loss = reference.sigreg(h, drawn)
            loss.backward()
            expected = torch.cat([p.grad.flatten() for p in model.parameters()])
            for backend in ("auto", "torch"):
                results = [found[shards, name, backend] for found in everyone]
                assert all(relative(loss_, loss) <= min(bound, 1e-5) for loss_, _ in results)
                assert all(relative(gradient, expected) <= bound for _, gradient in results), (shards, name, backend)
                assert len({float(loss_) for loss_, _ in results}) == 1  # the very same number on each
    # Every process returns the whole loss: a first derivative counts it `world` times, and its square is of that.
    h = torch.cat([found["second"][0] for found in everyone]).requires_grad_()
    drawn = projections.drawn(projections.splitmix(0, torch.tensor(0)), 5, 40, h.device).double()
    (first,) = torch.autograd.grad(reference.sigreg(h, drawn), h, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), h)
    ours = torch.cat([found["second"][1] for found in everyone])
    assert relative(ours, world**2 * second) <= 1e-6
    for found in everyone:
        assert world > 2 or found["compiled"][0] == found["compiled"][1]
        assert relative(torch.tensor(found["alone"][0]), torch.tensor(found["alone"][1])) <= 1e-6
        assert found["error"] == "backend='reference' computes the loss of one process alone: it takes no group"
