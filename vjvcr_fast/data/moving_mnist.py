"""MovingMNIST, rendered in batches on any device while training: no files, no workers, no host synchronisation.

Every video is a pure function of (seed, stream, index): its parameters are hashes of the index, its path is in
closed form and its rendering is exact in float32. Batch size, order, worker and device therefore change nothing.

Coordinates are (x, y) of the digit's top-left corner in pixels: x grows to the right, y downward, as rows do. Angles
are as in mathematics: 0 points right, positive angles turn upward on the screen, so a digit that moves at angle a
changes by speed * (cos a, -sin a) a frame.
"""

import math
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast.data.digits import Digits
from vjvcr_fast.data.hashing import key, splitmix, uniform

DIRECTIONS = 5  # psi = 2 k pi / 5, k = 0..4
STARTS = ("switch", "center")

# Positions lie on a grid of 1/256 pixel: a pixel (8 bits) times two weights (8 bits each) then fits float32's 24
# bits, so that rendering rounds nothing and no order of summation can change a bit.
SUBPIXEL_STEPS = 256


class Videos(NamedTuple):
    """N videos of T frames; S = canvas.

    frames: (N, T, 1, S, S) float32 in [0, 1]; speed: (N,) float32, pixels per frame; direction: (N,) int64, the k of
    psi = 2 k pi / 5 in stochastic videos, -1 in deterministic ones; digit: (N,) int64, the label; positions:
    (N, T, 2) float32, where the digit is drawn: its top-left corner (x, y) in pixels, multiples of 1/256.
    """

    frames: Tensor
    speed: Tensor
    direction: Tensor
    digit: Tensor
    positions: Tensor


