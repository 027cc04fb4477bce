"""Simulated videos in CLEVRER's own layout and format: what runs on CLEVRER also runs on data that anyone can make.

Each video is an H.264 file with one keyframe.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.simulated import make
from vjvcr_fast.data.simulated.scenes import FRAME_SECONDS, World, annotate, film, sample_clevrer

FORMAT = make.Format(
    title="CLEVRER",
    generator=1,
    most=15_000,  # CLEVRER's train and validation videos; more would give train videos the numbers of validation
    fewest=1,
    foreign=("video_*", "annotation_*"),
    leftovers=("video_*/*/.video_*", "annotation_*/*/.annotation_*"),
    bytes_per_pixel=0.01,
    bytes_per_frame=1500,
)
# One thread, because the bytes depend on the number of threads. No B-frames, as in CLEVRER.
X264 = "keyint=infinite:scenecut=0:bframes=0:threads=1"
ENCODING = make.Encoding("mp4", "libx264", 25, "yuv420p", {"preset": "veryfast", "crf": "14", "x264-params": X264})
VALIDATION_START = 10_000
FOLDER = 1000  # videos in a folder


def simulate_clevrer(
    out: Path,
    videos: int,
    *,
    seed: int = 0,
    processes: int = 0,
    size: tuple[int, int] = (480, 320),
    frames: int = 128,
    shadows: bool = True,
    stride: int = 1,
) -> None:
    """Writes `videos` simulated videos with annotations under `out`, in CLEVRER's layout. Those already there are kept.

    videos: 1 to 15,000 in all. A third of them (at least 1 of 2) are for validation, which CLEVRER counts from 10000.
    Asking for more later only adds files. processes: 0 is one for each core. size: (width, height) in pixels, both
    even, the width 1.2 to 2 times the height. frames: of a scene. shadows: without them pictures are drawn about three
    times as fast. stride: draw every so many frames only, from a first one that is drawn from the seed, so that the
    videos have frames // stride frames at 1 / stride of the rate; annotations are in frames of the video.

    Raises ValueError for arguments out of range, or if `out` holds other videos (real ones, or of another seed, size or
    number of frames); ImportError if mujoco, av, pebble or tqdm is missing; SimulationError if nothing can draw without
    a screen; OSError if the disk is too small.
    """
    settings = make.Settings(seed, size, frames, shadows, stride)
    make.check(FORMAT, videos, processes, settings)
    if not 1.2 <= size[0] / size[1] <= 2:  # else the camera sees the horizon, or hardly the scene
        raise ValueError(f"size must be (width, height) with width / height between 1.2 and 2, got {size}")
    out = Path(out)
    annotation = functools.partial(path_of, out, "annotation")
    missing = make.prepare(FORMAT, out, settings, split(videos), lambda item: annotation(*item).is_file())
    make.run(functools.partial(_make_video, out, settings), missing, videos, processes)


def split(videos: int) -> list[tuple[str, int]]:
    """(split, number) of each of `videos` videos. Fewer videos are a subset of more."""
    validation = max(1, round(videos / 3)) if videos >= 2 else 0
    train = [("train", i) for i in range(videos - validation)]
    return train + [("validation", VALIDATION_START + i) for i in range(validation)]


def path_of(out: Path, kind: str, split: str, number: int) -> Path:
    """Where a file of a video belongs. kind: "video" or "annotation"."""
    first, suffix = number // FOLDER * FOLDER, {"video": "mp4", "annotation": "json"}[kind]
    return out / f"{kind}_{split}" / f"{kind}_{first:05d}-{first + FOLDER:05d}" / f"{kind}_{number:05d}.{suffix}"


def _make_video(out: Path, settings: make.Settings, item: tuple[str, int]) -> None:
    (name, number), size, frames = item, settings.size, settings.frames
    random = Random(key(settings.seed, "clevrer", name, number) % 2**64)
    drawn = settings.drawn("clevrer", name, number)
    world = World(sample_clevrer(random, aspect=size[0] / size[1], seconds=frames * FRAME_SECONDS), size=size)
    trajectory: list[dict[str, Any]] = []

    def pictures() -> Iterator[Any]:
        with film(world, size, shadows=settings.shadows) as draw:
            for entry in annotate(world, drawn[-1] + 1):
                if entry["frame_id"] in drawn:
                    trajectory.append(entry | {"frame_id": len(trajectory)})
                    yield draw()

    video = path_of(out, "video", *item)
    make.write_video(video, pictures(), size, ENCODING.every(settings.stride))
    collisions = [(c, (c["frame_id"] - drawn.start) // drawn.step) for c in world.collisions]
    annotation = {
        "scene_index": number,
        "video_filename": video.name,
        "object_property": world.properties(),
        "motion_trajectory": trajectory,
        "collision": [c | {"frame_id": frame} for c, frame in collisions if frame >= 0],
    }
    write_atomic(path_of(out, "annotation", *item), json.dumps(annotation))
