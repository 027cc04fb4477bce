"""The quasi-Newton method: its operator against `reference.proximal_newton`, where it serves, and what it is for."""

import dataclasses
from typing import Any

import pytest
import torch
import ways
from test_latents import relative
from test_operators import mlp
from tolerances import LATENT_CONVEX, LATENT_PLAIN, LATENT_ROUTES
from torch import Tensor

from vjvcr_fast import native, reference
from vjvcr_fast.latents import LatentResult, MLPEnergy, NonFiniteEnergyError, SparseLatent, descent
from vjvcr_fast.reference import DAMPED, SCALES, SETTLED, SWEEPS

N, M = 7, 5
needs_operators = pytest.mark.skipif(native.MISSING is not None, reason=f"the operators are {native.MISSING}")


@pytest.mark.parametrize("low", [-torch.inf, 0.0])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_trial_is_the_minimum_of_the_model(weight: float, low: float) -> None:
    """To the precision of its last sweep."""
    generator = torch.Generator().manual_seed(0)
    z, gradient, root = (torch.randn(*s, generator=generator).double() for s in ((N, M), (N, M), (N, M, M)))
    z, B = z.where(z.abs() > 0.5, 0).clamp(min=low), root @ root.mT + torch.eye(M)
    for i in range(N):
        v = reference.model_minimum(z[i], gradient[i], B[i], weight, low)

        def model(x: Tensor, i: int = i) -> Tensor:
            return gradient[i] @ (x - z[i]) + (x - z[i]) @ B[i] @ (x - z[i]) / 2 + weight * x.abs().sum()

        assert v.min() >= low
        for _ in range(20):
            other = (v + 0.1 * torch.randn(M, generator=generator)).clamp(min=low)
            assert model(v) <= model(other) + 1e-5


def infer(energy: MLPEnergy, dtype: torch.dtype = torch.float64, **options: Any) -> LatentResult:
    latent = SparseLatent(energy.w1z.shape[1], 1e-2, **{"steps": 30, "method": "newton", **options})
    return latent.infer(energy.to(dtype), len(energy.p), device="cpu", dtype=dtype)


def of_sample(energy: MLPEnergy, i: int) -> MLPEnergy:
    return dataclasses.replace(energy, p=energy.p[i : i + 1], target=energy.target[i : i + 1])


def plain(energy: MLPEnergy, i: int, curvature: Tensor, **options: Any) -> tuple[Tensor, int]:
    """z and the number of steps of sample i, by the specification."""
    own, zero = of_sample(energy, i), torch.zeros(energy.w1z.shape[1], dtype=torch.float64)
    rules = {"steps": 30, "tolerance": 1e-4, "weight": 1e-2, **options}
    return reference.proximal_newton(lambda z: own(z[None])[0], zero, curvature=curvature, **rules)


