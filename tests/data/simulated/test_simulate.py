"""Simulated scenes have CLEVRER's format and physics, compared with its own files, and an interrupted run goes on.

CLEVRER's own files are read if VJVCR_DATA or ../shared/data has them.
"""

import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from videos import drawing, quick_workers

from vjvcr_fast.data.simulated.clevrer import path_of, simulate_clevrer, split
from vjvcr_fast.data.simulated.make import gl_backend, in_parallel
from vjvcr_fast.data.simulated.scenes import (
    APART,
    COLORS,
    FOCAL,
    FRAME_SECONDS,
    HALF,
    MATERIALS,
    SHAPES,
    Thing,
    World,
    annotate,
    euler,
    in_view,
    sample_clevrer,
    to_camera,
)

MODULES = ("av", "mujoco", "pebble", "tqdm")
MISSING = [name for name in MODULES if importlib.util.find_spec(name) is None]
needs_mujoco = pytest.mark.skipif("mujoco" in MISSING, reason="mujoco is not installed")

SIZE, FRAMES, VIDEOS = (96, 64), 8, 5
TINY: dict[str, Any] = {"size": SIZE, "frames": FRAMES}


@pytest.fixture(scope="module")
def drawable() -> None:
    if MISSING or drawing()[1]:
        pytest.skip(drawing()[1] if not MISSING else f"{', '.join(MISSING)} not installed")


draws = pytest.mark.usefixtures("drawable")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def field(notes: dict[str, Any], name: str) -> Tensor:
    """(frames, objects, ...) float64 of motion_trajectory."""
    return torch.tensor([[o[name] for o in f["objects"]] for f in notes["motion_trajectory"]], dtype=torch.float64)


def film(things: list[Thing], frames: int = 128) -> tuple[World, dict[str, Any]]:
    """A world after so many frames, and its annotation."""
    world = World(things)
    return world, {"motion_trajectory": [*annotate(world, frames)]}


# -- CLEVRER's own files --------------------------------------------------------------------------------------------


def real_notes() -> list[dict[str, Any]]:
    places: list[str | Path | None] = [os.environ.get("VJVCR_DATA"), Path(__file__).parents[4] / "shared" / "data"]
    for place in [Path(place) for place in places if place]:
        for root in (place, place / "clevrer"):
            found = sorted(root.glob("annotation_*/*/annotation_*.json"))[:3]
            if found and not (root / "simulated.json").exists():
                return [json.loads(path.read_text()) for path in found]
    return []


@pytest.fixture(scope="module")
def real() -> list[dict[str, Any]]:
    return real_notes() or pytest.skip("no CLEVRER annotations in VJVCR_DATA or ../shared/data")


def things_of(notes: dict[str, Any]) -> list[Thing]:
    """What an annotation says of its first frame."""
    return [
        Thing(p["shape"], p["color"], p["material"], o["location"][:2], o["orientation"][2], o["velocity"][:2])
        for p, o in zip(notes["object_property"], notes["motion_trajectory"][0]["objects"], strict=True)
    ]


def schema(value: Any) -> Any:
    """Keys in order, types, lengths of numeric lists; lists of objects as the schema of their first."""
    if isinstance(value, dict):
        return {name: schema(item) for name, item in value.items()}
    if isinstance(value, list):
        return [schema(value[0])] if value and isinstance(value[0], dict) else [type(item).__name__ for item in value]
    return type(value).__name__


@needs_mujoco
def test_real_motion_is_reproduced(real: list[dict[str, Any]]) -> None:
    """From CLEVRER's first frame ours meets its first collision within a frame, and until then its locations."""
    for notes in real:
        first = min(notes["collision"], key=lambda c: c["frame_id"])
        world, ours = film(things_of(notes), first["frame_id"] + 3)
        assert [c["object_ids"] for c in world.collisions] == [first["object_ids"]]
        assert abs(world.collisions[0]["frame_id"] - first["frame_id"]) <= 1
        assert math.dist(world.collisions[0]["location"][:2], first["location"][:2]) < 0.05
        until = first["frame_id"]
        assert (field(notes, "location")[:until] - field(ours, "location")[:until]).norm(dim=-1).max() < 0.04
        assert (field(notes, "velocity")[:until] - field(ours, "velocity")[:until]).norm(dim=-1).max() < 0.06
        assert (field(notes, "orientation")[0] - field(ours, "orientation")[0]).abs().max() < 2e-4


