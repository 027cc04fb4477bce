"""MovingMNIST: reproducible by index alone, physically right, and drawn exactly."""

import contextlib
import math
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from vjvcr_fast.data.digits import Digits
from vjvcr_fast.data.hashing import splitmix, uniform
from vjvcr_fast.data.moving_mnist import DIRECTIONS, MovingMNIST, Videos, _reflect

GRID = 1 / 256  # positions are multiples of it


def some_digits(count: int = 12) -> Digits:
    """Random 28 x 28 images; labels that tell them apart."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    return Digits(images, torch.arange(count), "random")


def moving(digits: Digits | None = None, **settings: Any) -> MovingMNIST:
    defaults: dict[str, Any] = {"frames": 8, "speed": (2.0, 6.0), "seed": 3, "stream": "train"}
    return MovingMNIST(some_digits() if digits is None else digits, **(defaults | settings))


def stochastic(**settings: Any) -> MovingMNIST:
    return moving(**({"stochastic": True, "frames": 6, "x_frames": 3} | settings))


def points(count: int = 4096) -> Digits:
    """Single black pixels: cheap, for tests of parameters and paths."""
    return Digits(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count), "points")


def assert_same(a: Videos, b: Videos) -> None:
    for name, x, y in zip(Videos._fields, a, b, strict=True):
        assert x.equal(y), name


def join(*parts: Videos) -> Videos:
    return Videos(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def unit(direction: Tensor) -> Tensor:
    """(N,) k -> (N, 2) displacement (x to the right, y downward) of a step of one pixel."""
    angle = direction * 2 * math.pi / DIRECTIONS
    return torch.stack([angle.cos(), -angle.sin()], dim=1)


# -- Form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [moving, stochastic])
@pytest.mark.parametrize("subpixel", [True, False])
def test_shapes_dtypes_ranges(make: Any, subpixel: bool) -> None:
    data = make(subpixel=subpixel)
    videos = data.batch(5, 40)
    T = data.frames
    assert {name: tuple(field.shape) for name, field in videos._asdict().items()} == {
        "frames": (40, T, 1, 64, 64),
        "speed": (40,),
        "direction": (40,),
        "digit": (40,),
        "positions": (40, T, 2),
    }
    assert videos.frames.dtype == videos.speed.dtype == videos.positions.dtype == torch.float32
    assert videos.direction.dtype == videos.digit.dtype == torch.int64
    assert videos.frames.is_contiguous()
    assert 0 <= videos.frames.min() < videos.frames.max() <= 1
    assert 2 <= videos.speed.min() <= videos.speed.max() <= 6
    assert 0 <= videos.positions.min() <= videos.positions.max() <= 36
    assert (videos.positions * 256 % 1 == 0).all()
    assert set(videos.direction.tolist()) == (set(range(5)) if data.stochastic else {-1})


@pytest.mark.parametrize(
    ("settings", "name", "got"),
    [
        ({"frames": 0}, "frames", "0"),
        ({"digit_size": 65}, "digit_size", "65"),
        ({"digit_size": 0}, "digit_size", "0"),
        ({"canvas": 27}, "digit_size", "28"),
        ({"speed": (3.0, 2.0)}, "speed", "(3.0, 2.0)"),
        ({"speed": (-1.0, 2.0)}, "speed", "(-1.0, 2.0)"),
        ({"speed": (0.0, math.inf)}, "speed", "(0.0, inf)"),
        ({"speed": (math.nan, 2.0)}, "speed", "(nan, 2.0)"),
        ({"start": "left"}, "start", "'left'"),
        ({"stochastic": True}, "x_frames", "None"),
        ({"stochastic": True, "x_frames": 0}, "x_frames", "0"),
        ({"stochastic": True, "x_frames": 9}, "x_frames", "9"),
        ({"digits": some_digits(0)}, "digits", "'none'"),
    ],
)
def test_refused_settings(settings: dict[str, Any], name: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .+, got {re.escape(got)}$"):
        moving(**settings)


def test_refused_indices() -> None:
    data = moving()
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        data.batch(0, 0)
    with pytest.raises(ValueError, match="start_index must be at least 0, got -1"):
        data.batch(-1, 2)
    with pytest.raises(ValueError, match="indices must be at least 0, got -5"):
        data.batch_at(torch.tensor([3, -5]))
    for indices in (torch.tensor([1.0]), torch.tensor(1), torch.tensor([], dtype=torch.int64), torch.ones(2, 2).long()):
        with pytest.raises(ValueError, match=r"indices must be \(N,\) int64 on the CPU"):
            data.batch_at(indices)


# -- Reproducible by index ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [moving, stochastic])
def test_batches_and_order_change_nothing(make: Any) -> None:
    whole = make().batch(4, 30)  # epochs 0, 1 and 2 of 12 digits
    data = make()
    assert_same(whole, join(*(data.batch(4 + i, 1) for i in range(30))))
    assert_same(whole, join(data.batch(4, 13), data.batch(17, 17)))
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert_same(Videos(*(field[shuffled] for field in whole)), make().batch_at(4 + shuffled))
    assert_same(make().batch(9, 1), data.batch_at(torch.tensor([9])))
    assert_same(join(whole, whole), data.batch_at(torch.arange(4, 34).repeat(2)))


@pytest.mark.parametrize("make", [moving, stochastic])
def test_global_state_changes_nothing(make: Any) -> None:
    before = make().batch(0, 8)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        state = torch.get_rng_state()
        assert_same(before, make().batch(0, 8))
        assert state.equal(torch.get_rng_state())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(before, make().batch(0, 8))
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert_same(before, make().batch(0, 8))
    finally:
        torch.set_default_dtype(torch.float32)


def test_pickles() -> None:
    data = moving()
    data.batch(0, 4)
    assert_same(data.batch(2, 20), pickle.loads(pickle.dumps(data)).batch(2, 20))


def test_an_epoch_is_every_digit_once() -> None:
    data = moving(points(101), canvas=32)
    assert len(data) == 101
    videos = data.batch(0, 404)
    assert videos.speed.unique().numel() == 404
    labels = videos.digit.view(4, 101)
    assert labels.sort(dim=1).values.equal(torch.arange(101).expand(4, 101))
    assert len({tuple(row) for row in labels.tolist()}) == 4
    assert len(data._orders.kept) == 2
    assert data.batch(101, 101).digit.equal(labels[1])


def test_orders_areuniform() -> None:
    """Every digit is equally often first: 6 digits, 600 epochs, counts of mean 100 and deviation 9.1."""
    first = moving(some_digits(6), canvas=28, frames=1).batch_at(torch.arange(600) * 6).digit
    assert (first.bincount(minlength=6) - 100).abs().max() < 5 * 9.1


@pytest.mark.parametrize("other", [{"stream": "validation"}, {"seed": 4}, {"seed": -3}])
def test_streams_and_seeds_differ(other: dict[str, Any]) -> None:
    a, b = moving(points(512), canvas=32).batch(0, 512), moving(points(512), canvas=32, **other).batch(0, 512)
    assert not (a.speed == b.speed).any()
    assert (a.digit == b.digit).float().mean() < 0.05
    correlation = torch.corrcoef(torch.stack([a.speed, b.speed]))[0, 1]
    assert correlation.abs() < 5 / math.sqrt(512)


def test_large_indices() -> None:
    data = moving(frames=20)
    for start in (10**9 - 5, 10**15):
        videos = data.batch(start, 24)
        assert_same(videos, data.batch_at(torch.arange(start, start + 24)))
        assert videos.speed.unique().numel() == 24
        assert 0 <= videos.positions.min() <= videos.positions.max() <= 36


# -- The hash -------------------------------------------------------------------------------------------------------


def test_hash_is_splitmix64() -> None:
    """The first values of the published generator for seed 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in splitmix(0, torch.arange(1, 4)).tolist()] == published


