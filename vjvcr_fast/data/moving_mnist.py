"""MovingMNIST, rendered in batches on any device while training: no files, no workers, no synchronisation.

A video only depends on (seed, stream, index). Its parameters are hashes of the index, its path has a closed form, and
its rendering is exact in float32. So batch size, order, worker and device change nothing.

Coordinates are (x, y) of the digit's top-left corner in pixels: x grows to the right, y downward like rows. Angles are
as in mathematics: 0 points right, and positive angles turn upward on the screen. A digit that moves at angle a changes
its place by speed * (cos a, -sin a) each frame.
"""

import math
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast.data.digits import Digits
from vjvcr_fast.data.hashing import Orders, key, uniform

DIRECTIONS = 5  # psi = 2 k pi / 5, k = 0..4
STARTS = ("switch", "center")

# Positions are multiples of 1/256 pixel. A pixel (8 bits) times two weights (8 bits each) then fits into float32's 24
# bits. So rendering does not round, and the order of summation does not matter.
SUBPIXEL_STEPS = 256


class Videos(NamedTuple):
    """N videos of T frames, S = canvas pixels wide and high.

    frames: (N, T, 1, S, S) float32 in [0, 1]. speed: (N,) float32, pixels per frame. direction: (N,) int64, the k of
    psi = 2 k pi / 5 in stochastic videos, -1 in deterministic ones. digit: (N,) int64, the label. positions: (N, T, 2)
    float32, the top-left corner (x, y) of the drawn digit in pixels, multiples of 1/256.
    """

    frames: Tensor
    speed: Tensor
    direction: Tensor
    digit: Tensor
    positions: Tensor


