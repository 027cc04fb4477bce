"""Simulated videos in CATER's own layout and format, so that what runs on CATER runs on data anyone can make.

Matched: names, folders, Motion-JPEG at 24 frames a second, the scene files' `objects` (instance, shape, size, color,
material, locations by frame) and `movements`, the lists. Not CATER's: pictures, sizes, speeds, how often what happens;
directions, relationships and pixel coordinates are left out, and what is inside a cone slides with it without a
movement of its own (CATER lists one).
As in `simulate`, video i is a pure function of (seed, i), and its scene file, written last, says that it is finished.
"""

import contextlib
import functools
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, BinaryIO

from vjvcr_fast.data.cater import CLASSES, LIST_FOLDER, LISTS
from vjvcr_fast.data.files import cores, progress, replace, write_atomic
from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.simulated import clevrer as simulate
from vjvcr_fast.data.simulated.scenes import Film
from vjvcr_fast.data.simulated.scenes_cater import Body, Movement, Pose, Stage, poses, sample_bodies, sample_movements

GENERATOR = 2  # changes whenever the same seed would give other videos
NOTE = "Simulated scenes made by vjvcr_fast in CATER's format. They are not CATER, and not part of it."
FPS = 24
VALIDATION = (2, 5, 9)  # last digits of the numbers of validation videos: 30%
BYTES_PER_PIXEL = 0.12  # of a video, twice what was measured
BYTES_PER_FRAME = 600  # of a scene file


def simulate_cater(
    out: Path,
    videos: int,
    *,
    seed: int = 0,
    processes: int = 0,
    size: tuple[int, int] = (320, 240),
    frames: int = 301,
    shadows: bool = True,
) -> None:
    """Writes `videos` simulated videos, scenes and lists under `out`, in CATER's layout; those there are kept.

    videos: at least 1; those whose number ends in 2, 5 or 9 are for validation. Asking for more later only adds. size:
    (width, height) in pixels, both even. frames: at least 8. Others, and what is raised: as of `simulate_clevrer`.
    """
    _check(videos, processes, size, frames)
    simulate.import_av()
    if importlib.util.find_spec("mujoco") is None:
        raise ImportError("mujoco is not installed: pip install 'vjvcr_fast[simulate]'")
    out = Path(out)
    settings = {"seed": seed, "size": list(size), "frames": frames, "shadows": shadows, "generator": GENERATOR}
    simulate.claim(out, settings, note=NOTE, files=("videos/*.avi", "scenes/*.json"))
    for pattern in ("videos/.CLEVR*", "scenes/.CLEVR*", f"{LIST_FOLDER}/.*.txt.*"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)
    missing = [number for number in range(videos) if not scene_path(out, number).is_file()]
    simulate.require_space(out, len(missing) * frames * (size[0] * size[1] * BYTES_PER_PIXEL + BYTES_PER_FRAME))
    task = functools.partial(_make_video, out, seed, size, frames, shadows)
    try:
        if missing:
            environment = {"MUJOCO_GL": simulate.gl_backend(), "LP_NUM_THREADS": "0"}
            made = simulate.in_parallel(task, missing, processes or cores(), environment)
            done = videos - len(missing)
            with (
                progress(total=videos, initial=done, desc="simulate", unit="video", disable=None) as bar,
                contextlib.closing(made) as finished,
            ):
                for _ in finished:
                    bar.update()
    finally:
        write_lists(out)  # of what is complete, also where it was stopped


def _check(videos: int, processes: int, size: tuple[int, int], frames: int) -> None:
    if not 1 <= videos <= 10**6:
        raise ValueError(f"videos must be between 1 and 1,000,000, got {videos}")
    if processes < 0:
        raise ValueError(f"processes must be at least 0 (0: one a core), got {processes}")
    if len(size) != 2 or not all(side >= 16 and side % 2 == 0 for side in size):
        raise ValueError(f"size must be (width, height), both even and at least 16, got {size}")
    if frames < 8:
        raise ValueError(f"frames must be at least 8, got {frames}")


def video_path(out: Path, number: int) -> Path:
    return out / "videos" / f"CLEVR_new_{number:06d}.avi"


def scene_path(out: Path, number: int) -> Path:
    return out / "scenes" / f"CLEVR_new_{number:06d}.json"


def write_lists(out: Path) -> None:
    """train.txt and val.txt, from the scenes that are there."""
    lines: dict[str, list[str]] = {name: [] for name in LISTS.values()}
    for scene in sorted(out.glob("scenes/CLEVR_new_*.json")):
        found = json.loads(scene.read_text())
        shapes = {item["instance"]: item["shape"] for item in found["objects"]}
        names = {f"{shapes[i]} {m[0].lstrip('_')}" for i, of_one in found["movements"].items() for m in of_one}
        numbers = ",".join(str(i) for i, name in enumerate(CLASSES) if name in names)
        split = "validation" if int(scene.stem[-1]) in VALIDATION else "train"
        lines[LISTS[split]].append(f"{found['image_filename']} {numbers}\n")
    for name, of_split in lines.items():
        write_atomic(out / LIST_FOLDER / name, "".join(of_split))


def draw_scene(seed: int, number: int, frames: int) -> tuple[list[Body], dict[str, list[Movement]]]:
    """What is in video `number`, and what it does."""
    random = Random(key(seed, "cater", number) % 2**64)
    bodies = sample_bodies(random)
    return bodies, sample_movements(bodies, frames, random)


def _make_video(out: Path, seed: int, size: tuple[int, int], frames: int, shadows: bool, number: int) -> None:
    bodies, movements = draw_scene(seed, number, frames)
    motion = poses(bodies, movements, frames)
    stage = Stage(bodies, size)

    def pictures() -> Iterator[Any]:
        with Film(stage, size, shadows=shadows) as film:
            for frame in motion:
                stage.show(frame)
                yield film.frame()

    video = video_path(out, number)
    write_avi(video, pictures(), size)
    scene = {
        "image_filename": video.name,
        "image_index": number,
        "split": "new",
        "objects": [_object(body, motion) for body in bodies],
        "movements": {name: [list(m[:4]) for m in of_one] for name, of_one in movements.items()},
    }
    write_atomic(scene_path(out, number), json.dumps(scene))


def _object(body: Body, motion: list[dict[str, Pose]]) -> dict[str, Any]:
    places = [[round(c, 4) for c in frame[body.instance].place] for frame in motion]
    return {
        "instance": body.instance,
        "shape": body.shape,
        "size": body.size,
        "sized": body.half,
        "color": body.color,
        "material": body.material,
        "rotation": round(math.degrees(body.yaw), 3),
        "3d_coords": places[0],
        "locations": {str(i): place for i, place in enumerate(places)},
    }


def write_avi(path: Path, pictures: Iterable[Any], size: tuple[int, int], *, fps: int = FPS) -> None:
    """Pictures (H, W, 3) uint8 as Motion-JPEG; the file appears when it is whole."""
    av = simulate.import_av()

    def write(file: BinaryIO) -> None:
        with av.open(file, "w", format="avi") as container:
            stream = container.add_stream("mjpeg", rate=fps)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p"
            stream.options = {"qmin": "3", "qmax": "3", "threads": "1"}
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))

    replace(path, write)
