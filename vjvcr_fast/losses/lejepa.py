"""SIGReg (LeJEPA, arXiv 2511.08544): compares samples, along random directions, with a standard normal distribution.

The equation is `vjvcr_fast.reference.sigreg`. This file checks the arguments, draws the directions and picks the code
that computes the loss; `projections` has it. What is said of types, strides, NaN and the GPU in `vcr` holds here, too.
"""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.data.hashing import splitmix
from vjvcr_fast.losses import analytic, cpu, distributed, projections
from vjvcr_fast.losses.backends import Backend, check_number, resolve, transformed
from vjvcr_fast.losses.projections import Settings, Work
from vjvcr_fast.losses.vcr import Representations, Samples, as_slices, guarded


def sigreg(
    h: Representations,
    *,
    directions: int | Tensor = 1024,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    knots: int = 17,
    limit: float = 3.0,
    symmetric: bool = False,
    scale_by_n: bool = True,
    backend: Backend = "auto",
    group: Any = None,
    samples: Samples = None,
) -> Tensor:
    """SIGReg: for each time step and direction the distance of the samples' characteristic function to a normal one's,

        N sum_j w_j |1/N sum_n exp(i t_j <h_n, a>) - exp(-t_j^2 / 2)|^2,

    averaged over directions a and time steps. Samples of a standard normal distribution give about 1.05, whatever N and
    d. Nothing is centred or scaled. The defaults are those of LeJEPA's MINIMAL.md, lightly and stable-worldmodel:

        eb_jepa's BCS                   directions=256, knots=10, symmetric=True, scale_by_n=False
        the listing in LeJEPA's paper   directions=256, limit=5.0, symmetric=True

    Args:
        h: (N, d), (N, ..., d), or a sequence of such tensors with the same N and d. float16, bfloat16, float32 or
            float64, any strides.
        directions: how many are drawn; or the directions themselves, (d, K), as they are: their length is not changed.
        seed: directions are a function of it, the same on all processes and, up to rounding, on all devices. Give
            another one at each call. A number, or an int64 tensor of one element, which is not read by the host.
        generator: directions are drawn from it instead, which changes its state. With a group, all processes need
            generators in the same state. torch's own generators are never touched.
        knots, limit: t_j, `knots` numbers from 0 to `limit`. Their weights are those of the trapezoidal rule times
            exp(-t_j^2 / 2), doubled for the other half of the integral over [-limit, limit].
        symmetric: t_j are `knots` numbers from -limit to limit instead.
        scale_by_n: with the factor N of the formula.
        backend: "native" (compiled CPU operators), "triton" (fused CUDA kernels), "torch" (plain operations with an
            analytic gradient), "reference" (reference.py and autograd) or "auto"; see `vcr_loss`.
        group, samples: processes whose samples form one batch; see `vcr_loss`. Sums of cosines and sines, T x 2 x
            (knots - 1) x K numbers, are added up over the processes in forward; backward sends nothing.

    Returns: a scalar, float64 for float64 and float32 for all narrower types.

    Raises:
        ValueError: if directions is a number and neither seed nor generator is given, or both are; if it is a tensor of
            another shape than (d, K) or on another device, or is given with a seed or generator; if knots < 2, limit
            is not positive, or directions < 1; for what `vcr_loss` says of h, backend, group and samples, except
            that N = 1 is allowed. TypeError: as `vcr_loss`; if the directions or the seed require a
            gradient or are no numbers.
        RuntimeError: as `vcr_loss`.
    """
    hs = as_slices(h, least=1)
    settings = Settings(_whole("knots", knots, 2), _positive("limit", limit), bool(symmetric), bool(scale_by_n))
    chosen = resolve(backend, hs[0])
    a = _directions(hs[0], directions, seed, generator, chosen == "native")
    if group is not None:
        if chosen == "reference":
            raise ValueError("backend='reference' computes the loss of one process alone: it takes no group")
        return _over_processes(hs, settings, a, chosen, group, samples)
    return _evaluate(hs, settings, a, chosen)


class SIGRegLoss(nn.Module):
    """`sigreg` as a module, which draws other directions at each call: SIGRegLoss()(h). See `sigreg` for the arguments.

    The seed of a call is made of `seed` and the buffer `step`, the number of calls in training mode. So a run that
    resumes from a checkpoint goes on with the directions it would have had. In evaluation mode nothing is counted: all
    calls after the same training step use the same directions, and how often one validates changes nothing.

    With a group, all processes must have made as many calls. Leave the module out of torch.utils.checkpoint: its second
    forward pass would count as another call. Transforms of torch.func that take gradients allow no counting, as with
    batch norm: there use evaluation mode, or `sigreg` with a seed.
    """

    step: Tensor

    def __init__(
        self,
        directions: int = 1024,
        seed: int = 0,
        *,
        knots: int = 17,
        limit: float = 3.0,
        symmetric: bool = False,
        scale_by_n: bool = True,
        backend: Backend = "auto",
        group: Any = None,
        samples: Samples = None,
    ) -> None:
        super().__init__()
        self.directions, self.seed = _whole("directions", directions, 1), _int64(_whole("seed", seed, None))
        self.knots, self.limit = _whole("knots", knots, 2), _positive("limit", limit)
        self.symmetric, self.scale_by_n = bool(symmetric), bool(scale_by_n)
        self.backend: Backend = backend
        self.group, self.samples = group, samples
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, h: Representations) -> Tensor:
        """h: as for `sigreg`. Returns a scalar.

        In training mode the next call takes other directions; in evaluation mode it takes the same ones.
        """
        seed = splitmix(self.seed, self.step)
        if self.training:
            self.step += 1
        return sigreg(
            h,
            directions=self.directions,
            seed=seed,
            knots=self.knots,
            limit=self.limit,
            symmetric=self.symmetric,
            scale_by_n=self.scale_by_n,
            backend=self.backend,
            group=self.group,
            samples=self.samples,
        )

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"directions={self.directions}, seed={self.seed}, knots={self.knots}, limit={self.limit}"