def test_uniforms() -> None:
    """Chi-square over 64 bins (63 degrees of freedom, deviation 11.2), mean, and correlations of neighbours."""
    n = 1 << 16
    for start in (0, 10**9):
        u = uniform(torch.tensor([1, 2, -7 << 40]), torch.arange(start, start + n))
        assert u.dtype == torch.float64
        assert 0 <= u.min() <= u.max() < 1
        for column in u.unbind(dim=1):
            counts = (column * 64).long().bincount(minlength=64)
            assert ((counts - n / 64).square() / (n / 64)).sum() < 63 + 6 * 11.2
        correlation = torch.corrcoef(torch.cat([u[1:], u[:-1]], dim=1).T) - torch.eye(6)
        assert correlation.abs().max() < 6 / math.sqrt(n)


def test_speed_isuniform() -> None:
    speed = moving(points(), canvas=28, frames=1).batch(0, 20_000).speed.double()
    assert abs(speed.mean() - 4) < 5 * math.sqrt(4 / 3 / 20_000)
    assert abs(speed.var() - 4 / 3) < 0.05
    assert speed.min() < 2.01
    assert speed.max() > 5.99
    assert (moving(speed=(3.0, 3.0)).batch(0, 9).speed == 3).all()


def test_starts_and_directions_areuniform() -> None:
    videos = moving(points(), canvas=32, frames=2, digit_size=4, speed=(1.0, 1.0)).batch(0, 8192)
    start = videos.positions[:, 0].double()
    assert (start.mean(dim=0) - 14).abs().max() < 5 * 28 / math.sqrt(12 * 8192)
    assert (start.var(dim=0) - 28**2 / 12).abs().max() < 3
    step = (videos.positions[:, 1] - start)[inside(start, 1.0, 28)]
    octant = ((torch.atan2(-step[:, 1], step[:, 0]) / (math.pi / 4)) % 8).long().bincount(minlength=8)
    assert ((octant - len(step) / 8).square() / (len(step) / 8)).sum() < 7 + 6 * math.sqrt(14)


