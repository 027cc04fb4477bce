"""What the benchmarks of the losses compare, and how its outputs are checked: shapes, providers, the float64 judge."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import vcr_loss

ALPHA, BETA = 25.0, 1.0
# Relative, (loss, gradient), against float64; of float32 over more than MANY samples times the root of their excess.
TOLERANCES, MANY = {"fp32": (1e-5, 1e-5), "tf32": (5e-3, 1e-2), "bf16": (1e-2, 2e-2)}, 16384
SIGMA = 0.7  # of the features: below the threshold, so that the hinge is on and no small difference of large numbers

Parts = Sequence[Tensor]
Provider = Callable[[Parts], Tensor]  # the parts of h to the loss
Outputs = tuple[Tensor, ...]  # the loss and the gradient of each part


class Case(NamedTuple):
    """(N, T, d); with several entries in `steps` h is a sequence, [h_x, h_y]. target: what the project promises of our
    ratio to the eager reference on a CPU."""

    n: int
    steps: tuple[int, ...]
    d: int
    target: float = 0.9

    def __str__(self) -> str:
        return f"{self.n}, {'+'.join(map(str, self.steps))}, {self.d}"


# -- Providers ------------------------------------------------------------------------------------------------------


def eager_reference(parts: Parts) -> Tensor:
    h = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    return reference.vcr(h, ALPHA, BETA)[0]


def gram_form(parts: Parts) -> Tensor:
    """What a reader of the identity would write: ||ZZ'||^2 less the squared variances."""
    h = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    n, steps, d = h.shape
    z = (h - h.mean(dim=0)).transpose(0, 1)
    variance = z.square().sum(dim=1) / (n - 1)
    hinge = torch.relu(1.0 - torch.sqrt(variance + 1e-4)).mean()
    gram = z @ z.mT / (n - 1)
    penalty = (gram.square().sum() - variance.square().sum()) / (steps * d)
    return ALPHA * hinge + BETA * penalty


def gram_form_of(case: Case) -> Provider | str:
    """`gram_form`, or why it is left out."""
    too_large = f"N > d: its {case.n} x {case.n} products are the larger ones"
    return too_large if case.n > case.d else gram_form


def ours(parts: Parts) -> Tensor:
    return vcr_loss(parts if len(parts) > 1 else parts[0], alpha=ALPHA, beta=BETA).loss


def ours_in_forward(parts: Parts) -> Tensor:
    """The gradient is made in the forward pass."""
    return vcr_loss(parts if len(parts) > 1 else parts[0], alpha=ALPHA, beta=BETA, gradient="forward").loss


def ours_in_torch(parts: Parts) -> Tensor:
    """Plain torch operations, no kernels."""
    return vcr_loss(parts if len(parts) > 1 else parts[0], alpha=ALPHA, beta=BETA, backend="torch").loss


def compiled(function: Provider | str) -> Provider | str:
    if isinstance(function, str):
        return function
    return torch.compile(function, fullgraph=True, dynamic=False)


# -- One pass, and its judge ----------------------------------------------------------------------------------------


def step(function: Provider, parts: Parts) -> Outputs:
    """One forward and backward pass. Nothing that is returned keeps the graph alive."""
    loss = function(parts)
    return loss.detach(), *torch.autograd.grad(loss, parts)


def judge(parts: Parts) -> tuple[Tensor, Tensor]:
    """The reference's loss in float64, and its gradient (N, T, d), rounded to float32. A time step at a time: they are
    independent, and all of them at once would need d x d x T x 8 bytes several times over."""
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
    """What `errors` may be; precision is one of timing.PRECISIONS."""
    more = (n / MANY) ** 0.5
    loss, gradient = (max(a, b * more) for a, b in zip(TOLERANCES[precision], TOLERANCES["fp32"], strict=True))
    return loss, gradient


def errors(outputs: Outputs, loss: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient; NaN counts as infinite."""
    made = torch.cat(outputs[1:], dim=1)
    found = (outputs[0].double() - loss).abs() / loss.abs(), (made - gradient).norm() / gradient.norm()
    return tuple(float(error.double().nan_to_num(nan=torch.inf)) for error in found)