def _whole(name: str, value: Any, least: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's are whole numbers, too
        raise TypeError(f"{name}={value!r}: a whole number is needed")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name}={number}: at least {least} is needed")
    return number


def _int64(number: int) -> int:
    """`number` modulo 2^64, as int64 holds it."""
    if -(2**63) <= number < 2**63:  # torch.compile has no larger numbers, so it must not see the next line
        return number
    return (number + 2**63) % 2**64 - 2**63


def _positive(name: str, value: Any) -> float:
    number = check_number(name, value)
    if isinstance(number, Tensor):
        raise TypeError(f"{name} is a tensor: a number is needed")
    if number <= 0:
        raise ValueError(f"{name}={value}: must be positive")
    return float(number)


def _directions(
    h: Tensor,
    directions: int | Tensor,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    native: bool,
) -> Tensor:
    """(d, K), in the dtype of the computation."""
    d, dtype = h.shape[-1], analytic.compute_dtype(h)
    sources = (seed is not None) + (generator is not None)
    if isinstance(directions, Tensor):
        if sources:
            raise ValueError("directions is a tensor, so nothing is drawn: leave out seed and generator")
        what = f"directions has shape {tuple(directions.shape)} and dtype {directions.dtype} on {directions.device}"
        if not directions.is_floating_point():
            raise TypeError(f"{what}: real numbers are needed")
        if directions.requires_grad:
            raise TypeError(f"{what} and requires a gradient, but would get none")
        if directions.ndim != 2 or directions.shape[0] != d or directions.shape[1] < 1 or directions.device != h.device:
            raise ValueError(f"{what}: (d, K) = ({d}, at least 1) on {h.device} is needed")
        return directions.to(dtype)
    count = _whole("directions", directions, 1)
    if sources != 1:
        raise ValueError(
            f"directions={count}: to draw them, give seed, another one at each call and the same on all processes, or "
            "generator. SIGRegLoss counts its calls and needs neither"
        )
    if generator is not None:
        normal = torch.randn(d, count, generator=generator, device=generator.device, dtype=torch.float32)
        return projections.unit(normal.to(h.device, dtype))
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}: one int64 is needed")
        seed = seed.reshape(()).to(h.device)
    else:
        seed = _int64(_whole("seed", seed, None))
    return projections.drawn(seed, d, count, h.device, native).to(dtype)


def _evaluate(hs: list[Tensor], settings: Settings, a: Tensor, backend: str) -> Tensor:
    """The loss of tensors (N, T, d) that hold the whole batch. a: (d, K)."""
    compiling = torch.compiler.is_compiling()
    if backend == "reference":
        h = torch.cat(hs, dim=1).to(a.dtype)
        with analytic.full_precision(h):
            return reference.sigreg(h, a, *settings)
    if transformed():
        return projections.plain(hs, a, settings, hs[0].shape[0])
    early = backend == "native" and not compiling and cpu.makes_gradients(hs[0])
    made = [early and h.requires_grad for h in hs]
    hs, work = _work(hs, backend)
    if compiling and not (torch.is_grad_enabled() and any(h.requires_grad for h in hs)):
        return projections.evaluate(settings, a, work, made, hs).loss
    return guarded([projections.SIGReg.apply(settings, a, work, made, *hs)], hs)[0]


def _work(hs: list[Tensor], backend: str, shards: distributed.Shards | None = None) -> tuple[list[Tensor], Work]:
    """How to compute it, and of which tensors: the kernels get a copy if features are not adjacent, as in vcr.py."""
    if backend == "triton":
        hs = [h if h.stride(-1) == 1 else h.contiguous() for h in hs]
    return hs, Work(backend == "native", shards, backend == "triton")


@torch._disable_dynamo  # the same as torch.compiler.disable, without importing the compiler now
def _over_processes(
    hs: list[Tensor], settings: Settings, a: Tensor, backend: str, group: Any, samples: Samples
) -> Tensor:
    hs, work = _work(hs, backend, distributed.shards(hs, group, samples, least=1))
    found: Tensor = projections.SIGReg.apply(settings, a, work, [False] * len(hs), *hs)
    return found
