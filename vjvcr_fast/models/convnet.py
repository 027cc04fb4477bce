"""The MovingMNIST networks of the paper (section 4.4): convolutional encoder, MLP predictor, mirrored decoder.

The paper gives the depth (3 spatial then 2 temporal convolutions, batch norm and ReLU at each, then average pooling; an
MLP with 2 hidden layers) and leaves channels, kernels, strides and widths open. Ours: 3x3 kernels of stride 2 in space,
kernels of 3 in time that keep T, pooling to a `pool` x `pool` map that is flattened, since pooling to a single cell
would lose the position.

Activations stay channels_last throughout: folding time into the batch for the spatial part, or space into one axis for
the temporal part, is then a view.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _temporal(channels: int) -> nn.Sequential:
    """Two convolutions over time of (N, C, T, cells); T is kept."""
    conv = (nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False) for _ in range(2))
    return nn.Sequential(*(_block(c, channels) for c in conv))


def _over_time(temporal: nn.Module, maps: Tensor, frames: int) -> Tensor:
    """Applies `temporal`, which works on (N, C, T, cells), to maps (N T, C, H, W)."""
    _, c, h, w = maps.shape
    by_time = maps.permute(0, 2, 3, 1).reshape(-1, frames, h * w, c).permute(0, 3, 1, 2)
    return temporal(by_time).permute(0, 2, 3, 1).reshape(-1, h, w, c).permute(0, 3, 1, 2)


class ConvEncoder(nn.Module):
    """Frames (N, T, C, S, S) in [0, 1] -> representations (N, T, d), d = channels[-1] * pool^2.

    Args:
        in_channels: C. channels: of the three spatial convolutions, the last also of the temporal ones.
        size: S, a multiple of 8. pool: side of the pooled map, at most S / 8 and a divisor of it.

    Raises: ValueError for sizes that do not fit.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], size: int, pool: int) -> None:
        super().__init__()
        check_sizes(channels, size, pool)
        self.d = channels[-1] * pool * pool
        widths = [in_channels, *channels]
        self.spatial = nn.Sequential(*(_block(nn.Conv2d(a, b, 3, 2, 1, bias=False), b) for a, b in pairwise(widths)))
        self.temporal = _temporal(channels[-1])
        self.window = size // 8 // pool

    def forward(self, frames: Tensor) -> Tensor:
        n, t = frames.shape[:2]
        maps = _over_time(self.temporal, self.spatial(frames.flatten(0, 1)), t)
        return F.avg_pool2d(maps, self.window).reshape(n, t, self.d)


class ConvDecoder(nn.Module):
    """The encoder mirrored: representations (N, T, d) -> frames (N, T, C, S, S), unbounded. Arguments as ConvEncoder's.

    Its input is the (predicted) representation alone; no skip from the input frames.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], size: int, pool: int) -> None:
        super().__init__()
        check_sizes(channels, size, pool)
        self.pool, self.window = pool, size // 8 // pool
        self.temporal = _temporal(channels[-1])
        widths = list(reversed(channels))
        self.spatial = nn.Sequential(
            *(_block(_upsample(a, b, bias=False), b) for a, b in pairwise(widths)),
            _upsample(widths[-1], in_channels, bias=True),
        )

    def forward(self, h: Tensor) -> Tensor:
        n, t = h.shape[:2]
        maps = h.reshape(n * t, -1, self.pool, self.pool)
        maps = F.interpolate(maps, scale_factor=self.window).contiguous(memory_format=torch.channels_last)
        return self.spatial(_over_time(self.temporal, maps, t)).unflatten(0, (n, t))


class MLPPredictor(nn.Module):
    """h_x (N, T_x, d) -> predicted h_y (N, T_y, d): two hidden layers of ReLU, all target frames at once."""

    def __init__(self, d: int, frames_in: int, frames_out: int, hidden: int) -> None:
        super().__init__()
        self.frames_out = frames_out
        self.layers = nn.Sequential(
            nn.Linear(frames_in * d, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, frames_out * d),
        )

    def forward(self, h_x: Tensor) -> Tensor:
        return self.layers(h_x.flatten(1)).unflatten(1, (self.frames_out, -1))


def _upsample(a: int, b: int, bias: bool) -> nn.Module:
    return nn.ConvTranspose2d(a, b, 4, 2, 1, bias=bias)


def check_sizes(channels: Sequence[int], size: int, pool: int) -> None:
    """Raises ValueError, naming the value and what is allowed, where the three do not make a network."""
    if len(channels) != 3 or min(channels) < 1:
        raise ValueError(f"channels={tuple(channels)}: three positive numbers, one for each spatial convolution")
    if size < 8 or size % 8:
        raise ValueError(f"size={size}: frames must have a side that is a multiple of 8, for three strides of 2")
    if pool < 1 or (size // 8) % pool:
        raise ValueError(f"pool={pool}: must divide the {size // 8}x{size // 8} map that {size}x{size} frames give")
