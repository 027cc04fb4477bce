"""The three kinds of latent: discrete (every value is tried), sparse (FISTA) and continuous (gradient descent).

Each has `infer`, for any energy z (N, ...) -> (N,), and `infer_from`, which takes the energy from a model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, get_args

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
    """What `infer_from` needs of a model. `vjvcr_fast.models.energy.EnergyModel` has it."""

    def modules(self) -> Iterator[nn.Module]:
        """The model and all its parts, which are put into evaluation mode while z* is inferred."""
        ...

    def latent_energy(self, h_x: Tensor, h_y: Tensor | None, y: Tensor | None = None) -> LatentEnergy:
        """The terms of the energy that depend on z, as a function of z. Arguments: see `Latent.infer_from`."""
        ...


class Latent(ABC):
    """What the three kinds have in common."""

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

        Args:
            energy: z (N, ...) -> (N,). Each sample's energy depends on its own z only. Must be differentiable by
                torch.func, unless z is discrete. Autocast is off while it runs. Tensors that it closes over may require
                gradients; they get none.
            n: the number of samples.
            device, dtype: of z; float32 or float64.
            z0: where to start, of z's shape, with any strides; None is 0. A discrete latent ignores it.

        In a CUDA graph: set check=False, and infer once with the same sizes before the capture, in which no kernel can
        be loaded. The compiled operators raise a RuntimeError if that was forgotten.

        Raises ValueError for a wrong n, dtype, z0 or shape of the energy, and if method="newton" does not serve;
        NonFiniteEnergyError, unless check=False.
        """
        shape = (n, *self._shape())
        require(n >= 1, f"n={n}: at least one sample is needed")
        require(dtype in (torch.float32, torch.float64), f"dtype={dtype}: float32 or float64 is needed")
        if z0 is None:
            return self._search(energy, torch.zeros(shape, device=device, dtype=dtype))
        require(z0.shape == shape, f"z0 has shape {tuple(z0.shape)}: {shape} is needed")
        return self._search(energy, z0.detach().to(device, dtype))

    def infer_from(
        self,
        model: LatentModel,
        h_x: Tensor,
        h_y: Tensor | None,
        y: Tensor | None = None,
        z0: Tensor | None = None,
    ) -> LatentResult:
        """z* for the terms of the model's energy that depend on z, equation (6).

        If the energy is the prediction term through an `MLPPredictor` alone, its closed form `MLPEnergy` is used, which
        agrees with autograd to rounding. Computes in float32, or in float64 if h_x is float64, also under autocast; and
        in evaluation mode, where samples do not see each other. Leaves parameters, their .grad, buffers and modes as
        they were.

        h_x: (N, T_x, d). h_y: (N, T_y, d). y: (N, T_y, C, H, W), for a model with a pixel term. z0: as for `infer`.

        Raises what `infer` raises; ValueError if the predictor has no such latent, or if the energy needs h_y or y.
        """
        dtype = compute_dtype(h_x)
        with _evaluation(model), apart(h_x):
            targets = [None if t is None else t.detach().to(dtype) for t in (h_y, y)]
            energy = model.latent_energy(h_x.detach().to(dtype), *targets)
            return self.infer(energy, len(h_x), device=h_x.device, dtype=dtype, z0=z0)

    @abstractmethod
    def _shape(self) -> tuple[int, ...]:
        """Of one sample's z."""

    @abstractmethod
    def _search(self, energy: LatentEnergy, z0: Tensor) -> LatentResult: ...