def test_view_is_clevrers(real: list[dict[str, Any]]) -> None:
    """Of nearly two thousand answers at most one in two hundred differs: at the moment an object crosses the edge."""
    wrong = total = 0
    for notes in real:
        for frame in notes["motion_trajectory"]:
            for what, where in zip(notes["object_property"], frame["objects"], strict=True):
                cos, sin = math.cos(where["orientation"][2]), math.sin(where["orientation"][2])
                seen = in_view(what["shape"], where["location"], (cos, -sin, 0, sin, cos, 0, 0, 0, 1))
                wrong, total = wrong + (seen != where["inside_camera_view"]), total + 1
    assert total > 1500
    assert wrong <= total / 200


def test_frame_time_is_clevrers(real: list[dict[str, Any]]) -> None:
    for notes in real:
        assert velocity_error(notes) < 0.05
        assert velocity_error(notes, 1 / 25) > 0.5


def velocity_error(notes: dict[str, Any], seconds: float = FRAME_SECONDS) -> float:
    """The largest difference of steps between frames and mean velocity, where no collision changes it."""
    location, velocity = field(notes, "location")[..., :2], field(notes, "velocity")[..., :2]
    step, mean = location.diff(dim=0) / seconds, (velocity[1:] + velocity[:-1]) / 2
    smooth = velocity.diff(dim=0).norm(dim=-1) < 0.05
    return float((step - mean).norm(dim=-1)[smooth].max())


# -- Scenes ---------------------------------------------------------------------------------------------------------


def test_scenes() -> None:
    """No two objects alike or overlapping, some at rest in view, some on their way in, fast as CLEVRER's."""
    scenes = [sample_clevrer(Random(seed)) for seed in range(100)]
    for things in scenes:
        assert len({thing[:3] for thing in things}) == len(things)
        for a, b in combinations(things, 2):
            assert math.dist(a.position, b.position) > 2 * math.sqrt(2) * HALF
        for thing in things:
            cos, sin = math.cos(thing.yaw), math.sin(thing.yaw)
            moving = thing.velocity != (0, 0)
            seen = in_view(thing.shape, (*thing.position, HALF), (cos, -sin, 0, sin, cos, 0, 0, 0, 1))
            assert seen != moving
            assert not moving or 2.7 <= math.hypot(*thing.velocity) <= 3
        assert 0 < sum(thing.velocity != (0, 0) for thing in things) < len(things)
    assert {len(things) for things in scenes} == {3, 4, 5, 6}
    for i, kinds in enumerate((SHAPES, COLORS, MATERIALS)):
        assert {thing[i] for things in scenes for thing in things} == set(kinds)
    assert sample_clevrer(Random(7)) == scenes[7] != scenes[8]


@needs_mujoco
def test_plausible() -> None:
    """On the ground, upright, finite, never gaining energy, moving in view most of the time."""
    moving_in_view = collisions = 0.0
    for seed in range(6):
        world = World(sample_clevrer(Random(seed)))
        frames, energy = [], []
        for entry in annotate(world, 128):
            frames.append(entry)
            energy.append(kinetic_energy(world))
        # A frame amid a touch, which is shorter than a frame, lacks what the touch stores.
        assert all(c < max(a, b) + 0.02 for a, b, c in zip(energy, energy[1:], energy[2:], strict=False))
        notes = {"motion_trajectory": frames}
        location, speed = field(notes, "location"), field(notes, "velocity").norm(dim=-1)
        assert location.isfinite().all()
        assert (location[..., 2] - HALF).abs().max() < 0.02
        assert velocity_error(notes) < 0.05
        active = ((speed > 0.1) & (field(notes, "inside_camera_view") > 0)).any(dim=1).double().mean().item()
        assert active > 0.3
        moving_in_view, collisions = moving_in_view + active, collisions + len(world.collisions)
    assert moving_in_view / 6 > 0.75
    assert collisions / 6 > 0.75


