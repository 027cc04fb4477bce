"""Inference of the latent, equation (6): z* = argmin_z E(x, y, z), one independent problem per sample.

`DiscreteLatent` tries every value, `SparseLatent` runs FISTA (or ISTA), `ContinuousLatent` gradient descent with
momentum. Each has `infer`, for any energy z (N, ...) -> (N,), and `infer_from`, which takes the energy from a model.

The last two share one loop, `reference.monotone_fista` for all samples at once: per sample a point z, a step size s and
a momentum b. A step costs one forward and one backward pass, both at the trial point v; the start costs one of each.

    x = prox(z - s grad E(z)),   v = x + b (x - previous x), with 0 where v has not the sign of x
    E(v) <= E(z):  z becomes v, b grows;   else:  z stays, b restarts from 0

so that the energy, L1 term included, never rises and v is as sparse as x. Backtracking holds s below the inverse of the
curvature that the trial met, <grad E(v) - grad E(z), v - z> / |v - z|^2. For the next step s is halved where it is
above that, or where a trial without momentum failed; else it grows, fourfold until a trial fails or comes near the
bound, by 1% from then on: enough to leave a kink behind, too little to disturb the acceleration. A sample whose
proximal step |x - z| is at most `tolerance` of |x| or |z|, once s has found its scale, is frozen: later steps leave it
as it is, to the bit.

Nothing in the loop waits for the device; the one look at a flag, for energies that are not finite, comes at the end.

`SparseLatent(method="newton")` has another loop, vjvcr_fast/newton.py: for an MLP predictor on a CPU, of which a
trained one takes a small part of the evaluations.

Where the operators of csrc/ are built, the loop for an MLP predictor is one of them, `fista_mlp`, in which samples that
are frozen cost nothing, and so is the choice among an MLP predictor's heads; else both run in torch operations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast import native, newton
from vjvcr_fast.analytic import compute_dtype, full_precision
from vjvcr_fast.reference import GROWTH, GROWTH_AT_FIRST, SHRINKAGE, soft_threshold

LatentEnergy: TypeAlias = Callable[[Tensor], Tensor]
Method = Literal["fista", "ista", "newton"]
StepRule = Literal["backtracking", "fixed"]


class LatentResult(NamedTuple):
    """What inference found, for each of N samples.

    z: (N, ...). energy: (N,), what was minimised, the L1 term included. steps: (N,), int64, until the sample was
    frozen. zeros: (N,), the fraction of z's components that are exactly 0.
    """

    z: Tensor
    energy: Tensor
    steps: Tensor
    zeros: Tensor


class NonFiniteEnergyError(RuntimeError):
    """The energy or its gradient is NaN or infinite where inference started or ended; the message has the step size."""


class LatentModel(Protocol):
    """What `infer_from` asks of a model; `vjvcr_fast.models.energy.EnergyModel` has it."""

    def modules(self) -> Iterator[nn.Module]: ...

    def latent_energy(self, h_x: Tensor, h_y: Tensor | None, y: Tensor | None = None) -> LatentEnergy: ...


# -- Energies of which more is known than their value ---------------------------------------------------------------


@dataclass(frozen=True)
class MLPEnergy:
    """The prediction term through an MLP: |W3 u + b3 - h_y|^2 / M, with u = relu(W2 a + b2), a = relu(W1z z + P).

    p: (N, H), W1h h_x + b1, which does not depend on z. w1z: (H, m). w2, b2: (H, H), (H,). w3, b3: (M, H), (M,).
    target: (N, M), h_y with its frames side by side, M = T_y d.

    A call computes the true residual. Inference takes `expand` instead, whose steps touch nothing of size M.
    """

    p: Tensor
    w1z: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    target: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """z (N, m) -> (N,)."""
        return self.residual(self.activations(z)[1]).square().mean(dim=1)

    def activations(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden layers a and u, (N, H) each."""
        a = torch.relu(torch.addmm(self.p, z, self.w1z.mT))
        return a, torch.relu(F.linear(a, self.w2, self.b2))

    def residual(self, u: Tensor) -> Tensor:
        """(N, H) -> (N, M)."""
        return F.linear(u, self.w3, self.b3) - self.target

    def to(self, dtype: torch.dtype) -> "MLPEnergy":
        return MLPEnergy(**{name: tensor.to(dtype) for name, tensor in vars(self).items()})

    def expand(self, z0: Tensor) -> "ExpandedMLPEnergy":
        """The same energy, exactly, about z0 (N, m). Raises ValueError for another shape."""
        if z0.shape != (shape := (len(self.p), self.w1z.shape[1])):
            raise ValueError(f"z has shape {tuple(z0.shape)}: this predictor and batch need {shape}")
        u0 = self.activations(z0)[1]
        residual = self.residual(u0)
        return ExpandedMLPEnergy(
            self, u0, self.w3.mT @ self.w3, -residual @ self.w3, residual.square().mean(dim=1), 1 / residual.shape[1]
        )


