"""Inference of z* against long runs, coordinate descent and one sample at a time; and what it must not change."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerances import (
    COMPILED,
    FLOAT32,
    FLOAT64,
    LATENT_CONVEX,
    LATENT_OPTIMUM,
    LATENT_PLAIN,
    LATENT_ROUTES,
    relative,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vjvcr_fast import native, reference
from vjvcr_fast.latents import (
    ContinuousLatent,
    DiscreteLatent,
    HeadEnergy,
    Latent,
    LatentResult,
    MLPEnergy,
    NonFiniteEnergyError,
    SparseLatent,
)
from vjvcr_fast.models.convnet import ConvDecoder, MLPPredictor
from vjvcr_fast.models.energy import EnergyModel

N, T_X, T_Y, D, DIM = 8, 2, 3, 24, 6
SPARSE = SparseLatent(DIM, 2e-3, 100)
NEWTON = SparseLatent(DIM, 2e-3, 40, method="newton")
CONTINUOUS = ContinuousLatent((DIM,), 100, 1.0)
HOW = {"device": "cpu", "dtype": torch.float64}

Energy = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def seed(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=["operators", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operators of csrc/, and as if they were not built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "MISSING", "not wanted")
    elif native.MISSING is not None:
        pytest.skip(f"the operators are {native.MISSING}")


def make_model(row: str = "vj-vcr", gamma: float = 0.5, **latent: int) -> EnergyModel:
    """A model without encoder, whose inputs are representations. Weights are larger than a new layer's, so that z
    matters."""
    predictor = MLPPredictor(D, T_X, T_Y, 32, **(latent or {"latent_dim": DIM}))
    decoder = None if row == "vj-vcr" else ConvDecoder(1, (4, 5, 6), 16, 2)
    with torch.no_grad():
        for layer in predictor.layers:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(2)
    return EnergyModel(nn.Identity(), predictor, decoder, row, alpha=1, beta=1, gamma=gamma).double()


def make_targets(model: EnergyModel, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """h_x, an h_y that some z predicts well, and y, in float64."""
    h_x = torch.randn(n, T_X, D, dtype=torch.float64)
    z = torch.randn(n, max(model.predictor.latent_dim, model.predictor.heads), dtype=torch.float64)
    with torch.no_grad():
        h_y = model.predictor(h_x, 3 * z)
    return h_x, h_y + 0.05 * torch.randn_like(h_y), torch.rand(n, T_Y, 1, 16, 16, dtype=torch.float64)


def name(latent: Latent) -> str:
    """A test's name: the settings of the latent that are not the default."""
    fields = dataclasses.fields(latent)
    changed = (f.name for f in fields if f.default is not dataclasses.MISSING and getattr(latent, f.name) != f.default)
    return "-".join([type(latent).__name__, *changed])


def is_refused(latent: Any, closed: bool, infer: Callable[[], LatentResult]) -> bool:
    """True if method="newton" cannot serve. Then `infer` must raise an error that says so."""
    if latent.method != "newton" or (closed and native.MISSING is None):
        return False
    with pytest.raises(ValueError, match=r"^method='newton': it needs .*; choose method='fista'$") as error:
        infer()
    assert str(error.value).isprintable()
    return True


def by_autograd(energy: Energy) -> Energy:
    """The same energy without its closed form."""
    return lambda z: energy(z)


def l1(z: Tensor, weight: float) -> Tensor:
    return weight * z.abs().sum(dim=1)


