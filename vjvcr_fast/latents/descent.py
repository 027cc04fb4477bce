"""Inference in steps, for all samples at once: `reference.monotone_fista`.

Each sample has a point z, a step size s and a momentum b. A step costs one forward and one backward pass, both at the
trial point v. One more of each is needed at the start.

    x = prox(z - s grad E(z)),   v = x + b (x - previous x), with 0 where v and x differ in sign
    E(v) <= E(z):  z becomes v, b grows;   else:  z stays, b restarts from 0

So the energy, L1 term included, never rises, and v is as sparse as x.

Backtracking keeps s below the inverse of the curvature that the trial met, <grad E(v) - grad E(z), v - z> / |v - z|^2.
If s is above that, or if a trial without momentum failed, s is halved for the next step. Otherwise it grows: fourfold
until a trial fails or s comes near the bound, then by 1% a step. That is enough to leave a kink behind, and too little
to disturb the acceleration.

A sample is frozen when its proximal step |x - z| is at most `tolerance` times |x| or |z| and s has found its scale.
Later steps do not change it, not even in the last bit.

The loop never waits for the device. The only synchronisation is at the end, to check for energies that are not finite.

There are three ways to run it. If the operators of csrc/ are built, all steps for an MLP predictor are one operator,
`fista_mlp`, in which frozen samples cost nothing; for other energies the loop below uses `proximal_step`. If they are
not built, or if the loop is compiled, it is in torch operations alone.

`SparseLatent(method="newton")` is another method, `reference.proximal_newton`. It is for energies that are nearly
quadratic over the distance that z moves, and exists only as an operator, `newton_mlp`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import native
from vjvcr_fast.latents.energies import ExpandedMLPEnergy, LatentEnergy, MLPEnergy
from vjvcr_fast.losses.analytic import full_precision
from vjvcr_fast.reference import (
    DAMPED,
    GROWTH,
    GROWTH_AT_FIRST,
    SCALES,
    SETTLED,
    SHRINKAGE,
    SWEEPS,
    soft_threshold,
    with_ridge,
)

StepRule = Literal["backtracking", "fixed"]


class LatentResult(NamedTuple):
    """What inference found for each of N samples.

    z: (N, ...). energy: (N,), what was minimised, L1 term included. steps: (N,), int64, how many until the sample was
    frozen. zeros: (N,), the fraction of z's components that are exactly 0.
    """

    z: Tensor
    energy: Tensor
    steps: Tensor
    zeros: Tensor


class NonFiniteEnergyError(RuntimeError):
    """The energy or its gradient is NaN or infinite where inference started or ended. The message has the step size."""


class Rule(NamedTuple):
    """The settings of a step, the same for all samples. momentum: None for FISTA's, which grows."""

    shape: tuple[int, ...]
    step_rule: StepRule
    lr: float
    tolerance: float
    momentum: float | None = None
    weight: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    bf16: bool = False
    newton: bool = False

    def penalty(self, z: Tensor) -> Tensor:
        """(N, m) -> (N, 1)."""
        return self.weight * z.abs().sum(dim=1, keepdim=True)

    def propose(
        self, z: Tensor, gradient: Tensor, previous: Tensor, step: Tensor, momentum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The proximal point x and the trial v of a step, (N, m) each. z, gradient, previous: (N, m); step, momentum:
        (N, 1)."""
        if not torch.compiler.is_compiling() and native.serves(z):
            x, v = previous.clone(), z.clone()
            of_sample = step.squeeze(1), momentum.squeeze(1)
            torch.ops.vjvcr.proximal_step(x, v, gradient.contiguous(), *of_sample, self.weight, self.low, self.high)
            return x, v
        x = z - step * gradient
        if self.weight > 0:
            x = soft_threshold(x, step * self.weight)
        x = self.project(x)
        v = x + momentum * (x - previous)
        return x, self.project(torch.where(v * x > 0, v, 0) if self.weight > 0 else v)

    def project(self, z: Tensor) -> Tensor:
        """z with every entry brought into [low, high]."""
        return z.clamp(self.low, self.high)


class _Found(NamedTuple):
    """What remains of a `_State` in the end."""

    z: Tensor
    energy: Tensor
    step: Tensor
    steps: Tensor
    lost: Tensor


class _State(NamedTuple):
    """What changes from step to step: (N, m) or (N, 1)."""

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
    """argmin_z of the energy plus the rule's penalty, from z0 (N, *rule.shape), in at most `steps` steps.

    compile_step: put the loop's step through torch.compile, unless one operator makes all steps. check: raise
    NonFiniteEnergyError; waits for the device. Raises ValueError if `rule.newton` is set and the operator does not
    serve.
    """
    with apart(z0):
        z0 = rule.project(z0.flatten(1)).contiguous()  # as the operators need it; the loop keeps it so
        inner: LatentEnergy | ExpandedMLPEnergy = energy
        if isinstance(energy, MLPEnergy):
            energy = energy.to(z0.dtype)
            inner = energy.expand(z0)
        if rule.newton:
            why = newton_refusal(isinstance(inner, ExpandedMLPEnergy), z0.device)
            require(why is None, f"method='newton': {why}; choose method='fista'")
        if isinstance(inner, ExpandedMLPEnergy) and _is_fused(inner, z0, rule):
            found = _fused(inner, rule, z0, steps)
        else:
            at = _start(inner, rule, z0)
            step = torch.compile(_step, fullgraph=True) if compile_step else _step
            for _ in range(steps):
                at = step(inner, rule, at)
            found = _Found(at.z, at.energy, at.step, at.steps, at.lost)
        z, least = found.z, found.energy
        if isinstance(inner, ExpandedMLPEnergy):  # the true residual, once
            before = inner.start.unsqueeze(1) + rule.penalty(z0)
            least = energy(z).unsqueeze(1) + rule.penalty(z)
            rose = least > before  # by rounding
            z, least = torch.where(rose, z0, z), torch.where(rose, before, least)
        lost = found.lost | ~found.energy.isfinite()
        if check and lost.any():
            raise NonFiniteEnergyError(_diagnosis(_start(inner, rule, z0), found, lost, rule))
        return result(z.unflatten(1, rule.shape), least.squeeze(1), found.steps.squeeze(1))


def newton_refusal(closed_form: bool, device: torch.device) -> str | None:
    """Why method="newton" cannot serve here, or None if it can. closed_form: the energy is an `MLPEnergy`."""
    if not closed_form:
        return "it needs an energy in closed form, that of an MLP predictor without a pixel term"
    if device.type != "cpu":
        return f"it runs on a CPU only, not on {device.type}"
    return None if native.MISSING is None else f"it needs the compiled operators, which are {native.MISSING}"


def _is_fused(energy: ExpandedMLPEnergy, z0: Tensor, rule: Rule) -> bool:
    return rule.newton or native.serves_fista(z0, len(energy.G), rule.bf16)


def _fused(energy: ExpandedMLPEnergy, rule: Rule, z0: Tensor, steps: int) -> _Found:
    """All steps in one operator."""
    operands = energy.operands(z0)
    shared = {"scale": energy.scale, "weight": rule.weight, "tolerance": rule.tolerance, "steps": steps}
    if rule.newton:
        found = torch.ops.vjvcr.newton_mlp(
            *operands,
            with_ridge(energy.curvature()),
            **shared,
            low=rule.low,
            sweeps=SWEEPS,
            settled=SETTLED,
            damped=DAMPED,
            least=SCALES[0],
            most=SCALES[1],
        )
    else:
        found = torch.ops.vjvcr.fista_mlp(
            *operands,
            **shared,
            lower=rule.low,
            upper=rule.high,
            momentum=-1.0 if rule.momentum is None else rule.momentum,
            backtracking=rule.step_rule == "backtracking",
            lr=rule.lr,
            bf16=rule.bf16 and z0.is_cuda,
        )
    return _Found(found[0], *(of_sample.unsqueeze(1) for of_sample in found[1:]))


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
    """One step of all samples, as the head of this file describes it."""
    z, step, active = state.z, state.step, state.active
    momentum, t = _momentum(state.t, rule.momentum)
    x, trial = rule.propose(z, state.gradient, state.previous, step, momentum)
    value, gradient = _evaluate(energy, rule, trial)

    change = trial - z
    bent = _inner(gradient - state.gradient, change)  # the curvature times |change|^2
    finite = value.isfinite() & bent.isfinite()
    accepted = finite & (value <= state.energy)
    moved = _inner(x - z, x - z).sqrt()
    small = moved <= rule.tolerance * torch.maximum(_inner(x, x), _inner(z, z)).sqrt()

    growth = state.growth
    if rule.step_rule == "fixed":
        done = small | ~(accepted | (momentum > 0))  # the same trial would fail again
    else:
        done = (small & (growth < GROWTH_AT_FIRST)) | (moved == 0)  # with a small lr the first step is small
        # How many times larger a step the curvature allows: any number if there is no curvature.
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
    """The momentum and the next t. After a restart t is 1 and the momentum 0."""
    if constant is not None:
        return constant * (t > 1).to(t.dtype), torch.full_like(t, 2.0)
    following = (1 + (1 + 4 * t * t).sqrt()) / 2
    return (t - 1) / following, following


def _evaluate(energy: LatentEnergy | ExpandedMLPEnergy, rule: Rule, z: Tensor) -> tuple[Tensor, Tensor]:
    """At z (N, m): energies with the penalty (N, 1), gradients without it (N, m)."""
    if isinstance(energy, ExpandedMLPEnergy):
        value, gradient = energy.value_and_gradient(z)
    else:
        # Unlike autograd.grad, vjp leaves parameters alone, works in inference mode and compiles.
        value, pull_back = torch.func.vjp(energy, z.unflatten(1, rule.shape))  # type: ignore[misc]
        (gradient,) = pull_back(torch.ones_like(checked(value, len(z))))
    return value.to(z.dtype).unsqueeze(1) + rule.penalty(z), gradient.flatten(1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """(N, m) -> (N, 1)."""
    return (a * b).sum(dim=1, keepdim=True)


def _diagnosis(start: _State, found: _Found, lost: Tensor, rule: Rule) -> str:
    at_start = ~start.energy.isfinite() | ~start.gradient.isfinite().all(dim=1, keepdim=True)
    settings = "method='newton'" if rule.newton else f"lr={rule.lr:g}, step_rule={rule.step_rule!r}"
    if at_start.any():
        return (
            f"energy or gradient is not finite at z0 for {int(at_start.sum())} of {len(lost)} samples, before the "
            f"first step ({settings}): look at weights and inputs"
        )
    return (
        f"energy or gradient is not finite for {int(lost.sum())} of {len(lost)} samples, after steps down to a size of "
        f"{float(found.step[lost].min()):.3g} ({settings}): "
        + ("look at weights and inputs, or choose method='fista'" if rule.newton else "choose a smaller lr")
    )


def result(z: Tensor, energy: Tensor, steps: Tensor) -> LatentResult:
    """A LatentResult of z (N, ...), energy (N,) and steps (N,), with the fraction of zeros in each sample's z."""
    return LatentResult(z, energy, steps, (z == 0).flatten(1).to(z.dtype).mean(dim=1))


def checked(energy: Tensor, n: int) -> Tensor:
    """The energy, if its shape is (n,). Raises ValueError otherwise."""
    require(energy.shape == (n,), f"energy(z) has shape {tuple(energy.shape)}: {(n,)}, one per sample, is needed")
    return energy


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@contextmanager
def apart(tensor: Tensor) -> Iterator[None]:
    """A context in which nothing is recorded for a backward pass, and autocast is off.

    Not in inference mode, where torch.func.vjp of torch 2.11 says that all gradients are zero.
    """
    with torch.inference_mode(False), torch.no_grad(), full_precision(tensor):
        yield
