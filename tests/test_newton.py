"""The quasi-Newton method: its parts against the plain ones, its operators, and what it is for."""

import dataclasses

import pytest
import torch
from test_latents import relative
from test_operators import mlp
from tolerances import LATENT_CONVEX, LATENT_PLAIN
from torch import Tensor

from vjvcr_fast import native, newton, reference
from vjvcr_fast.latents import SparseLatent

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
