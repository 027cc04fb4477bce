"""Simulated videos in CATER's own layout and format: what runs on CATER also runs on data that anyone can make.

As in CATER: names, folders, Motion-JPEG at 24 frames a second, the lists, and the scene files' `objects` (instance,
shape, size, color, material, locations by frame) and `movements`. Different: pictures, sizes, speeds, and how often
something happens. Directions, relationships and pixel coordinates are left out. What is inside a cone slides with it
without a movement of its own, while CATER lists one.
"""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from vjvcr_fast.data.cater import CLASSES, LIST_FOLDER, LISTS
from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.simulated import make
from vjvcr_fast.data.simulated.scenes import film
from vjvcr_fast.data.simulated.scenes_cater import Body, Movement, Pose, Stage, poses, sample_bodies, sample_movements

FORMAT = make.Format(
    title="CATER",
    generator=2,
    most=10**6,
    fewest=8,
    foreign=("videos/*.avi", "scenes/*.json"),
    leftovers=("videos/.CLEVR*", "scenes/.CLEVR*", f"{LIST_FOLDER}/.*.txt.*"),
    bytes_per_pixel=0.12,
    bytes_per_frame=600,
)
ENCODING = make.Encoding("avi", "mjpeg", 24, "yuvj420p", {"qmin": "3", "qmax": "3", "threads": "1"})
VALIDATION = (2, 5, 9)  # last digits of the numbers of validation videos: 30%


def simulate_cater(
    out: Path,
    videos: int,
    *,
    seed: int = 0,
    processes: int = 0,
    size: tuple[int, int] = (320, 240),
    frames: int = 301,
    shadows: bool = True,
    stride: int = 1,
) -> None:
    """Writes `videos` simulated videos, scenes and lists under `out`, in CATER's layout. Those already there are kept.

    videos: at least 1; those whose number ends in 2, 5 or 9 are for validation. Asking for more later only adds files.
    size: (width, height) in pixels, both even. frames: at least 8. The other arguments, and the errors raised, are as
    in `simulate_clevrer`.
    """
    settings = make.Settings(seed, size, frames, shadows, stride)
    make.check(FORMAT, videos, processes, settings)
    out = Path(out)
    missing = make.prepare(FORMAT, out, settings, range(videos), lambda number: scene_path(out, number).is_file())
    try:
        make.run(functools.partial(_make_video, out, settings), missing, videos, processes)
    finally:
        write_lists(out)  # of the complete videos, also if the run was stopped


def video_path(out: Path, number: int) -> Path:
    """The file of a video in the folder `out`."""
    return out / "videos" / f"CLEVR_new_{number:06d}.avi"


def scene_path(out: Path, number: int) -> Path:
    """The file that says what happens in a video. It is written when the video is complete."""
    return out / "scenes" / f"CLEVR_new_{number:06d}.json"


def write_lists(out: Path) -> None:
    """Writes train.txt and val.txt from the scenes that are there."""
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
    """What is in video `number`, and what each object does, {instance: its movements}."""
    random = Random(key(seed, "cater", number) % 2**64)
    bodies = sample_bodies(random)
    return bodies, sample_movements(bodies, frames, random)


def _make_video(out: Path, settings: make.Settings, number: int) -> None:
    bodies, movements = draw_scene(settings.seed, number, settings.frames)
    drawn, motion = settings.drawn("cater", number), poses(bodies, movements, settings.frames)
    motion = [motion[frame] for frame in drawn]
    stage = Stage(bodies, settings.size)

    def pictures() -> Iterator[Any]:
        with film(stage, settings.size, shadows=settings.shadows) as draw:
            for frame in motion:
                stage.show(frame)
                yield draw()

    video = video_path(out, number)
    make.write_video(video, pictures(), settings.size, ENCODING.every(settings.stride))
    scene = {
        "image_filename": video.name,
        "image_index": number,
        "split": "new",
        "objects": [_object(body, motion) for body in bodies],
        "movements": {name: _in_video(of_one, drawn) for name, of_one in movements.items()},
    }
    write_atomic(scene_path(out, number), json.dumps(scene))


def _in_video(movements: list[Movement], drawn: range) -> list[list[Any]]:
    """Movements as a scene file has them, in frames of the video.

    Frame t of the video stands for all frames of the scene from drawn[t] up to the next that is drawn, as for
    `data.cater.sampled`. A movement that is over before drawn[0] is left out.
    """
    spans = [(m, (m.start - drawn.start) // drawn.step, -((drawn.start - m.end) // drawn.step)) for m in movements]
    spans = [(m, max(start, 0), min(end, len(drawn))) for m, start, end in spans]
    return [[m.action, m.other, start, end] for m, start, end in spans if start < end]


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
