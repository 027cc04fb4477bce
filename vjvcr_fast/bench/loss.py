"""`vjvcr-fast bench`: vcr_loss against plain PyTorch, for a user's own shape. benchmarks/ compares and checks likewise.

h is given as its parts, (N, T, d) tensors with the same N and d, often one.
"""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.bench import timing
from vjvcr_fast.data.files import one_line, reason
from vjvcr_fast.losses import vcr_loss

ALPHA, BETA = 25.0, 1.0
# Allowed relative errors (loss, gradient) against float64. Beyond MANY samples float32's grow with the root of N.
TOLERANCES, MANY = {"fp32": (1e-5, 1e-5), "tf32": (5e-3, 1e-2), "bf16": (1e-2, 2e-2)}, 16384
# Standard deviation of the features, below the threshold: the hinge is on, and no small difference of large numbers.
SIGMA = 0.7

Parts = Sequence[Tensor]
Provider = Callable[[Parts], Tensor]  # from the parts of h to the loss
Outputs = tuple[Tensor, ...]  # the loss, then the gradient of each part


# -- Providers ------------------------------------------------------------------------------------------------------


def eager_reference(parts: Parts) -> Tensor:
    """The paper's formula, with covariances (T, d, d)."""
    return reference.vcr(_whole(parts), ALPHA, BETA)[0]


def gram_form(parts: Parts) -> Tensor:
    """What one would write who knows the identity: ||ZZ'||^2 minus the squared variances."""
    return of_product(_whole(parts), gram=True)


def smaller_form(parts: Parts) -> Tensor:
    """`gram_form`, or the same with Z'Z where that is smaller."""
    h = _whole(parts)
    return of_product(h, gram=h.shape[0] <= h.shape[2])


def of_product(h: Tensor, gram: bool, beta: float = BETA) -> Tensor:
    """VCR of h (N, T, d) by N x N products, or by d x d ones."""
    n, steps, d = h.shape
    z = (h - h.mean(dim=0)).transpose(0, 1)
    variance = z.square().sum(dim=1) / (n - 1)
    hinge = torch.relu(1.0 - torch.sqrt(variance + 1e-4)).mean()
    product = (z @ z.mT if gram else z.mT @ z) / (n - 1)
    penalty = (product.square().sum() - variance.square().sum()) / (steps * d)
    return ALPHA * hinge + beta * penalty


def _whole(parts: Parts) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def ours_with(**options: Any) -> Provider:
    """`vcr_loss` with these options."""
    return lambda parts: vcr_loss(parts, alpha=ALPHA, beta=BETA, **options).loss


ours = ours_with()
ours_in_torch = ours_with(backend="torch")


def compiled(function: Provider | str, dynamic: bool = False) -> Provider | str:
    """The function as torch.compile makes it. dynamic: once for all shapes, as far as torch can."""
    if isinstance(function, str):
        return function
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


# -- One pass, and what it is compared with -------------------------------------------------------------------------


def step(function: Provider, parts: Parts) -> Outputs:
    """One forward and backward pass. What it returns does not keep the graph alive."""
    loss = function(parts)
    return loss.detach(), *torch.autograd.grad(loss, parts)


def judge(parts: Parts, beta: float = BETA) -> tuple[Tensor, Tensor]:
    """The reference's loss in float64, and its gradient (N, T, d) rounded to float32, or in float64 as h is.

    Time steps are independent, so we take one at a time: all at once would need T d d float64 numbers several times.
    """
    h = torch.cat([part.detach() for part in parts], dim=1)
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    gradient = torch.empty(h.shape, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)
    for t in range(h.shape[1]):
        x = h[:, t : t + 1].double().requires_grad_()
        loss = reference.vcr(x, ALPHA, beta)[0] / h.shape[1]
        gradient[:, t : t + 1] = torch.autograd.grad(loss, x)[0]
        total += loss.detach()
    return total, gradient


def tolerance(precision: str, n: int) -> tuple[float, float]:
    """The largest `errors` allowed for N = n. precision: one of timing.PRECISIONS."""
    more = (n / MANY) ** 0.5
    loss, gradient = (max(a, b * more) for a, b in zip(TOLERANCES[precision], TOLERANCES["fp32"], strict=True))
    return loss, gradient