# -- Against the plain loop and known minima ------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["closed form", "autograd"])
@pytest.mark.parametrize("rule", ["backtracking", "fixed"])
@pytest.mark.parametrize("method", ["fista", "ista"])
def test_is_the_plain_loop_for_every_sample(method: str, rule: str, route: str) -> None:
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    latent = SparseLatent(DIM, 2e-3, 40, method=method, step_rule=rule, lr=3.0, tolerance=1e-3)
    energy = model.latent_energy(h_x, h_y)
    found = latent.infer(energy if route == "closed form" else by_autograd(energy), N, **HOW)
    for i in range(N):
        own = by_autograd(make_energy_of_one(model, h_x, h_y, i))
        z, steps = reference.monotone_fista(
            lambda z, own=own: own(z[None])[0],
            torch.zeros(DIM, dtype=torch.float64),
            weight=2e-3,
            step=3.0,
            steps=40,
            backtracking=rule == "backtracking",
            momentum=None if method == "fista" else 0.0,
            tolerance=1e-3,
        )
        assert int(found.steps[i]) == steps
        assert relative(found.z[i], z) < LATENT_PLAIN


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("closed", [True, False])
def test_newton_is_the_plain_method_for_every_sample(closed: bool, nonnegative: bool) -> None:
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    latent = SparseLatent(DIM, 2e-3, 40, method="newton", nonnegative=nonnegative, tolerance=1e-4)
    energy = model.latent_energy(h_x, h_y)
    zeros = torch.zeros(N, DIM, dtype=torch.float64)
    with torch.no_grad():
        curvature = energy.expand(zeros).curvature()
    infer = lambda: latent.infer(energy if closed else by_autograd(energy), N, **HOW)  # noqa: E731
    if is_refused(latent, closed, infer):
        return
    found = infer()
    for i in range(N):
        own = by_autograd(make_energy_of_one(model, h_x, h_y, i))
        z, steps = reference.proximal_newton(
            lambda z, own=own: own(z[None])[0],
            zeros[i],
            weight=2e-3,
            curvature=curvature,
            steps=40,
            tolerance=1e-4,
            low=0.0 if nonnegative else -torch.inf,
        )
        assert int(found.steps[i]) == steps
        assert relative(found.z[i], z) < LATENT_PLAIN


def make_energy_of_one(model: EnergyModel, h_x: Tensor, h_y: Tensor, i: int) -> Energy:
    return model.latent_energy(h_x[i : i + 1], h_y[i : i + 1])


def test_gradient_descent_is_the_plain_loop_without_penalty() -> None:
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    found = ContinuousLatent((DIM,), 30, 2.0, momentum=0.8).infer_from(model, h_x, h_y)
    for i in range(N):
        own = make_energy_of_one(model, h_x, h_y, i)
        start = torch.zeros(DIM, dtype=torch.float64)
        z, _ = reference.monotone_fista(
            lambda z, own=own: own(z[None])[0], start, 0.0, 2.0, 30, momentum=0.8, tolerance=1e-4
        )
        assert relative(found.z[i], z) < LATENT_PLAIN


class Quadratic:
    """The mean of (A z - b)^2 for every row b, and its minimum with an L1 term in a box, by coordinate descent."""

    def __init__(self, rows: int = 30, condition: float = 10.0) -> None:
        q, _ = torch.linalg.qr(torch.randn(rows, DIM, dtype=torch.float64))
        self.a = q * torch.logspace(0, -torch.tensor(condition).log10(), DIM, dtype=torch.float64) @ orthogonal()
        self.b = torch.randn(N, rows, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.a.T - self.b).square().mean(dim=1)

    def minimum(self, weight: float, low: float = -torch.inf, high: float = torch.inf, sweeps: int = 300) -> Tensor:
        z, rows = torch.zeros(N, DIM, dtype=torch.float64), len(self.a)
        gram, right = 2 * self.a.T @ self.a / rows, 2 * self.b @ self.a / rows
        for _ in range(sweeps):
            for j in range(DIM):
                slope = right[:, j] - z @ gram[j] + z[:, j] * gram[j, j]
                z[:, j] = (reference.soft_threshold(slope, weight) / gram[j, j]).clamp(low, high)
        return z


