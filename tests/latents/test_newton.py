"""The quasi-Newton method: its parts against the plain ones, its operators, and what it is for."""

import dataclasses

import pytest
import torch
from test_latents import relative
from test_operators import mlp
from tolerances import LATENT_CONVEX, LATENT_PLAIN, LATENT_ROUTES
from torch import Tensor

from vjvcr_fast import native, reference
from vjvcr_fast.latents import LatentResult, MLPEnergy, NonFiniteEnergyError, SparseLatent, newton

N, M = 7, 5
needs_operators = pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")


def models(n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """z (n, m) with zeros, gradients and positive definite B (n, m, m)."""
    generator = torch.Generator().manual_seed(0)
    z, gradient, root = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((n, m), (n, m), (n, m, m)))
    return z.where(z.abs() > 0.5, 0), gradient, root @ root.mT + torch.eye(m, dtype=dtype)


def state_of(n: int = N, m: int = M, dtype: torch.dtype = torch.float64) -> newton.State:
    z, gradient, B = models(n, m, dtype)
    ones = torch.ones(n, 1, dtype=dtype)
    steps = (torch.arange(n) % 3).unsqueeze(1)  # some at their first
    active = (torch.arange(n) % 4 != 3).unsqueeze(1)
    return newton.State(z, 5 * ones, gradient, B, 2 * ones, active, ones < 0, steps)


def met(state: newton.State) -> list[Tensor]:
    """Trials, their energies, some of them higher, one not finite, and gradients, some with negative curvature."""
    generator = torch.Generator().manual_seed(1)
    v = newton.trial(state.z, state.gradient, state.damping[:, :, None] * state.B, 0.3, -torch.inf)
    value = 5 + torch.randn(len(v), 1, generator=generator, dtype=v.dtype)
    value[1] = torch.nan
    bend = torch.linspace(-1, 3, len(v), dtype=v.dtype)[:, None]
    return [v, value, state.gradient + bend * (v - state.z)]


@pytest.mark.parametrize("low", [-torch.inf, 0.0])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_trial_is_the_minimum_of_the_model(weight: float, low: float) -> None:
    """To the precision of its last sweep; the plain one's, exactly."""
    z, gradient, B = models()
    z = z.clamp(min=low)
    v = newton.trial(z, gradient, B, weight, low)
    for i in range(N):
        assert relative(v[i], reference.model_minimum(z[i], gradient[i], B[i], weight, low)) < LATENT_PLAIN

        def model(x: Tensor, i: int = i) -> Tensor:
            return gradient[i] @ (x - z[i]) + (x - z[i]) @ B[i] @ (x - z[i]) / 2 + weight * x.abs().sum()

        for _ in range(20):
            other = (v[i] + 0.1 * torch.randn(M, dtype=z.dtype)).clamp(min=low)
            assert model(v[i]) <= model(other) + 1e-5