def kinetic_energy(world: World) -> float:
    velocity = torch.from_numpy(world.data.qvel.reshape(-1, 6).copy())
    inertia = torch.from_numpy(world.model.body_inertia[1:].copy())
    return float((velocity[:, :3].square() + inertia * velocity[:, 3:].square()).sum() / 2)


@needs_mujoco
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_collision(shape: str, other: str) -> None:
    """Aimed at each other: one collision, in the middle, at the last frame before the touch; momentum is kept."""
    world, notes = film(
        [Thing(shape, "red", "metal", (-1, 0.5)), Thing(other, "blue", "rubber", (0, 0.5), velocity=(-2.0, 0))], 30
    )
    assert len(world.collisions) == 1
    meeting = world.collisions[0]
    assert meeting["object_ids"] == [0, 1]
    assert meeting["location"][:2] == pytest.approx([-0.8, 0.5], abs=0.03)
    gap = field(notes, "location").diff(dim=1)[:, 0, 0] - 2 * HALF
    assert 0 < gap[meeting["frame_id"]] < 2 * FRAME_SECONDS
    velocity = field(notes, "velocity")[:, :, 0]
    before, after = velocity[meeting["frame_id"]], velocity[meeting["frame_id"] + 2]
    assert after.sum().item() == pytest.approx(before.sum().item(), abs=0.06)
    assert 0.25 < (after[1] - after[0]) / (before[0] - before[1]) < 0.7  # restitution


@needs_mujoco
def test_a_long_touch_is_one_collision_and_a_second_one_another() -> None:
    things = [Thing("cube", "red", "metal", (0, 0)), Thing("cube", "blue", "metal", (0.402, 0), velocity=(-0.05, 0))]
    world, _ = film(things, 20)
    assert len(world.collisions) <= 1
    world, _ = film([Thing("sphere", "red", "metal", (0, 0)), Thing("sphere", "blue", "metal", (0.5, 0))], 2)
    for _ in range(2):
        world.data.qvel[6:9] = -2, 0, 0
        world.data.qpos[7:9] = world.data.qpos[:2] + (0.5, 0)  # noqa: RUF005
        world.data.qvel[:6] = 0
        for _ in range(APART + 5):
            world.advance()
    assert len(world.collisions) == 2


@needs_mujoco
@pytest.mark.parametrize("shape", SHAPES)
def test_orientation(shape: str) -> None:
    """Euler angles turn with the angular velocity; a cylinder's own axis is y, so standing it has (pi / 2, 0, yaw)."""
    world = World([Thing(shape, "red", "metal", (0, 0), 0.3)])
    world.data.qvel[5] = 2.0
    entries = [entry["objects"][0] for entry in annotate(world, 5)]
    tilt = math.pi / 2 if shape == "cylinder" else 0
    assert entries[0]["orientation"] == pytest.approx([tilt, 0, 0.3], abs=1e-3)
    turned = entries[-1]["orientation"][2] - entries[0]["orientation"][2]
    mean = sum(entry["angular_velocity"][2] for entry in entries) / 5
    assert turned == pytest.approx(mean * 4 * FRAME_SECONDS, abs=0.01)
    assert turned > 0.1


def test_euler_undoes_its_own_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    for x, y, z in (torch.rand(20, 3, generator=generator) * 2.8 - 1.4).double():
        one, nil = torch.ones(()).double(), torch.zeros(()).double()
        about_x = torch.stack([one, nil, nil, nil, x.cos(), -x.sin(), nil, x.sin(), x.cos()]).view(3, 3)
        about_y = torch.stack([y.cos(), nil, y.sin(), nil, one, nil, -y.sin(), nil, y.cos()]).view(3, 3)
        about_z = torch.stack([z.cos(), -z.sin(), nil, z.sin(), z.cos(), nil, nil, nil, one]).view(3, 3)
        angles = euler((about_z @ about_y @ about_x).flatten().tolist())
        assert angles == pytest.approx([float(x), float(y), float(z)], abs=1e-12)


