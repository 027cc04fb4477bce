"""Inference of z* for any energy: it never ends above its start, z* is finite if the energy is, samples do not see each
other, nothing but z changes, and energies that are not finite give one clear error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import ways
from fuzz import fuzz
from hypothesis import strategies as st
from tolerances import FLOAT32, FLOAT64, LATENT_PLAIN, relative
from torch import Tensor, nn

from vjvcr_fast import native
from vjvcr_fast.latents import (
    ContinuousLatent,
    DiscreteLatent,
    Latent,
    LatentResult,
    MLPEnergy,
    NonFiniteEnergyError,
    SparseLatent,
)

Energy = Callable[[Tensor], Tensor]
DTYPES = st.sampled_from((torch.float32, torch.float64))
# With the operators of csrc/, for an instruction set, or "": as if they were not built.
NAMES = ("", *ways.HERE)
ROUTES = st.sampled_from(NAMES)
SEEDS = st.integers(0, 10**6)


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    pass


# -- Energies and latents -------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """n samples of m components. of: makes an energy from the samples' data, (n, ...) tensors. data: these tensors."""

    m: int
    of: Callable[..., Energy]
    data: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]  # what all samples share

    @property
    def n(self) -> int:
        return len(self.data[0])

    def methods(self, operators: str) -> tuple[str, ...]:
        """The methods of a sparse latent that serve this energy."""
        newton = operators and isinstance(self.energy(), MLPEnergy)
        return ("fista", "ista", "newton") if newton else ("fista", "ista")

    def energy(self, *rows: Tensor) -> Energy:
        return self.of(*(rows or self.data))


def quadratic(n: int, m: int, scale: float, make: Callable[..., Tensor]) -> Problem:
    """The mean of (A z - b)^2, with an A that may be ill-conditioned."""
    a = make(m + 2, m) * torch.logspace(0, -3, m, dtype=torch.float64)
    b = make(n, m + 2)
    return Problem(
        m, lambda b: lambda z: scale * (z @ a.to(z.dtype).T - b.to(z.dtype)).square().mean(dim=1), (b,), (a,)
    )


def network(n: int, m: int, scale: float, make: Callable[..., Tensor]) -> Problem:
    """Two layers with ReLU: not convex, with kinks."""
    w, v, p, target = make(7, m), make(5, 7), make(n, 7), make(n, 5)

    def of(p: Tensor, target: Tensor) -> Energy:
        def energy(z: Tensor) -> Tensor:
            u = torch.relu(z @ w.to(z.dtype).T + p.to(z.dtype))
            return scale * (u @ v.to(z.dtype).T - target.to(z.dtype)).square().mean(dim=1)

        return energy

    return Problem(m, of, (p, target), (w, v))


def closed_form(n: int, m: int, scale: float, make: Callable[..., Tensor]) -> Problem:
    """The same kind of network in closed form."""
    root = scale**0.5
    shared = make(8, m), make(8, 8), make(8), root * make(6, 8), root * make(6)
    of = lambda p, target: MLPEnergy(p, *shared, target)  # noqa: E731
    return Problem(m, of, (make(n, 8), root * make(n, 6)), shared)


def wavy(n: int, m: int, scale: float, make: Callable[..., Tensor]) -> Problem:
    """Many minima, and curvature without a bound."""
    b = make(n, m)
    return Problem(m, lambda b: lambda z: scale * ((5 * z + b).sin() + 0.1 * z.square() * b.exp()).sum(dim=1), (b,), ())


KINDS = (quadratic, network, closed_form, wavy)


@st.composite
def problems(draw: st.DrawFn, exponents: st.SearchStrategy[int]) -> Problem:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(st.sampled_from(KINDS))(draw(st.integers(1, 5)), draw(st.integers(1, 6)), 10.0 ** draw(exponents), make)


@st.composite
def latents(
    draw: st.DrawFn, problem: Problem, operators: str, steps: st.SearchStrategy[int], rates: st.SearchStrategy[int]
) -> Any:
    """A sparse or continuous latent that serves the problem."""
    m = problem.m
    common = {
        "step_rule": draw(st.sampled_from(("backtracking", "backtracking", "fixed"))),
        "tolerance": draw(st.sampled_from((0.0, 1e-4, 0.1))),
        "check": draw(st.booleans()),
    }
    lr = 10.0 ** draw(rates)
    if draw(st.booleans()):
        weight = draw(st.sampled_from((0.0, 1e-4, 1e-2, 1.0, 1e10)))
        method, nonnegative = draw(st.sampled_from(problem.methods(operators))), draw(st.booleans())
        if method == "newton":
            common["step_rule"] = "backtracking"
        return SparseLatent(m, weight, draw(steps), method=method, nonnegative=nonnegative, lr=lr, **common)
    clamp = draw(st.sampled_from((None, (0, 1), (-0.3, 0.1), (-1e-30, 1e30))))
    return ContinuousLatent((m,), draw(steps), lr, momentum=draw(st.sampled_from((0.0, 0.9))), clamp=clamp, **common)