@needs_operators
@pytest.mark.parametrize(("n", "m"), [(N, M), (1, 1), (70, 20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operators_are_the_torch_operations(dtype: torch.dtype, n: int, m: int) -> None:
    bound = LATENT_PLAIN if dtype == torch.float64 else 1e-4
    state = state_of(n, m, dtype)
    v, (z, _, gradient, B, damping, active, *_) = state.z.clone(), state
    torch.ops.vjvcr.newton_trial(v, gradient, B, damping, active, 0.3, -torch.inf, 20, 1e-3)
    right = newton.trial(z, gradient, damping[:, :, None] * B, 0.3, -torch.inf)
    assert relative(v, right.where(active, z)) < bound

    plain = newton.State(*(of.clone() for of in state))
    if n > 1:
        trial = met(state)
        torch.ops.vjvcr.newton_update(*state, *trial, 0.3, 1e-3, reference.DAMPED, *reference.SCALES)
        newton.update(plain, *trial, 0.3, 1e-3)
        for name, ours, theirs in zip(newton.State._fields, state, plain, strict=True):
            assert relative(ours.double(), theirs.double()) < bound, name
        assert 0 < state.active.sum() < n
        assert torch.linalg.eigvalsh(state.B.double()).min() > 0


@needs_operators
@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        (0, lambda x: x[0], r"z must be \(N, m\)"),
        (1, lambda x: x[:-1], "must have z's shape"),
        (2, lambda x: x[:, 0], r"B must be \(N, m, m\) = \(7, 5, 5\)"),
        (3, lambda x: x.squeeze(1), r"must be \(N, 1\), N = 7"),
        (4, lambda x: x.double(), "bool"),
        (1, lambda x: x.float(), "dtype and device"),
    ],
)
def test_what_a_trial_cannot_take_is_named(at: int, change: object, words: str) -> None:
    state = state_of()
    given = [state.z, state.gradient, state.B, state.damping, state.active]
    given[at] = change(given[at])  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.vjvcr.newton_trial(*given, 0.3, 0.0, 20, 1e-3)


@needs_operators
def test_opcheck() -> None:
    state = state_of()
    trial = (state.z, state.gradient, state.B, state.damping, state.active, 0.3, 0.0, 20, 1e-3)
    torch.library.opcheck(torch.ops.vjvcr.newton_trial.default, trial)
    torch.library.opcheck(torch.ops.vjvcr.newton_update.default, (*state, *met(state), 0.3, 1e-3, 0.2, 0.01, 100.0))


def infer(method: str, energy: MLPEnergy, dtype: torch.dtype = torch.float64, **options: object) -> LatentResult:
    latent = SparseLatent(energy.w1z.shape[1], 1e-2, **{"steps": 30, "method": method, **options})  # type: ignore[arg-type]
    return latent.infer(energy.to(dtype), len(energy.p), device="cpu", dtype=dtype)


def infer_in_torch(energy: MLPEnergy, **options: object) -> LatentResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "MISSING", "not wanted")
        return infer("newton", energy, **options)


@needs_operators
@pytest.mark.parametrize("options", [{}, {"nonnegative": True}, {"tolerance": 0.0}, {"steps": 1}], ids=str)
@pytest.mark.parametrize(
    "size", [{}, {"n": 1}, {"hidden": 1}, {"hidden": 17, "width": 1, "latent": 1}, {"n": 70}], ids=str
)
def test_newton_mlp_is_the_loop_in_torch(size: dict[str, int], options: dict[str, object]) -> None:
    found, right = infer("newton", mlp(**size), **options), infer_in_torch(mlp(**size), **options)
    assert found.steps.equal(right.steps)
    assert (found.z == 0).equal(right.z == 0)
    assert relative(found.z, right.z) < LATENT_PLAIN
    assert relative(found.energy, right.energy) < LATENT_PLAIN


@needs_operators
def test_samples_leave_the_batch_as_they_are() -> None:
    """Samples that froze after different steps, in a batch that shrinks, and each alone; in float32 by their energy."""
    energy = mlp(n=64, seed=1)
    together = infer("newton", energy, steps=200)
    assert len(together.steps.unique()) > 8
    for i in (0, 17, 63):
        one = dataclasses.replace(energy, p=energy.p[i : i + 1], target=energy.target[i : i + 1])
        alone = infer("newton", one, steps=200)
        assert relative(alone.z[0], together.z[i]) < LATENT_PLAIN
        assert alone.steps[0] == together.steps[i]
    short = infer("newton", energy, torch.float32, steps=200)
    assert relative(short.energy.mean(), together.energy.mean()) < LATENT_ROUTES


@needs_operators
def test_what_newton_mlp_cannot_take_is_named() -> None:
    z0, energy = torch.zeros(9, 5, dtype=torch.float64), mlp()
    made = energy.expand(z0)
    tensors = [z0, energy.p, energy.w1z, energy.w2, energy.b2, made.G, made.u0, made.r, made.start]
    numbers = (made.scale, 1e-2, -torch.inf, 1e-3, 7, *newton.CONSTANTS)
    torch.library.opcheck(torch.ops.vjvcr.newton_mlp.default, (*tensors, made.curvature(), *numbers))
    with pytest.raises(RuntimeError, match=r"B must be \(m, m\), m = 5"):
        torch.ops.vjvcr.newton_mlp(*tensors, made.curvature()[:4], *numbers)
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.vjvcr.newton_mlp(*tensors, made.curvature().float(), *numbers)