class ExpandedMLPEnergy(NamedTuple):
    """E(z) = E(z0) + (D'G D - 2 r'D) / M with D = u(z) - u(z0); its gradient in u is 2 (G D - r) / M.

    About the start, not about u = 0, it rounds against the change of the energy and not against |h_y|^2. Where torch
    allows TF32 the products round to that.

    u0: (N, H), u(z0). G: (H, H), W3'W3. r: (N, H), W3'(h_y - Pred(h_x, z0)). start: (N,), E(z0). scale: 1 / M.
    """

    mlp: MLPEnergy
    u0: Tensor
    G: Tensor
    r: Tensor
    start: Tensor
    scale: float

    def curvature(self) -> Tensor:
        """(m, m): the Hessian in z where every unit of both layers is active, the same for all samples."""
        slopes = self.mlp.w2 @ self.mlp.w1z
        return 2 * self.scale * (slopes.mT @ (self.G @ slopes))

    def value_and_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (N, m) -> energies (N,), gradients (N, m)."""
        a, u = self.mlp.activations(z)
        change = u - self.u0
        gradient = torch.addmm(self.r, change, self.G, beta=-1)
        value = self.start + self.scale * torch.linalg.vecdot(gradient - self.r, change)
        gradient = torch.ops.aten.threshold_backward(gradient, u, 0) @ self.mlp.w2
        return value, 2 * self.scale * (torch.ops.aten.threshold_backward(gradient, a, 0) @ self.mlp.w1z)


@dataclass(frozen=True)
class HeadEnergy:
    """The energy of a predictor with `heads` last layers, of which z selects one.

    energy: of any z (N, heads). of_head: (N,), that of the i-th one-hot, from the i-th head alone. linear: where that
    is the mean of (W_i u + b_i - target)^2, what `torch.ops.vjvcr.discrete_argmin` takes: (u, W, b, target).
    """

    heads: int
    energy: LatentEnergy
    of_head: Callable[[int], Tensor]
    linear: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """z (N, heads) -> (N,)."""
        return self.energy(z)

    def all(self) -> Tensor:
        """(N, heads)."""
        if self.linear is not None and native.serves(self.linear[0]):
            return torch.ops.vjvcr.discrete_argmin(*(tensor.contiguous() for tensor in self.linear))[0]
        return torch.stack([self.of_head(i) for i in range(self.heads)], dim=1)


# -- The latents ----------------------------------------------------------------------------------------------------


class Latent(ABC):
    """What the three have in common."""

    @abstractmethod
    def infer(
        self,
        energy: LatentEnergy,
        n: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        z0: Tensor | None = None,
    ) -> LatentResult:
        """z* = argmin_z energy(z) for each of n samples.

        energy: z (N, ...) -> (N,), each sample's own, of its own z alone; differentiable by torch.func, but for
            discrete z. Autocast is off while it runs; anything it closes over may require gradients and gets none.
        device, dtype: of z; float32 or float64. z0: where to start, as z; None: 0.

        Raises: ValueError for a wrong n, dtype, z0 or shape of the energy; NonFiniteEnergyError, unless check=False.
        """

    def infer_from(
        self,
        model: LatentModel,
        h_x: Tensor,
        h_y: Tensor | None,
        y: Tensor | None = None,
        z0: Tensor | None = None,
    ) -> LatentResult:
        """z* for the terms of the model's energy that depend on z, equation (6).

        The prediction term through an `MLPPredictor` alone takes the closed form of `MLPEnergy`, which agrees with
        autograd to rounding. Computed in float32, in float64 where h_x is, also under autocast; in evaluation mode,
        where no sample sees another. Parameters, their .grad, buffers and modes are afterwards as they were.

        h_x: (N, T_x, d). h_y: (N, T_y, d). y: (N, T_y, C, H, W), for a model with a pixel term. z0: as `infer`.

        Raises: as `infer`; ValueError where the predictor has no such latent, or the energy misses h_y or y.
        """
        dtype = compute_dtype(h_x)
        with _evaluation(model), _apart(h_x):
            targets = [None if t is None else t.detach().to(dtype) for t in (h_y, y)]
            energy = model.latent_energy(h_x.detach().to(dtype), *targets)
            return self.infer(energy, len(h_x), device=h_x.device, dtype=dtype, z0=z0)


@dataclass(frozen=True)
class DiscreteLatent(Latent):
    """z is one of k one-hots: all are tried, the least energy wins, the first of equals.

    k: at least 2. check: raise for an energy that is not finite; else such a value of z only never wins.

    k energies; of a predictor with k heads, k last layers, one prediction at a time in memory. z0 changes nothing.
    """

    k: int
    _: KW_ONLY
    check: bool = True

    def __post_init__(self) -> None:
        _require(self.k >= 2, f"k={self.k}: at least 2 values are needed")

    def infer(
        self,
        energy: LatentEnergy,
        n: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        z0: Tensor | None = None,
    ) -> LatentResult:
        values = torch.eye(self.k, device=device, dtype=dtype)
        _start_at(z0, n, (self.k,), device, dtype)
        with _apart(values):
            if isinstance(energy, HeadEnergy):
                _require(energy.heads == self.k, f"k={self.k}: the predictor has {energy.heads} heads")
                each = energy.all().to(dtype)
                _require(len(each) == n, f"n={n}: the energy is of {len(each)} samples")
            else:
                each = torch.stack([_checked(energy(value.expand(n, -1)), n) for value in values], dim=1).to(dtype)
            finite = each.isfinite()
            least, index = torch.where(finite, each, torch.inf).min(dim=1)
        if self.check and not finite.all():
            bad = ", ".join(str(i) for i in range(self.k) if not finite[:, i].all())
            raise NonFiniteEnergyError(
                f"the energy of z = {bad} of {self.k} is not finite for {int((~finite).any(dim=1).sum())} of {n} "
                "samples; no step size is involved: look at weights and inputs"
            )
        return _result(values[index], least, torch.ones_like(index))


class _Descended(Latent):
    """What the two that take steps have in common."""

    steps: int
    compile: bool
    check: bool

    @abstractmethod
    def _rule(self) -> "_Rule": ...

    def infer(
        self,
        energy: LatentEnergy,
        n: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        z0: Tensor | None = None,
    ) -> LatentResult:
        rule = self._rule()
        start = _start_at(z0, n, rule.shape, device, dtype)
        return _minimise(energy, start, rule, self.steps, self.compile, self.check)


@dataclass(frozen=True)
class SparseLatent(_Descended):
    """energy(z) + weight * |z|_1 by monotone FISTA (Beck and Teboulle 2009), restarted where the energy would rise.

    Args:
        dim: components of z. weight: of the L1 term, summed over z and not divided by anything.
        steps: at most; the cost does not shrink where samples are frozen earlier.
        method: "ista" is the same without momentum; "newton" the quasi-Newton method of `reference.proximal_newton`,
            for a CPU. nonnegative: z >= 0.
        step_rule: "backtracking", or "fixed": always lr, trials that fail are still left out.
        lr: the (first) step size; of "newton", for energies whose curvature is not known, right to a factor of 1000.
        tolerance: of convergence, relative, of z, "newton": of the energy; 0 runs on until nothing moves.
        compile: the step through torch.compile(fullgraph=True); for energies that it can trace.
        bf16: products in bfloat16 where `fista_mlp` runs on a GPU, several times as fast; elsewhere it changes nothing.
        check: raise where energies are not finite, the one synchronisation; without, such samples keep z0.
    """

    dim: int
    weight: float
    steps: int = 100
    _: KW_ONLY
    method: Method = "fista"
    nonnegative: bool = False
    step_rule: StepRule = "backtracking"
    lr: float = 1.0
    tolerance: float = 1e-4
    compile: bool = False
    bf16: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        _require(self.dim >= 1, f"dim={self.dim}: must be at least 1")
        _require(0 <= self.weight < float("inf"), f"weight={self.weight}: must be finite and not negative")
        _require(self.method in get_args(Method), f"method={self.method!r}: choose {', '.join(get_args(Method))}")
        _check_loop(self.steps, self.step_rule, self.lr, self.tolerance)
        newton = self.method == "newton"
        _require(not newton or self.step_rule == "backtracking", "step_rule='fixed': method='newton' has no step size")
        _require(not (newton and self.compile), "compile=True: method='newton' is not compiled")

    def _rule(self) -> "_Rule":
        return _Rule(
            shape=(self.dim,),
            weight=self.weight,
            low=0.0 if self.nonnegative else None,
            momentum=0.0 if self.method == "ista" else None,
            newton=self.method == "newton",
            step_rule=self.step_rule,
            lr=self.lr,
            tolerance=self.tolerance,
            bf16=self.bf16,
        )


@dataclass(frozen=True)
class ContinuousLatent(_Descended):
    """energy(z) by gradient descent with (Nesterov's) momentum, projected on a box where `clamp` gives one.

    Args:
        shape: of one sample's z. steps: at most. lr: the first step size, or the only one where step_rule="fixed".
        momentum: in [0, 1); restarted at 0 for one step where the energy would rise.
        clamp: (low, high), as (0, 1) for actions; z0 is projected too. Others: as SparseLatent's.
    """

    shape: Sequence[int]
    steps: int
    lr: float
    _: KW_ONLY
    momentum: float = 0.9
    clamp: tuple[float, float] | None = None
    step_rule: StepRule = "backtracking"
    tolerance: float = 1e-4
    compile: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        _require(len(self.shape) > 0 and min(self.shape) > 0, f"shape={self.shape}: positive numbers are needed")
        _require(0 <= self.momentum < 1, f"momentum={self.momentum}: must be in [0, 1)")
        if self.clamp is not None:
            _require(len(self.clamp) == 2 and self.clamp[0] < self.clamp[1], f"clamp={self.clamp}: needs low < high")
        _check_loop(self.steps, self.step_rule, self.lr, self.tolerance)

    def _rule(self) -> "_Rule":
        low, high = self.clamp or (None, None)
        return _Rule(
            shape=tuple(self.shape),
            low=low,
            high=high,
            momentum=self.momentum,
            step_rule=self.step_rule,
            lr=self.lr,
            tolerance=self.tolerance,
        )


# -- The loop -------------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """What a step needs to know; the same for all samples. momentum: None for FISTA's growing one."""

    shape: tuple[int, ...]
    momentum: float | None
    step_rule: StepRule
    lr: float
    tolerance: float
    weight: float = 0.0
    low: float | None = None
    high: float | None = None
    bf16: bool = False
    newton: bool = False

    @property
    def box(self) -> tuple[float, float]:
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high

    def penalty(self, z: Tensor) -> Tensor:
        """(N, m) -> (N, 1)."""
        return self.weight * z.abs().sum(dim=1, keepdim=True)

    def propose(
        self, z: Tensor, gradient: Tensor, previous: Tensor, step: Tensor, momentum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The proximal point x and the trial v of a step. (N, m), or (N, 1) for step and momentum."""
        if native.serves(z) and not torch.compiler.is_compiling():
            x, v = previous.clone(), z.clone()
            of_sample = step.squeeze(1), momentum.squeeze(1)
            torch.ops.vjvcr.proximal_step(x, v, gradient.contiguous(), *of_sample, self.weight, *self.box)
            return x, v
        x = self.proximal(z - step * gradient, step)
        return x, self.extrapolate(x, previous, momentum)

    def proximal(self, z: Tensor, step: Tensor) -> Tensor:
        """argmin_x |x - z|^2 / (2 step) + penalty(x), in the box; elementwise. z: (N, m). step: (N, 1)."""
        if self.weight > 0:
            z = soft_threshold(z, step * self.weight)
        return self.project(z)

    def project(self, z: Tensor) -> Tensor:
        return z if self.low is None and self.high is None else z.clamp(self.low, self.high)

    def extrapolate(self, x: Tensor, previous: Tensor, momentum: Tensor) -> Tensor:
        """x + momentum * (x - previous), where it keeps the signs of a penalised x, its zeros and the box."""
        v = x + momentum * (x - previous)
        return self.project(torch.where(v * x > 0, v, 0) if self.weight > 0 else v)


class _Found(NamedTuple):
    """What is left of a `_State` in the end."""

    z: Tensor
    energy: Tensor
    step: Tensor
    steps: Tensor
    lost: Tensor


class _State(NamedTuple):
    """Of every sample: (N, m) or (N, 1)."""

    z: Tensor
    energy: Tensor
    gradient: Tensor
    previous: Tensor  # x of the last step that was taken
    t: Tensor  # FISTA's sequence; 1 after a restart
    step: Tensor
    growth: Tensor
    active: Tensor  # not frozen
    lost: Tensor  # the last trial was not finite
    steps: Tensor


def _minimise(
    energy: LatentEnergy, z0: Tensor, rule: _Rule, steps: int, compile_step: bool, check: bool
) -> LatentResult:
    """z0: (N, *rule.shape)."""
    with _apart(z0):
        z0 = rule.project(z0.flatten(1))
        inner: LatentEnergy | ExpandedMLPEnergy = energy
        if isinstance(energy, MLPEnergy):
            energy = energy.to(z0.dtype)
            inner = energy.expand(z0)
        if rule.newton:
            state = _newton(inner, rule, z0, steps)
        elif isinstance(inner, ExpandedMLPEnergy) and not compile_step and _is_fused(inner, z0, rule):
            state = _fused(inner, rule, z0, steps)
        else:
            at = _start(inner, rule, z0)
            step = torch.compile(_step, fullgraph=True) if compile_step else _step
            for _ in range(steps):
                at = step(inner, rule, at)
            state = _Found(at.z, at.energy, at.step, at.steps, at.lost)
        z, least = state.z, state.energy
        if isinstance(inner, ExpandedMLPEnergy):  # the true residual, once
            before = inner.start.unsqueeze(1) + rule.penalty(z0)
            least = energy(z).unsqueeze(1) + rule.penalty(z)
            rose = least > before  # by rounding
            z, least = torch.where(rose, z0, z), torch.where(rose, before, least)
        lost = state.lost | ~state.energy.isfinite()
        if check and lost.any():
            raise NonFiniteEnergyError(_diagnosis(_start(inner, rule, z0), state, lost, rule))
        return _result(z.unflatten(1, rule.shape), least.squeeze(1), state.steps.squeeze(1))


def _is_fused(energy: ExpandedMLPEnergy, z0: Tensor, rule: _Rule) -> bool:
    if not native.serves(z0) or not z0.is_cuda:
        return native.serves(z0)
    return z0.dtype == torch.float32 and native.planned(len(energy.G), len(z0), z0.shape[1], rule.bf16, z0.get_device())


def _fused(energy: ExpandedMLPEnergy, rule: _Rule, z0: Tensor, steps: int) -> "_Found":
    """All steps of `_step` in one operator."""
    momentum = -1.0 if rule.momentum is None else rule.momentum
    found = torch.ops.vjvcr.fista_mlp(
        *_tensors(energy, z0), energy.scale, rule.weight, *rule.box, momentum,
        rule.step_rule == "backtracking", rule.lr, rule.tolerance, steps, rule.bf16 and z0.is_cuda,
    )  # fmt: skip
    return _Found(found[0], *(of_sample.unsqueeze(1) for of_sample in found[1:]))


def _tensors(energy: ExpandedMLPEnergy, z0: Tensor) -> list[Tensor]:
    """What the operators for an MLP predictor take."""
    mlp = energy.mlp
    tensors = (z0, mlp.p, mlp.w1z, mlp.w2, mlp.b2, energy.G, energy.u0, energy.r, energy.start)
    return [tensor.contiguous() for tensor in tensors]


def _newton(energy: LatentEnergy | ExpandedMLPEnergy, rule: _Rule, z0: Tensor, steps: int) -> "_Found":
    """All steps of the quasi-Newton method."""
    low = rule.box[0]
    if isinstance(energy, ExpandedMLPEnergy):
        curvature = energy.curvature()
        if newton.serves(z0):
            rules = energy.scale, rule.weight, low, rule.tolerance, steps
            tensors = (*_tensors(energy, z0), newton.with_ridge(curvature))
            found = torch.ops.vjvcr.newton_mlp(*tensors, *rules, *newton.CONSTANTS)
            z, least, damping, taken, lost = found
            return _Found(z, *(of_sample.unsqueeze(1) for of_sample in (least, 1 / damping, taken, lost)))
    else:
        curvature = torch.eye(z0.shape[1]).to(z0) / rule.lr
    evaluate = partial(_evaluate, energy, rule)
    at = newton.minimise(evaluate, z0, curvature, rule.weight, low, rule.tolerance, steps)
    return _Found(at.z, at.energy, 1 / at.damping, at.steps, at.lost)


def _start(energy: LatentEnergy | ExpandedMLPEnergy, rule: _Rule, z0: Tensor) -> _State:
    value, gradient = _evaluate(energy, rule, z0)
    ones = torch.ones_like(value)
    return _State(
        z0,
        value,
        gradient,
        previous=z0.clone(),  # not the same tensor: the compiler would make another graph for it
        t=ones,
        step=ones * rule.lr,
        growth=ones * GROWTH_AT_FIRST,
        active=ones > 0,
        lost=ones < 0,
        steps=torch.zeros_like(value, dtype=torch.int64),
    )


def _step(energy: LatentEnergy | ExpandedMLPEnergy, rule: _Rule, state: _State) -> _State:
    """One step of all samples; see the top of the file."""
    z, step, active = state.z, state.step, state.active
    momentum, t = _momentum(state.t, rule.momentum)
    x, trial = rule.propose(z, state.gradient, state.previous, step, momentum)
    value, gradient = _evaluate(energy, rule, trial)

    change = trial - z
    bent = _inner(gradient - state.gradient, change)  # the curvature, times |change|^2
    finite = value.isfinite() & bent.isfinite()
    accepted = finite & (value <= state.energy)
    moved = _inner(x - z, x - z).sqrt()
    small = moved <= rule.tolerance * torch.maximum(_inner(x, x), _inner(z, z)).sqrt()

    growth = state.growth
    if rule.step_rule == "fixed":
        done = small | ~(accepted | (momentum > 0))  # the same trial would fail again
    else:
        done = (small & (growth < GROWTH_AT_FIRST)) | (moved == 0)  # a first step is small where lr is
        # How many times this step the curvature allows; any number where there is none.
        room = torch.where(bent > 0, _inner(change, change) / (bent * step), torch.inf)
        growth = torch.where(accepted & (room >= GROWTH_AT_FIRST), growth, GROWTH)
        factor = torch.where(accepted, growth, torch.where(momentum > 0, 1.0, SHRINKAGE))
        largest = torch.finfo(step.dtype).max ** 0.5
        step = (step * torch.minimum(room.clamp_min(SHRINKAGE), factor)).clamp_max(largest)

    taken = accepted & active
    return _State(
        z=torch.where(taken, trial, z),
        energy=torch.where(taken, value, state.energy),
        gradient=torch.where(taken, gradient, state.gradient),
        previous=torch.where(taken, x, state.previous),
        t=torch.where(accepted, t, 1.0),
        step=torch.where(active, step, state.step),
        growth=growth,
        active=active & ~done,
        lost=torch.where(active, ~finite, state.lost),
        steps=state.steps + active,
    )


def _momentum(t: Tensor, constant: float | None) -> tuple[Tensor, Tensor]:
    """The momentum and the next t. None after a restart, where t is 1."""
    if constant is not None:
        return constant * (t > 1).to(t.dtype), torch.full_like(t, 2.0)
    following = (1 + (1 + 4 * t * t).sqrt()) / 2
    return (t - 1) / following, following


def _evaluate(energy: LatentEnergy | ExpandedMLPEnergy, rule: _Rule, z: Tensor) -> tuple[Tensor, Tensor]:
    """Energy with penalty (N, 1) and the gradient without (N, m) at z (N, m)."""
    if isinstance(energy, ExpandedMLPEnergy):
        value, gradient = energy.value_and_gradient(z)
    else:
        # Unlike autograd.grad it leaves parameters out by itself, works in inference mode and compiles.
        value, pull_back = torch.func.vjp(energy, z.unflatten(1, rule.shape))  # type: ignore[misc]
        (gradient,) = pull_back(torch.ones_like(_checked(value, len(z))))
    return value.to(z.dtype).unsqueeze(1) + rule.penalty(z), gradient.flatten(1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(N, m) -> (N, 1)."""
    return (a * b).sum(dim=1, keepdim=True)


def _diagnosis(start: _State, state: "_Found", lost: Tensor, rule: _Rule) -> str:
    at_start = ~start.energy.isfinite() | ~start.gradient.isfinite().all(dim=1, keepdim=True)
    settings = f"lr={rule.lr:g}, step_rule={rule.step_rule!r}"
    if at_start.any():
        return (
            f"energy or gradient is not finite at z0 for {int(at_start.sum())} of {len(lost)} samples, before the "
            f"first step ({settings}): look at weights and inputs"
        )
    return (
        f"energy or gradient is not finite for {int(lost.sum())} of {len(lost)} samples, after steps down to a size of "
        f"{float(state.step[lost].min()):.3g} ({settings}): choose a smaller lr"
    )


# -- Around it ------------------------------------------------------------------------------------------------------


def _start_at(
    z0: Tensor | None, n: int, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    _require(n >= 1, f"n={n}: at least one sample is needed")
    _require(dtype in (torch.float32, torch.float64), f"dtype={dtype}: float32 or float64 is needed")
    if z0 is None:
        return torch.zeros(n, *shape, device=device, dtype=dtype)
    _require(z0.shape == (n, *shape), f"z0 has shape {tuple(z0.shape)}: {(n, *shape)} is needed")
    return z0.detach().to(device, dtype)


def _result(z: Tensor, energy: Tensor, steps: Tensor) -> LatentResult:
    return LatentResult(z, energy, steps, (z == 0).flatten(1).to(z.dtype).mean(dim=1))


def _checked(energy: Tensor, n: int) -> Tensor:
    _require(energy.shape == (n,), f"energy(z) has shape {tuple(energy.shape)}: {(n,)}, one per sample, is needed")
    return energy


def _check_loop(steps: int, step_rule: str, lr: float, tolerance: float) -> None:
    _require(steps >= 1, f"steps={steps}: must be at least 1")
    _require(step_rule in get_args(StepRule), f"step_rule={step_rule!r}: choose 'backtracking' or 'fixed'")
    _require(0 < lr < float("inf"), f"lr={lr}: must be positive and finite")
    _require(0 <= tolerance < 1, f"tolerance={tolerance}: must be in [0, 1)")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@contextmanager
def _apart(tensor: Tensor) -> Iterator[None]:
    """Nothing is recorded for a backward pass, and autocast is off."""
    with torch.no_grad(), full_precision(tensor):
        yield


@contextmanager
def _evaluation(model: LatentModel) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