def errors(outputs: Outputs, loss: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient. NaN counts as infinite."""
    made = torch.cat(outputs[1:], dim=1)
    found = (outputs[0].double() - loss).abs() / loss.abs(), (made - gradient).norm() / gradient.norm()
    loss_error, gradient_error = (float(error.double().nan_to_num(nan=torch.inf)) for error in found)
    return loss_error, gradient_error


def inputs(n: int, steps: Sequence[int], d: int, dtype: torch.dtype, device: timing.Device) -> list[Parts]:
    """Copies of h, each as its parts, that together do not fit the cache. All have the same numbers, so that one
    reference result serves all."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    parts = [SIGMA * torch.randn(n, t, d, generator=generator, device=device.torch_device) for t in steps]
    parts = [part.to(dtype) for part in parts]
    count = timing.copies(sum(part.nbytes for part in parts), device.cache_bytes)
    return [[part.clone().requires_grad_() for part in parts] for _ in range(count)]


# -- The command ----------------------------------------------------------------------------------------------------

OURS = "vjvcr_fast"
DTYPES = {"float32": "fp32", "float64": "fp32", "bfloat16": "bf16", "float16": "bf16"}  # whose TOLERANCES hold
SLACK = 10.0  # plain PyTorch may be off by this many times our tolerance: it also rounds variances and sums
SECONDS, MOST_ROUNDS = 3.0, 200  # of all rounds
SLOW = 1.0  # seconds: if a way takes longer, one round has to do
LAUNCHED = 8  # passes that a GPU gets at a time, as from a training loop

Row = dict[str, Any]  # way, ms, copies, error; or way, note


class BenchError(RuntimeError):
    """There is nothing to time: our own loss is wrong here, or the shape does not fit into memory."""


def measure(
    n: int, steps: int, d: int, dtype: str, device: torch.device, say: Callable[[str], object]
) -> tuple[list[Row], float]:
    """Forward and backward of VCR of (N, T, d): a row for each way that could be timed or the reason why it was not,
    and the share of the machine that other processes used.

    Every way's loss and gradient are compared with the reference in float64 first. dtype: one of DTYPES. say: is told
    what is being done. Raises BenchError.
    """
    on = timing.current() if device.type == "cuda" else timing.Host()
    plain: dict[str, tuple[Any, int]] = {
        "plain PyTorch": (eager_reference, d),
        "plain PyTorch, compiled": (compiled(eager_reference), d),
        "smaller product": (smaller_form, min(n, d)),
        "smaller product, compiled": (compiled(smaller_form), min(n, d)),
    }
    width = getattr(torch, dtype).itemsize
    if (lacking := _lacking(8 * 4 * d * d + 16 * n * steps * d, on)) is not None:
        raise BenchError(f"({n}, {steps}, {d}): to check it takes {lacking}")
    sets, rows, regions = inputs(n, [steps], d, getattr(torch, dtype), on), list[Row](), dict[str, timing.Region]()
    judged, bounds, slowest = judge(sets[0]), tolerance(DTYPES[dtype], n), 0.0
    for number, (way, (function, side)) in enumerate((plain | {OURS: (ours, 1)}).items()):
        say(f"{way} ...")
        row: Row = {"way": way}
        rows.append(row)
        if (lacking := _lacking(4 * steps * side * side * width, on)) is not None:
            row["note"] = f"left out: it takes {lacking}"
            continue
        run = functools.partial(step, function)
        row |= _checked(functools.partial(run, sets[0]), judged, bounds, on, 1.0 if way == OURS else SLACK)
        if "note" not in row:
            slowest = max(slowest, row.pop("seconds"))
            passes = LAUNCHED if device.type == "cuda" else 1
            rotating = timing.Rotating(run, sets, number * len(sets) // (len(plain) + 1))
            regions[way] = timing.Region(functools.partial(_repeat, rotating, passes), passes)
        elif way == OURS:
            raise BenchError(f"({n}, {steps}, {d}), {dtype}: {row['note']}")
    say("timing ...")
    busy = timing.BusyElsewhere()
    times = timing.take_turns(on, regions, SECONDS, 1 if slowest > SLOW else 3, MOST_ROUNDS)
    for row in rows:
        if row["way"] in times:
            row["ms"] = timing.spread(times[row["way"]]).median
    return rows, busy.share() if device.type == "cpu" else 0.0


def _checked(
    run: Callable[[], Outputs],
    judged: tuple[Tensor, Tensor],
    bounds: tuple[float, float],
    on: timing.Device,
    slack: float,
) -> Row:
    """error, copies (peak memory over that of h) and seconds of a step; or a note that says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
            run()  # compiles
        started = on.event()
        with _silent():
            outputs, peak = timing.peak_bytes(run, on)
        ended = on.event()
    except torch.OutOfMemoryError:
        return {"note": "left out: out of memory"}
    except Exception as error:  # those of compilers have no common class
        return {"note": f"left out: {type(error).__name__}: {one_line(reason(error))}"}
    on.synchronize()
    found = errors(outputs, *judged)
    if any(error > slack * bound for error, bound in zip(found, bounds, strict=True)):
        said = ", ".join(f"{name} off by {error:.0e}" for name, error in zip(("loss", "gradient"), found, strict=True))
        return {"note": f"wrong: {said}"}
    nbytes = sum(gradient.nbytes for gradient in outputs[1:])
    return {"error": max(found), "copies": peak / nbytes, "seconds": on.milliseconds(started, ended) / 1e3}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing is written to stderr inside. torch's profiler, which measures memory, writes lines of its own there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _repeat(run: Callable[[], object], passes: int) -> None:
    for _ in range(passes):
        run()


def _lacking(needed: float, on: timing.Device) -> str | None:
    """Says what is missing if that many bytes are not free, else None."""
    free = _free(on)
    return None if needed <= free else f"some {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _free(on: timing.Device) -> float:
    if on.torch_device.type == "cuda":
        return float(torch.cuda.mem_get_info(on.torch_device)[0])
    return 1024.0 * int(re.findall(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[0])