# -- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(drawable: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos, made by one spawned process without interruption."""
    out = tmp_path_factory.mktemp("made") / "new" / "folder"
    simulate_clevrer(out, VIDEOS, processes=1, **TINY)
    return out


def notes_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(root.glob("annotation_*/*/*.json"))]


def test_layout(made: Path) -> None:
    numbers = [("train", "00000-01000", f"0000{i}") for i in range(3)]
    numbers += [("validation", "10000-11000", f"1000{i}") for i in range(2)]
    expected = {f"video_{a}/video_{b}/video_{c}.mp4" for a, b, c in numbers}
    expected |= {f"annotation_{a}/annotation_{b}/annotation_{c}.json" for a, b, c in numbers}
    assert set(files(made)) == expected | {"simulated.json"}
    about = json.loads((made / "simulated.json").read_text())
    assert about["seed"] == 0
    assert about["size"] == [96, 64]
    assert about["frames"] == FRAMES
    assert "not CLEVRER" in about["note"]


def test_schema_is_clevrers(made: Path, real: list[dict[str, Any]]) -> None:
    everything = notes_of(made)
    # A video as short as this may have no collision: theirs then comes from a scene that has one.
    things = [Thing("cube", "red", "metal", (-1, 0)), Thing("cube", "red", "metal", (-0.5, 0), velocity=(-2.0, 0))]
    collision = film(things, 9)[0].collisions
    for notes in everything:
        theirs = schema(real[0])
        assert list(notes) == list(real[0])
        assert schema(notes | {"collision": collision}) == theirs
        assert [o["object_id"] for o in notes["object_property"]] == list(range(len(notes["object_property"])))
        assert [f["frame_id"] for f in notes["motion_trajectory"]] == list(range(FRAMES))
        for frame in notes["motion_trajectory"]:
            assert [o["object_id"] for o in frame["objects"]] == list(range(len(notes["object_property"])))
    assert [(n["scene_index"], n["video_filename"]) for n in everything] == [
        (i, f"video_{i:05d}.mp4") for i in (0, 1, 2, 10000, 10001)
    ]
    assert len({json.dumps(notes["object_property"]) for notes in everything}) == VIDEOS


def decode(path: Path) -> tuple[Tensor, list[bool], Any]:
    """(frames, H, W, 3) uint8, whether each packet is a keyframe, and (codec, pixel format, frames a second)."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        keys = [packet.is_keyframe for packet in container.demux(stream) if packet.size]
        facts = stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate
    with av.open(str(path)) as container:
        pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(pictures), keys, facts


def test_a_stride_leaves_frames_out(made: Path, tmp_path: Path) -> None:
    """Annotations are in frames of the video; the motion is that of the whole scene."""
    simulate_clevrer(tmp_path, VIDEOS, processes=1, stride=2, **TINY)
    firsts = set()
    for notes, whole in zip(notes_of(tmp_path), notes_of(made), strict=True):
        entries = [frame["objects"] for frame in whole["motion_trajectory"]]
        seen = [frame["objects"] for frame in notes["motion_trajectory"]]
        assert [frame["frame_id"] for frame in notes["motion_trajectory"]] == list(range(FRAMES // 2))
        first = entries.index(seen[0])
        assert seen == entries[first::2]
        between = [c for c in whole["collision"] if first <= c["frame_id"] < first + FRAMES - 2]
        assert notes["collision"] == [c | {"frame_id": (c["frame_id"] - first) // 2} for c in between]
        firsts.add(first)
    assert firsts == {0, 1}
    (path,) = tmp_path.glob("video_train/*/video_00000.mp4")
    assert (len(decode(path)[0]), decode(path)[2][2]) == (FRAMES // 2, 12.5)


def test_videos_are_as_a_decoder_expects(made: Path) -> None:
    for path in made.glob("video_*/*/*.mp4"):
        pictures, keys, facts = decode(path)
        assert pictures.shape == (FRAMES, 64, 96, 3)
        assert keys == [True] + [False] * (FRAMES - 1)
        assert facts == ("h264", "yuv420p", 25)


def test_pictures_show_what_the_annotation_says(made: Path) -> None:
    """Where an object's centre is seen and none is near, the picture has its colour."""
    agreements = []
    for notes in notes_of(made):
        pictures = decode(next(made.glob(f"video_*/*/{notes['video_filename']}")))[0].double()
        location = field(notes, "location")
        for t in range(FRAMES):
            distance = torch.cdist(location[t], location[t]).fill_diagonal_(9).amin(dim=1)
            for what, place, free in zip(notes["object_property"], location[t].tolist(), distance, strict=True):
                right, up, depth = to_camera(place)
                column, row = 48 + 96 * FOCAL * right / depth, 32 - 96 * FOCAL * up / depth
                if free < 1 or what["color"] == "gray" or not (2 < column < 94 and 2 < row < 62) or depth < 1:
                    continue
                seen = pictures[t, int(row), int(column)]
                expected = torch.tensor(COLORS[what["color"]]).double()
                agreements.append(torch.corrcoef(torch.stack([seen, expected]))[0, 1])
    assert len(agreements) > 20
    assert torch.stack(agreements).min() > 0.7


