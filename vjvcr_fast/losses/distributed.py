"""VCR of a batch that is spread over several processes: exact, with the fewest bytes that the shape allows.

Samples lie on W processes, n_r of the N on the r-th, and the loss couples all of them. It does not couple time steps,
and features only through N x N or d x d products, so nobody needs everything:

    time        all-to-all: every process receives all samples of T/W time steps, and is then on its own
    features    all-to-all over features; the Gram matrices ZZ' (T, N, N) are the sum of the processes' own
    covariance  no sample moves; the scatter matrices Z'Z (T, d, d) are the sum of the processes' own; none in backward
    gather      every process receives every sample and does all the work: what the others are measured against

Bytes that the busiest process sends or receives, forward and backward; e of an element of h, c of the computation:

    time        2 e max over r of max(n_r (T - T_r), (N - n_r) T_r) d
    features    the same with d split in the place of T, and 2 (W-1)/W c T N (N/2 + 1)
    covariance  2 (W-1)/W c T (d (d/2 + 1) + d) and c T d, the first sample
    gather      2 e (N - n_r) T d

Symmetric matrices travel as half of them. Every process reports the loss of the whole batch; its gradient is W times
that of its own samples, so that the mean over processes, which is DDP's, is the gradient of one process with it all.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from vjvcr_fast.losses import analytic

Route = Literal["auto", "time", "features", "covariance", "gather"]
Terms: TypeAlias = tuple[Tensor, Tensor, Tensor]  # loss, variance, covariance


class Shards(NamedTuple):
    """Where the samples are. samples: of every process, by its rank in `group`; rank: of this one."""

    group: Any
    rank: int
    samples: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.samples)

    @property
    def total(self) -> int:
        """N."""
        return sum(self.samples)


def share(total: int, rank: int, world: int) -> slice:
    """The rank-th of `world` nearly equal parts of range(total)."""
    small, more = divmod(total, world)
    start = rank * small + min(rank, more)
    return slice(start, start + small + (rank < more))


def shards(hs: Sequence[Tensor], group: Any, samples: Sequence[int] | Literal["equal"] | None) -> Shards:
    """hs: (n_r, T, d) each. samples: as `vcr_loss`; None asks every process, which waits for the device.

    Raises ValueError where this process is not in `group`, where samples do not fit, where processes disagree in what
    they hold; the last on all of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: torch.distributed is not initialised (torch.distributed.init_process_group)")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: this process is not in it")
    n = len(hs[0])
    counts = _ask(hs, group) if samples is None else (n,) * world if samples == "equal" else tuple(samples)
    if len(counts) != world or counts[rank] != n or min(counts) < 1:
        raise ValueError(
            f"samples={list(counts)}: one number a process, at least 1, is needed; rank {rank} of {world} has {n}"
        )
    if sum(counts) < 2:
        raise ValueError(f"samples={list(counts)}: N >= 2 is needed, the variance is over the batch")
    return Shards(group, rank, counts)


