"""SIGReg and its gradient, from sums over samples of sines and cosines of projections.

For one time step with samples z_n (N, d) and directions a_k, let x_nk = <z_n, a_k>. For the knots t_j > 0

    D_jk = sum_n (cos(t_j x_nk) - phi_j),   S_jk = sum_n sin(t_j x_nk)

The loss, averaged over K directions and T time steps, and its gradient for the projections are, with F = N or 1,

    loss     = F / (T K N^2) sum_jk w_j (D_jk^2 + S_jk^2)
    dx_nk    = 2 F / (T K N^2) sum_j w_j t_j (S_jk cos(t_j x_nk) - D_jk sin(t_j x_nk))

and dz_n = sum_k dx_nk a_k. A knot at zero adds nothing. Knots are equispaced, so one sine and one cosine of each
projection are enough: exp(i t_{j+1} x) = exp(i t_j x) exp(i step x). Derivations and rounding: docs/math.md.

What is kept for backward are the sums, T x 2 x J x K numbers. Projections are made again, in blocks of samples and
panels of directions, so nothing of size N x K is ever whole. `SIGReg` joins all that for autograd, with the compiled
operators of csrc/sigreg_cpu.cpp, the Triton kernels of kernels/sigreg.py or the plain operations of this file.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast.data.hashing import splitmix
from vjvcr_fast.losses import analytic, distributed, ops
from vjvcr_fast.losses.analytic import full_precision

_PANEL = 256  # directions that are worked on together

Sums = Tensor  # (T, 2, J, K): D and S


class Settings(NamedTuple):
    """The quadrature: `knots` on [0, limit], or on [-limit, limit] if `symmetric`. scale_by_n: F is N, else 1."""

    knots: int = 17
    limit: float = 3.0
    symmetric: bool = False
    scale_by_n: bool = True

    @property
    def half(self) -> bool:
        """True if the knots are at 1/2, 3/2, ... steps, False if they are at 1, 2, ... steps (and at zero)."""
        return self.symmetric and self.knots % 2 == 0

    @property
    def above(self) -> int:
        """J, the number of knots above zero."""
        return self.knots // 2 if self.symmetric else self.knots - 1

    @property
    def step(self) -> float:
        """The distance of neighbouring knots."""
        return self.limit / (self.knots - 1) * (2 if self.symmetric else 1)

    def grid(self, device: torch.device) -> Tensor:
        """t, phi and w of the J knots above zero, (3, J) in float64. They stand for those below zero, too."""
        t = (torch.arange(self.above, dtype=torch.float64, device=device) + (0.5 if self.half else 1.0)) * self.step
        phi = (t * t / -2).exp()
        weights = 2 * self.step * phi
        weights[-1:] /= 2
        return torch.stack([t, phi, weights])


class Work(NamedTuple):
    """How it is computed: native, by the compiled operators; triton, by the kernels (the tensors' features are side by
    side in memory); shards, with which other processes."""

    native: bool
    shards: distributed.Shards | None = None
    triton: bool = False


def drawn(seed: int | Tensor, d: int, count: int, device: torch.device, native: bool = False) -> Tensor:
    """`count` directions in d dimensions, uniform on the sphere: (d, count) float32, columns of unit length.

    They are hashes of `seed` (int64, one element), by way of normal numbers (Box and Muller). So no generator has a
    part in them, nothing waits for a GPU, and all devices and processes get the same, up to rounding.
    """
    zero = torch.zeros((), dtype=torch.int64, device=device)
    first = splitmix(0, zero + seed)
    if native:
        return torch.ops.vjvcr.sigreg_directions_cpu(first, d, count)
    pairs = (d * count + 1) // 2
    bits = splitmix(first, torch.arange(pairs, device=device))
    # 23 bits above 0, and 24 bits of a turn: both are exact in float32.
    radius = (((bits >> 41) & 0x7FFFFF).float() + 0.5).mul_(2.0**-23).log_().mul_(-2).sqrt_()
    angle = ((bits >> 17) & 0xFFFFFF).float().mul_(2 * torch.pi * 2.0**-24)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()])[: d * count].view(d, count)
    return unit(normal)


def unit(columns: Tensor) -> Tensor:
    """The columns of a matrix, divided by their lengths."""
    return columns / columns.square().sum(dim=0).sqrt()


# -- The loss -------------------------------------------------------------------------------------------------------


def _turns(x: Tensor, grid: Tensor, half: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """cos and sin of t_j x for each knot, by the angle addition formula."""
    angle = x * grid[0, 0]
    c, s = angle.cos(), angle.sin()
    step_c, step_s = (c * c - s * s, 2 * c * s) if half else (c, s)
    yield c, s
    for _ in range(grid.shape[1] - 1):
        c, s = (c * step_c).addcmul_(s, step_s, value=-1), (s * step_c).addcmul_(c, step_s)
        yield c, s


def _blocks(h: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Samples and time steps of h (N, T, d) in blocks; `width` is how wide their panels are."""
    n, steps, d = h.shape
    if torch.compiler.is_compiling():  # the compiler fuses and splits as it likes
        yield slice(None), slice(None)
        return
    # A few arrays of half a block stay in the cache. On a GPU larger ones are faster, but should be small beside h.
    most = analytic._BLOCK // 2 if h.device.type == "cpu" else max(analytic._BLOCK, h.numel() // 16)
    budget = most // max(d, width)
    rows = max(1, min(n, budget))
    together = max(1, min(steps, budget // rows)) if rows == n else 1
    for t in range(0, steps, together):
        for start in range(0, n, rows):
            yield slice(start, start + rows), slice(t, t + together)


def _panels(directions: Tensor) -> Sequence[Tensor]:
    return (directions,) if torch.compiler.is_compiling() else directions.split(_PANEL, dim=1)


def sums_of(h: Tensor, directions: Tensor, settings: Settings, native: bool) -> Sums:
    """D and S of h (N, T, d), in the dtype of the directions (d, K)."""
    grid = settings.grid(h.device)
    if native:
        return torch.ops.vjvcr.sigreg_sums_cpu(h, directions, grid, settings.half)
    panels = _panels(directions)
    blocks = list(_blocks(h, panels[0].shape[1]))
    found = directions.new_empty(h.shape[1], 2, grid.shape[1], directions.shape[1]) if len(blocks) > 1 else None
    for samples, steps in blocks:
        z = h[samples, steps].transpose(0, 1).to(directions.dtype)
        parts = []
        for panel in panels:
            both = [torch.stack([c.sum(1), s.sum(1)], 1) for c, s in _turns(z @ panel, grid, settings.half)]
            parts.append(torch.stack(both, 2))
        whole = torch.cat(parts, dim=3)
        whole[:, 0] -= (z.shape[1] * grid[1]).to(z.dtype)[:, None]
        if found is None:
            return whole
        if samples.start:  # more samples of the same time steps
            found[steps] += whole
        else:
            found[steps] = whole
    assert found is not None
    return found


def divisor_of(settings: Settings, n: int, count: int) -> int:
    """T K N^2 / F. count: T K."""
    return count * n if settings.scale_by_n else count * n * n


def loss_of(sums: Sums, grid: Tensor, scale: float) -> Tensor:
    """The part of the loss that is of these sums: scale * sum_jk w_j (D_jk^2 + S_jk^2), in float64."""
    squares = reduce(torch.add, [each.square().sum(dim=2).double() for each in sums.unbind(1)])  # one after the other
    return (squares @ grid[2]).sum() * scale


def plain(
    hs: Sequence[Tensor],
    directions: Tensor,
    settings: Settings,
    n: int,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """The loss by operations that every transform of torch.func can follow; autograd keeps all that they make.

    n: N. total: adds up sums over processes.
    """
    grid = settings.grid(hs[0].device)
    scale = 1 / divisor_of(settings, n, sum(h.shape[1] for h in hs) * directions.shape[1])
    with full_precision(hs[0]):
        parts = [loss_of(total(plain_sums(h, directions, grid)), grid, scale) for h in hs]
        return reduce(torch.add, parts).to(directions.dtype)


def plain_sums(h: Tensor, directions: Tensor, grid: Tensor) -> Sums:
    """`sums_of` by such operations."""
    t, phi = grid[:2].to(directions.dtype)
    x = h.transpose(0, 1).to(directions.dtype) @ directions
    angles = x.unsqueeze(1) * t[:, None, None]  # (T, J, N, K)
    return torch.stack([angles.cos().sum(2) - len(h) * phi[:, None], angles.sin().sum(2)], 1)


# -- Its gradient ---------------------------------------------------------------------------------------------------


def coefficients(sums: Sums, grid: Tensor, factor: Tensor | float) -> Tensor:
    """factor * w_j t_j times S_jk and D_jk, (T, 2, J, K): what cos(t_j x) and -sin(t_j x) are multiplied with."""
    each = (grid[0] * grid[2] * factor).to(sums.dtype)
    return sums.flip(1).mul_(each[:, None])


def gradient_of(h: Tensor, directions: Tensor, settings: Settings, factors: Tensor, native: bool) -> Tensor:
    """dz for h (N, T, d), in its dtype. factors: from `coefficients`."""
    grid = settings.grid(h.device)
    if native:
        found: Tensor = torch.ops.vjvcr.sigreg_gradient_cpu(h, directions, grid, settings.half, factors)
        return found
    panels = _panels(directions)
    blocks = list(_blocks(h, panels[0].shape[1]))
    made = torch.empty_like(h) if len(blocks) > 1 else None
    for samples, steps in blocks:
        z = h[samples, steps].transpose(0, 1).to(directions.dtype)
        total: Tensor | None = None
        for panel, (a, b) in zip(panels, _of_panels(factors[steps], panels), strict=True):
            x = z @ panel
            slope = torch.zeros_like(x)
            for j, (c, s) in enumerate(_turns(x, grid, settings.half)):
                slope.addcmul_(a[:, j, None], c).addcmul_(b[:, j, None], s, value=-1)
            part = slope @ panel.mT
            total = part if total is None else total.add_(part)
        assert total is not None
        if made is None:
            return total.transpose(0, 1).to(h.dtype)
        made[samples, steps].transpose(0, 1).copy_(total)
    assert made is not None
    return made


def _of_panels(factors: Tensor, panels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each panel the factors of cos and of -sin, (T, J, its directions) each."""
    return [(part[:, 0], part[:, 1]) for part in factors.split([panel.shape[1] for panel in panels], dim=3)]


# -- For autograd ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """loss: a scalar. gradients: dloss/dh of each tensor whose `made` is true. sums: of the others."""

    loss: Tensor
    gradients: list[Tensor]
    sums: list[Tensor]


def evaluate(settings: Settings, directions: Tensor, work: Work, made: Sequence[bool], hs: Sequence[Tensor]) -> Found:
    """hs: (N, T, d) tensors. made: for which of them the operator also computes the gradient, which needs one process.

    directions: (d, K), in `compute_dtype`.
    """
    divisor = _divisor(settings, directions, work, hs)
    scale, numbers = 1 / divisor, (settings.above, settings.step, settings.half, divisor)
    parts, gradients = [], []
    sums: list[Sums] = []
    with full_precision(hs[0]):
        if work.triton and work.shards is None:
            loss, sums = ops.sigreg(hs, directions, *numbers)
            return Found(loss, [], sums)
        grid = settings.grid(hs[0].device)
        for h, make in zip(hs, made, strict=True):
            if make:
                part, gradient = torch.ops.vjvcr.sigreg_cpu(h, directions, grid, settings.half, scale)
                parts.append(part)
                gradients.append(gradient)
            elif work.triton:
                sums += ops.sigreg([h], directions, *numbers)[1]
            else:
                sums.append(sums_of(h, directions, settings, work.native))
        if work.shards is not None:
            whole = distributed.summed(torch.cat(sums), work.shards.group)
            sums = list(whole.split([h.shape[1] for h in hs]))
        parts += [loss_of(each, grid, scale) for each in sums]
        return Found(reduce(torch.add, parts).to(directions.dtype), gradients, sums)


def _divisor(settings: Settings, directions: Tensor, work: Work, hs: Sequence[Tensor]) -> int:
    n = hs[0].shape[0] if work.shards is None else work.shards.total
    return divisor_of(settings, n, sum(h.shape[1] for h in hs) * directions.shape[1])


class SIGReg(torch.autograd.Function):
    """(settings, directions, work, made, *hs) -> the loss. See `evaluate`.

    Backward multiplies the gradients that forward made by the incoming gradient. The others it computes from h and from
    the sums that forward kept.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, directions: Tensor, work: Work, made: Sequence[bool], *hs: Tensor
    ) -> Tensor:
        """hs: (N, T, d) each. Keeps hs, and the gradients that were made or else the sums."""
        needed = ctx.needs_input_grad[4:]
        found = evaluate(settings, directions, work, made, hs)
        # Either all tensors that need a gradient have one by now, or none has.
        kept = [] if any(made) else [sums for sums, need in zip(found.sums, needed, strict=True) if need]
        ctx.settings, ctx.work, ctx.needed, ctx.made, ctx.tensors = settings, work, list(needed), made, len(hs)
        ctx.save_for_backward(directions, *hs, *kept)
        if any(made):
            ctx.gradients = found.gradients
        return found.loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        """incoming: dL/dloss, a scalar. Returns dL/dh of each tensor that needs it."""
        directions, *saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no more
        hs, kept = saved[: ctx.tensors], saved[ctx.tensors :]
        if analytic.followed((incoming,)):
            found = _differentiable(ctx, directions, hs, incoming)
        elif not any(ctx.made):
            found = _from_sums(ctx, directions, hs, incoming, kept)
        else:
            made = ctx.__dict__.pop("gradients", None)  # given away once: it may be changed
            if made is None:
                made = evaluate(ctx.settings, directions, ctx.work, ctx.made, hs).gradients
            one = not torch._C._len_torch_dispatch_stack() and incoming.item() == 1
            found = made if one else [gradient.mul_(incoming) for gradient in made]
        rest = iter(found)
        return None, None, None, None, *(next(rest) if need else None for need in ctx.needed)


def _from_sums(
    ctx: Any, directions: Tensor, hs: Sequence[Tensor], incoming: Tensor, kept: Sequence[Sums]
) -> list[Tensor]:
    """The gradients of the tensors that are needed. kept: their sums."""
    settings, work = ctx.settings, ctx.work
    wanted = [h for h, need in zip(hs, ctx.needed, strict=True) if need]
    # Every process returns the whole loss, so what comes in counts it as often as there are processes.
    times, divisor = 2 * (work.shards.world if work.shards else 1), _divisor(settings, directions, work, hs)
    with full_precision(hs[0]):
        if work.triton:
            numbers = settings.above, settings.step, settings.half, times, divisor
            return ops.sigreg_backward(wanted, directions, kept, incoming, *numbers)
        grid, factor = settings.grid(hs[0].device), incoming * (times / divisor)

        def of(h: Tensor, sums: Sums) -> Tensor:
            return gradient_of(h, directions, settings, coefficients(sums, grid, factor), work.native)

        return [_by_steps(of, h, sums) for h, sums in zip(wanted, kept, strict=True)]


def _by_steps(of: Callable[[Tensor, Sums], Tensor], h: Tensor, sums: Sums) -> Tensor:
    """of(h, sums), of an eighth of the time steps at once, since coefficients are as large as the sums."""
    few = h.shape[1] // 8
    if torch.compiler.is_compiling() or few == 0:
        return of(h, sums)
    made = torch.empty_like(h)
    for to, x, part in zip(made.split(few, 1), h.split(few, 1), sums.split(few), strict=True):
        to.copy_(of(x, part))
    return made


def _differentiable(ctx: Any, directions: Tensor, hs: Sequence[Tensor], incoming: Tensor) -> list[Tensor]:
    """The same, by operations that autograd can differentiate."""
    settings, shards = ctx.settings, ctx.work.shards
    with torch.enable_grad():  # it is off while many gradients are computed at once
        views = [h.view_as(h) for h in hs]  # a tensor that is there twice has two gradients
        if shards is None:
            loss = plain(views, directions, settings, len(hs[0]))
        else:
            loss = plain(views, directions, settings, shards.total, lambda x: distributed.summed(x, shards.group))
    wanted = [view for view, need in zip(views, ctx.needed, strict=True) if need]
    return list(torch.autograd.grad(loss, wanted, incoming, create_graph=True))


# -- The Triton operator by itself, for graphs that hold it without `SIGReg` around it ------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hs, directions, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.needed = [h.requires_grad for h in hs]
    ctx.save_for_backward(directions, *hs, *output[1])


def _operator_backward(ctx: Any, incoming: Tensor, *_: Any) -> tuple[Any, ...]:
    directions, *saved = ctx.saved_tensors
    hs, kept = saved[: len(ctx.needed)], saved[len(ctx.needed) :]
    above, step, half, divisor = ctx.numbers
    n, count = len(hs[0]), sum(h.shape[1] for h in hs) * directions.shape[1]
    scaled = divisor == divisor_of(Settings(), n, count)
    ctx.settings = Settings(*((2 * above, (above - 0.5) * step) if half else (above + 1, above * step)), half, scaled)
    ctx.work = Work(False, triton=True)
    if analytic.followed((incoming,)):
        found = _differentiable(ctx, directions, hs, incoming)
    else:
        kept = [sums for sums, need in zip(kept, ctx.needed, strict=True) if need]
        found = _from_sums(ctx, directions, hs, incoming, kept)
    rest = iter(found)
    return [next(rest) if need else None for need in ctx.needed], None, None, None, None, None


ops.sigreg_operator.register_autograd(_operator_backward, setup_context=_setup_context)
