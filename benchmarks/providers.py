"""What the benchmarks of the losses compare, and how results are checked against the reference in float64."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses import VICRegLoss, vcr_loss

ALPHA, BETA = 25.0, 1.0
INVARIANCE = 25.0  # VICReg's weights are this, ALPHA and BETA
# Allowed relative errors (loss, gradient) against float64. Beyond MANY samples float32's grow with the root of N.
TOLERANCES, MANY = {"fp32": (1e-5, 1e-5), "tf32": (5e-3, 1e-2), "bf16": (1e-2, 2e-2)}, 16384
# Standard deviation of the features, below the threshold: the hinge is on, and no small difference of large numbers.
SIGMA = 0.7

Parts = Sequence[Tensor]
Provider = Callable[[Parts], Tensor]  # from the parts of h to the loss
Outputs = tuple[Tensor, ...]  # the loss, then the gradient of each part


class Case(NamedTuple):
    """(N, T, d). With several entries in `steps`, h is a sequence such as [h_x, h_y].

    eager, plain, product: our goals on a CPU. The ratios to the eager reference and to the fastest plain PyTorch, and
    the share of the machine's rate of products; none where it is 0.
    """

    n: int
    steps: tuple[int, ...]
    d: int
    eager: float = 0.0
    plain: float = 1.0
    product: float = 0.0

    def __str__(self) -> str:
        return f"{self.n}, {'+'.join(map(str, self.steps))}, {self.d}"

    @property
    def goals(self) -> dict[str, float]:
        """The least values of a row's columns."""
        found = {"x eager": self.eager, "x plain": self.plain, "of product": self.product}
        return {column: least for column, least in found.items() if least}


# -- Providers ------------------------------------------------------------------------------------------------------


def eager_reference(parts: Parts) -> Tensor:
    return reference.vcr(_whole(parts), ALPHA, BETA)[0]


def gram_form(parts: Parts) -> Tensor:
    """What one would write who knows the identity: ||ZZ'||^2 minus the squared variances."""
    return _of_product(_whole(parts), gram=True)


def smaller_form(parts: Parts) -> Tensor:
    """`gram_form`, or the same with Z'Z where that is smaller."""
    h = _whole(parts)
    return _of_product(h, gram=h.shape[0] <= h.shape[2])


def _of_product(h: Tensor, gram: bool, beta: float = BETA) -> Tensor:
    n, steps, d = h.shape
    z = (h - h.mean(dim=0)).transpose(0, 1)
    variance = z.square().sum(dim=1) / (n - 1)
    hinge = torch.relu(1.0 - torch.sqrt(variance + 1e-4)).mean()
    product = (z @ z.mT if gram else z.mT @ z) / (n - 1)
    penalty = (product.square().sum() - variance.square().sum()) / (steps * d)
    return ALPHA * hinge + beta * penalty


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


def compiled(function: Provider | str, dynamic: bool = False) -> Provider | str:
    """dynamic: once for all shapes, as far as torch can."""
    if isinstance(function, str):
        return function
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


# -- VICReg, of two branches (N, 1, d) ------------------------------------------------------------------------------


def vicreg(parts: Parts) -> Tensor:
    """The paper's formula, a branch after the other: invariance, and each branch's hinge and covariances."""
    branches = _branches(parts)
    loss = INVARIANCE * (branches[0] - branches[1]).square().mean()
    for z in branches:
        n, d = z.shape
        hinge = torch.relu(1.0 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()
        centred = z - z.mean(dim=0)
        covariance = centred.T @ centred / (n - 1)
        off_diagonal = covariance.masked_fill(torch.eye(d, dtype=torch.bool, device=z.device), 0)
        loss = loss + ALPHA * hinge / 2 + BETA * off_diagonal.square().sum() / d
    return loss


def smaller_vicreg(parts: Parts) -> Tensor:
    """The same by the smaller products. Its mean over branches is of VCR's terms, but VICReg adds their penalties."""
    a, b = _branches(parts)
    terms = [_of_product(part, gram=len(part) <= part.shape[2], beta=2 * BETA) for part in parts]
    return INVARIANCE * (a - b).square().mean() + sum(terms) / len(terms)


def vicreg_ours(parts: Parts) -> Tensor:
    return _VICREG(*_branches(parts))


_VICREG = VICRegLoss(INVARIANCE, ALPHA, BETA)


def lightly() -> Provider | str:
    """lightly's VICRegLoss, or the reason why it is left out."""
    try:
        module = importlib.import_module("lightly.loss")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision does not fit this torch
        return f"no lightly: {error}"
    theirs = module.VICRegLoss(lambda_param=INVARIANCE, mu_param=ALPHA, nu_param=BETA)
    return lambda parts: theirs(*_branches(parts))


def _branches(parts: Parts) -> list[Tensor]:
    """(N, d) each."""
    return [part.squeeze(1) for part in parts]


# -- One pass, and what it is compared with -------------------------------------------------------------------------


def step(function: Provider, parts: Parts) -> Outputs:
    """One forward and backward pass. What it returns does not keep the graph alive."""
    loss = function(parts)
    return loss.detach(), *torch.autograd.grad(loss, parts)


def judge(parts: Parts, vicreg: bool = False) -> tuple[Tensor, Tensor]:
    """The reference's loss in float64, and its gradient (N, T, d) rounded to float32. vicreg: VICReg's of two branches.

    Time steps are independent, so we take one at a time: all at once would need T d d float64 numbers several times.
    """
    h = torch.cat([part.detach() for part in parts], dim=1)
    total = torch.zeros((), dtype=torch.float64, device=h.device)
    gradient = torch.empty(h.shape, device=h.device)
    beta = 2 * BETA if vicreg else BETA  # VICReg adds the branches' penalties, VCR takes a mean over time steps
    for t in range(h.shape[1]):
        x = h[:, t : t + 1].double().requires_grad_()
        loss = reference.vcr(x, ALPHA, beta)[0] / h.shape[1]
        gradient[:, t : t + 1] = torch.autograd.grad(loss, x)[0]
        total += loss.detach()
    if vicreg:
        difference = h[:, 0].double() - h[:, 1].double()
        total += INVARIANCE * difference.square().mean()
        by_a = 2 * INVARIANCE * difference / difference.numel()
        gradient += torch.stack((by_a, -by_a), dim=1)
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