def test_processes_and_number_change_nothing(made: Path, tmp_path: Path) -> None:
    whole = files(made)
    with quick_workers():
        simulate_clevrer(tmp_path, 2, processes=2, **TINY)
        assert {name: whole[name] for name in files(tmp_path)} == files(tmp_path)
        assert len(files(tmp_path)) == 5
        simulate_clevrer(tmp_path, VIDEOS, processes=2, **TINY)
    assert files(tmp_path) == whole


def simulation(out: Path, videos: int, errors: Path, workers: str) -> None:
    """A program in a process group of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs behind it ignore Ctrl-C
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    multiprocessing.set_forkserver_preload(["vjvcr_fast.data.simulated.clevrer"])  # this program's own server, if any
    with contextlib.nullcontext() if workers == "spawn" else quick_workers(workers):
        simulate_clevrer(out, videos, processes=2, **TINY)


@contextlib.contextmanager
def running(out: Path, videos: int, errors: Path, workers: str) -> Iterator[Any]:
    """The simulation as a program, once its first video is finished. workers: how it starts its own processes."""
    context = multiprocessing.get_context("spawn" if workers == "spawn" else "forkserver")
    run = context.Process(target=simulation, args=(out, videos, errors, workers))
    run.start()
    try:
        until = time.monotonic() + 60
        while not any(out.glob("annotation_*/*/annotation_*.json")):
            assert run.exitcode is None, errors.read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.join(20)


def ends(group: int, seconds: float) -> bool:
    """Whether every process of the group is gone within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@draws
@pytest.mark.parametrize(
    ("how", "workers"),
    # A forked worker also holds its parent's end of the pipes, so that it would not notice its parent's end.
    [("SIGINT", "fork"), *(pytest.param("SIGKILL", of, marks=pytest.mark.slow) for of in ("forkserver", "spawn"))],
)
def test_an_interrupted_run_is_completed(how: str, workers: str, made: Path, tmp_path: Path) -> None:
    out, errors = tmp_path / "out", tmp_path / "errors.txt"
    with running(out, 60, errors, workers) as run:
        (os.kill if how == "SIGKILL" else os.killpg)(run.pid, getattr(signal, how))
        run.join(20)
        assert ends(run.pid, 20), "a worker lives on"
    assert run.exitcode
    assert how != "SIGINT" or "KeyboardInterrupt" in errors.read_text()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("annotation_*/*/annotation_*.json")}
    assert 1 <= len(kept) < 60
    # Of those beyond five videos no trace shall disturb; leftovers and a video without its annotation do not count.
    for path in [*out.glob("*/*/*_0000[3-9].*"), *out.glob("*/*/*_000[1-9]?.*"), *out.glob("*/*/*_100[0-9][2-9].*")]:
        path.unlink()
    half = out / "video_train" / "video_00000-01000"
    (half / ".video_00002.mp4.0123456789abcdef").write_bytes(b"half")
    path_of(out, "annotation", "train", 2).unlink(missing_ok=True)
    (half / "video_00002.mp4").write_bytes(b"half a video")
    with quick_workers():
        simulate_clevrer(out, VIDEOS, processes=1, **TINY)
    assert files(out) == files(made)
    first = path_of(out, "annotation", "train", 0)
    assert first not in kept or first.stat().st_mtime_ns == kept[first]


