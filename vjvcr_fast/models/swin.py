"""The predictor for video files: a Swin Transformer over the map of the input frames (section 4.4; Liu et al. 2021).

As in SimVP's translator, the maps of all input frames are stacked in the channels, so that a token is one cell of the
map with its whole past. Attention is within windows of cells, which every second block shifts. All target frames come
out at once, as differences from the last input frame: without these a predictor takes long to let anything through.
Depth, width, window and the differences are not stated in the paper; they are ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.models.convnet import LatentPredictor
from vjvcr_fast.models.simvp import run


class SwinPredictor(LatentPredictor):
    """h_x (N, T_x, d) -> predicted h_y (N, T_y, d), where d = C H W is a map as `SimVPEncoder` lays it out.

    Predicted h_y[t] = h_x[last] + Swin(h_x, z)[t].

    Args:
        map: (C, H, W). frames_in, frames_out: T_x, T_y.
        dim: width of a token.
        depth: number of blocks; every second one shifts its windows by half a window.
        heads: of the attention, a divisor of dim.
        window: side of a window, a divisor of H and W. If it is at least as large as both, one window covers the map
            and nothing is shifted.
        latent_dim: m > 0 gives it a latent z (N, m). A linear map of z is added to every token
            (`LatentPredictor`).
        checkpoint: recompute activations in backward instead of keeping them. The gradients are the same.

    As in Swin, weights of linear layers and the bias table are drawn from a normal distribution of std 0.02, here cut
    at 0.04.

    Raises ValueError for sizes that do not fit, for a z of the wrong shape, and for a z that is missing or not wanted.
    """

    def __init__(
        self,
        map: tuple[int, int, int],
        frames_in: int,
        frames_out: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 8,
        window: int = 4,
        latent_dim: int = 0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if latent_dim < 0:
            raise ValueError(f"latent_dim={latent_dim}: must be at least 0")
        channels, grid = map[0], map[1:]
        side = check_sizes(grid, dim, heads, window)
        self.map, self.frames_out, self.checkpoint = map, frames_out, checkpoint
        self.embed = nn.Linear(frames_in * channels, dim)
        shifts = [side[0] // 2 if i % 2 and side[0] < max(grid) else 0 for i in range(depth)]
        self.blocks = nn.ModuleList(_Block(grid, dim, heads, side, s) for s in shifts)
        self.norm = nn.LayerNorm(dim)
        self.last = nn.Linear(dim, frames_out * channels)
        self.apply(_initialise)
        self.add_latent(latent_dim, dim)

    def forward(self, h_x: Tensor, z: Tensor | None = None) -> Tensor:
        """h_x (N, T_x, d), and z (N, m) if there is a latent -> predicted h_y (N, T_y, d)."""
        self.check_latent(z, len(h_x), self.latent_dim)
        channels, height, width = self.map
        n, t = h_x.shape[:2]
        cells = h_x.reshape(n, t, height, width, channels).permute(0, 2, 3, 1, 4).flatten(3)  # (N, H, W, T_x C)
        tokens = self.embed(cells)
        if z is not None:
            tokens = tokens + self.latent_in(z)[:, None, None]
        tokens = run(self.blocks, tokens, self.checkpoint and self.training)
        out = self.last(self.norm(tokens)).unflatten(3, (self.frames_out, channels))
        return h_x[:, -1:] + out.permute(0, 3, 1, 2, 4).reshape(n, self.frames_out, -1)


class _Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)), for tokens x (N, H, W, dim)."""

    def __init__(self, grid: tuple[int, int], dim: int, heads: int, window: tuple[int, int], shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(grid, dim, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WindowAttention(nn.Module):
    """Attention among the tokens (N, H, W, dim) of a window: softmax(q k^T / sqrt(dim / heads) + B) v for every head.

    B[i, j] = table[offset from cell i to cell j], one table for each head. With a shift of s, windows begin at cell s
    and wrap around the grid. Cells from opposite sides that meet in one window do not attend to each other.

    Under torch.func transforms freeze the weights: torch's CPU kernel has no gradient for B there, and says so.
    """

    offset: Tensor
    apart: Tensor

    def __init__(self, grid: tuple[int, int], dim: int, heads: int, window: tuple[int, int], shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, offsets), std=0.02, a=-0.04, b=0.04))
        self.register_buffer("offset", _offsets(window), persistent=False)
        self.register_buffer("apart", _apart(grid, window, shift), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, H, W, dim) -> the same shape."""
        n, height, width, dim = x.shape
        a, b = self.window
        rows, columns = height // a, width // b
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        # Windows and heads together are the heads that SDPA sees, so that one bias serves all samples.
        qkv = self.qkv(x).reshape(n, rows, a, columns, b, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)  # (N, windows heads, cells, size)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias().to(q.dtype))
        out = out.reshape(n, rows, columns, self.heads, a, b, -1).permute(0, 1, 4, 2, 5, 3, 6)
        out = out.reshape(n, height, width, dim)
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return self.out(out)

    def _bias(self) -> Tensor:
        """B for all windows: (1, windows heads, cells, cells), -inf where cells do not attend to each other."""
        bias = self.table[:, self.offset]  # (heads, cells, cells)
        return bias.masked_fill(self.apart[:, None], float("-inf")).flatten(0, 1)[None]


def _offsets(window: tuple[int, int]) -> Tensor:
    """(cells, cells) int64: for each pair of cells of a window, the number of their offset in the table."""
    a, b = window
    place = torch.stack(torch.meshgrid(torch.arange(a), torch.arange(b), indexing="ij")).flatten(1)
    rows, columns = place[:, :, None] - place[:, None, :]
    return (rows + a - 1) * (2 * b - 1) + columns + b - 1


def _apart(grid: tuple[int, int], window: tuple[int, int], shift: int) -> Tensor:
    """(windows, cells, cells) bool: True for pairs that wrapping brought into one window from opposite sides."""
    (height, width), (a, b) = grid, window
    # After the shift the last `shift` rows and columns are those that wrapped around.
    rows, columns = torch.arange(height) >= height - shift, torch.arange(width) >= width - shift
    side = 2 * rows[:, None].long() + columns[None, :].long()
    cells = side.reshape(height // a, a, width // b, b).transpose(1, 2).reshape(-1, a * b)
    return cells[:, :, None] != cells[:, None, :]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)


def check_sizes(grid: tuple[int, int], dim: int, heads: int, window: int) -> tuple[int, int]:
    """Returns (height, width) of a window.

    Raises ValueError, naming the value and what is allowed, if the sizes do not fit.
    """
    if heads < 1 or dim < 1 or dim % heads:
        raise ValueError(f"heads={heads}: must divide dim={dim}, and both must be at least 1")
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1")
    if window >= max(grid):
        return grid
    if grid[0] % window or grid[1] % window:
        raise ValueError(f"window={window}: must divide the {grid[0]}x{grid[1]} map, or cover all of it")
    return window, window
