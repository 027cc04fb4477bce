"""What the benchmarks compare besides what is in vjvcr_fast/bench/loss.py: VICReg's losses, and cases with goals."""

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from vjvcr_fast.bench import loss
from vjvcr_fast.bench.loss import (  # noqa: F401
    ALPHA,
    BETA,
    SIGMA,
    SLACK,
    TOLERANCES,
    Outputs,
    Parts,
    Provider,
    compiled,
    eager_reference,
    errors,
    gram_form,
    inputs,
    of_product,
    ours,
    ours_in_torch,
    ours_with,
    smaller_form,
    step,
    tolerance,
)
from vjvcr_fast.losses import VICRegLoss

INVARIANCE = 25.0  # VICReg's weights are this, ALPHA and BETA


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


def gram_form_of(case: Case) -> Provider | str:
    """`gram_form`, or the reason why it is left out."""
    too_large = f"N > d: its {case.n} x {case.n} products are the larger ones"
    return too_large if case.n > case.d else gram_form


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
    terms = [of_product(part, gram=len(part) <= part.shape[2], beta=2 * BETA) for part in parts]
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


def judge(parts: Parts, vicreg: bool = False) -> tuple[Tensor, Tensor]:
    """As that of `loss`. vicreg: VICReg's of two branches."""
    # VICReg adds the branches' penalties, VCR takes a mean over time steps.
    total, gradient = loss.judge(parts, 2 * BETA if vicreg else BETA)
    if vicreg:
        difference = parts[0].detach()[:, 0].double() - parts[1].detach()[:, 0].double()
        total += INVARIANCE * difference.square().mean()
        by_a = 2 * INVARIANCE * difference / difference.numel()
        gradient += torch.stack((by_a, -by_a), dim=1)
    return total, gradient
