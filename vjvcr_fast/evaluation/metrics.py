"""Image quality (PSNR, grain) and the ranking of labels (average precision)."""

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN_MARGIN = 4  # pixels from what moves to where nothing should be drawn


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """PSNR of every frame in dB, 10 log10(1 / MSE). Reported numbers are its mean over frames and videos.

    target: (..., C, H, W) in [0, 1]. prediction: the same shape, or one that broadcasts to it; it is clipped to [0, 1].
    Returns (...). An MSE below 1e-10 counts as 1e-10, so that a perfect frame has 100 dB.
    """
    mse = (target - prediction.clamp(0, 1)).square().flatten(-3).mean(dim=-1)
    return -10 * mse.clamp_min(1e-10).log10()


def grain(prediction: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """The mean absolute difference between neighbouring pixels where the target's video is black.

    Noise that a decoder draws on empty ground is hardly seen in the PSNR, but it is the first thing one sees. Black is
    what is GRAIN_MARGIN pixels and more from all that is not 0 in any frame of the target, so that it counts as no
    grain if something is drawn at a slightly wrong place.

    prediction, target: (N, T, C, S, S). Returns the sum of differences of each time step, float64 (T,), and the number
    of differences in each.
    """
    drawn = target.amax(dim=(1, 2)).unsqueeze(1)  # (N, 1, S, S)
    black = F.max_pool2d(drawn, 2 * GRAIN_MARGIN + 1, 1, GRAIN_MARGIN)[:, :, None] == 0
    total, count = torch.zeros(target.shape[1], dtype=torch.float64, device=target.device), 0
    for dim in (-1, -2):
        size = target.shape[dim] - 1
        both = black.narrow(dim, 0, size) & black.narrow(dim, 1, size)
        total += (prediction.diff(dim=dim).abs() * both).sum(dim=(0, 2, 3, 4), dtype=torch.float64)
        count += int(both.sum()) * target.shape[2]
    return total, count


def average_precision(scores: Tensor, labels: Tensor, interpolated: bool = True) -> Tensor:
    """Average precision of one class, sum_k (R_k - R_{k-1}) P_k.

    P_k and R_k are precision and recall among the k highest scores. interpolated=True replaces P_k by the largest
    precision at recall R_k or more, as VOC (all points, since 2010) and CATER do. False takes P_k itself, as in
    scikit-learn. Equal scores count together in both.

    scores: (n,). labels: (n,) bool. Returns a float64 scalar, NaN if no label is positive.
    """
    order = scores.argsort(descending=True)
    ranked, hits = scores[order], labels[order].double().cumsum(dim=0)
    last = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])  # of equal scores
    hits, seen = hits[last], torch.arange(1, len(scores) + 1, device=scores.device)[last]
    precision, recall = hits / seen, hits / hits[-1]
    if interpolated:
        precision = precision.flip(0).cummax(dim=0).values.flip(0)
    return (torch.diff(recall, prepend=recall.new_zeros(1)) * precision).sum()


def mean_average_precision(scores: Tensor, labels: Tensor, interpolated: bool = True) -> tuple[float, list[float]]:
    """The mean over all classes with a positive label, and the average precision of each class (NaN without one).

    scores: (n, classes). labels: (n, classes) bool.
    """
    each = [average_precision(s, y, interpolated) for s, y in zip(scores.mT, labels.mT, strict=True)]
    values = torch.stack(each)
    return values.nanmean().item(), values.tolist()
