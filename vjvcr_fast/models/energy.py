"""The energy of VJ-VCR and of the generative baseline, equations (5) and (7), as one model.

The four rows of Table 1 are four settings of it (`ROWS`). latents/energies.py has its closed forms for finding z*.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.latents import HeadEnergy, LatentEnergy
from vjvcr_fast.losses import SIGRegLoss, vcr_loss
from vjvcr_fast.losses.analytic import compute_dtype
from vjvcr_fast.models.convnet import MLPPredictor

Infer: TypeAlias = Callable[[Tensor, Tensor | None, Tensor], Tensor]  # (h_x, h_y, y) -> z


class Row(NamedTuple):
    """A row of Table 1: its title, and which terms the energy has."""

    title: str
    hidden: bool  # D(Pred(h_x, z), h_y)
    pixel: bool  # D(Dec(Pred(h_x, z)), y)
    vcr: bool  # l_vcr([h_x, h_y]), or SIGReg in its place


ROWS = {
    "vj-vcr": Row("VJ-VCR without decoder", hidden=True, pixel=False, vcr=True),
    "vj-vcr-decoder": Row("VJ-VCR with decoder", hidden=True, pixel=True, vcr=True),
    "generative-vcr": Row("generative with VCR", hidden=False, pixel=True, vcr=True),
    "generative": Row("generative without VCR", hidden=False, pixel=True, vcr=False),
}


class Energy(NamedTuple):
    """The energy and its terms without their weights, all scalars. A term that the model does not have is zero."""

    loss: Tensor
    hidden: Tensor
    pixel: Tensor
    variance: Tensor
    covariance: Tensor
    sigreg: Tensor


class Regularised(NamedTuple):
    """What keeps representations from collapsing: `loss`, the weighted sum, and its terms as in `Energy`."""

    loss: Tensor
    variance: Tensor
    covariance: Tensor
    sigreg: Tensor


class EnergyModel(nn.Module):
    """E(x, y, z) = [D(Pred(h_x, z), h_y)] + [alpha l_var + beta l_cov of (h_x, h_y)] + [gamma D(Dec(Pred(h_x, z)), y)].

    Each bracket is a term that the `row` may or may not have. D is the squared error: its mean over videos and frames,
    and within a frame its mean (distance="mean") or its sum (distance="sum").

    gamma also says in which unit pixels are compared: values divided by a deviation s have 1 / s^2 times the error.
    Equation (7), the generative rows', has no gamma, and the paper does not say the unit of its pixels.

    With `sigreg`, sigreg_weight SIGReg(h_x, h_y) takes the place of the second bracket. Its directions are a function
    of its seed and of the number of training steps, which is a buffer of the model.

    x and y go through the same encoder one after the other, so that nothing of y reaches h_x, not even through batch
    statistics. If the encoder has batch norm, x and y have running statistics of their own, since a mixture would fit
    neither. Those of y are in `twin`, a copy of the encoder that shares its weights: whoever loads weights into the
    encoder alone must load `twin` too. If the row has neither a hidden term nor VCR, y is not encoded.

    Args:
        encoder: frames (N, T, C, H, W) -> representations (N, T, d).
        predictor: h_x (N, T_x, d), and a latent z if it has one -> predicted h_y (N, T_y, d).
        decoder: (N, T_y, d) -> frames (N, T_y, C, H, W), for a row with a pixel term; otherwise None.
        row: a key of `ROWS`.
        alpha, beta, gamma: the weights above.
        threshold, eps: of the variance hinge (`vcr_loss`).
        distance: "mean" or "sum".
        sigreg: the module of SIGReg, or None for VCR. sigreg_weight: its weight.

    Raises ValueError for an unknown row or distance, and for a decoder that is missing or not wanted.
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
        distance: str = "mean",
        sigreg: SIGRegLoss | None = None,
        sigreg_weight: float = 0.05,
    ) -> None:
        super().__init__()
        if row not in ROWS:
            raise ValueError(f"row={row!r}: choose one of {', '.join(ROWS)}")
        if distance not in ("mean", "sum"):
            raise ValueError(f"distance={distance!r}: must be mean or sum")
        self.terms, self.sums = ROWS[row], distance == "sum"
        if self.terms.pixel != (decoder is not None):
            raise ValueError(f"row={row!r} {'needs a' if self.terms.pixel else 'has no pixel term, so no'} decoder")
        self.encoder, self.predictor, self.decoder = encoder, predictor, decoder
        # If training never encodes y, there are only the statistics of x, and they serve y too.
        self.twin = _twin(encoder) if self.terms.hidden or self.terms.vcr else None
        self.register_load_state_dict_pre_hook(_without_twin)
        self.alpha, self.beta, self.gamma, self.threshold, self.eps = alpha, beta, gamma, threshold, eps
        self.sigreg, self.sigreg_weight = sigreg, sigreg_weight
        self.share(None)

    def share(self, group: Any) -> None:
        """From now on a batch is that of all processes of a group of torch.distributed, which hold equal parts of it.

        group: such a group, or None for a batch of one process.
        """
        self.group = group
        if self.sigreg is not None:
            self.sigreg.group, self.sigreg.samples = group, "equal"

    def forward(self, x: Tensor, y: Tensor, z: Tensor | Infer | None = None) -> Energy:
        """The energy of a batch, in float32 or float64.

        x: (N, T_x, C, H, W) in [0, 1]. y: (N, T_y, C, H, W) in [0, 1].
        z: the latent (N, ...) of a predictor that has one, or a function that infers it from h_x, h_y (None if the row
        has no hidden term) and y.
        """
        h_x = self.encoder(x)
        h_y = self.encode_targets(y) if self.terms.hidden or self.terms.vcr else None
        if callable(z):
            z = z(h_x, h_y if self.terms.hidden else None, y)
        predicted = self._predicted(h_x, z)
        return self.terms_of(h_x, h_y, predicted, None if self.decoder is None else self.decoder(predicted), y)

    def terms_of(self, h_x: Tensor, h_y: Tensor | None, predicted: Tensor, decoded: Tensor | None, y: Tensor) -> Energy:
        """The energy from what the networks make of a batch: h_x (N, T_x, d), h_y and predicted (N, T_y, d), decoded
        (N, T_y, C, H, W), in y's dtype or a smaller one. h_y: for a hidden term or VCR. decoded: for a pixel term."""
        hidden = pixel = variance = covariance = sigreg = loss = y.new_zeros(())
        if self.terms.hidden and h_y is not None:
            hidden = self.distance(predicted.to(y.dtype), h_y.to(y.dtype))
            loss = loss + hidden
        if self.terms.vcr and h_y is not None:
            added, variance, covariance, sigreg = self.regularise([h_x, h_y])
            loss = loss + added
        if decoded is not None:
            pixel = self.distance(decoded.to(y.dtype), y)
            loss = loss + self.gamma * pixel
        return Energy(loss, hidden, pixel, variance, covariance, sigreg)

    def encode_targets(self, y: Tensor) -> Tensor:
        """h_y (N, T_y, d) of target frames y: the encoder, with the running statistics of y if it has any."""
        return cast(Tensor, (self.encoder if self.twin is None else self.twin)(y))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """D(a, b) for two tensors (N, T, ...): a scalar."""
        mean = F.mse_loss(a, b)
        return mean * b.shape[2:].numel() if self.sums else mean

    def regularise(self, h: Sequence[Tensor]) -> Regularised:
        """VCR, or SIGReg if the model has it, of representations (N, T, d) each. In training mode SIGReg counts calls.

        The batch is that of all processes of the group (`share`).
        """
        if self.sigreg is not None:
            term = self.sigreg(h)
            none = torch.zeros_like(term)
            return Regularised(self.sigreg_weight * term, none, none, term)
        vcr = vcr_loss(
            h,
            alpha=self.alpha,
            beta=self.beta,
            threshold=self.threshold,
            eps=self.eps,
            group=self.group,
            samples="equal",
        )
        return Regularised(*vcr, torch.zeros_like(vcr.loss))

    def predict(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Predicted representations of the target frames, (N, T_y, d)."""
        return self._predicted(self.encoder(x), z)

    def latent_energy(self, h_x: Tensor, h_y: Tensor | None, y: Tensor | None = None) -> LatentEnergy:
        """The objective of equation (6): z -> (N,), the terms of each sample's energy that depend on z.

        These are the mean over T_y d of (Pred(h_x, z) - h_y)^2 if the row has a hidden term, plus gamma times the mean
        over T_y C H W of (Dec(Pred(h_x, z)) - y)^2 if it has a pixel term. VCR and SIGReg do not depend on z.

        h_x: (N, T_x, d). h_y: (N, T_y, d), for a hidden term. y: (N, T_y, C, H, W), for a pixel term.

        Returns a function whose values are float32 or float64. For an `MLPPredictor` it is, where possible, an energy
        that `vjvcr_fast.latents` can minimise faster.

        Raises ValueError if h_y or y is missing, or if distance="sum".
        """
        if self.sums:
            raise ValueError("distance=sum: a latent is inferred with distance=mean")
        hidden, decoder = self.terms.hidden, self.decoder if self.gamma != 0 else None
        if hidden and h_y is None:
            raise ValueError("h_y is missing: the row has a hidden term")
        if decoder is not None and y is None:
            raise ValueError("y is missing: the row has a pixel term")

        def energy(predicted: Tensor) -> Tensor:
            total = predicted.new_zeros(len(predicted), dtype=compute_dtype(h_x))
            if hidden and h_y is not None:
                total = total + _distances(predicted, h_y)
            if decoder is not None and y is not None:
                total = total + self.gamma * _distances(decoder(predicted), y)
            return total

        predictor = self.predictor
        whole = lambda z: energy(predictor(h_x, z))  # noqa: E731
        if type(predictor) is not MLPPredictor:  # a subclass may have another forward
            return whole
        if predictor.latent_dim > 0 and h_y is not None and decoder is None:
            return predictor.closed_form(h_x, h_y)
        if predictor.heads > 1:
            u = predictor.hidden(h_x)
            return HeadEnergy(predictor.heads, whole, lambda i: energy(predictor.head(i, u)))
        return whole

    def _predicted(self, h_x: Tensor, z: Tensor | None) -> Tensor:
        return self.predictor(h_x) if z is None else self.predictor(h_x, z)


def _twin(encoder: nn.Module) -> nn.Module | None:
    """A copy of the encoder with the same weights and its own running statistics; None if it has no statistics."""
    if not any(isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in encoder.modules()):
        return None
    return copy.deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})


def _without_twin(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Adapts an old state dict, in place, to whether there is a twin.

    Older states have one set of statistics, which then serves x and y. A twin that this row does not need is dropped.
    """
    names = [name for name in state if name.startswith(f"{prefix}twin.")]
    if model.twin is None:
        for name in names:
            del state[name]
    elif not names:
        of_encoder = f"{prefix}encoder."
        found = {name: value for name, value in state.items() if name.startswith(of_encoder)}
        state.update({f"{prefix}twin.{name.removeprefix(of_encoder)}": value for name, value in found.items()})


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared difference for every sample: (N, ...) -> (N,)."""
    dtype = compute_dtype(b)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).mean(dim=1)
