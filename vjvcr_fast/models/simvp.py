"""SimVP's encoder for video files, and its mirror (section 4.4; Gao et al. 2022).

Every frame on its own: pairs of 3x3 convolutions with GroupNorm and SiLU, the second of a pair with stride 2, then a
1x1 convolution without normalisation, so that the scale of the representations is free to follow the variance hinge.
Nothing depends on the other samples of the batch. Sizes are [NS] in the paper and ours.

A frame's representation is its map by rows, the channels of a cell together: with channels_last that is a view.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

GROUPS = 2  # of GroupNorm, as SimVP has it


def _block(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, channels), nn.SiLU())


class SimVPEncoder(nn.Module):
    """Frames (N, T, C, S, S) in [0, 1] -> representations (N, T, d), d = features * (S / 2^k)^2 with k strides of 2.

    Args:
        in_channels: C. size: S, a multiple of 2^k. channels: of each of the k pairs of convolutions, even numbers.
        features: channels of the map. checkpoint: recompute activations in backward instead of keeping them.

    `map` is (features, S / 2^k, S / 2^k). Weights start as torch's convolutions do.

    Raises: ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        channels: Sequence[int] = (64, 64, 64),
        features: int = 32,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.map = check_sizes(channels, size, features)
        self.d = self.map[0] * self.map[1] * self.map[2]
        self.checkpoint = checkpoint
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_block(nn.Conv2d(a, b, 3, 1, 1), b), _block(nn.Conv2d(b, b, 3, 2, 1), b))
                for a, b in pairwise([in_channels, *channels])
            )
        )
        self.last = nn.Conv2d(channels[-1], features, 1)

    def forward(self, frames: Tensor) -> Tensor:
        n, t = frames.shape[:2]
        maps = self.last(run(self.stages, frames.flatten(0, 1), self.checkpoint and self.training))
        return maps.permute(0, 2, 3, 1).reshape(n, t, self.d)


class SimVPDecoder(nn.Module):
    """The encoder mirrored: (N, T, d) -> frames (N, T, C, S, S), unbounded. Arguments as SimVPEncoder's.

    Its input is the (predicted) representation alone; no skip from the input frames.
    """

    def __init__(
        self,
        in_channels: int,
        size: int,
        channels: Sequence[int] = (64, 64, 64),
        features: int = 32,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.map = check_sizes(channels, size, features)
        self.first = nn.Conv2d(features, channels[-1], 1)
        widths = [*reversed(channels), channels[0]]
        self.checkpoint = checkpoint
        self.stages = nn.Sequential(
            *(
                nn.Sequential(_block(nn.ConvTranspose2d(a, a, 4, 2, 1), a), _block(nn.Conv2d(a, b, 3, 1, 1), b))
                for a, b in pairwise(widths)
            )
        )
        self.last = nn.Conv2d(channels[0], in_channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        n, t = h.shape[:2]
        features, height, width = self.map
        maps = h.reshape(n * t, height, width, features).permute(0, 3, 1, 2)
        maps = run(self.stages, self.first(maps), self.checkpoint and self.training)
        return self.last(maps).unflatten(0, (n, t))


def run(modules: Iterable[nn.Module], x: Tensor, checkpoint: bool) -> Tensor:
    """The modules one after the other. checkpoint: recompute the activations inside each one in backward."""
    for module in modules:
        # Nothing in these modules is random, so that there is no generator state to restore.
        x = recompute(module, x, use_reentrant=False, preserve_rng_state=False) if checkpoint else module(x)
    return x


def check_sizes(channels: Sequence[int], size: int, features: int) -> tuple[int, int, int]:
    """(features, height, width) of a frame's map. Raises ValueError, naming the value and what is allowed, where the
    three do not make a network."""
    if not channels or min(channels) < GROUPS or any(c % GROUPS for c in channels):
        raise ValueError(f"channels={tuple(channels)}: multiples of {GROUPS}, one for each stride of 2")
    if features < 1:
        raise ValueError(f"features={features}: at least 1")
    stride = 2 ** len(channels)
    if size < stride or size % stride:
        raise ValueError(f"size={size}: frames must have a side that is a multiple of {stride}, for their strides of 2")
    return features, size // stride, size // stride