@needs_operators
@pytest.mark.parametrize("options", [{}, {"nonnegative": True}, {"tolerance": 0.0}, {"steps": 1}], ids=str)
@pytest.mark.parametrize(
    "size",
    [{}, {"n": 1}, {"hidden": 1}, {"hidden": 17, "width": 1, "latent": 1}, {"n": 70}, {"n": 3, "latent": 20}],
    ids=str,
)
def test_it_is_the_specification_of_every_sample(
    size: dict[str, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each instruction set of this CPU."""
    energy = mlp(**size)
    found = []
    for way in ways.HERE:
        ways.take(way, monkeypatch)
        found.append(infer(energy, **options))
    start = torch.zeros(len(energy.p), energy.w1z.shape[1], dtype=torch.float64)
    curvature = energy.expand(start).curvature()
    low = 0.0 if "nonnegative" in options else -torch.inf
    options = {name: value for name, value in options.items() if name != "nonnegative"}
    for i in range(0, len(energy.p), 1 + len(energy.p) // 10):
        z, steps = plain(energy, i, curvature, low=low, **options)
        for one in found:
            assert one.steps[i] == steps
            assert (one.z[i] == 0).equal(z == 0)
            assert relative(one.z[i], z) < LATENT_PLAIN
    for one in found:
        right = energy.to(torch.float64)(one.z) + 1e-2 * one.z.abs().sum(dim=1)
        assert relative(one.energy, right) < LATENT_PLAIN


@needs_operators
def test_samples_leave_the_batch_as_they_are() -> None:
    """Samples that froze after different steps, in a batch that shrinks, and each alone; in float32 by their energy."""
    energy = mlp(n=64, seed=1)
    together = infer(energy, steps=200)
    assert len(together.steps.unique()) > 8
    for i in (0, 17, 63):
        alone = infer(of_sample(energy, i), steps=200)
        assert relative(alone.z[0], together.z[i]) < LATENT_PLAIN
        assert alone.steps[0] == together.steps[i]
    short = infer(energy, torch.float32, steps=200)
    assert relative(short.energy.mean(), together.energy.mean()) < LATENT_ROUTES


def call(energy: MLPEnergy, scale: float = 1.0, steps: int = 7) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Arguments of newton_mlp, with a first curvature that is off by a factor `scale`; that curvature."""
    z0 = torch.zeros(len(energy.p), energy.w1z.shape[1], dtype=torch.float64)
    made = energy.expand(z0)
    curvature = scale * made.curvature()
    rules = {"scale": made.scale, "weight": 1e-2, "low": -torch.inf, "tolerance": 1e-4, "steps": steps}
    constants = {"sweeps": SWEEPS, "settled": SETTLED, "damped": DAMPED, "least": SCALES[0], "most": SCALES[1]}
    return [*made.operands(z0), reference.with_ridge(curvature)], rules | constants, curvature


@needs_operators
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_first_model_that_is_far_off_does_not_end_it(scale: float) -> None:
    """With a wrong curvature the first trial may hardly move, which is no convergence."""
    energy = mlp(n=N)
    right = infer(energy, steps=200, tolerance=0.0)
    tensors, numbers, curvature = call(energy, scale, steps=60)
    z, value, step, steps, lost = torch.ops.vjvcr.newton_mlp(*tensors, **numbers)
    assert value.mean() < right.energy.mean() * 1.01
    assert (step <= 1).all()
    assert not lost.any()
    for i in range(N):
        expected, taken = plain(energy, i, curvature, steps=60)
        assert steps[i] == taken
        assert relative(z[i], expected) < LATENT_PLAIN


@needs_operators
def test_what_newton_mlp_cannot_take_is_named() -> None:
    (*tensors, B), numbers, _ = call(mlp())
    torch.library.opcheck(torch.ops.vjvcr.newton_mlp.default, (*tensors, B), numbers)
    for wrong, words in ((B[:4], r"B must be \(m, m\), m = 5"), (B.float(), "dtype"), (B.mT, "contiguous")):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.vjvcr.newton_mlp(*tensors, wrong, **numbers)


@needs_operators
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_lost(value: float) -> None:
    energy = mlp()
    energy.target[4, 2] = value
    with pytest.raises(NonFiniteEnergyError, match="1 of 9 samples, before the first step"):
        infer(energy)
    energy.target[4, 2], energy.w3[:] = 0, 1e200  # finite at z0 alone
    with pytest.raises(NonFiniteEnergyError, match=r"\(method='newton'\): look at weights and inputs"):
        infer(energy)
    energy = mlp()
    energy.target[4, 2] = value
    quiet, right = infer(energy, check=False), infer(mlp())
    assert quiet.z[4].count_nonzero() == 0
    others = torch.arange(9) != 4
    assert relative(quiet.z[others], right.z[others]) < LATENT_PLAIN


def test_where_it_does_not_serve_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"^method='newton': it needs an energy in closed form, .*choose method='fista'$"
    ):
        SparseLatent(M, 1e-2, method="newton").infer(mlp().__call__, 9, device="cpu", dtype=torch.float64)
    monkeypatch.setattr(native, "MISSING", "not built: no compiler")
    with pytest.raises(
        ValueError, match=r"the compiled operators, which are not built: no compiler; choose method='fista'$"
    ):
        infer(mlp())
    assert descent.newton_refusal(True, torch.device("cuda", 1)) == "it runs on a CPU only, not on cuda"


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


@needs_operators
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


@needs_operators
def test_no_curvature_at_all() -> None:
    """With units that are never active the energy is flat, and z stays."""
    energy = mlp()
    energy = dataclasses.replace(energy, w2=0 * energy.w2)
    found = SparseLatent(5, 1e-2, 10, method="newton").infer(energy, 9, device="cpu", dtype=torch.float64)
    assert found.z.count_nonzero() == 0
    assert found.steps.eq(1).all()