def orthogonal() -> Tensor:
    return torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64))[0]


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("method", ["fista", "ista"])
@pytest.mark.parametrize("lr", [1e-3, 1.0, 1e5])
def test_lasso(lr: float, method: str, nonnegative: bool) -> None:
    energy, weight = Quadratic(condition=5.0), 0.01
    steps = {"fista": 100, "ista": 150}[method]
    latent = SparseLatent(DIM, weight, steps, method=method, nonnegative=nonnegative, lr=lr, tolerance=0)
    found = latent.infer(energy, N, **HOW)
    right = energy.minimum(weight, low=0.0 if nonnegative else -torch.inf)
    assert 0 < int((right == 0).sum()) < right.numel()
    assert relative(found.energy, energy(right) + l1(right, weight)) < LATENT_CONVEX
    assert found.z.sign().equal(right.sign())  # the very same components are zero
    assert not nonnegative or found.z.min() >= 0


@pytest.mark.parametrize("clamp", [None, (0, 1), (-0.3, 0.1), (0.2, 0.5)])
def test_least_squares_in_a_box(clamp: tuple[float, float] | None) -> None:
    energy = Quadratic(condition=5.0)
    found = ContinuousLatent((2, 3), 300, 1.0, clamp=clamp, tolerance=0).infer(energy, N, **HOW)
    right = energy.minimum(0.0, *(clamp or (-torch.inf, torch.inf)))
    assert found.z.shape == (N, 2, 3)
    assert relative(found.energy, energy(right)) < LATENT_CONVEX
    assert clamp is None or (found.z.min() >= clamp[0] and found.z.max() <= clamp[1])


def test_momentum_pays() -> None:
    """An ill-conditioned LASSO: FISTA is far below ISTA after as many evaluations."""
    energy, weight = Quadratic(condition=30.0), 1e-3
    right = energy.minimum(weight, sweeps=3000)
    least = energy(right) + l1(right, weight)
    gap = {
        method: SparseLatent(DIM, weight, 150, method=method, tolerance=0).infer(energy, N, **HOW).energy - least
        for method in ("fista", "ista")
    }
    assert gap["fista"].max() < 0.2 * gap["ista"].max()


@pytest.mark.parametrize(
    ("route", "row"),  # of the rows with a decoder, which cost the most, each on one route
    [("operators", "vj-vcr"), ("torch", "vj-vcr"), ("operators", "vj-vcr-decoder"), ("torch", "generative")],
    indirect=["route"],
)
@pytest.mark.parametrize("latent", [SPARSE, SparseLatent(DIM, 2e-3, nonnegative=True), NEWTON, CONTINUOUS], ids=name)
def test_no_worse_than_a_long_run(latent: Any, row: str) -> None:
    model = make_model(row)
    h_x, h_y, y = make_targets(model)
    if latent is NEWTON and is_refused(latent, row == "vj-vcr", lambda: latent.infer_from(model, h_x, h_y, y)):
        return
    steps = 80 if latent is NEWTON else 1000 if row == "vj-vcr" else 150
    long = type(latent)(**{**vars(latent), "steps": steps, "tolerance": 0.0}).infer_from(model, h_x, h_y, y)
    short = latent.infer_from(model.float(), h_x.float(), h_y.float(), y.float())
    assert short.z.dtype == short.energy.dtype == torch.float32
    assert float(short.energy.double().mean() / long.energy.mean()) < 1 + LATENT_OPTIMUM


# -- The closed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_closed_form_value_and_gradient(dtype: torch.dtype, bound: float) -> None:
    model = make_model().to(dtype)
    h_x, h_y, _ = (t.to(dtype) for t in make_targets(model.double()))
    model = model.to(dtype)
    energy = model.latent_energy(h_x, h_y)
    assert isinstance(energy, MLPEnergy)
    z = torch.randn(N, DIM, dtype=dtype, requires_grad=True)
    right = reference.energy_per_sample(model.predictor(h_x, z), h_y)
    (gradient,) = torch.autograd.grad(right.sum(), z)
    with torch.no_grad():
        value, found = energy.expand(torch.randn(N, DIM, dtype=dtype)).value_and_gradient(z)
    assert relative(energy(z), right) < bound
    assert relative(value, right) < bound
    assert relative(found, gradient) < bound