def _ask(hs: Sequence[Tensor], group: Any) -> tuple[int, ...]:
    """Everyone's number of samples. Raises ValueError, on every process, where they disagree in anything else."""
    ours = [len(hs[0]), sum(h.shape[1] for h in hs), hs[0].shape[2], analytic.DTYPES.index(hs[0].dtype)]
    mine = torch.tensor(ours, device=hs[0].device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    theirs = torch.stack(everyone).tolist()
    for name, values in zip(("T", "d", "dtype"), list(zip(*theirs, strict=True))[1:], strict=True):
        if len(set(values)) > 1:
            shown = [analytic.DTYPES[i] for i in values] if name == "dtype" else list(values)
            raise ValueError(f"h: processes disagree in {name}: {shown}, by rank")
    return tuple(row[0] for row in theirs)


def bytes_moved(route: str, samples: Sequence[int], steps: int, d: int, dtype: torch.dtype) -> float:
    """Bytes that the busiest process sends or receives for one forward and backward pass, by the table above."""
    total, world = sum(samples), len(samples)
    e, c = dtype.itemsize, max(dtype.itemsize, 4)
    ring = 2 * (world - 1) / world * c
    if route == "covariance":
        return ring * steps * (d * (d // 2 + 1) + d) + c * steps * d
    if route == "gather":
        return 2 * e * (total - min(samples)) * steps * d
    length, other = (steps, d) if route == "time" else (d, steps)
    parts = [share(length, r, world) for r in range(world)]
    most = max(
        max(n * (length - (p.stop - p.start)), (total - n) * (p.stop - p.start))
        for n, p in zip(samples, parts, strict=True)
    )
    return 2 * e * most * other + (ring * steps * total * (total // 2 + 1) if route == "features" else 0)


def choose(route: str, form: str, backend: str, hs: Sequence[Tensor], found: Shards) -> str:
    """The route of fewest bytes among those that `form` and `backend` allow, or the one that is asked for.

    "features" is of the Gram form, "covariance" of the covariance form; both are plain torch operations.
    Raises ValueError for an unknown route, and for one that form or backend rule out.
    """
    if route not in get_args(Route):
        raise ValueError(f"route={route!r}: choose one of {', '.join(get_args(Route))}")
    against = {}
    if backend not in ("auto", "torch"):
        against = dict.fromkeys(("features", "covariance"), f"backend={backend!r}")
    if form in ("gram", "covariance"):
        against["covariance" if form == "gram" else "features"] = f"form={form!r}"
    if route in against:
        raise ValueError(f"route={route!r} cannot be had with {against[route]}")
    if route != "auto":
        return route
    steps, d = sum(h.shape[1] for h in hs), hs[0].shape[2]
    allowed = [r for r in ("time", "features", "covariance") if r not in against]
    return min(allowed, key=lambda r: bytes_moved(r, found.samples, steps, d, hs[0].dtype))


def vcr(
    hs: Sequence[Tensor],
    settings: analytic.Settings,
    found: Shards,
    route: str,
    alone: Callable[[list[Tensor]], Terms],
) -> Terms:
    """(loss, variance, covariance) of the whole batch, the same on every process.

    hs: this process's (n_r, T, d) each, of one dtype. route: any but "auto". alone: the three terms of tensors
    (N, T, d) that are all here.
    """
    steps, d = sum(h.shape[1] for h in hs), hs[0].shape[2]
    if route == "gather":
        whole = _gathered(torch.cat(list(hs), dim=1), found)
        return alone([whole])
    if route == "time":
        mine = _all_to_all([_steps(hs, share(steps, q, found.world)) for q in range(found.world)], found)
        count = mine.shape[1]
        # A process without a time step still takes part in what comes back.
        terms = alone([mine]) if count else (mine.sum(dtype=analytic.compute_dtype(mine)),) * 3
        return cast(Terms, _Reported.apply(found, *(term * (count / steps) for term in terms)))
    h = torch.cat(list(hs), dim=1) if len(hs) > 1 else hs[0]
    if route == "features":
        h = _all_to_all([h[:, :, share(d, q, found.world)] for q in range(found.world)], found)
    whole_settings = settings._replace(gram=route == "features")
    return cast(Terms, _Sharded.apply(h, whole_settings, found, steps * d))


def summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the processes of `group`, the same on each; differentiable, twice too."""
    return cast(Tensor, _Sum.apply(tensor, group))


def global_mean(local_sum: Tensor, count: int, found: Shards) -> Tensor:
    """The mean over all processes of what each has the sum of. count: of elements, over all processes."""
    return cast(Terms, _Reported.apply(found, local_sum / count))[0]


class _Reported(torch.autograd.Function):
    """(found, *scalars) -> their sums over processes. Every process backpropagates through its own copy of them, all
    alike, so a gradient counts W times: no bytes move for it."""

    @staticmethod
    def forward(ctx: Any, found: Shards, *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.world = found.world
        ctx.set_materialize_grads(False)
        total = torch.stack(terms)
        dist.all_reduce(total, group=found.group)
        return total.unbind()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if g is None else g * ctx.world for g in gradients)


class _Sum(torch.autograd.Function):
    """A tensor's sum over processes, as a new tensor, the same on each; its adjoint is itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, _Sum.apply(gradient, ctx.group)), None


class _Exchange(torch.autograd.Function):
    """all_to_all of a flat tensor: `sent[q]` elements go to rank q, `received[p]` come from rank p, in their order."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sizes = sent, received, group
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.sizes
        return cast(Tensor, _Exchange.apply(gradient.contiguous(), received, sent, group)), None, None, None


def _all_to_all(parts: Sequence[Tensor], found: Shards) -> Tensor:
    """parts: (n_r, a, b) for every rank q, where what is meant for q has the same (a, b) on all processes. Returns the
    (N, a, b) meant for this one: blocks of samples come in by rank, so that they lie right without a copy."""
    _, a, b = parts[found.rank].shape
    flat = torch.cat([part.reshape(-1) for part in parts])
    sent, received = [part.numel() for part in parts], [n * a * b for n in found.samples]
    return cast(Tensor, _Exchange.apply(flat, sent, received, found.group)).view(found.total, a, b)


def _gathered(h: Tensor, found: Shards) -> Tensor:
    """(n_r, T, d) -> (N, T, d) on every process."""
    return _all_to_all([h] * found.world, found)


def _steps(hs: Sequence[Tensor], part: slice) -> Tensor:
    """Time steps part.start .. part.stop - 1 of all tensors (n, T, d) as if they were one."""
    pieces, first = [], 0
    for h in hs:
        start, stop = max(part.start - first, 0), min(part.stop - first, h.shape[1])
        if start < stop:
            pieces.append(h[:, start:stop])
        first += h.shape[1]
    if not pieces:
        return hs[0][:, :0]
    return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]


# -- Products that are sums over processes --------------------------------------------------------------------------


class _Parts(NamedTuple):
    """z: centred, (T, n, k); squares: (T, k), over all samples; product: (T, N, N) or (T, d, d) without its diagonal,
    over all processes."""

    z: Tensor
    squares: Tensor
    product: Tensor


class _Sharded(torch.autograd.Function):
    """(h, settings, found, T d) -> (loss, variance, covariance) of the whole batch. h holds all samples (N, T, d_r) of
    some features, in Gram form, or some samples (n_r, T, d) with all features, in covariance form.

    Backward needs the summed product, which forward keeps, and moves no bytes. Where it is itself differentiated it
    makes everything anew, and moves forward's again.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, settings: analytic.Settings, found: Shards, count: int) -> Terms:
        with analytic.full_precision(h):
            parts = _parts(h, settings, found)
            variance, covariance = _terms(parts, settings, found, count)
        ctx.settings, ctx.found, ctx.count = settings, found, count
        ctx.save_for_backward(h, *parts)
        ctx.set_materialize_grads(False)
        loss = torch.add(settings.alpha * variance, covariance, alpha=settings.beta)
        dtype = analytic.compute_dtype(h)
        return loss.to(dtype), variance.to(dtype), covariance.to(dtype)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, found, n = ctx.settings, ctx.found, ctx.found.total
        h, *parts = ctx.saved_tensors
        with analytic.full_precision(h):
            kept = _parts(h, settings, found) if torch.is_grad_enabled() else _Parts(*parts)
            a, b = analytic.coefficients(n, ctx.count, settings, *incoming)
            gradient = analytic.gradient_of(kept.z, kept.squares, kept.product, n, a, b, settings)
        return (gradient * found.world).transpose(0, 1).to(h.dtype), None, None, None


def _parts(h: Tensor, settings: analytic.Settings, found: Shards) -> _Parts:
    x = h.transpose(0, 1)
    if settings.gram:  # all samples are here
        z = analytic.centred(x)
        return _Parts(z, z.square().sum(dim=1), _summed(analytic.product_of(z, gram=True), found))
    z = _centred_over_processes(x, found)
    scatter = _summed(torch.bmm(z.mT, z), found)
    squares = scatter.diagonal(dim1=1, dim2=2).clone()
    scatter.diagonal(dim1=1, dim2=2).mul_(0)  # times zero: NaN stays NaN
    return _Parts(z, squares, scatter)


def _centred_over_processes(x: Tensor, found: Shards) -> Tensor:
    """x (T, n_r, d) minus its mean over all samples. Rank 0's first sample goes first, as in `analytic.centred`."""
    first = x[:, 0].detach().to(analytic.compute_dtype(x), copy=True, memory_format=torch.contiguous_format)
    dist.broadcast(first, group=found.group, group_src=0)
    z = x - first.unsqueeze(1)
    mean = summed(z.sum(dim=1), found.group) / found.total
    return z - mean.unsqueeze(1)


def _terms(parts: _Parts, settings: analytic.Settings, found: Shards, count: int) -> tuple[Tensor, Tensor]:
    """The unweighted terms. In Gram form a process knows the squares of its own features: those sums are added up."""
    squares, n = parts.squares, found.total
    hinge = analytic.hinge_sum(squares, n, settings)
    penalty = parts.product.square().sum(dim=(1, 2)).sum(dtype=torch.float64)
    if settings.gram:
        hinge, squared = summed(torch.stack([hinge, squares.square().sum(dtype=torch.float64)]), found.group)
        penalty = penalty - squared
    return hinge / count, penalty / (count * (n - 1) ** 2)


def _summed(symmetric: Tensor, found: Shards) -> Tensor:
    """The sum over processes of symmetric matrices (T, m, m), sent as half of them."""
    return unpacked(summed(packed(symmetric), found.group), symmetric.shape[-1])


def packed(symmetric: Tensor) -> Tensor:
    """(T, m, m) -> (T, k, m), k = m // 2 + 1: the first k rows from the diagonal on, and the lower triangle of the
    other rows, which fits below their diagonal."""
    m = symmetric.shape[-1]
    k = m // 2 + 1
    half = symmetric[:, :k].triu()
    half[:, 1 : m - k + 1, : m - k] += symmetric[:, k:, k:].tril()
    return half


def unpacked(half: Tensor, m: int) -> Tensor:
    """The (T, m, m) that `packed` made `half` of."""
    k = m // 2 + 1
    whole = half.new_zeros(len(half), m, m)
    whole[:, :k] = half.triu()
    whole[:, k:, k:] = half[:, 1 : m - k + 1, : m - k].tril().mT
    return whole + whole.triu(1).mT