def test_a_finished_folder_is_left_alone(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    simulate_clevrer(made, VIDEOS, **TINY)
    simulate_clevrer(made, 2, **TINY)
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"size": (98, 64)}, r"size \[96, 64\], not \[98, 64\]"),
        ({"frames": 9}, "frames 8, not 9"),
    ],
)
def test_other_settings_are_refused(made: Path, other: dict[str, Any], message: str) -> None:
    before = files(made)
    with pytest.raises(ValueError, match=f"{message}: choose another"):
        simulate_clevrer(made, 9, **{**TINY, **other})
    assert files(made) == before


@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed")
def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "video_train").mkdir()
    with pytest.raises(ValueError, match=r"video_train but no simulated\.json"):
        simulate_clevrer(tmp_path, 2, **TINY)
    assert files(tmp_path) == {}
    for content in ("{", "[]"):
        (tmp_path / "simulated.json").write_text(content)
        with pytest.raises(ValueError, match=r"simulated\.json cannot be read"):
            simulate_clevrer(tmp_path, 2, **TINY)


def test_splits() -> None:
    assert split(1) == [("train", 0)]
    assert split(2) == [("train", 0), ("validation", 10_000)]
    for n in range(1, 200):
        assert len(set(split(n))) == n
        assert set(split(n)) < set(split(n + 1))
    whole = split(15_000)
    assert [name for name, _ in whole].count("validation") == 5000
    assert max(i for name, i in whole if name == "train") == 9999
    assert path_of(Path("x"), "video", "train", 1234) == Path("x/video_train/video_01000-02000/video_01234.mp4")


# -- What can go wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"videos": 0}, "videos must be between 1 and 15000, got 0"),
        ({"videos": 15_001}, "videos must be"),
        ({"processes": -1}, "processes must be at least 0"),
        ({"size": (95, 64)}, r"size must be .*even.*\(95, 64\)"),
        ({"size": (96, 8)}, "size must be .*at least 16"),
        ({"size": (64, 64)}, r"size must be .*between 1\.2 and 2"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_clevrer(tmp_path, **{"videos": 2, **arguments})
    assert files(tmp_path) == {}


@pytest.mark.parametrize("name", ["av", "mujoco", "pebble"])
def test_missing_packages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MISSING:
        if module != name:
            pytest.skip(f"{module} is not installed")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{name} is not installed: pip install 'vjvcr_fast\[simulate\]'"):
        simulate_clevrer(tmp_path, 2)
    assert files(tmp_path) == {}


@needs_mujoco
def test_nothing_to_draw_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(RuntimeError, match=r"libosmesa6.*MUJOCO_GL=nonsense"):
        gl_backend()


@draws
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough space, about 5,[0-9]{3} MB needed, 2 MB free"):
        simulate_clevrer(tmp_path, 15_000)


def test_an_error_of_a_task() -> None:
    """Arrives with where it happened."""
    pytest.importorskip("pebble")
    with pytest.raises(ValueError, match="'twelve'") as caught:
        list(in_parallel(int, ["twelve"], 1, {}))  # type: ignore[arg-type]
    assert "while making twelve" in str(caught.value.__cause__)


def end(status: int) -> None:
    """os._exit itself cannot be sent to a process where coverage is measured."""
    os._exit(status)


def test_a_worker_that_dies() -> None:
    """Is an error, and its task is named."""
    pytest.importorskip("pebble")
    with pytest.raises(RuntimeError, match=r"made 3 died \(exit status 3\)"):
        list(in_parallel(end, [3], 1, {}))
