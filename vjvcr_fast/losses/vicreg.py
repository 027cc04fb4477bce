"""VICReg. Variance and covariance are computed by `vcr_loss`, to which the two branches are two time steps."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.losses import analytic, distributed
from vjvcr_fast.losses.backends import check_choice, check_number
from vjvcr_fast.losses.vcr import DIVISORS, Divisor, Samples, as_slices, check_eps, vcr_loss


class VICRegTerms(NamedTuple):
    """Four differentiable scalars: the loss, and its three terms without weights, in the convention that was chosen."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class VICRegLoss(nn.Module):
    """VICReg (arXiv 2105.04906): lambda * invariance + mu * variance + nu * covariance of two branches.

    By default this is the loss of the `lightly` package and of facebookresearch/vicreg. Invariance is the mean squared
    error; variance is the mean of the two branches' hinge means; covariance is the sum over both branches of the
    squared off-diagonal covariances, divided by d. Other code averages differently, so its weights must be converted
    (docs/math.md has a table).

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        gather_distributed: compute the loss of the batch of all processes of the default group together, as
            `vcr_loss` does with `group`. Every process returns that loss, and DDP's mean of the gradients is its
            gradient. Processes may hold different numbers of samples.
        eps: added to the variance before the square root.
        variance_branches: "mean" of the two branches' hinges, or their "sum" as in the VICReg paper and solo-learn.
        covariance_divisor: "d", or "d(d-1)", the mean over off-diagonal entries, as in eb_jepa.
        samples: with gather_distributed, how many samples each process holds; see `vcr_loss`.
        return_terms: return VICRegTerms(loss, invariance, variance, covariance) instead of the loss, for example to log
            them: loss = lambda_param * invariance + mu_param * variance + nu_param * covariance.

    Raises: ValueError if variance_branches or covariance_divisor is unknown, if a weight or eps is not finite, if
    eps < 0, or if gather_distributed is set and this torch has no torch.distributed; TypeError if a weight or eps is no
    number, or a tensor that requires a gradient.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
        *,
        variance_branches: Literal["mean", "sum"] = "mean",
        covariance_divisor: Divisor = "d",
        samples: Samples = None,
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        check_choice("variance_branches", variance_branches, ("mean", "sum"))
        check_choice("covariance_divisor", covariance_divisor, DIVISORS)
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed=True needs a torch built with torch.distributed")
        self.lambda_param = check_number("lambda_param", lambda_param)
        self.mu_param, self.nu_param = check_number("mu_param", mu_param), check_number("nu_param", nu_param)
        self.gather_distributed, self.eps, self.samples = gather_distributed, check_eps(eps), samples
        self.variance_branches, self.return_terms = variance_branches, return_terms
        self.covariance_divisor: Divisor = covariance_divisor

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor | VICRegTerms:
        """z_a, z_b: (N, ..., d), of the same shape. Returns the scalar loss, or with return_terms the four scalars.

        Raises the errors of `vcr_loss`, and ValueError if the two shapes differ.
        """
        together = self.gather_distributed and torch.distributed.is_initialized()
        if isinstance(z_a, Tensor) and isinstance(z_b, Tensor) and z_a.shape != z_b.shape:
            raise ValueError(f"z_a {tuple(z_a.shape)} and z_b {tuple(z_b.shape)} must have the same shape")
        hs = as_slices([z_a, z_b], least=1 if together else 2)
        # The branches are time steps of one call. Its terms are means of theirs.
        hinges = 2.0 if self.variance_branches == "sum" else 1.0
        group = torch.distributed.group.WORLD if together else None
        found = distributed.shards(hs, group, self.samples) if together else None
        a, b = (z.to(analytic.compute_dtype(z)) for z in (z_a, z_b))
        if found is None:
            invariance = F.mse_loss(a, b)
        else:
            count = z_a.numel() // len(z_a) * found.total
            (invariance,) = distributed.reported(found, F.mse_loss(a, b, reduction="sum") / count)
        loss, variance, covariance = vcr_loss(
            hs,
            alpha=hinges * self.mu_param,
            beta=2.0 * self.nu_param,
            eps=self.eps,
            covariance_divisor=self.covariance_divisor,
            group=group,
            samples=None if found is None else found.samples,
        )
        loss = self.lambda_param * invariance + loss
        return VICRegTerms(loss, invariance, hinges * variance, 2.0 * covariance) if self.return_terms else loss

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"lambda_param={self.lambda_param}, mu_param={self.mu_param}, nu_param={self.nu_param}"