@pytest.mark.parametrize("latent", [SPARSE, SparseLatent(DIM, 5e-3, method="ista"), CONTINUOUS], ids=name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_closed_form_ends_where_autograd_does(dtype: torch.dtype, latent: Any) -> None:
    model = make_model()
    h_x, h_y, _ = (t.to(dtype) for t in make_targets(model))
    model.to(dtype)
    closed = latent.infer_from(model, h_x, h_y)
    plain = latent.infer(by_autograd(model.latent_energy(h_x, h_y)), N, device="cpu", dtype=dtype)
    assert float(((closed.energy - plain.energy) / plain.energy).abs().max()) < LATENT_ROUTES


def test_closed_form_keeps_its_digits_beside_large_targets() -> None:
    """With |h_y| a thousand times the residual, an expansion about u = 0 would lose all digits of the energy."""
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    with torch.no_grad():
        model.predictor.layers[4].bias += 1e3
    h_y = h_y + 1e3
    right = SPARSE.infer_from(model, h_x, h_y)
    model.float()
    found = SPARSE.infer_from(model, h_x.float(), h_y.float())
    assert relative(found.energy, right.energy) < 1e-3  # the residual itself has lost 1e3 * 6e-8 of 0.05
    assert (found.energy < reference.energy_per_sample(model.predictor(h_x.float(), found.z * 0), h_y.float())).all()


# -- What holds whatever the energy ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exponent=st.floats(-6, 8),
    weight=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    options=st.fixed_dictionaries(
        {
            "method": st.sampled_from(["fista", "ista", "newton"]),
            "nonnegative": st.booleans(),
            "step_rule": st.sampled_from(["backtracking", "fixed"]),
            "tolerance": st.sampled_from([0.0, 1e-4, 0.1]),
        }
    ).filter(lambda options: options["method"] != "newton" or options["step_rule"] == "backtracking"),
    closed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_never_ends_above_the_start(
    seed: int, exponent: float, weight: float, options: dict[str, Any], closed: bool, dtype: torch.dtype
) -> None:
    assume(options["method"] != "newton" or (closed and native.MISSING is None))
    torch.manual_seed(seed)
    model = make_model()
    h_x, h_y, _ = (t.to(dtype) for t in make_targets(model, 5))
    energy = model.to(dtype).latent_energy(h_x, h_y)
    energy = energy if closed else by_autograd(energy)
    z0 = 2 * torch.randn(5, DIM, dtype=dtype)
    start = z0.clamp_min(0) if options["nonnegative"] else z0
    last = energy(start).detach() + l1(start, weight)
    for steps in (1, 3, 20):
        latent = SparseLatent(DIM, weight, steps, lr=10.0**exponent, **options)
        found = latent.infer(energy, 5, device="cpu", dtype=dtype, z0=z0)
        assert found.z.isfinite().all()
        assert not options["nonnegative"] or found.z.min() >= 0
        assert relative(found.energy, energy(found.z) + l1(found.z, weight)) < FLOAT32
        # Longer runs start as shorter ones do; the closed form's true residual is reported, which it rounds against.
        assert (found.energy <= last * (1 + (FLOAT32 if closed and steps > 1 else 0))).all()
        assert (found.steps >= 1).all()
        assert (found.steps <= steps).all()
        last = found.energy


@pytest.mark.parametrize("row", ["vj-vcr", "generative"])
@pytest.mark.parametrize("latent", [SparseLatent(DIM, 2e-3, 40), dataclasses.replace(NEWTON, steps=25)], ids=name)
def test_samples_are_independent(latent: SparseLatent, row: str) -> None:
    model = make_model(row)
    h_x, h_y, y = make_targets(model)
    if is_refused(latent, row == "vj-vcr", lambda: latent.infer_from(model, h_x, h_y, y)):
        return
    whole = latent.infer_from(model, h_x, h_y, y)
    order = torch.randperm(N)
    shuffled = latent.infer_from(model, h_x[order], h_y[order], y[order])
    assert relative(shuffled.z, whole.z[order]) < LATENT_PLAIN
    assert shuffled.steps.equal(whole.steps[order])
    for i in (0, N - 1):
        alone = latent.infer_from(model, *(t[i : i + 1] for t in (h_x, h_y, y)))
        assert relative(alone.z[0], whole.z[i]) < LATENT_PLAIN
        assert alone.steps[0] == whole.steps[i]


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("latent", [SPARSE, NEWTON, CONTINUOUS], ids=name)
def test_frozen_samples_stay(latent: Any, closed: bool) -> None:
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    energy = model.latent_energy(h_x, h_y)
    energy = energy if closed else by_autograd(energy)
    if latent is NEWTON and is_refused(latent, closed, lambda: latent.infer(energy, N, **HOW)):
        return
    few = 17 if latent is NEWTON and closed else 25
    runs = [
        type(latent)(**{**vars(latent), "steps": steps, "tolerance": 1e-3}).infer(energy, N, **HOW)
        for steps in (few, 60 if latent is NEWTON else 200)
    ]
    frozen = runs[0].steps < few
    assert 0 < int(frozen.sum()) < N
    for short, long in zip(runs[0], runs[1], strict=True):
        assert short[frozen].equal(long[frozen])
    assert (runs[1].steps[~frozen] > few).any()


def test_one_evaluation_a_step_and_one_at_the_start() -> None:
    energy, calls = Quadratic(), []

    def counted(z: Tensor) -> Tensor:
        calls.append(z)
        return energy(z)

    SparseLatent(DIM, 0.01, 17).infer(counted, N, **HOW)
    assert len(calls) == 18


def test_a_converged_start_is_kept() -> None:
    """Also, a first step that is far too small must not count as convergence."""
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    cold = SparseLatent(DIM, 2e-3, 400).infer_from(model, h_x, h_y)
    warm = SparseLatent(DIM, 2e-3, 400).infer_from(model, h_x, h_y, z0=cold.z)
    assert (warm.energy <= cold.energy).all()
    assert relative(warm.energy, cold.energy) < LATENT_ROUTES
    assert float(warm.steps.double().mean()) < 0.6 * float(cold.steps.double().mean())
    far = cold.z + 1
    tiny = SparseLatent(DIM, 2e-3, 400, lr=1e-7).infer_from(model, h_x, h_y, z0=far)
    assert float(tiny.energy.mean() / cold.energy.mean()) < 1.1


def test_a_start_at_the_solution_takes_one_step() -> None:
    found = SparseLatent(DIM, 1e3).infer(Quadratic(), N, **HOW)  # the penalty holds all of z at 0
    assert found.steps.eq(1).all()
    assert found.zeros.eq(1).all()
    assert found.z.count_nonzero() == 0


def test_z0_is_projected_and_not_written_to() -> None:
    energy, z0 = Quadratic(), torch.full((N, DIM), 5.0, dtype=torch.float64, requires_grad=True)
    found = ContinuousLatent((DIM,), 1, 1e-12, clamp=(0, 1), step_rule="fixed").infer(energy, N, **HOW, z0=z0)
    assert relative(found.z, torch.ones_like(z0)) < 1e-9
    assert z0.detach().eq(5).all()
    assert not found.z.requires_grad


def test_zeros_are_counted() -> None:
    found = SparseLatent(DIM, 0.02, 300).infer(Quadratic(), N, **HOW)
    assert found.zeros.equal((found.z == 0).double().mean(dim=1))
    assert 0 < float(found.zeros.mean()) < 1


# -- Discrete -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder", "generative-vcr"])
def test_discrete_takes_the_least_of_all_heads(row: str) -> None:
    model = make_model(row, heads=5).eval()
    h_x, h_y, y = make_targets(model)
    energy = model.latent_energy(h_x, h_y, y)
    assert isinstance(energy, HeadEnergy)
    each = torch.stack([energy(row.expand(N, -1)) for row in torch.eye(5).double()], dim=1)
    assert each.argmin(dim=1).unique().numel() > 1
    for found in (
        DiscreteLatent(5).infer_from(model, h_x, h_y, y),
        DiscreteLatent(5).infer(by_autograd(energy), N, **HOW, z0=torch.ones(N, 5)),
    ):
        assert found.z.argmax(dim=1).equal(each.argmin(dim=1))
        assert found.z.sum(dim=1).eq(1).all()
        assert relative(found.energy, each.amin(dim=1)) < FLOAT64
        assert found.zeros.eq(0.8).all()
        assert found.steps.dtype == torch.int64


def test_the_first_of_equal_heads_wins() -> None:
    energies = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0])
    found = DiscreteLatent(5).infer(lambda z: z @ energies, 4, device="cpu", dtype=torch.float32)
    assert found.z.argmax(dim=1).tolist() == [1, 1, 1, 1]


