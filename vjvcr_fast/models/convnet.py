"""The networks for MovingMNIST (section 4.4 of the paper): convolutional encoder, MLP predictor, mirrored decoder.

The paper states the depth: three spatial and then two temporal convolutions, each with batch norm and ReLU, then
average pooling; an MLP with two hidden layers. It does not state channels, kernels, strides and widths; these are ours.
Spatial convolutions have stride 2. A cell of their map sees 15 pixels with 3x3 kernels, 29 with 5x5 and 43 with 7x7.
Temporal kernels have length 3 and keep T. We pool to a `pool` x `pool` map and flatten it, because pooling to a single
cell would lose the digit's position.

Activations stay in channels_last throughout: then it takes no copy to fold time into the batch for the spatial part, or
space into one axis for the temporal part.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.latents import MLPEnergy


def _block(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


class _Replicating(nn.Conv2d):
    """A convolution over time that sees the first and the last time step once more.

    As Conv2d with padding_mode="replicate", whose gradient torch.compile takes for one with other strides, and stops.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2))


def _temporal(channels: int, padding: str) -> nn.Sequential:
    """Two convolutions over time for inputs (N, C, T, cells), which keep T. padding: "zeros" or "replicate"."""
    if padding not in ("zeros", "replicate"):
        raise ValueError(f"padding={padding!r}: must be zeros or replicate")
    kind, ends = (_Replicating, (0, 0)) if padding == "replicate" else (nn.Conv2d, (1, 0))
    conv = (kind(channels, channels, (3, 1), padding=ends, bias=False) for _ in range(2))
    return nn.Sequential(*(_block(c, channels) for c in conv))


def _over_time(temporal: nn.Module, maps: Tensor, frames: int) -> Tensor:
    """Applies `temporal`, which takes (N, C, T, cells), to maps (N T, C, H, W)."""
    _, c, h, w = maps.shape
    by_time = maps.permute(0, 2, 3, 1).reshape(-1, frames, h * w, c).permute(0, 3, 1, 2)
    return temporal(by_time).permute(0, 2, 3, 1).reshape(-1, h, w, c).permute(0, 3, 1, 2)


class ConvEncoder(nn.Module):
    """Frames (N, T, C, S, S) in [0, 1] -> representations (N, T, d) with d = channels[-1] * pool^2.

    Args:
        in_channels: C.
        channels: of the three spatial convolutions. The temporal ones have as many as the last of these.
        size: S, a multiple of 8.
        pool: side of the pooled map, a divisor of S / 8.
        norm_scale: initial scale of the last batch norm.
        kernel: side of the spatial kernels, odd.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        size: int,
        pool: int,
        norm_scale: float = 1.0,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(channels, size, pool)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel}: must be odd and above 0")
        self.d = channels[-1] * pool * pool
        widths = [in_channels, *channels]
        conv = (nn.Conv2d(a, b, kernel, 2, kernel // 2, bias=False) for a, b in pairwise(widths))
        self.spatial = nn.Sequential(*(_block(c, c.out_channels) for c in conv))
        self.temporal = _temporal(channels[-1], "zeros")
        nn.init.constant_(cast(Tensor, cast(nn.Sequential, self.temporal[-1])[1].weight), norm_scale)
        self.window = size // 8 // pool

    def forward(self, frames: Tensor) -> Tensor:
        """frames (N, T, C, S, S) -> representations (N, T, d)."""
        n, t = frames.shape[:2]
        maps = _over_time(self.temporal, self.spatial(frames.flatten(0, 1)), t)
        return F.avg_pool2d(maps, self.window).reshape(n, t, self.d)


class ConvDecoder(nn.Module):
    """Representations (N, T, d) -> frames (N, T, C, S, S), unbounded. Its spatial kernels are 4x4.

    in_channels, channels, size, pool: those of the ConvEncoder. padding: what the temporal convolutions see before the
    first frame and after the last: "zeros" or "replicate", the nearest frame once more. unpool: what makes
    size / 8 / pool cells, each way, of a place of the pooled map: "nearest", copies; or "learned", a transposed
    convolution with batch norm and ReLU. If cells are copies, the convolutions draw the same thing in all inner ones.

    It sees the (predicted) representation and nothing else: there is no skip connection from the input frames.

    Raises ValueError for sizes that do not fit, and for another padding or unpool.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        size: int,
        pool: int,
        padding: str = "zeros",
        unpool: str = "nearest",
    ) -> None:
        super().__init__()
        check_sizes(channels, size, pool)
        if unpool not in ("nearest", "learned"):
            raise ValueError(f"unpool={unpool!r}: must be nearest or learned")
        self.pool, window, c = pool, size // 8 // pool, channels[-1]
        self.unpool: nn.Module = nn.Upsample(scale_factor=window)
        if unpool == "learned":
            self.unpool = _block(nn.ConvTranspose2d(c, c, window, window, bias=False), c)
        self.temporal = _temporal(c, padding)
        widths = list(reversed(channels))
        self.spatial = nn.Sequential(
            *(_block(_upsample(a, b, bias=False), b) for a, b in pairwise(widths)),
            _upsample(widths[-1], in_channels, bias=True),
        )

    def forward(self, h: Tensor) -> Tensor:
        """h (N, T, d) -> frames (N, T, C, S, S)."""
        n, t = h.shape[:2]
        maps = h.reshape(n * t, -1, self.pool, self.pool)
        maps = self.unpool(maps).contiguous(memory_format=torch.channels_last)
        return self.spatial(_over_time(self.temporal, maps, t)).unflatten(0, (n, t))


