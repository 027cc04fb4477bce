"""The energy of VJ-VCR and of the generative baseline, equations (5) and (7): one model, four settings (Table 1)."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.losses import vcr_loss


class Row(NamedTuple):
    """A row of Table 1: which terms the energy has."""

    title: str
    hidden: bool  # D(Pred(h_x), h_y)
    pixel: bool  # D(Dec(Pred(h_x)), y)
    vcr: bool  # l_vcr([h_x, h_y])


ROWS = {
    "vj-vcr": Row("VJ-VCR without decoder", hidden=True, pixel=False, vcr=True),
    "vj-vcr-decoder": Row("VJ-VCR with decoder", hidden=True, pixel=True, vcr=True),
    "generative-vcr": Row("generative with VCR", hidden=False, pixel=True, vcr=True),
    "generative": Row("generative without VCR", hidden=False, pixel=True, vcr=False),
}


class Energy(NamedTuple):
    """Scalars: the energy and its terms, unweighted; a term the row does not have is zero."""

    loss: Tensor
    hidden: Tensor
    pixel: Tensor
    variance: Tensor
    covariance: Tensor


class EnergyModel(nn.Module):
    """E(x, y) = [D(Pred(h_x), h_y)] + [alpha l_var + beta l_cov of (h_x, h_y)] + [gamma D(Dec(Pred(h_x)), y)].

    D is the mean squared error over all elements. The brackets are the terms `row` has; in a generative row the pixel
    term is the prediction term and its weight is 1. x and y go through the shared encoder one after the other, so that
    no frame of y reaches h_x, not even through batch statistics. Without a hidden term and VCR, y is not encoded.

    Args:
        encoder: (N, T, C, H, W) -> (N, T, d). predictor: (N, T_x, d) -> (N, T_y, d).
        decoder: (N, T_y, d) -> (N, T_y, C, H, W), for rows with a pixel term; None otherwise.
        row: a key of ROWS. alpha, beta, gamma, threshold, eps: of the equation.

    Raises: ValueError for an unknown row, or a decoder that is missing or not wanted.
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        decoder: nn.Module | None,
        row: str,
        alpha: float,
        beta: float,
        gamma: float,
        threshold: float = 1.0,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        if row not in ROWS:
            raise ValueError(f"row={row!r}: choose one of {', '.join(ROWS)}")
        self.terms = ROWS[row]
        if self.terms.pixel != (decoder is not None):
            raise ValueError(f"row={row!r} {'needs a' if self.terms.pixel else 'has no pixel term, so no'} decoder")
        self.encoder, self.predictor, self.decoder = encoder, predictor, decoder
        self.alpha, self.beta, self.threshold, self.eps = alpha, beta, threshold, eps
        self.gamma = gamma if self.terms.hidden else 1.0

    def forward(self, x: Tensor, y: Tensor) -> Energy:
        """x (N, T_x, C, H, W), y (N, T_y, C, H, W), in [0, 1]. Returns the Energy of the batch, in float32 at least."""
        h_x = self.encoder(x)
        predicted = self.predictor(h_x)
        hidden = pixel = variance = covariance = loss = x.new_zeros(())
        if self.terms.hidden or self.terms.vcr:
            h_y = self.encoder(y)
            if self.terms.hidden:
                hidden = F.mse_loss(predicted.to(x.dtype), h_y.to(x.dtype))
                loss = loss + hidden
            if self.terms.vcr:
                vcr = vcr_loss([h_x, h_y], alpha=self.alpha, beta=self.beta, threshold=self.threshold, eps=self.eps)
                variance, covariance = vcr.variance, vcr.covariance
                loss = loss + vcr.loss
        if self.decoder is not None:
            pixel = F.mse_loss(self.decoder(predicted).to(x.dtype), y)
            loss = loss + self.gamma * pixel
        return Energy(loss, hidden, pixel, variance, covariance)

    def predict(self, x: Tensor) -> Tensor:
        """Predicted representations of the target frames, (N, T_y, d)."""
        return self.predictor(self.encoder(x))
