"""The latents: discrete (every value is tried), sparse (FISTA) and continuous (gradient descent with momentum).

Each has `infer`, for any energy z (N, ...) -> (N,), and `infer_from`, which takes the energy from a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from vjvcr_fast.latents.descent import (
    LatentResult,
    NonFiniteEnergyError,
    Rule,
    StepRule,
    apart,
    checked,
    minimise,
    require,
    result,
)
from vjvcr_fast.latents.energies import HeadEnergy, LatentEnergy
from vjvcr_fast.losses.analytic import compute_dtype

Method = Literal["fista", "ista", "newton"]


class LatentModel(Protocol):
    """What `infer_from` asks of a model; `vjvcr_fast.models.energy.EnergyModel` has it."""

    def modules(self) -> Iterator[nn.Module]: ...

    def latent_energy(self, h_x: Tensor, h_y: Tensor | None, y: Tensor | None = None) -> LatentEnergy: ...


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
        with _evaluation(model), apart(h_x):
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
        require(self.k >= 2, f"k={self.k}: at least 2 values are needed")

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
        with apart(values):
            if isinstance(energy, HeadEnergy):
                require(energy.heads == self.k, f"k={self.k}: the predictor has {energy.heads} heads")
                each = energy.all().to(dtype)
                require(len(each) == n, f"n={n}: the energy is of {len(each)} samples")
            else:
                each = torch.stack([checked(energy(value.expand(n, -1)), n) for value in values], dim=1).to(dtype)
            finite = each.isfinite()
            least, index = torch.where(finite, each, torch.inf).min(dim=1)
        if self.check and not finite.all():
            bad = ", ".join(str(i) for i in range(self.k) if not finite[:, i].all())
            raise NonFiniteEnergyError(
                f"the energy of z = {bad} of {self.k} is not finite for {int((~finite).any(dim=1).sum())} of {n} "
                "samples; no step size is involved: look at weights and inputs"
            )
        return result(values[index], least, torch.ones_like(index))


class _Descended(Latent):
    """What the two that take steps have in common."""

    steps: int
    compile: bool
    check: bool

    @abstractmethod
    def _rule(self) -> "Rule": ...

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
        return minimise(energy, start, rule, self.steps, self.compile, self.check)


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
        require(self.dim >= 1, f"dim={self.dim}: must be at least 1")
        require(0 <= self.weight < float("inf"), f"weight={self.weight}: must be finite and not negative")
        require(self.method in get_args(Method), f"method={self.method!r}: choose {', '.join(get_args(Method))}")
        _check_loop(self.steps, self.step_rule, self.lr, self.tolerance)
        newton = self.method == "newton"
        require(not newton or self.step_rule == "backtracking", "step_rule='fixed': method='newton' has no step size")
        require(not (newton and self.compile), "compile=True: method='newton' is not compiled")

    def _rule(self) -> "Rule":
        return Rule(
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
        require(len(self.shape) > 0 and min(self.shape) > 0, f"shape={self.shape}: positive numbers are needed")
        require(0 <= self.momentum < 1, f"momentum={self.momentum}: must be in [0, 1)")
        if self.clamp is not None:
            require(len(self.clamp) == 2 and self.clamp[0] < self.clamp[1], f"clamp={self.clamp}: needs low < high")
        _check_loop(self.steps, self.step_rule, self.lr, self.tolerance)

    def _rule(self) -> "Rule":
        low, high = self.clamp or (None, None)
        return Rule(
            shape=tuple(self.shape),
            low=low,
            high=high,
            momentum=self.momentum,
            step_rule=self.step_rule,
            lr=self.lr,
            tolerance=self.tolerance,
        )


def _start_at(
    z0: Tensor | None, n: int, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    require(n >= 1, f"n={n}: at least one sample is needed")
    require(dtype in (torch.float32, torch.float64), f"dtype={dtype}: float32 or float64 is needed")
    if z0 is None:
        return torch.zeros(n, *shape, device=device, dtype=dtype)
    require(z0.shape == (n, *shape), f"z0 has shape {tuple(z0.shape)}: {(n, *shape)} is needed")
    return z0.detach().to(device, dtype)


def _check_loop(steps: int, step_rule: str, lr: float, tolerance: float) -> None:
    require(steps >= 1, f"steps={steps}: must be at least 1")
    require(step_rule in get_args(StepRule), f"step_rule={step_rule!r}: choose 'backtracking' or 'fixed'")
    require(0 < lr < float("inf"), f"lr={lr}: must be positive and finite")
    require(0 <= tolerance < 1, f"tolerance={tolerance}: must be in [0, 1)")


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