class LatentPredictor(nn.Module):
    """A predictor that can take a latent z (N, m), which enters linearly through `latent_in`.

    The columns of `latent_in` begin with unit norm. Training keeps it if z has a penalty: otherwise the weights could
    grow and z shrink, and the penalty would do nothing. A subclass calls `add_latent` after it has drawn its other
    weights.
    """

    def add_latent(self, latent_dim: int, width: int) -> None:
        """latent_dim: m, or 0 for no latent. width: of the layer that z enters."""
        self.latent_dim = latent_dim
        if latent_dim > 0:
            self.latent_in = nn.Linear(latent_dim, width, bias=False)
            self.normalize_latent()

    @torch.no_grad()
    def normalize_latent(self) -> None:
        """Scales the columns of `latent_in` back to unit norm, in place. Without a latent does nothing."""
        if self.latent_dim > 0:
            self.latent_in.weight.copy_(F.normalize(self.latent_in.weight, dim=0))

    def check_latent(self, z: Tensor | None, n: int, width: int) -> None:
        """Raises ValueError unless z is (n, width), or None for width 0."""
        if (z is not None) != (width > 0):
            raise ValueError(f"this predictor {f'needs z ({n}, {width})' if width else 'has no latent, so takes no z'}")
        if z is not None and z.shape != (n, width):
            raise ValueError(f"z has shape {tuple(z.shape)}: {(n, width)} is needed")


class MLPPredictor(LatentPredictor):
    """h_x (N, T_x, d) -> predicted h_y (N, T_y, d), all target frames at once: two hidden layers with ReLU.

    Args:
        latent_dim: m > 0 gives it a latent z (N, m), which is concatenated to h_x. Its part of the first layer's weight
            is `latent_in`.
        heads: more than 1 gives it that many last layers. z (N, heads) weighs their outputs; a one-hot z selects one.

    Raises ValueError for both kinds of latent at once, for a z of the wrong shape, and for a z that is missing or not
    wanted.
    """

    def __init__(
        self, d: int, frames_in: int, frames_out: int, hidden: int, latent_dim: int = 0, heads: int = 1
    ) -> None:
        super().__init__()
        if latent_dim < 0 or heads < 1 or (latent_dim > 0 and heads > 1):
            raise ValueError(f"latent_dim={latent_dim}, heads={heads}: needs one latent, latent_dim > 0 or heads > 1")
        self.frames_out, self.heads = frames_out, heads
        self.layers = nn.Sequential(
            nn.Linear(frames_in * d, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            *([nn.Linear(hidden, frames_out * d)] if heads == 1 else []),
        )
        if heads > 1:
            self.last = nn.ModuleList(nn.Linear(hidden, frames_out * d) for _ in range(heads))
        self.add_latent(latent_dim, hidden)

    def forward(self, h_x: Tensor, z: Tensor | None = None) -> Tensor:
        """h_x (N, T_x, d), and z (N, m) if there is a latent -> predicted h_y (N, T_y, d)."""
        self.check_latent(z, len(h_x), self.latent_dim if self.heads == 1 else self.heads)
        if self.heads == 1 or z is None:
            return self._frames(self.layers[4](self.hidden(h_x, z)))
        u = self.hidden(h_x)
        weighted = (z[:, i, None] * last(u) for i, last in enumerate(self.last))
        return self._frames(cast(Tensor, sum(weighted)))

    def hidden(self, h_x: Tensor, z: Tensor | None = None) -> Tensor:
        """The second hidden layer, (N, hidden), from which the last layer makes its output."""
        first = self.layers[0](h_x.flatten(1))
        a = F.relu(first if z is None else first + self.latent_in(z))
        return F.relu(self.layers[2](a))

    def head(self, i: int, u: Tensor) -> Tensor:
        """Predicted h_y (N, T_y, d) of the i-th head, from u = hidden(h_x)."""
        return self._frames(self.last[i](u))

    def closed_form(self, h_x: Tensor, h_y: Tensor) -> MLPEnergy:
        """z -> the mean of (Pred(h_x, z) - h_y)^2 over T_y d, for each sample. Needs latent_dim > 0."""
        first, _, second, _, last = cast("Sequence[nn.Linear]", self.layers)
        p, w1z = first(h_x.flatten(1)), self.latent_in.weight
        return MLPEnergy(p, w1z, second.weight, second.bias, last.weight, last.bias, h_y.flatten(1))

    def _frames(self, flat: Tensor) -> Tensor:
        return flat.unflatten(1, (self.frames_out, -1))


def _upsample(a: int, b: int, bias: bool) -> nn.Module:
    return nn.ConvTranspose2d(a, b, 4, 2, 1, bias=bias)


def check_sizes(channels: Sequence[int], size: int, pool: int) -> None:
    """Raises ValueError, naming the value and what is allowed, if the three do not make a network."""
    if len(channels) != 3 or min(channels) < 1:
        raise ValueError(f"channels={tuple(channels)}: three positive numbers, one for each spatial convolution")
    if size < 8 or size % 8:
        raise ValueError(f"size={size}: must be a multiple of 8, for three strides of 2")
    if pool < 1 or (size // 8) % pool:
        raise ValueError(f"pool={pool}: must divide the {size // 8}x{size // 8} map that {size}x{size} frames give")