@needs_operators
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_lost(value: float) -> None:
    energy = mlp()
    energy.target[4, 2] = value
    with pytest.raises(NonFiniteEnergyError, match="1 of 9 samples, before the first step"):
        infer("newton", energy)
    quiet, right = infer("newton", energy, check=False), infer("newton", mlp())
    assert quiet.z[4].count_nonzero() == 0
    others = torch.arange(9) != 4
    assert relative(quiet.z[others], right.z[others]) < LATENT_PLAIN


@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e3])
def test_a_first_model_that_is_far_off_does_not_end_it(lr: float) -> None:
    """Of an unknown curvature the first trial may move hardly, which is no convergence."""
    how = {"device": "cpu", "dtype": torch.float64}
    for operators in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not operators:
                patch.setattr(native, "MISSING", "not wanted")
            latent = SparseLatent(3, 1e-3, 60, method="newton", lr=lr, tolerance=1e-3)
            found = latent.infer(lambda z: 1 + (z - 1).square().sum(dim=1) / 2, 4, **how)
        assert (found.energy < 1.01).all()


def test_a_lasso_takes_one_step() -> None:
    """Where the curvature is known and constant the model is the energy."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, M, generator=generator, dtype=torch.float64)
    target = torch.randn(12, generator=generator, dtype=torch.float64)
    smooth = lambda z: (rows @ z - target).square().sum()  # noqa: E731
    zero = torch.zeros(M, dtype=torch.float64)
    z, _ = reference.proximal_newton(smooth, zero, 0.5, 2 * rows.T @ rows, steps=40)
    quick, few = reference.proximal_newton(smooth, zero, 0.5, 2 * rows.T @ rows, steps=40, tolerance=1e-3)
    exact = reference.fista(
        lambda z: (z @ rows.T - target).square().sum(dim=1),
        zero[None],
        0.5,
        1 / (2 * torch.linalg.matrix_norm(rows, 2).item() ** 2),
        5000,
    )[0]
    energy = lambda z: float(smooth(z) + 0.5 * z.abs().sum())  # noqa: E731
    assert energy(z) <= energy(exact) * (1 + LATENT_CONVEX)
    assert few <= 3
    assert energy(quick) <= energy(exact) * (1 + 1e-3)


def test_fewer_evaluations_than_fista_where_units_seldom_switch() -> None:
    """An MLP most of whose units are active, and a target that it reaches: four trials against sixteen."""
    generator = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(40, width, generator=generator, dtype=torch.float64) for width in (5, 40))
    energy = mlp(n=40, hidden=32, width=40)
    energy = dataclasses.replace(energy, p=3 + energy.p, b2=4 + energy.b2)
    reached = energy.activations(z)[1] @ energy.w3.mT + energy.b3
    energy = dataclasses.replace(energy, target=reached + 0.1 * noise)
    how = {"device": "cpu", "dtype": torch.float64}
    found = SparseLatent(5, 1e-3, 4, method="newton").infer(energy, 40, **how)
    fista = SparseLatent(5, 1e-3, 16).infer(energy, 40, **how)
    assert found.energy.mean() < fista.energy.mean()


def test_no_curvature_at_all() -> None:
    """Of units that are never active: the energy is flat, z stays."""
    energy = mlp()
    energy = dataclasses.replace(energy, w2=0 * energy.w2)
    found = SparseLatent(5, 1e-2, 10, method="newton").infer(energy, 9, device="cpu", dtype=torch.float64)
    assert found.z.count_nonzero() == 0
    assert found.steps.eq(1).all()
