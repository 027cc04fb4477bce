"""Image quality, and the ranking of labels."""

import torch
from torch import Tensor


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR of every frame in dB: 10 log10(1 / MSE), the prediction clipped to [0, 1] first.

    target: (..., C, H, W) in [0, 1]; prediction: the same shape, or one that broadcasts to it. Returns (...). Reported
    numbers are its mean over frames and videos. An MSE under 1e-10 counts as 1e-10, so that a perfect frame is 100 dB.
    """
    mse = (target - prediction.clamp(0, 1)).square().flatten(-3).mean(dim=-1)
    return -10 * mse.clamp_min(1e-10).log10()


def average_precision(scores: Tensor, labels: Tensor, interpolated: bool = True) -> Tensor:
    """Average precision of one class, a float64 scalar, NaN without a positive. scores: (n,). labels: (n,) bool.

    With precision P_k and recall R_k among the k highest scores, sum_k (R_k - R_{k-1}) P_k: interpolated=True takes the
    largest precision at R_k or beyond in the place of P_k, as VOC (all points, 2010 on) and CATER do; False takes P_k
    itself, as scikit-learn does. Equal scores enter together, in both.
    """
    order = scores.argsort(descending=True)
    ranked, hits = scores[order], labels[order].double().cumsum(dim=0)
    last = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])  # of its equals
    hits, seen = hits[last], torch.arange(1, len(scores) + 1, device=scores.device)[last]
    precision, recall = hits / seen, hits / hits[-1]
    if interpolated:
        precision = precision.flip(0).cummax(dim=0).values.flip(0)
    return (torch.diff(recall, prepend=recall.new_zeros(1)) * precision).sum()


def mean_average_precision(scores: Tensor, labels: Tensor, interpolated: bool = True) -> tuple[float, list[float]]:
    """Mean over the classes that have a positive, and each class's average precision (NaN without one).

    scores: (n, classes). labels: (n, classes) bool.
    """
    each = [average_precision(s, y, interpolated) for s, y in zip(scores.mT, labels.mT, strict=True)]
    values = torch.stack(each)
    return values.nanmean().item(), values.tolist()
