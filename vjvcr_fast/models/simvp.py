"""SimVP's encoder for video files and its mirror, the decoder (section 4.4 of the paper; Gao et al. 2022).

Every frame is encoded on its own, by pairs of 3x3 convolutions with GroupNorm and SiLU. The second of each pair has
stride 2. The last layer is a 1x1 convolution without normalisation, so that the scale of the representations can follow
the variance hinge. No sample depends on the others of its batch. The paper does not state sizes; these are ours.

The representation of a frame is its map row by row, with the channels of a cell side by side: in channels_last a view.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

GROUPS = 2  # of GroupNorm, as SimVP has it


def _block(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, conv.out_channels), nn.SiLU())


def _down(a: int, b: int) -> nn.Sequential:
    """A stage of the encoder: (N, a, H, W) -> (N, b, H / 2, W / 2)."""
    return nn.Sequential(_block(nn.Conv2d(a, b, 3, 1, 1)), _block(nn.Conv2d(b, b, 3, 2, 1)))


def _up(a: int, b: int) -> nn.Sequential:
    """A stage of the decoder: (N, a, H, W) -> (N, b, 2 H, 2 W)."""
    return nn.Sequential(_block(nn.ConvTranspose2d(a, a, 4, 2, 1)), _block(nn.Conv2d(a, b, 3, 1, 1)))


class SimVPEncoder(nn.Module):
    """Frames (N, T, C, S, S) in [0, 1] -> representations (N, T, d) with d = features * (S / 2^k)^2, for k stages.

    Args:
        in_channels: C.
        size: S, a multiple of 2^k.
        channels: of each of the k stages, multiples of GROUPS.
        features: channels of the map.
        checkpoint: recompute activations in backward instead of keeping them. The gradients are the same.

    `map` is (features, S / 2^k, S / 2^k). Weights start as torch's convolutions do.

    Raises ValueError for sizes that do not fit.
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
        self.stages = nn.Sequential(*(_down(a, b) for a, b in pairwise([in_channels, *channels])))
        self.last = nn.Conv2d(channels[-1], features, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (N, T, C, S, S) -> representations (N, T, d)."""
        n, t = frames.shape[:2]
        maps = self.last(run(self.stages, frames.flatten(0, 1), self.checkpoint and self.training))
        return maps.permute(0, 2, 3, 1).reshape(n, t, self.d)


class SimVPDecoder(nn.Module):
    """Representations (N, T, d) -> frames (N, T, C, S, S), unbounded. The arguments are those of SimVPEncoder.

    It sees the (predicted) representation and nothing else: there is no skip connection from the input frames.
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
        self.checkpoint = checkpoint
        self.stages = nn.Sequential(*(_up(a, b) for a, b in pairwise([*reversed(channels), channels[0]])))
        self.last = nn.Conv2d(channels[0], in_channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        """h (N, T, d) -> frames (N, T, C, S, S)."""
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
    """Returns (features, height, width) of a frame's map.

    Raises ValueError, naming the value and what is allowed, if the three do not fit.
    """
    if not channels or min(channels) < GROUPS or any(c % GROUPS for c in channels):
        raise ValueError(f"channels={tuple(channels)}: must be multiples of {GROUPS}, one for each stride of 2")
    if features < 1:
        raise ValueError(f"features={features}: must be at least 1")
    stride = 2 ** len(channels)
    if size < stride or size % stride:
        raise ValueError(f"size={size}: must be a multiple of {stride}, for {len(channels)} strides of 2")
    return features, size // stride, size // stride
