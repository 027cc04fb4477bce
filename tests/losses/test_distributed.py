"""VCR over several processes equals that of one process with the whole batch: all routes, forms, types and shards."""

import functools
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
import torch.distributed as dist
from processes import in_processes
from tolerances import penalty_scale, relative
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.losses import VCRLoss, VICRegLoss, distributed, vcr_loss
from vjvcr_fast.losses.distributed import bytes_moved, packed, unpacked

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

ALPHA, BETA = 0.7, 0.3
ROUTES = ("time", "features", "covariance", "gather")
WORLDS = (2, 4)
SHARDS = {2: {"even": (4, 4), "uneven": (6, 2), "one": (1, 4)}, 4: {"even": (2, 2, 2, 2), "uneven": (1, 4, 2, 5)}}
# (T of each tensor, d), with T and d below and above the number of processes.
SHAPES = {"long": ([7], 5), "sequence": ([3, 6], 9), "one step": ([1], 11), "few features": ([5], 1), "two": ([2], 3)}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def dtypes(world: int) -> dict[str, torch.dtype]:
    """Only float64 with more than two processes, because rounding does not depend on their number."""
    return DTYPES if world == 2 else {"float64": torch.float64}


LIMITS = {"float64": 1e-6, "float32": 1e-5, "bfloat16": tolerances.BFLOAT16}  # the first two are promised