class MovingMNIST:
    """Videos of one digit that moves on a black canvas at constant speed and is reflected by the walls (section 4.2).

    Deterministic videos start at a uniform place where the whole digit is visible, in a uniform direction. Stochastic
    videos move to the right for `x_frames` frames, and from the last of them on in direction psi = 2 k pi / 5 with
    uniform k. In both the speed is uniform in `speed`, in pixels per frame.

    An epoch is `len(self)` videos, one for each digit, in an order of its own: video i shows digit i % len(self) of the
    order of epoch i // len(self).

    digits: drawn `digit_size` pixels wide and high; resized once (antialiased, rounded to uint8) if that is not 28.
    x_frames: only for stochastic videos. start: where the digit of a stochastic video is at the centre: "switch", when
    it changes direction (frame x_frames - 1), or "center", at frame 0. subpixel: False rounds positions to whole
    pixels, so that frames contain the digit's own pixels. seed: any integer. stream: any name, such as "train"; videos
    of different streams have nothing in common.

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
        keys = [key(seed, parameter, stream) for parameter in ("speed", "direction", "x", "y")]
        self._keys = torch.tensor(keys, device=self.device)
        self._orders = Orders(len(self), seed, stream, self.device)

    def __len__(self) -> int:
        """The number of videos in an epoch, which is the number of digits."""
        return self._images.shape[0]

    def batch(self, start_index: int, n: int) -> Videos:
        """Videos start_index, ..., start_index + n - 1, without waiting for the device.

        Raises ValueError for start_index < 0 or n < 1.
        """
        _require(start_index >= 0, "start_index", start_index, "at least 0")
        _require(n >= 1, "n", n, "at least 1")
        digits, end = [], start_index + n
        for epoch in range(start_index // len(self), (end - 1) // len(self) + 1):
            first = epoch * len(self)
            digits.append(self._orders.of(epoch)[max(start_index - first, 0) : end - first])
        return self._videos(torch.arange(start_index, end, device=self.device), torch.cat(digits))

    def batches(self, step: int, n: int, rank: int = 0, world: int = 1) -> Iterator[Videos]:
        """Batches of n videos without end, from batch number `step` on. Each of `world` processes gets n other ones."""
        return (self.batch((k * world + rank) * n, n) for k in count(step))

    def batch_at(self, indices: Tensor) -> Videos:
        """The videos of the given indices, (N,) int64 on the CPU, in any order.

        Raises ValueError for another shape, dtype or device, for N = 0 and for negative indices.
        """
        valid = indices.ndim == 1 and indices.dtype == torch.int64 and indices.device.type == "cpu"
        kind = f"{tuple(indices.shape)} {indices.dtype} on {indices.device}"
        _require(valid and len(indices) >= 1, "indices", kind, "(N,) int64 on the CPU with N >= 1")
        _require(bool(indices.min() >= 0), "indices", int(indices.min()), "at least 0")
        epochs, row = torch.unique(indices // len(self), return_inverse=True)
        orders = torch.stack([self._orders.of(epoch) for epoch in epochs.tolist()])
        digits = orders[row.to(self.device), (indices % len(self)).to(self.device)]
        return self._videos(indices.to(self.device), digits)

    def _videos(self, indices: Tensor, digits: Tensor) -> Videos:
        """indices: (N,) int64. digits: (N,) int64, which digit each video shows. Both on the device."""
        # In float64: the last bit of a cosine differs between devices, and must not reach the float32 result.
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


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


# -- Motion and rendering -------------------------------------------------------------------------------------------


def _reflect(position: Tensor, room: int) -> Tensor:
    """Folds a path without walls into [0, room], as mirrors at both ends would: a triangle wave of period 2 * room."""
    if room == 0:
        return torch.zeros_like(position)
    return room - (torch.remainder(position, 2 * room) - room).abs()


def _path(origin: Tensor, speed: Tensor, angle: Tensor, frames: int, switch: int, room: int) -> Tensor:
    """Positions (N, T, 2) in [0, room] of digits that move right until frame `switch`, then at `angle`.

    origin: (N, 2), the position at frame 0, before reflection. speed, angle: (N,).
    """
    time = torch.arange(frames, device=origin.device, dtype=origin.dtype)[:, None]  # (T, 1)
    right = torch.stack([speed, torch.zeros_like(speed)], dim=1)[:, None]  # (N, 1, 2)
    turned = torch.stack([speed * angle.cos(), -speed * angle.sin()], dim=1)[:, None]
    # Reflected before it turns, so that a digit that has met a wall still leaves in the direction it was given.
    reached = _reflect(origin[:, None] + right * time.clamp(max=switch), room)
    return _reflect(reached + turned * (time - switch).clamp(min=0), room)


def _render(images: Tensor, positions: Tensor, canvas: int) -> Tensor:
    """Draws digits bilinearly: R @ digit @ C^T with weights R[i, a] = max(0, 1 - |i - (y + a)|), and C alike with x.

    images: (N, D, D) uint8. positions: (N, T, 2) float32. Returns (N, T, 1, S, S) float32 in [0, 1]. The products are
    exact in float32 (see SUBPIXEL_STEPS). If the caller allows TF32 for products, digits between pixels are rounded by
    up to 2^-11 of their value; digits at whole pixels stay exact.
    """
    N, T, _ = positions.shape
    D = images.shape[-1]
    columns, rows = (_weights(axis, canvas, D) for axis in positions.unbind(dim=2))
    with torch.autocast(images.device.type, enabled=False):  # a caller's bfloat16 must not reach the data
        drawn = (rows.view(N, T * canvas, D) @ images.float()).view(N, T, canvas, D) @ columns.mT
    # By a tensor: for a Python number, CUDA would multiply by the reciprocal, which can change the last bit.
    return drawn.div_(drawn.new_full((), 255)).unsqueeze(2)


def _weights(position: Tensor, canvas: int, size: int) -> Tensor:
    """How much of the digit's row (or column) a falls on row (or column) i of the canvas: (N, T) -> (N, T, S, D)."""
    i = torch.arange(canvas, device=position.device, dtype=position.dtype)[:, None]
    a = torch.arange(size, device=position.device, dtype=position.dtype)
    return (1 - (i - a - position[..., None, None]).abs_()).relu_()


def _resize(images: Tensor, size: int) -> Tensor:
    """Resizes (M, 28, 28) uint8 images to (M, size, size) uint8."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images[:, None].float(), size=(size, size), mode="bilinear", antialias=True)
    return resized[:, 0].round().clamp(0, 255).to(torch.uint8)