# -- Motion ---------------------------------------------------------------------------------------------------------


def inside(position: Tensor, speed: Tensor | float, room: float) -> Tensor:
    """Where a step of this length cannot meet a wall; position (..., 2)."""
    limit = speed if isinstance(speed, float) else speed[(...,) + (None,) * (position.ndim - speed.ndim)]
    return ((position > limit) & (position < room - limit)).all(dim=-1)


@pytest.mark.parametrize("start", [0, 10**9])
def test_displacement_is_the_speed(start: int) -> None:
    videos = moving(points(), frames=20, canvas=64).batch(start, 256)
    steps = videos.positions.diff(dim=1).norm(dim=-1)
    free = inside(videos.positions[:, :-1], videos.speed, 36)
    assert free.float().mean() > 0.4
    error = (steps - videos.speed[:, None])[free]
    assert error.abs().max() < 1.5 * GRID  # both ends are rounded, in both coordinates
    assert error.mean().abs() < GRID / 10


def test_velocity_is_constant_between_walls() -> None:
    """No drift: over a long path without a bounce, the end is where the first frames point."""
    positions = moving(points(), frames=100, digit_size=4, speed=(0.1, 0.2)).batch(0, 64).positions
    straight = (positions > 0.2).all(dim=(1, 2)) & (positions < 59.8).all(dim=(1, 2))
    assert straight.sum() > 20
    line = torch.linspace(0, 1, 100)[:, None]
    expected = positions[:, :1] * (1 - line) + positions[:, -1:] * line
    assert (positions - expected)[straight].abs().max() < 1.1 * GRID


@pytest.mark.parametrize(("origin", "velocity"), [(3.0, 0.5), (0.0, -0.25), (7.0, 1.75), (6.5, -3.0), (1.0, 40.25)])
def test_reflection_against_a_walk(origin: float, velocity: float) -> None:
    """The closed form against a ball that turns round whenever it would leave."""
    time = torch.arange(400, dtype=torch.float64)
    place, step, walk = origin, velocity, []
    for _ in time:
        walk.append(place)
        place += step
        while not 0 <= place <= 7:
            place, step = (-place if place < 0 else 14 - place), -step
    assert _reflect(origin + velocity * time, 7).equal(torch.tensor(walk, dtype=torch.float64))