def test_discrete_non_finite() -> None:
    def energy(z: Tensor) -> Tensor:
        return z @ torch.tensor([torch.nan, 2.0, torch.inf]) if z[0, 1] == 0 else z[:, 1] * 2

    with pytest.raises(NonFiniteEnergyError, match=r"energy of z = 0, 2 of 3 is not finite for 4 of 4 samples"):
        DiscreteLatent(3).infer(energy, 4, device="cpu", dtype=torch.float32)
    found = DiscreteLatent(3, check=False).infer(energy, 4, device="cpu", dtype=torch.float32)
    assert found.z.argmax(dim=1).tolist() == [1, 1, 1, 1]


# -- What inference must not do -------------------------------------------------------------------------------------

CONTEXTS = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder", "generative"])
@pytest.mark.parametrize("kind", ["sparse", "continuous", "discrete"])
def test_leaves_the_model_as_it_was(kind: str, row: str, context: str) -> None:
    latents = SparseLatent(DIM, 2e-3, 5), ContinuousLatent((DIM,), 5, 1.0), DiscreteLatent(3)
    latent: Latent = dict(zip(("sparse", "continuous", "discrete"), latents, strict=True))[kind]
    model = make_model(row, **({"heads": 3} if kind == "discrete" else {})).float()
    h_x, h_y, y = (t.float() for t in make_targets(model.double()))
    model.float().train()
    first = next(model.predictor.parameters()).requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = None if i % 2 else torch.ones_like(parameter)
    if model.decoder is not None:
        model.decoder.temporal.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right = latent.infer_from(model, h_x, h_y, y)
    with CONTEXTS[context]():
        found = latent.infer_from(model, h_x.clone().requires_grad_(context == "plain"), h_y, y)
    for a, b in zip(found, right, strict=True):
        assert a.equal(b)
        assert not a.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert not first.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not first)
    for i, parameter in enumerate(model.parameters()):
        assert (parameter.grad is None) if i % 2 else parameter.grad.eq(1).all()