def infer(latent: Latent, energy: Energy, z0: Tensor, operators: str = NAMES[-1]) -> LatentResult:
    with pytest.MonkeyPatch.context() as patch:
        if operators:
            ways.take(operators, patch)
        else:
            patch.setattr(native, "MISSING", "not wanted")
        return latent.infer(energy, len(z0), device="cpu", dtype=z0.dtype, z0=z0)


def outcome(call: Callable[[], Any], error: type[Exception]) -> tuple[Any, str]:
    """What a call returns, or the message of the error that it raises, which must be one line."""
    try:
        return call(), ""
    except error as refusal:
        said = str(refusal)
    assert said.isprintable()
    return None, said


def project(latent: Any, z0: Tensor) -> Tensor:
    """Where inference starts."""
    if isinstance(latent, SparseLatent):
        return z0.clamp_min(0) if latent.nonnegative else z0
    return z0 if latent.clamp is None else z0.clamp(*latent.clamp)


def whole(latent: Any, energy: Energy, z: Tensor) -> Tensor:
    """The energy with the L1 term."""
    return energy(z) + getattr(latent, "weight", 0.0) * z.abs().sum(dim=1)


def make_z0(problem: Problem, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(problem.n, problem.m, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- Any energy -----------------------------------------------------------------------------------------------------

EXTREME = st.one_of(st.integers(-3, 3), st.integers(-30, 30))


@fuzz(
    150,
    625,
    problem=problems(EXTREME),
    dtype=DTYPES,
    seed=SEEDS,
    far=st.sampled_from((0.0, 1.0, 1.0, 1e6, 1e18, 1e25)),
    operators=ROUTES,
    data=st.data(),
)
def test_never_above_the_start(
    problem: Problem, dtype: torch.dtype, seed: int, far: float, operators: str, data: st.DataObject
) -> None:
    latent = data.draw(latents(problem, operators, st.integers(1, 12), EXTREME))
    problem = problem._replace(data=tuple(t.to(dtype) for t in problem.data))
    energy, z0 = problem.energy(), make_z0(problem, dtype, seed, far)
    if isinstance(energy, MLPEnergy):
        energy = energy.to(dtype)
    kept, shared = z0.clone(), [t.clone() for t in (*problem.data, *problem.tensors)]
    start = project(latent, z0)
    before = whole(latent, energy, start)
    found, said = outcome(lambda: infer(latent, energy, z0, operators), NonFiniteEnergyError)
    assert z0.equal(kept)
    assert all(a.equal(b) for a, b in zip(shared, (*problem.data, *problem.tensors), strict=True))
    if said:
        assert latent.check
        assert "lr=" in said
        return
    assert found.z.shape == z0.shape
    assert found.z.isfinite().all()
    assert project(latent, found.z).equal(found.z)
    good = before.isfinite()
    assert not latent.check or good.all()
    assert (found.energy <= before)[good].all()
    assert found.z[~good].equal(start[~good])  # nothing is known about those
    rounding = FLOAT32 if dtype == torch.float32 else FLOAT64
    assert relative(found.energy[good], whole(latent, energy, found.z)[good]) < rounding
    assert ((found.steps >= 1) & (found.steps <= latent.steps)).all()
    assert found.zeros.equal((found.z == 0).to(dtype).mean(dim=1))


USUAL, FEW = st.integers(-1, 1), st.integers(1, 8)


@fuzz(80, 250, problem=problems(USUAL), seed=SEEDS, operators=ROUTES, data=st.data())
def test_samples_do_not_see_each_other(problem: Problem, seed: int, operators: str, data: st.DataObject) -> None:
    """z* is the same in a part of the batch, and beside samples whose data are not finite."""
    latent = data.draw(latents(problem, operators, FEW, USUAL).filter(lambda latent: not latent.check))
    z0 = make_z0(problem, torch.float64, seed)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=problem.n, max_size=problem.n).filter(any)))
    right = infer(latent, problem.energy(), z0, operators)
    part = infer(latent, problem.energy(*(t[kept] for t in problem.data)), z0[kept], operators)
    assert relative(part.z, right.z[kept]) < LATENT_PLAIN
    assert relative(part.energy, right.energy[kept]) < LATENT_PLAIN
    bad = data.draw(st.sampled_from((float("nan"), float("inf"), 1e300)))
    spoiled = [torch.where(kept.view(-1, *[1] * (t.ndim - 1)), t, bad) for t in problem.data]
    beside = infer(latent, problem.energy(*spoiled), z0, operators)
    assert all(a[kept].equal(b[kept]) for a, b in zip(beside, right, strict=True))