def test_no_room_to_move() -> None:
    digits = some_digits()
    for data in (moving(digits, canvas=28), stochastic(digits=digits, canvas=28)):
        videos = data.batch(0, 12)
        assert videos.positions.eq(0).all()
        expected = digits.images[videos.digit].float() / 255
        assert videos.frames.equal(expected[:, None, None].expand_as(videos.frames))
        assert (videos.speed > 0).all()


@pytest.mark.parametrize(("start", "centred"), [("switch", 2), ("center", 0)])
def test_stochastic_paths(start: str, centred: int) -> None:
    data = stochastic(digits=points(), start=start, speed=(2.0, 4.0))
    videos = data.batch(0, 256)
    positions, speed = videos.positions, videos.speed[:, None]
    assert positions[:, centred].eq(18).all()
    assert positions[:, :3, 1].eq(18).all()
    # 18 pixels to the wall: two steps of 4 never meet it.
    assert (positions[:, :3, 0].diff(dim=1) - speed).abs().max() < GRID
    steps = positions[:, 2:].diff(dim=1)
    expected = unit(videos.direction) * speed
    free = inside(positions[:, 2:-1], videos.speed, 36)
    assert (steps - expected[:, None])[free].abs().max() < 1.1 * GRID
    assert free[:, 0].all()
    assert (videos.direction.bincount(minlength=5) - 51.2).abs().max() < 5 * 6.4


def test_a_wall_before_the_switch_does_not_mirror_the_direction() -> None:
    videos = stochastic(digits=points(), start="center", frames=6, x_frames=4, speed=(8.0, 8.0)).batch(0, 64)
    x = videos.positions[..., 0]
    assert x[:, :4].equal(torch.tensor([18.0, 26, 34, 30]).expand(64, 4))
    back = (videos.direction == 2) | (videos.direction == 3)
    assert ((x[:, 4] - 30)[back] - 8 * math.cos(4 * math.pi / 5)).abs().max() < GRID


def test_directions_on_the_screen() -> None:
    """The drawn digit itself: k = 0 goes right, 1 and 2 rise (rows fall), 3 and 4 sink."""
    videos = stochastic(speed=(3.0, 3.0)).batch(0, 60)
    moved = (centre_of_mass(videos.frames)[:, 5] - centre_of_mass(videos.frames)[:, 2]) / 9
    assert (moved - unit(videos.direction)).abs().max() < 0.01
    assert set(videos.direction.tolist()) == set(range(5))
    for k, (right, up) in enumerate([(1, 0), (1, 1), (-1, 1), (-1, -1), (1, -1)]):
        of_k = moved[videos.direction == k]
        assert (of_k[:, 0] * right > 0.3).all()
        assert (of_k[:, 1].abs() < 0.01).all() if up == 0 else (-of_k[:, 1] * up > 0.5).all()


# -- Drawing --------------------------------------------------------------------------------------------------------


def centre_of_mass(frames: Tensor) -> Tensor:
    """(..., 1, S, S) -> (..., 2), x and y of the pixels' centre of mass, in pixel indices."""
    mass, line = frames.squeeze(-3).double(), torch.arange(frames.shape[-1], dtype=torch.float64)
    total = mass.sum(dim=(-2, -1))
    return (
        torch.stack([(mass.sum(dim=-2) * line).sum(-1), (mass.sum(dim=-1) * line).sum(-1)], dim=-1) / total[..., None]
    )


@pytest.mark.parametrize("subpixel", [True, False])
def test_the_drawing_follows_the_positions(subpixel: bool) -> None:
    digits = some_digits()
    videos = moving(digits, subpixel=subpixel).batch(0, 24)
    own = centre_of_mass(digits.images[videos.digit][:, None, None])
    assert (centre_of_mass(videos.frames) - own - videos.positions).abs().max() < 1e-6