def test_modes_are_restored_after_an_error() -> None:
    model = make_model("vj-vcr-decoder").train()
    h_x, h_y, _ = make_targets(model)
    with pytest.raises(ValueError, match="y is missing"):
        SPARSE.infer_from(model, h_x, h_y)
    assert all(module.training for module in model.modules())


class NoSynchronisation(TorchDispatchMode):
    """Raises if an operation would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), func
        return func(*args, **(kwargs or {}))


class NoTransfers(TorchDispatchMode):
    """Raises if a tensor is made on a CPU, to be copied to the device later."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, Tensor) or out.is_meta, func
        return out


@pytest.mark.parametrize(
    "latent",
    [DiscreteLatent(DIM, check=False), SparseLatent(DIM, 2e-3, 3, check=False), ContinuousLatent((DIM,), 3, 1.0)],
    ids=name,
)
def test_nothing_is_copied_to_the_device(latent: Any) -> None:
    """On the meta device, which has no numbers."""
    latent = dataclasses.replace(latent, check=False)
    with NoTransfers():
        found = latent.infer(lambda z: z.square().sum(dim=1), 4, device="meta", dtype=torch.float32)
    assert found.z.shape == (4, DIM)


@pytest.mark.parametrize("row", ["vj-vcr", "generative"])
@pytest.mark.parametrize(
    "latent",
    [
        SparseLatent(DIM, 2e-3, 10, check=False),
        SparseLatent(DIM, 2e-3, 10, nonnegative=True, method="ista", step_rule="fixed", check=False),
        SparseLatent(DIM, 2e-3, 10, method="newton", check=False),
        ContinuousLatent((DIM,), 10, 1.0, clamp=(0, 1), check=False),
        DiscreteLatent(DIM, check=False),
    ],
    ids=name,
)
def test_nothing_waits_for_the_device(latent: Any, row: str) -> None:
    model = make_model(row)
    h_x, h_y, y = make_targets(model)
    sparse = isinstance(latent, SparseLatent)
    if sparse and is_refused(latent, row == "vj-vcr", lambda: latent.infer_from(model, h_x, h_y, y)):
        return
    with NoSynchronisation():
        latent.infer_from(model, h_x, h_y, y)
    if row == "generative":
        return
    with NoSynchronisation(), pytest.raises(AssertionError, match="_local_scalar_dense"):  # it would be seen
        type(latent)(**{**vars(latent), "check": True}).infer_from(model, h_x, h_y, y)