@fuzz(
    60,
    250,
    problem=problems(USUAL),
    seed=SEEDS,
    operators=ROUTES,
    bad=st.sampled_from(("nan", "inf", "-inf")),
    data=st.data(),
)
def test_an_energy_that_is_not_finite(
    problem: Problem, seed: int, operators: str, bad: str, data: st.DataObject
) -> None:
    """It raises an error with the number of samples, or leaves them at their start."""
    latent = data.draw(latents(problem, operators, FEW, USUAL))
    z0, row = make_z0(problem, torch.float64, seed), data.draw(st.integers(0, problem.n - 1))
    last = problem.data[-1].clone()
    last[row] = float(bad)
    energy = problem.energy(*problem.data[:-1], last)
    if latent.check:
        with pytest.raises(NonFiniteEnergyError, match=rf"not finite at z0 for 1 of {problem.n} samples") as error:
            infer(latent, energy, z0, operators)
        assert str(error.value).isprintable()
    else:
        found = infer(latent, energy, z0, operators)
        assert found.z.isfinite().all()
        assert found.z[row].equal(project(latent, z0)[row])


# -- One of k -------------------------------------------------------------------------------------------------------


@fuzz(60, 250, n=st.integers(1, 5), k=st.integers(2, 6), dtype=DTYPES, check=st.booleans(), data=st.data())
def test_the_least_of_k(n: int, k: int, dtype: torch.dtype, check: bool, data: st.DataObject) -> None:
    """The first of equals wins. An energy that is not finite wins only if none is finite."""
    numbers = st.one_of(st.sampled_from((0.0, -0.0, 1.0, 1e30, -1e30)), st.floats(width=32))
    table = torch.tensor([[data.draw(numbers) for _ in range(k)] for _ in range(n)]).to(dtype)
    energy = lambda z: torch.where(z > 0, table, 0).sum(dim=1)  # noqa: E731
    if check and not table.isfinite().all():
        with pytest.raises(NonFiniteEnergyError, match=r"is not finite for \d of \d samples") as error:
            DiscreteLatent(k).infer(energy, n, device="cpu", dtype=dtype)
        assert str(error.value).isprintable()
        return
    found = DiscreteLatent(k, check=False).infer(energy, n, device="cpu", dtype=dtype)
    for row, values in enumerate(table.tolist()):
        finite = [value if abs(value) < float("inf") else float("inf") for value in values]
        assert found.z[row].tolist() == [float(i == finite.index(min(finite))) for i in range(k)]
        assert float(found.energy[row]) == min(finite)


# -- What surrounds it ----------------------------------------------------------------------------------------------


@fuzz(30, 75, seed=SEEDS, sparse=st.booleans(), operators=ROUTES)
def test_parameters_stay_as_they_are(seed: int, sparse: bool, operators: str) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    before = {name: p.clone() for name, p in net.named_parameters()}
    latent = SparseLatent(4, 1e-2, 5) if sparse else ContinuousLatent((4,), 5, 1.0)
    found = infer(latent, lambda z: net(z).square().mean(dim=1), torch.randn(3, 4, dtype=torch.float64), operators)
    assert not found.z.requires_grad
    assert all(p.equal(before[name]) and p.requires_grad for name, p in net.named_parameters())
    assert net[0].weight.grad.equal(torch.ones_like(net[0].weight))
    assert all(p.grad is None for name, p in net.named_parameters() if name != "0.weight")


NUMBERS = st.one_of(st.integers(-2, 3), st.floats(), st.sampled_from((1e-30, 0.5, 1e30)))


@fuzz(100, 500, dim=st.integers(-1, 2), weight=NUMBERS, steps=st.integers(-1, 3), lr=NUMBERS, tolerance=NUMBERS)
def test_settings(dim: int, weight: float, steps: int, lr: float, tolerance: float) -> None:
    """A latent either works or raises an error that names the setting when it is made."""
    make = lambda: SparseLatent(dim, weight, steps, lr=lr, tolerance=tolerance, check=False)  # noqa: E731
    latent, said = outcome(make, ValueError)
    if said:
        assert said.split("=")[0] in ("dim", "weight", "steps", "lr", "tolerance")
        return
    found = infer(latent, lambda z: (z - 1).square().sum(dim=1), torch.zeros(2, dim, dtype=torch.float64))
    assert found.z.isfinite().all()
    assert (found.energy <= dim).all()