@dataclass(frozen=True)
class DiscreteLatent(Latent):
    """z is one of k one-hots. All are tried; the lowest energy wins, the first one among equals.

    k: number of values, at least 2.
    check: raise NonFiniteEnergyError for an energy that is not finite. If False, such a value of z just never wins.

    Costs k energies. For a predictor with k heads it costs k last layers, with one prediction at a time in memory.
    """

    k: int
    _: KW_ONLY
    check: bool = True

    def __post_init__(self) -> None:
        require(self.k >= 2, f"k={self.k}: at least 2 values are needed")

    def _shape(self) -> tuple[int, ...]:
        return (self.k,)

    def _search(self, energy: LatentEnergy, z0: Tensor) -> LatentResult:
        n, values = len(z0), torch.eye(self.k, device=z0.device, dtype=z0.dtype)
        with apart(values):
            if isinstance(energy, HeadEnergy):
                require(energy.heads == self.k, f"k={self.k}: the predictor has {energy.heads} heads")
                each = energy.all().to(z0.dtype)
                require(len(each) == n, f"n={n}: the energy is of {len(each)} samples")
            else:
                each = torch.stack([checked(energy(value.expand(n, -1)), n) for value in values], dim=1).to(z0.dtype)
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
    """What the two kinds that take steps have in common."""

    steps: int
    step_rule: StepRule
    lr: float
    tolerance: float
    compile: bool
    check: bool

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps}: must be at least 1")
        rules = get_args(StepRule)
        require(self.step_rule in rules, f"step_rule={self.step_rule!r}: choose 'backtracking' or 'fixed'")
        require(0 < self.lr < float("inf"), f"lr={self.lr}: must be positive and finite")
        require(0 <= self.tolerance < 1, f"tolerance={self.tolerance}: must be in [0, 1)")

    @abstractmethod
    def _own(self) -> dict[str, Any]:
        """The fields of `Rule` that differ between the two."""

    def _search(self, energy: LatentEnergy, z0: Tensor) -> LatentResult:
        rule = Rule(self._shape(), self.step_rule, self.lr, self.tolerance, **self._own())
        return minimise(energy, z0, rule, self.steps, self.compile, self.check)


@dataclass(frozen=True)
class SparseLatent(_Descended):
    """energy(z) + weight * |z|_1 by monotone FISTA (Beck and Teboulle 2009), restarted if the energy would rise.

    Args:
        dim: components of z.
        weight: of the L1 term, which is summed over z and not divided by anything. In a run training/calibration.py
            adapts it.
        steps: at most. Samples that are frozen earlier cost less in the compiled operators only.
        method: "fista"; "ista", the same without momentum; or "newton", the quasi-Newton method
            `reference.proximal_newton`. "newton" needs an energy in closed form (an MLP predictor without a pixel
            term), a CPU and the compiled operators; otherwise `infer` raises a ValueError that says why.
        nonnegative: z >= 0.
        step_rule: "backtracking", or "fixed": always lr. In both, trials that raise the energy are not taken.
        lr: the first step size, or the fixed one. "newton" does not use it.
        tolerance: relative, when a sample counts as converged; of z, for "newton" of the energy. With 0 it runs on
            until nothing moves.
        compile: put the step through torch.compile(fullgraph=True); the energy must be traceable. Where the compiled
            operator `fista_mlp` makes all steps, nothing is left to compile, and it is used as with compile=False.
        bf16: products in bfloat16 if `fista_mlp` runs on a GPU, several times as fast; no effect elsewhere.
        check: raise NonFiniteEnergyError, which is the only synchronisation. If False, such samples keep
            the last z whose energy was finite.
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
        super().__post_init__()
        newton = self.method == "newton"
        require(not newton or self.step_rule == "backtracking", "step_rule='fixed': method='newton' has no step size")
        require(not (newton and self.compile), "compile=True: method='newton' is not compiled")

    def _shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def _own(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "low": 0.0 if self.nonnegative else -torch.inf,
            "momentum": 0.0 if self.method == "ista" else None,
            "newton": self.method == "newton",
            "bf16": self.bf16,
        }


@dataclass(frozen=True)
class ContinuousLatent(_Descended):
    """energy(z) by gradient descent with (Nesterov's) momentum, projected onto a box if `clamp` gives one.

    Args:
        shape: of one sample's z.
        steps: at most.
        lr: the first step size, or the only one if step_rule="fixed".
        momentum: in [0, 1). It restarts at 0, for one step, if the energy would rise.
        clamp: (low, high), for example (0, 1) for actions; z0 is projected, too.

    The other arguments are those of SparseLatent.
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
        super().__post_init__()

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.shape)

    def _own(self) -> dict[str, Any]:
        low, high = self.clamp or (-torch.inf, torch.inf)
        return {"momentum": self.momentum, "low": low, "high": high}


@contextmanager
def _evaluation(model: LatentModel) -> Iterator[None]:
    """The model is in evaluation mode; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
