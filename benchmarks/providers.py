"""What the benchmarks of the losses compare, and how results are checked against the reference in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import vcr_loss

ALPHA, BETA = 25.0, 1.0
# Allowed relative errors (loss, gradient) against float64. Beyond MANY samples float32's grow with the root of N.
TOLERANCES, MANY = {"fp32": (1e-5, 1e-5), "tf32": (5e-3, 1e-2), "bf16": (1e-2, 2e-2)}, 16384
# Standard deviation of the features, below the threshold: the hinge is on, and no small difference of large numbers.
SIGMA = 0.7

Parts = Sequence[Tensor]
Provider = Callable[[Parts], Tensor]  # from the parts of h to the loss
Outputs = tuple[Tensor, ...]  # the loss, then the gradient of each part


class Case(NamedTuple):
    """(N, T, d). With several entries in `steps`, h is a sequence such as [h_x, h_y].

    target: the ratio to the eager reference that we promise on a CPU.
    """

    n: int
    steps: tuple[int, ...]
    d: int
    target: float = 0.9

    def __str__(self) -> str:
        return f"{self.n}, {'+'.join(map(str, self.steps))}, {self.d}"


# -- Providers ------------------------------------------------------------------------------------------------------


def eager_reference(parts: Parts) -> Tensor:
    return reference.vcr(_whole(parts), ALPHA, BETA)[0]


def gram_form(parts: Parts) -> Tensor:
    """What one would write who knows the identity: ||ZZ'||^2 minus the squared variances."""
    h = _whole(parts)
    n, steps, d = h.shape
    z = (h - h.mean(dim=0)).transpose(0, 1)
    variance = z.square().sum(dim=1) / (n - 1)
    hinge = torch.relu(1.0 - torch.sqrt(variance + 1e-4)).mean()
    gram = z @ z.mT / (n - 1)
    penalty = (gram.square().sum() - variance.square().sum()) / (steps * d)
    return ALPHA * hinge + BETA * penalty


def _whole(parts: Parts) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def gram_form_of(case: Case) -> Provider | str:
    """`gram_form`, or the reason why it is left out."""
    too_large = f"N > d: its {case.n} x {case.n} products are the larger ones"
    return too_large if case.n > case.d else gram_form


def ours_with(**options: Any) -> Provider:
    """`vcr_loss` with these options."""
    return lambda parts: vcr_loss(parts, alpha=ALPHA, beta=BETA, **options).loss


ours = ours_with()
ours_in_torch = ours_with(backend="torch")


def compiled(function: Provider | str) -> Provider | str:
    if isinstance(function, str):
        return function
    return torch.compile(function, fullgraph=True, dynamic=False)


# -- One pass, and what it is compared with -------------------------------------------------------------------------


def step(function: Provider, parts: Parts) -> Outputs:
    """One forward and backward pass. What it returns does not keep the graph alive."""
    loss = function(parts)
    return loss.detach(), *torch.autograd.grad(loss, parts)


def judge(parts: Parts) -> tuple[Tensor, Tensor]:
    """The reference's loss in float64, and its gradient (N, T, d) rounded to float32.

    Time steps are independent, so we take one at a time: all at once would need T d d float64 numbers several times.
    """
    h = torch.cat([part.detach() for part in parts], dim=1)
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    gradient = torch.empty(h.shape, device=h.device)
    for t in range(h.shape[1]):
        x = h[:, t : t + 1].double().requires_grad_()
        loss = reference.vcr(x, ALPHA, BETA)[0] / h.shape[1]
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
    return tuple(float(error.double().nan_to_num(nan=torch.inf)) for error in found)
