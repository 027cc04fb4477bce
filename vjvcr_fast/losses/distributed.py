"""VCR of a batch that is spread over several processes: exact, with as few bytes sent as the shape allows.

The N samples lie on W processes, n_r of them on the r-th. The loss couples all samples, but it does not couple time
steps, and features meet only in N x N or d x d products. So no process needs everything. There are four routes:

    time        all-to-all: every process gets all samples of T/W time steps and computes their terms alone
    features    all-to-all over features: the Gram matrices ZZ' (T, N, N) are sums over the processes' own products
    covariance  samples stay where they are: the matrices Z'Z (T, d, d) are sums over the processes' own products
    gather      every process gets every sample and does all the work; the others are compared with this one

Bytes that the busiest process sends or receives, forward and backward, with e bytes in an element of h and c in an
element of the computation:

    time        2 e max over r of max(n_r (T - T_r), (N - n_r) T_r) d
    features    the same with d split instead of T, and 2 (W-1)/W c T N (N/2 + 1)
    covariance  2 (W-1)/W c T (d (d/2 + 1) + d), and c T d for the first sample; nothing in backward
    gather      2 e (N - n_r) T d

Only half of a symmetric matrix is sent. Every process returns the loss of the whole batch, and W times the gradient for
its own samples. The mean over processes, which DDP takes, is then the gradient of one process with the whole batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vjvcr_fast.losses import analytic
from vjvcr_fast.losses.analytic import Moments, Settings, Terms

Route = Literal["auto", "time", "features", "covariance", "gather"]


class Shards(NamedTuple):
    """Where the samples are. rank: of this process in `group`. samples: how many each process holds, by rank."""

    group: Any
    rank: int
    samples: tuple[int, ...]

    @property
    def world(self) -> int:
        """The number of processes."""
        return len(self.samples)

    @property
    def total(self) -> int:
        """N."""
        return sum(self.samples)


def shards(
    hs: Sequence[Tensor], group: Any, samples: Sequence[int] | Literal["equal"] | None, least: int = 2
) -> Shards:
    """hs: (n_r, T, d) each. samples: see `vcr_loss`; None asks the processes, which waits for the GPU. least: of N.

    Raises ValueError if this process is not in `group`, if samples do not fit or, on every process, if the processes
    differ in T, d or dtype. The last is noticed only with samples=None.
    """
    rank, world = _place(group)
    n = len(hs[0])
    counts = _ask(hs, group) if samples is None else (n,) * world if samples == "equal" else samples
    counts = checked(counts, n, group)
    if sum(counts) < least:
        raise ValueError(f"samples={list(counts)}: N >= {least} is needed, the variance is over the batch")
    return Shards(group, rank, counts)


def checked(samples: Sequence[int], n: int, group: Any) -> tuple[int, ...]:
    """`samples` of a group of which this process has n. Raises ValueError if they do not fit."""
    (rank, world), counts = _place(group), tuple(samples)
    if len(counts) != world or counts[rank] != n or min(counts) < 1:
        raise ValueError(
            f"samples={list(counts)}: one number a process, at least 1, is needed; rank {rank} of {world} has {n}"
        )
    return counts


def _place(group: Any) -> tuple[int, int]:
    """Rank and number of processes. Raises ValueError if this process is not in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group: torch.distributed is not initialised (torch.distributed.init_process_group)")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: this process is not in it")
    return rank, world