class MovingMNIST:
    """One digit moving on a black canvas at constant speed, reflected by the walls (section 4.2).

    Deterministic: start uniform over all places where the digit is whole, direction uniform. Stochastic: to the
    right for `x_frames` frames, then from the last of them on in direction psi = 2 k pi / 5, k uniform; start="switch"
    puts the digit at the centre where it switches (frame x_frames - 1), "center" at frame 0. In both the speed is
    uniform in `speed`, in pixels per frame.

    An epoch is `len(self)` videos, every digit once, in an order of its own: video i shows digit i % len(self) of
    the order of epoch i // len(self).

    digits: drawn at `digit_size` pixels, resized once (antialiased, rounded to uint8) if that is not 28.
    x_frames: ignored by deterministic videos. subpixel: False rounds positions to whole pixels, every frame then
    holds the digit's own pixels. seed, stream: any integer, any name ("train", "validation"): videos of different
    streams have nothing in common.

    Raises ValueError for arguments out of range.
    """

    def __init__(
        self,
        digits: Digits,
        *,
        frames: int,
        canvas: int = 64,
        digit_size: int = 28,
        speed: tuple[float, float],
        stochastic: bool = False,
        x_frames: int | None = None,
        start: str = "switch",
        subpixel: bool = True,
        seed: int,
        stream: str,
        device: str | torch.device = "cpu",
    ) -> None:
        _require(len(digits) >= 1, "digits", "none", "at least 1")
        _require(frames >= 1, "frames", frames, "at least 1")
        _require(1 <= digit_size <= canvas, "digit_size", digit_size, f"between 1 and canvas = {canvas}")
        _require(0 <= speed[0] <= speed[1] < math.inf, "speed", speed, "(low, high) with 0 <= low <= high, finite")
        _require(start in STARTS, "start", start, f"one of {STARTS}")
        if stochastic:
            allowed = f"between 1 and frames = {frames} for stochastic videos"
            _require(x_frames is not None and 1 <= x_frames <= frames, "x_frames", x_frames, allowed)

        self.frames, self.canvas, self.digit_size = frames, canvas, digit_size
        self.speed, self.subpixel, self.stochastic, self.start = speed, subpixel, stochastic, start
        self.switch = x_frames - 1 if stochastic and x_frames else 0
        self.seed, self.stream, self.device = seed, stream, torch.device(device)

        self._images = _resize(digits.images, digit_size).to(self.device)
        self._labels = digits.labels.to(self.device)
        keys = [self._key(parameter) for parameter in ("speed", "direction", "x", "y")]
        self._keys = torch.tensor(keys, device=self.device)
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Videos in one epoch: the number of digits."""
        return self._images.shape[0]

    def batch(self, start_index: int, n: int) -> Videos:
        """Videos start_index .. start_index + n - 1. Raises ValueError for start_index < 0 or n < 1.

        Never waits for the device.
        """
        _require(start_index >= 0, "start_index", start_index, "at least 0")
        _require(n >= 1, "n", n, "at least 1")
        digits, end = [], start_index + n
        for epoch in range(start_index // len(self), (end - 1) // len(self) + 1):
            first = epoch * len(self)
            digits.append(self._order(epoch)[max(start_index - first, 0) : end - first])
        return self._videos(torch.arange(start_index, end, device=self.device), torch.cat(digits))

    def batches(self, step: int, n: int, rank: int = 0, world: int = 1) -> Iterator[Videos]:
        """Batches of n videos, from the step-th on, without end; of `world` processes each has n, one after another."""
        return (self.batch((k * world + rank) * n, n) for k in count(step))

    def batch_at(self, indices: Tensor) -> Videos:
        """The videos of any global indices: (N,) int64 on the CPU, since their epochs are looked up there.

        Raises ValueError for another shape, dtype or device, for N = 0 and for negative indices.
        """
        valid = indices.ndim == 1 and indices.dtype == torch.int64 and indices.device.type == "cpu"
        kind = f"{tuple(indices.shape)} {indices.dtype} on {indices.device}"
        _require(valid and len(indices) >= 1, "indices", kind, "(N,) int64 on the CPU with N >= 1")
        _require(bool(indices.min() >= 0), "indices", int(indices.min()), "at least 0")
        epochs, row = torch.unique(indices // len(self), return_inverse=True)
        orders = torch.stack([self._order(epoch) for epoch in epochs.tolist()])
        digits = orders[row.to(self.device), (indices % len(self)).to(self.device)]
        return self._videos(indices.to(self.device), digits)

    def _videos(self, indices: Tensor, digits: Tensor) -> Videos:
        """indices: (N,) int64, global; digits: (N,) int64, which digit each shows; both on the device."""
        # float64: a difference of one ulp between two devices' cosines must not reach the float32 result.
        u_speed, u_direction, u_x, u_y = uniform(self._keys, indices).unbind(dim=1)
        low, high = self.speed
        speed = low + (high - low) * u_speed
        room = self.canvas - self.digit_size
        if self.stochastic:
            direction = (u_direction * DIRECTIONS).long()
            angle = direction.double() * (2 * math.pi / DIRECTIONS)
            centre = torch.full_like(speed, room / 2)
            x = centre - speed * self.switch if self.start == "switch" else centre
            origin = torch.stack([x, centre], dim=1)
        else:
            direction = torch.full_like(indices, -1)
            angle = u_direction * (2 * math.pi)
            origin = torch.stack([u_x, u_y], dim=1) * room
        positions = _path(origin, speed, angle, self.frames, self.switch, room)
        steps = SUBPIXEL_STEPS if self.subpixel else 1
        positions = (positions * steps).round().div(steps).float()
        frames = _render(self._images[digits], positions, self.canvas)
        return Videos(frames, speed.float(), direction, self._labels[digits], positions)

    def _order(self, epoch: int) -> Tensor:
        """The order of the digits in an epoch, (M,) int64; the last two are kept."""
        order = self._orders.get(epoch)
        if order is None:
            numbers = torch.arange(len(self), device=self.device)
            # The hash is one-to-one, so nothing ties and every device sorts alike.
            order = torch.argsort(splitmix(self._key("order", epoch), numbers))
            self._orders = dict([*self._orders.items()][-1:]) | {epoch: order}
        return order

    def _key(self, *purpose: str | int) -> int:
        return key(self.seed, *purpose, self.stream)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


# -- Motion and rendering -------------------------------------------------------------------------------------------


def _reflect(position: Tensor, room: int) -> Tensor:
    """Fold a free path into [0, room]: a triangle wave of period 2 * room, as mirrors at both walls would."""
    if room == 0:
        return torch.zeros_like(position)
    return room - (torch.remainder(position, 2 * room) - room).abs()


def _path(origin: Tensor, speed: Tensor, angle: Tensor, frames: int, switch: int, room: int) -> Tensor:
    """Positions (N, T, 2) in [0, room] of digits that move right until frame `switch`, then at `angle`.

    origin: (N, 2), the place at frame 0, before reflection; speed, angle: (N,).
    """
    time = torch.arange(frames, device=origin.device, dtype=origin.dtype)[:, None]  # (T, 1)
    right = torch.stack([speed, torch.zeros_like(speed)], dim=1)[:, None]  # (N, 1, 2)
    turned = torch.stack([speed * angle.cos(), -speed * angle.sin()], dim=1)[:, None]
    # Reflected before it turns: a digit that has met a wall by then still leaves in its own direction.
    reached = _reflect(origin[:, None] + right * time.clamp(max=switch), room)
    return _reflect(reached + turned * (time - switch).clamp(min=0), room)


def _render(images: Tensor, positions: Tensor, canvas: int) -> Tensor:
    """Bilinear drawing, R @ digit @ C^T with weights R[i, a] = max(0, 1 - |i - (y + a)|), and C alike with x.

    images: (N, D, D) uint8; positions: (N, T, 2) float32. Returns (N, T, 1, S, S) float32 in [0, 1]. The products
    are exact in float32 (see SUBPIXEL_STEPS). Where the caller lets float32 products round (TF32), so do drawings
    between pixels, by 2^-11 of their value; whole-pixel ones stay exact.
    """
    N, T, _ = positions.shape
    D = images.shape[-1]
    columns, rows = (_weights(axis, canvas, D) for axis in positions.unbind(dim=2))
    with torch.autocast(images.device.type, enabled=False):  # a caller's bfloat16 must not reach the data
        drawn = (rows.view(N, T * canvas, D) @ images.float()).view(N, T, canvas, D) @ columns.mT
    # A tensor on the device, since CUDA multiplies by the reciprocal of a Python number: another last bit.
    return drawn.div_(drawn.new_full((), 255)).unsqueeze(2)


def _weights(position: Tensor, canvas: int, size: int) -> Tensor:
    """(N, T) -> (N, T, S, D): how much of the digit's row (column) a falls on the canvas' row (column) i."""
    i = torch.arange(canvas, device=position.device, dtype=position.dtype)[:, None]
    a = torch.arange(size, device=position.device, dtype=position.dtype)
    return (1 - (i - a - position[..., None, None]).abs_()).relu_()


def _resize(images: Tensor, size: int) -> Tensor:
    """(M, 28, 28) uint8 -> (M, size, size) uint8."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images[:, None].float(), size=(size, size), mode="bilinear", antialias=True)
    return resized[:, 0].round().clamp(0, 255).to(torch.uint8)
