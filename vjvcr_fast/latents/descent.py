"""The loop of the latents that take steps: `reference.monotone_fista` for all samples at once.

Each sample has a point z, a step size s and a momentum b. A step costs one forward and one backward pass, both at the
trial point v. The start costs one of each.

    x = prox(z - s grad E(z)),   v = x + b (x - previous x), with 0 where v has not the sign of x
    E(v) <= E(z):  z becomes v, b grows;   else:  z stays, b restarts from 0

so that the energy, L1 term included, never rises and v is as sparse as x. Backtracking holds s below the inverse of the
curvature that the trial met, <grad E(v) - grad E(z), v - z> / |v - z|^2. For the next step s is halved where it is
above that, or where a trial without momentum failed; else it grows, fourfold until a trial fails or comes near the
bound, by 1% from then on: enough to leave a kink behind, too little to disturb the acceleration. A sample whose
proximal step |x - z| is at most `tolerance` of |x| or |z|, once s has found its scale, is frozen: later steps leave it
as it is, to the bit.

Nothing in the loop waits for the device; the one look at a flag, for energies that are not finite, comes at the end.

`SparseLatent(method="newton")` has a loop of its own, in newton.py.

If the operators of csrc/ are built, the loop for an MLP predictor is one of them, `fista_mlp`, in which frozen samples
cost nothing. Otherwise it runs in torch operations.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import native
from vjvcr_fast.latents import newton
from vjvcr_fast.latents.energies import ExpandedMLPEnergy, LatentEnergy, MLPEnergy
from vjvcr_fast.losses.analytic import full_precision
from vjvcr_fast.reference import GROWTH, GROWTH_AT_FIRST, SHRINKAGE, soft_threshold

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


class Rule(NamedTuple):
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


def minimise(energy: LatentEnergy, z0: Tensor, rule: Rule, steps: int, compile_step: bool, check: bool) -> LatentResult:
    """z0: (N, *rule.shape)."""
    with apart(z0):
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
        return result(z.unflatten(1, rule.shape), least.squeeze(1), state.steps.squeeze(1))


def _is_fused(energy: ExpandedMLPEnergy, z0: Tensor, rule: Rule) -> bool:
    if not native.serves(z0) or not z0.is_cuda:
        return native.serves(z0)
    return z0.dtype == torch.float32 and native.planned(len(energy.G), len(z0), z0.shape[1], rule.bf16, z0.get_device())


def _fused(energy: ExpandedMLPEnergy, rule: Rule, z0: Tensor, steps: int) -> "_Found":
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


def _newton(energy: LatentEnergy | ExpandedMLPEnergy, rule: Rule, z0: Tensor, steps: int) -> "_Found":
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


def _start(energy: LatentEnergy | ExpandedMLPEnergy, rule: Rule, z0: Tensor) -> _State:
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


def _step(energy: LatentEnergy | ExpandedMLPEnergy, rule: Rule, state: _State) -> _State:
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


def _evaluate(energy: LatentEnergy | ExpandedMLPEnergy, rule: Rule, z: Tensor) -> tuple[Tensor, Tensor]:
    """Energy with penalty (N, 1) and the gradient without (N, m) at z (N, m)."""
    if isinstance(energy, ExpandedMLPEnergy):
        value, gradient = energy.value_and_gradient(z)
    else:
        # Unlike autograd.grad it leaves parameters out by itself, works in inference mode and compiles.
        value, pull_back = torch.func.vjp(energy, z.unflatten(1, rule.shape))  # type: ignore[misc]
        (gradient,) = pull_back(torch.ones_like(checked(value, len(z))))
    return value.to(z.dtype).unsqueeze(1) + rule.penalty(z), gradient.flatten(1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(N, m) -> (N, 1)."""
    return (a * b).sum(dim=1, keepdim=True)


def _diagnosis(start: _State, state: "_Found", lost: Tensor, rule: Rule) -> str:
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


def result(z: Tensor, energy: Tensor, steps: Tensor) -> LatentResult:
    return LatentResult(z, energy, steps, (z == 0).flatten(1).to(z.dtype).mean(dim=1))


def checked(energy: Tensor, n: int) -> Tensor:
    require(energy.shape == (n,), f"energy(z) has shape {tuple(energy.shape)}: {(n,)}, one per sample, is needed")
    return energy


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@contextmanager
def apart(tensor: Tensor) -> Iterator[None]:
    """Nothing is recorded for a backward pass, and autocast is off."""
    with torch.no_grad(), full_precision(tensor):
        yield