# -- Energies that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["vj-vcr", "generative"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_at_the_start(row: str, bad: float) -> None:
    model = make_model(row)
    h_x, h_y, y = make_targets(model)
    h_x[3] = bad
    message = r"not finite at z0 for 1 of 8 samples, before the first step \(lr=0.5, step_rule='backtracking'\)"
    with pytest.raises(NonFiniteEnergyError, match=message):
        SparseLatent(DIM, 2e-3, 5, lr=0.5).infer_from(model, h_x, h_y, y)
    found = SparseLatent(DIM, 2e-3, 5, lr=0.5, check=False).infer_from(model, h_x, h_y, y)
    assert found.z.isfinite().all()
    assert found.z[3].count_nonzero() == 0
    h_x[3] = 0
    others = torch.arange(N) != 3
    right = SparseLatent(DIM, 2e-3, 5, lr=0.5).infer_from(model, h_x, h_y, y)
    assert relative(found.z[others], right.z[others]) < FLOAT64


def hole(z: Tensor) -> Tensor:
    """(z - 1)^2, NaN beyond 10."""
    return torch.where(z.abs() > 10, torch.nan, (z - 1).square()).sum(dim=1)


def test_not_finite_after_a_step() -> None:
    how = {"device": "cpu", "dtype": torch.float64}
    with pytest.raises(NonFiniteEnergyError, match=r"3 of 3 samples, after steps .* 100 \(lr=100, step_rule='fixed'\)"):
        SparseLatent(2, 0.0, 5, step_rule="fixed", lr=100.0).infer(hole, 3, **how)
    with pytest.raises(NonFiniteEnergyError, match=r"down to a size of 1.25e\+07 \(lr=1e\+08, step_rule='backtrack"):
        SparseLatent(2, 0.0, 3, lr=1e8).infer(hole, 3, **how)
    found = SparseLatent(2, 0.0, 60, lr=1e8).infer(hole, 3, **how)  # backtracking finds back
    assert relative(found.z, torch.ones(3, 2)) < FLOAT32
    kept = SparseLatent(2, 0.0, 5, step_rule="fixed", lr=100.0, check=False).infer(hole, 3, **how)
    assert kept.z.count_nonzero() == 0
    assert kept.energy.eq(2).all()
    narrow = lambda z: torch.where(z > 0.5, torch.nan, (z - 1).square()).sum(dim=1)  # noqa: E731
    last = SparseLatent(1, 0.0, 3, lr=0.4, check=False).infer(narrow, 1, **how)
    assert 0 < last.z < 0.5
    assert last.energy == (last.z - 1).square()