def _ask(hs: Sequence[Tensor], group: Any) -> tuple[int, ...]:
    """The number of samples of every process. Raises ValueError on all of them if they differ in anything else."""
    ours = [len(hs[0]), sum(h.shape[1] for h in hs), hs[0].shape[2], analytic.DTYPES.index(hs[0].dtype)]
    mine = torch.tensor(ours, device=hs[0].device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    samples, steps, features, dtypes = zip(*torch.stack(everyone).tolist(), strict=True)
    for name, values in (("T", steps), ("d", features), ("dtype", [analytic.DTYPES[i] for i in dtypes])):
        if len(set(values)) > 1:
            raise ValueError(f"h: processes disagree in {name}: {list(values)}, by rank")
    return samples


def bytes_moved(route: str, samples: Sequence[int], steps: int, d: int, dtype: torch.dtype) -> float:
    """Bytes that the busiest process sends or receives in a forward and backward pass, by the table above."""
    total, world = sum(samples), len(samples)
    e, c = dtype.itemsize, max(dtype.itemsize, 4)
    ring = 2 * (world - 1) / world * c
    if route == "covariance":
        return ring * steps * (d * (d // 2 + 1) + d) + c * steps * d
    if route == "gather":
        return 2 * e * (total - min(samples)) * steps * d
    length, other = (steps, d) if route == "time" else (d, steps)
    parts = [length // world + (rank < length % world) for rank in range(world)]  # as tensor_split does
    most = max(max(n * (length - part), (total - n) * part) for n, part in zip(samples, parts, strict=True))
    return 2 * e * most * other + (ring * steps * total * (total // 2 + 1) if route == "features" else 0)


def choose(route: str, form: str, backend: str, hs: Sequence[Tensor], found: Shards) -> str:
    """`route`, or for "auto" the one that moves the fewest bytes among those that `form` and `backend` allow.

    "features" needs the Gram form and "covariance" the covariance form; both are plain torch operations.
    Raises ValueError if form or backend rule out the route.
    """
    against = {}
    if backend not in ("auto", "torch"):
        against = dict.fromkeys(("features", "covariance"), f"backend={backend!r}")
    if form != "auto":
        against["covariance" if form == "gram" else "features"] = f"form={form!r}"
    if route in against:
        raise ValueError(f"route={route!r} cannot be had with {against[route]}")
    if route != "auto":
        return route
    steps, d = sum(h.shape[1] for h in hs), hs[0].shape[2]
    allowed = [r for r in ("time", "features", "covariance") if r not in against]
    return min(allowed, key=lambda r: bytes_moved(r, found.samples, steps, d, hs[0].dtype))


@torch._disable_dynamo  # the same as torch.compiler.disable, without importing the compiler now
def vcr(
    hs: Sequence[Tensor],
    settings: Settings,
    alone: Callable[[list[Tensor]], Terms],
    backend: str,
    form: str,
    group: Any,
    samples: Sequence[int] | Literal["equal"] | None,
    route: str,
) -> Terms:
    """(loss, variance, covariance) of the whole batch, the same numbers on every process.

    hs: this process's tensors (n_r, T, d). alone: computes the three terms of tensors (N, T, d) that are all here.
    Other arguments and errors: see `vcr_loss`.
    """
    found = shards(hs, group, samples)
    route = choose(route, form, backend, hs, found)
    h = torch.cat(list(hs), dim=1) if len(hs) > 1 else hs[0]
    steps, d = h.shape[1:]
    if route == "gather":
        return alone([_all_to_all([h] * found.world, found)])
    if route == "time":
        mine = _all_to_all(h.tensor_split(found.world, dim=1), found)
        count = mine.shape[1]
        # A process that got no time step still takes part in the backward exchange.
        terms = alone([mine]) if count else (mine.sum(dtype=analytic.compute_dtype(mine)),) * 3
        return reported(found, *(term * (count / steps) for term in terms))
    if route == "features":
        h = _all_to_all(h.tensor_split(found.world, dim=2), found)
    return _Sharded.apply(h, settings._replace(gram=route == "features"), found, steps * d)


@torch._disable_dynamo
def mean_over_samples(
    h: Tensor,
    alone: Callable[[list[Tensor]], Terms],
    group: Any,
    samples: Sequence[int] | Literal["equal"] | None,
) -> Terms:
    """The terms of statistics over time, which no two samples share: each process computes those of its own.

    h: this process's (T, n_r, d). alone: computes its terms. Other arguments and errors: see `vcr_loss`.
    """
    found = shards([h.transpose(0, 1)], group, samples, least=1)
    share = h.shape[1] / found.total
    return reported(found, *(term * share for term in alone([h])))


# -- Sums and exchanges that autograd can differentiate -------------------------------------------------------------


def summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum over the processes of `group`, the same on each. Differentiable, also twice."""
    return _Sum.apply(tensor, group)


def reported(found: Shards, *terms: Tensor) -> Any:
    """The sums of scalars over processes, for results that every process differentiates in the same way.

    The gradient of each scalar is then W times the incoming one, and no bytes move in backward.
    """
    return _Reported.apply(found, *terms)


class _Reported(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Shards, *terms: Tensor) -> tuple[Tensor, ...]:
        ctx.world = found.world
        ctx.set_materialize_grads(False)
        total = torch.stack(terms)
        dist.all_reduce(total, group=found.group)
        return tuple(term.clone() for term in total)  # of views autograd forbids changes in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if g is None else g * ctx.world for g in gradients)


class _Sum(torch.autograd.Function):
    """The sum over processes as a new tensor. Its adjoint is itself."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(gradient, ctx.group), None


class _Exchange(torch.autograd.Function):
    """all_to_all of a flat tensor: sent[q] elements go to rank q, received[p] elements come from rank p, in order."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sizes = sent, received, group
        out = flat.new_empty(sum(received))
        dist.all_to_all_single(out, flat, received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.sizes
        return _Exchange.apply(gradient.contiguous(), received, sent, group), None, None, None


def _all_to_all(parts: Sequence[Tensor], found: Shards) -> Tensor:
    """Sends parts[q] (n_r, a, b) to rank q, where (a, b) depends on q only. Returns the (N, a, b) meant for this rank.

    Samples arrive by rank, so they already lie in the right order.
    """
    _, a, b = parts[found.rank].shape
    flat = torch.cat([part.reshape(-1) for part in parts])
    sent, received = [part.numel() for part in parts], [n * a * b for n in found.samples]
    return _Exchange.apply(flat, sent, received, found.group).view(found.total, a, b)


# -- Products that are sums over processes --------------------------------------------------------------------------


class _Sharded(torch.autograd.Function):
    """(h, settings, found, T d) -> (loss, variance, covariance) of the whole batch.

    In the Gram form h holds all samples of some features, (N, T, d_r); in the covariance form some samples with all
    features, (n_r, T, d). Forward keeps the summed product, so backward sends nothing. If the gradient itself is
    differentiated, everything is computed and sent again.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, settings: Settings, found: Shards, count: int) -> Terms:
        with analytic.full_precision(h):
            z, moments = _moments(h, settings, found)
            # In the Gram form every process knows the squares of its own features only. It reports the part of the
            # product's norm that is its own, too, so that all parts add up.
            total = (lambda terms: summed(terms, found.group)) if settings.gram else None
            terms = analytic.terms([moments], found.total, count, settings, total)
        ctx.settings, ctx.found, ctx.count = settings, found, count
        ctx.save_for_backward(h, z, *moments[:2])
        ctx.set_materialize_grads(False)
        return terms

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, found = ctx.settings, ctx.found
        h, z, *kept = ctx.saved_tensors
        with analytic.full_precision(h):
            z, moments = _moments(h, settings, found) if torch.is_grad_enabled() else (z, Moments(*kept))
            a, b = analytic.coefficients(found.total, ctx.count, settings, incoming)
            gradient = analytic.gradient_of(z, moments, found.total, a, b, settings)
        return (gradient * found.world).transpose(0, 1).to(h.dtype), None, None, None


def _moments(h: Tensor, settings: Settings, found: Shards) -> tuple[Tensor, Moments]:
    """The centred part of h, (T, n, k), and moments with the product of the whole batch."""
    x = h.transpose(0, 1)
    if settings.gram:
        z = analytic.centred(x)
        squares, product = z.square().sum(dim=1), _summed_symmetric(z @ z.mT, found)
    else:
        z = _centred_over_processes(x, found)
        product = _summed_symmetric(z.mT @ z, found)
        squares = product.diagonal(dim1=1, dim2=2).clone()
        product.diagonal(dim1=1, dim2=2).mul_(0)  # not zero_(): NaN must stay NaN
    norms = product.square().sum(dim=(1, 2)) / (found.world if settings.gram else 1)
    return z, Moments(squares, product, norms)


def _centred_over_processes(x: Tensor, found: Shards) -> Tensor:
    """x (T, n_r, d) minus the mean over all samples. As in `analytic.centred`, a sample goes first: rank 0's first."""
    first = x[:, 0].detach().to(analytic.compute_dtype(x), copy=True, memory_format=torch.contiguous_format)
    dist.broadcast(first, group=found.group, group_src=0)
    z = x - first.unsqueeze(1)
    mean = summed(z.sum(dim=1), found.group) / found.total
    return z - mean.unsqueeze(1)


def _summed_symmetric(symmetric: Tensor, found: Shards) -> Tensor:
    """The sum over processes of symmetric matrices (T, m, m). Half of each is sent."""
    return unpacked(summed(packed(symmetric), found.group), symmetric.shape[-1])


def packed(symmetric: Tensor) -> Tensor:
    """Half of symmetric matrices (T, m, m), as (T, k, m) with k = m // 2 + 1.

    Row i < k has its entries from the diagonal on. The lower triangle of the other rows fits below that.
    """
    m = symmetric.shape[-1]
    k = m // 2 + 1
    half = symmetric[:, :k].triu()
    half[:, 1 : m - k + 1, : m - k] += symmetric[:, k:, k:].tril()
    return half


def unpacked(half: Tensor, m: int) -> Tensor:
    """The (T, m, m) from which `packed` made `half`."""
    k = m // 2 + 1
    whole = half.new_zeros(len(half), m, m)
    whole[:, :k] = half.triu()
    whole[:, k:, k:] = half[:, 1 : m - k + 1, : m - k].tril().mT
    return whole + whole.triu(1).mT