@pytest.mark.parametrize("subpixel", [True, False])
def test_light_is_conserved(subpixel: bool) -> None:
    """Up to the walls themselves: 2 pixels of room."""
    digits = some_digits()
    videos = moving(digits, canvas=30, frames=30, subpixel=subpixel).batch(0, 24)
    assert videos.positions.amin() < 0.1
    assert videos.positions.amax() > 1.9
    own = digits.images[videos.digit].double().sum(dim=(1, 2)) / 255
    assert (videos.frames.double().sum(dim=(2, 3, 4)) / own[:, None] - 1).abs().max() < 1e-7


def test_drawing_against_plain_bilinear_sampling() -> None:
    """Pixel by pixel from the definition, with no product of matrices."""
    digits = some_digits()
    videos = moving(digits, canvas=34).batch(0, 2)
    for n in range(2):
        image = torch.nn.functional.pad(digits.images[videos.digit[n]].double() / 255, (35, 35, 35, 35))
        for t in range(3):
            x, y = videos.positions[n, t].double().tolist()
            column, row = math.floor(x), math.floor(y)
            right, down = x - column, y - row
            at = [
                [image[35 - row - b : 69 - row - b, 35 - column - a : 69 - column - a] for a in (0, 1)] for b in (0, 1)
            ]
            upper = at[0][0] * (1 - right) + at[0][1] * right
            lower = at[1][0] * (1 - right) + at[1][1] * right
            assert videos.frames[n, t, 0].double().allclose(upper * (1 - down) + lower * down, atol=1e-7, rtol=0)


@pytest.mark.parametrize("make", [moving, stochastic])
def test_whole_pixels_copy_the_digit(make: Any) -> None:
    digits = some_digits()
    videos = make(digits=digits, subpixel=False).batch(0, 12)
    for n in range(12):
        expected = torch.zeros(videos.frames.shape[1], 64, 64)
        for t, (x, y) in enumerate(videos.positions[n].long().tolist()):
            expected[t, y : y + 28, x : x + 28] = digits.images[videos.digit[n]].float() / 255
        assert videos.frames[n, :, 0].equal(expected)


def test_whole_pixels_are_the_nearest() -> None:
    fine, coarse = moving().batch(0, 24), moving(subpixel=False).batch(0, 24)
    assert (fine.positions - coarse.positions).abs().max() <= 0.5 + GRID
    assert fine.speed.equal(coarse.speed)


@pytest.mark.parametrize(("canvas", "digit_size"), [(16, 7), (32, 14), (8, 1), (40, 40), (64, 56)])
def test_other_sizes(canvas: int, digit_size: int) -> None:
    digits = some_digits()
    videos = moving(digits, canvas=canvas, digit_size=digit_size, speed=(0.5, 1.0)).batch(0, 24)
    assert videos.frames.shape[-2:] == (canvas, canvas)
    assert 0 <= videos.frames.min() <= videos.frames.max() <= 1
    assert videos.positions.max() <= canvas - digit_size
    light = videos.frames.double().mean(dim=(1, 2, 3, 4)) * canvas**2 / digit_size**2
    assert (light - digits.images[videos.digit].double().mean(dim=(1, 2)) / 255).abs().max() < 0.03


# -- The device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [moving, stochastic])
def test_no_value_is_read_on_the_host(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has shapes and no values, .item(), .cpu() and boolean masks raise."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know "meta"
    videos = make(device="meta", digit_size=20).batch(5, 30)
    assert [field.shape for field in videos] == [field.shape for field in make().batch(5, 30)]


def test_compiles() -> None:
    data = stochastic()
    expected = data.batch(5, 10)
    assert_same(expected, torch.compile(data.batch, fullgraph=True, backend="eager")(5, 10))


@pytest.mark.cuda
@pytest.mark.parametrize("make", [moving, stochastic])
def test_cuda_draws_the_same_and_never_waits(make: Any) -> None:
    data = make(device="cuda")
    data.batch(0, 4)
    try:
        torch.cuda.set_sync_debug_mode("error")
        videos = data.batch(5, 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = make().batch(5, 30)
    assert_same(expected, Videos(*(field.cpu() for field in videos)))
    shuffled = torch.randperm(30)
    assert_same(
        Videos(*(field[shuffled] for field in expected)),
        Videos(*(field.cpu() for field in data.batch_at(5 + shuffled))),
    )