# -- Arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteLatent(1), "k=1: at least 2"),
        (lambda: SparseLatent(0, 0.1), "dim=0"),
        (lambda: SparseLatent(2, -0.1), "weight=-0.1"),
        (lambda: SparseLatent(2, float("nan")), "weight=nan"),
        (lambda: SparseLatent(2, 0.1, 0), "steps=0"),
        (lambda: SparseLatent(2, 0.1, method="adam"), "method='adam': choose fista, ista, newton"),
        (
            lambda: SparseLatent(2, 0.1, method="newton", step_rule="fixed"),
            "step_rule='fixed': method='newton' has no step",
        ),
        (lambda: SparseLatent(2, 0.1, method="newton", compile=True), "compile=True: method='newton' is not compiled"),
        (
            lambda: SparseLatent(2, 0.1, method="newton").infer(hole, 1, **HOW),
            "method='newton': it needs an energy in closed form, .*; choose method='fista'",
        ),
        (lambda: SparseLatent(2, 0.1, step_rule="none"), "step_rule='none': choose 'backtracking' or 'fixed'"),
        (lambda: SparseLatent(2, 0.1, lr=0.0), "lr=0.0"),
        (lambda: SparseLatent(2, 0.1, lr=float("inf")), "lr=inf"),
        (lambda: SparseLatent(2, 0.1, tolerance=-1.0), "tolerance=-1.0"),
        (lambda: ContinuousLatent((), 5, 1.0), r"shape=\(\)"),
        (lambda: ContinuousLatent((3, 0), 5, 1.0), r"shape=\(3, 0\)"),
        (lambda: ContinuousLatent([3], 5, 1.0, momentum=1.0), "momentum=1.0"),
        (lambda: ContinuousLatent([3], 5, 1.0, clamp=(1, 0)), r"clamp=\(1, 0\): needs low < high"),
        (lambda: SparseLatent(2, 0.1).infer(hole, 0, **HOW), "n=0"),
        (lambda: SparseLatent(2, 0.1).infer(hole, 1, device="cpu", dtype=torch.float16), "dtype=torch.float16"),
        (lambda: SparseLatent(2, 0.1).infer(hole, 1, **HOW, z0=torch.zeros(2, 1)), r"shape \(2, 1\): \(1, 2\) is"),
        (lambda: SparseLatent(2, 0.1).infer(torch.sum, 1, **HOW), r"energy\(z\) has shape \(\): \(1,\), one per"),
        (lambda: DiscreteLatent(2).infer(lambda z: z, 1, **HOW), r"energy\(z\) has shape \(1, 2\)"),
        (lambda: DiscreteLatent(2).infer(hole, 1, **HOW, z0=torch.zeros(2, 1)), r"z0 has shape \(2, 1\)"),
    ],
)
def test_wrong_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_latent_that_the_predictor_does_not_have() -> None:
    model = make_model()
    h_x, h_y, _ = make_targets(model)
    with pytest.raises(ValueError, match=r"z has shape \(8, 7\): .* need \(8, 6\)"):
        SparseLatent(7, 0.1).infer_from(model, h_x, h_y)
    with pytest.raises(ValueError, match="k=4: the predictor has 3 heads"):
        DiscreteLatent(4).infer_from(make_model(heads=3), h_x, h_y)
    with pytest.raises(ValueError, match="no latent"):
        SPARSE.infer_from(make_model(latent_dim=0), h_x, h_y)
    with pytest.raises(ValueError, match="h_y is missing"):
        SPARSE.infer_from(model, h_x, None)


# -- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("row", ["vj-vcr", "vj-vcr-decoder"])
@pytest.mark.parametrize(
    "latent",
    [SparseLatent(DIM, 2e-3, 30), ContinuousLatent((DIM,), 30, 1.0, clamp=(0, 1), step_rule="fixed")],
    ids=["sparse", "continuous"],
)
def test_compiled(latent: Any, row: str) -> None:
    """There is one graph for all batches. With fullgraph nothing in it can wait for the host. Where one operator makes
    all steps, nothing is compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(row)
    for _ in range(3):
        h_x, h_y, y = make_targets(model)
        plain: LatentResult = latent.infer_from(model, h_x, h_y, y)
        found = type(latent)(**{**vars(latent), "compile": True}).infer_from(model, h_x, h_y, y)
        assert relative(found.energy, plain.energy) < COMPILED
    fused = row == "vj-vcr" and native.MISSING is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (0 if fused else 1)