def frames(samples: int, steps: list[int], dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """(N, T, 4) each: inputs of the shared linear layer, which makes representations of them."""
    generator = torch.Generator().manual_seed(samples + sum(steps))
    made = torch.randn(samples, sum(steps), 4, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in (made * 0.6 + offset).split(steps, dim=1)]


def shared(d: int, dtype: torch.dtype) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(d)
        return nn.Linear(4, d, dtype=torch.float64).to(dtype)


def mine(whole: Tensor, samples: tuple[int, ...], rank: int) -> Tensor:
    return whole.split(list(samples))[rank]


def flat(gradients: Any) -> Tensor:
    """The gradients of all parameters in one tensor. That of a bias alone is zero but for rounding."""
    return torch.cat([gradient.flatten() for gradient in gradients])


# -- What runs in every process -------------------------------------------------------------------------------------


def averaged(loss: Tensor, model: nn.Module) -> dict[str, Any]:
    """The loss, and the mean of the gradients over processes, which DDP takes."""
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return {"loss": loss.detach(), "gradients": [g / dist.get_world_size() for g in gradients]}


def _vcr_of(rank: int, world: int) -> dict[str, Any]:
    found = {}
    for shards, samples in SHARDS[world].items():
        for shape, (steps, d) in SHAPES.items():
            for name, dtype in dtypes(world).items():
                for route in ROUTES:
                    model, x = shared(d, dtype), frames(sum(samples), steps, dtype)
                    hs = [model(mine(part, samples, rank)) for part in x]
                    given = samples if name == "float64" else None
                    terms = vcr_loss(hs, alpha=ALPHA, beta=BETA, group=dist.group.WORLD, route=route, samples=given)
                    kept = {"variance": terms.variance.detach(), "covariance": terms.covariance.detach()}
                    found[shards, shape, name, route] = averaged(terms.loss, model) | kept
    return found


@pytest.fixture(scope="module")
def vcr_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a number of processes, which are started once, to what each process found."""
    return functools.cache(lambda world: in_processes(_vcr_of, world, tmp_path_factory.mktemp(f"of{world}")))


# -- Equality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("world", "shards", "dtype"), [(w, s, t) for w in WORLDS for s in SHARDS[w] for t in dtypes(w)]
)
def test_loss_and_gradient_are_those_of_one_process(
    vcr_of: Any, world: int, shards: str, shape: str, dtype: str, route: str
) -> None:
    """Compared with reference.py in float64 on the whole batch, after the model has computed h in the tested dtype."""
    (steps, d), samples, limit = SHAPES[shape], SHARDS[world][shards], LIMITS[dtype]
    model, x = shared(d, DTYPES[dtype]), frames(sum(samples), steps, DTYPES[dtype])
    h = torch.cat([model(part) for part in x], dim=1).double()
    loss, variance, covariance = reference.vcr(h, ALPHA, BETA)
    loss.backward()
    scale = max(float(penalty_scale(h)), float(covariance.detach()))
    results = [found[shards, shape, dtype, route] for found in vcr_of(world)]
    expected = flat([p.grad for p in model.parameters()])
    for result in results:
        assert result["loss"].dtype == (torch.float64 if dtype == "float64" else torch.float32)
        assert relative(result["variance"], variance) <= min(limit, tolerances.FLOAT32)
        assert relative(result["covariance"], covariance, scale) <= min(limit, tolerances.FLOAT32)
        assert relative(flat(result["gradients"]), expected) <= limit
    assert len({float(result["loss"]) for result in results}) == 1  # the very same number on each


class Hard:
    """Special cases, once each, on two processes."""

    samples = (3, 4)

    def __call__(self, rank: int, world: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        group, part = dist.group.WORLD, functools.partial(mine, samples=self.samples, rank=rank)
        for route in ROUTES:
            far = part(frames(7, [4], torch.float32, offset=300.0)[0]).requires_grad_()
            terms = vcr_loss(far, alpha=1, beta=1, group=group, route=route)
            terms.loss.backward()
            found["far", route] = terms.loss.detach(), far.grad
            bad = part(frames(7, [4], torch.float32)[0]).clone()
            bad[0, 1, 2] = float("nan") if rank == 1 else 0.0
            found["nan", route] = vcr_loss(bad, alpha=1, beta=1, group=group, route=route).loss
            leaf = part(frames(7, [4], torch.float64)[0]).requires_grad_()
            loss = vcr_loss(leaf, alpha=1, beta=1, group=group, route=route).loss
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            found["second", route] = torch.autograd.grad(first.square().sum(), leaf)[0]
            terms = vcr_loss(leaf, alpha=1, beta=1, group=group, route=route)
            found["term", route] = torch.autograd.grad(terms.covariance, leaf)[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found["autocast", route] = vcr_loss(leaf, alpha=1, beta=1, group=group, route=route).loss.detach()
        for form in ("gram", "covariance"):
            found["form", form] = vcr_loss(leaf, alpha=1, beta=1, group=group, form=form).loss.detach()
        found["module"] = VCRLoss(1, 1, group=group, samples=self.samples)(leaf).loss.detach()
        compiled = torch.compile(lambda h: vcr_loss(h * 2, alpha=1, beta=1, group=group).loss, backend="eager")
        found["compiled"] = compiled(leaf).detach()
        compiled = torch.compile(lambda h: vcr_loss(h * 2, alpha=1, beta=1, over="time", group=group), backend="eager")
        found["compiled over time"] = compiled(leaf).loss.detach()
        found["errors"] = [error_of(action) for action in self.wrong(leaf, rank)]
        return found

    def wrong(self, h: Tensor, rank: int) -> list[Any]:
        def call(h: Tensor = h, **options: Any) -> Tensor:
            return vcr_loss(h, **{"alpha": 1, "beta": 1, "group": dist.group.WORLD} | options).loss

        return [
            lambda: call(route="ring"),
            lambda: call(route="features", form="covariance"),
            lambda: call(route="covariance", form="gram"),
            lambda: call(route="features", backend="reference"),
            lambda: call(samples=(3, 4, 1)),
            lambda: call(samples=(4, 3)),
            lambda: call(samples=(4, 3), over="both"),
            lambda: call(samples="equal", form="both"),
            lambda: call(h[:, : 2 + rank]),
            lambda: call(h[:, :, : 1 + rank]),
            lambda: call(h.float() if rank else h),
            lambda: call(eps=-1.0),
        ]


def error_of(action: Any) -> str:
    try:
        return f"no error: {action()}"
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(Hard(), 2, tmp_path_factory.mktemp("hard"))


def whole(name: str, hard: list[dict[str, Any]], route: str) -> Tensor:
    return torch.cat([found[name, route] for found in hard])


@pytest.mark.parametrize("route", ROUTES)
def test_features_far_from_zero(hard: list[dict[str, Any]], route: str) -> None:
    h = frames(7, [4], torch.float32, offset=300.0)[0].double().requires_grad_()
    loss = reference.vcr(h, 1, 1)[0]
    loss.backward()
    gradient = torch.cat([found["far", route][1] for found in hard]) / 2
    assert relative(hard[0]["far", route][0], loss) <= tolerances.MEAN_1000_SIGMA
    assert relative(gradient, h.grad) <= tolerances.MEAN_1000_SIGMA


@pytest.mark.parametrize("route", ROUTES)
def test_nan_of_one_process_reaches_all(hard: list[dict[str, Any]], route: str) -> None:
    assert all(found["nan", route].isnan() for found in hard)


@pytest.mark.parametrize("route", ROUTES)
def test_terms_and_second_derivatives(hard: list[dict[str, Any]], route: str) -> None:
    """Both processes return the whole loss, so a first derivative counts it twice and its square four times."""
    h = frames(7, [4], torch.float64)[0].requires_grad_()
    loss, _, covariance = reference.vcr(h, 1, 1)
    (first,) = torch.autograd.grad(loss, h, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), h, retain_graph=True)[0]
    assert relative(whole("second", hard, route), 4 * second) <= tolerances.FLOAT64
    (of_term,) = torch.autograd.grad(covariance, h)
    assert relative(whole("term", hard, route), 2 * of_term) <= tolerances.FLOAT64


def test_forms_modules_autocast_and_compiled(hard: list[dict[str, Any]]) -> None:
    h = frames(7, [4], torch.float64)[0]
    expected = reference.vcr(h, 1, 1)[0]
    for found in hard:
        for key in [("form", "gram"), ("form", "covariance"), "module", *(("autocast", route) for route in ROUTES)]:
            assert relative(found[key], expected) <= tolerances.FLOAT64, key
        assert relative(found["compiled"], reference.vcr(2 * h, 1, 1)[0]) <= tolerances.FLOAT64
        in_time = reference.vcr(2 * h, 1, 1, over="time")[0]
        assert relative(found["compiled over time"], in_time) <= tolerances.FLOAT64


def test_errors(hard: list[dict[str, Any]]) -> None:
    expected = [
        "route='ring': choose one of auto, time, features, covariance, gather",
        "route='features' cannot be had with form='covariance'",
        "route='covariance' cannot be had with form='gram'",
        "route='features' cannot be had with backend='reference'",
        "samples=[3, 4, 1]: one number a process, at least 1, is needed; rank 0 of 2 has 3",
        *["samples=[4, 3]: one number a process, at least 1, is needed; rank 0 of 2 has 3"] * 2,
        "form='both': choose one of auto, gram, covariance",
        "h: processes disagree in T: [2, 3], by rank",
        "h: processes disagree in d: [1, 2], by rank",
        "h: processes disagree in dtype: [torch.float64, torch.float32], by rank",
        "eps=-1.0: must be >= 0, it is added to the variance before the square root",
    ]
    assert hard[0]["errors"] == expected
    assert hard[1]["errors"][8:] == expected[8:]


def test_without_a_group() -> None:
    with pytest.raises(ValueError, match=r"group: torch\.distributed is not initialised"):
        vcr_loss(torch.randn(3, 4), alpha=1, beta=1, group="world")


# -- VICReg ---------------------------------------------------------------------------------------------------------


class VICReg:
    """Two branches from a shared layer and uneven shards, in each process."""

    def __call__(self, rank: int, world: int) -> list[dict[str, Any]]:
        samples, results = SHARDS[world]["uneven"], []
        for dtype in (torch.float64, torch.float32):
            for options in ({}, {"samples": samples, "variance_branches": "sum", "covariance_divisor": "d(d-1)"}):
                model, x = shared(6, dtype), frames(sum(samples), [1, 1], dtype)
                loss = VICRegLoss(gather_distributed=True, **options)
                z = [model(mine(part[:, 0], samples, rank)) for part in x]
                results.append(averaged(loss(*z), model))
        return results


@pytest.mark.parametrize("world", WORLDS)
def test_vicreg(tmp_path: Path, world: int) -> None:
    samples, everyone = SHARDS[world]["uneven"], in_processes(VICReg(), world, tmp_path)
    expected = []
    for _ in (1, 2):
        for options in ({}, {"variance_branches": "sum", "covariance_divisor": "d(d-1)"}):
            model, x = shared(6, torch.float64), frames(sum(samples), [1, 1], torch.float64)
            loss = VICRegLoss(**options)(*(model(part[:, 0]) for part in x))
            loss.backward()
            expected.append((loss, flat([p.grad for p in model.parameters()])))
    for results in everyone:
        for i, (found, (loss, gradient)) in enumerate(zip(results, expected, strict=True)):
            limit = LIMITS["float64" if i < 2 else "float32"]
            assert relative(found["loss"], loss) <= limit
            assert relative(flat(found["gradients"]), gradient) <= limit


# -- Bytes, packing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8])
def test_half_of_a_symmetric_matrix(m: int) -> None:
    a = torch.randn(3, m, m)
    symmetric = a + a.mT
    half = packed(symmetric)
    assert half.numel() <= 3 * (m * (m + 1) // 2 + m / 2)
    assert unpacked(half, m).equal(symmetric)


@pytest.mark.parametrize(
    ("samples", "steps", "d", "route"),
    [
        ([32] * 8, 15, 512, "time"),
        ([32] * 8, 26, 1024, "time"),
        ([20] * 8, 100, 2048, "time"),
        ([4096] * 8, 1, 64, "covariance"),
        ([256] * 4, 1, 8192, "features"),
        ([256] * 2, 8, 128, "covariance"),
    ],
)
def test_auto_takes_the_fewest_bytes(samples: list[int], steps: int, d: int, route: str) -> None:
    hs, found = [torch.empty(samples[0], steps, d)], distributed.Shards(None, 0, tuple(samples))
    assert distributed.choose("auto", "auto", "auto", hs, found) == route
    moved = {r: bytes_moved(r, samples, steps, d, torch.float32) for r in ROUTES}
    assert moved[route] == min(moved.values())
