"""CLEVRER: colliding objects in videos of 128 frames, in the data set's own folders and annotation format.

    ROOT/video_train/video_00000-01000/video_00000.mp4
    ROOT/annotation_train/annotation_00000-01000/annotation_00000.json

As published, a video's number tells its split: 0 to 9,999 train, 10,000 to 14,999 validation, 15,000 to 19,999 test,
which has no annotations. A part of a download is enough.

A speed is the norm of an annotation's `velocity`, in scene units per second of the simulator. The simulator's clock
runs at 0.7 of the speed of the 25 frames per second video: in the real files an object moves by 0.7 / 25 of its
velocity in a frame.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.video import scan
from vjvcr_fast.data.video.decode import VideoError
from vjvcr_fast.data.video.file import Source
from vjvcr_fast.data.video.scan import DataError, Split

SPLITS = {"train": range(10_000), "validation": range(10_000, 15_000), "test": range(15_000, 20_000)}
FOLDERS = ("", "clevrer", "CLEVRER")  # inside a root


class ClevrerError(DataError):
    """CLEVRER is missing or cannot be used. The message names the folder and what to do."""


def load_split(root: Path, split: str, frames_in: int, frames_out: int, stride: int = 1, **options: Any) -> Split:
    """Scans one split of the data set in `root`, or in clevrer/ or CLEVRER/ inside it.

    A window has frames_in + frames_out frames. Its target is the speed of the fastest visible object in its last frame.

    split: "train", "validation" or "test". stride: every so many frames count. options: backend, pool, index,
    on_bad and every_frame of `scan.open_split`.

    Raises ClevrerError if there is no such folder, video or window; VideoError for a file that cannot be used.
    """
    folder, length = find_root(root), frames_in + frames_out
    items = {}
    for video in _videos(folder / f"video_{split}"):
        number = video.stem.removeprefix("video_")
        if number.isdecimal() and int(number) in SPLITS[split]:
            block = video.parent.name.replace("video", "annotation")
            annotation = folder / f"annotation_{split}" / block / f"annotation_{number}.json"
            items[video.relative_to(folder).as_posix()] = (video, annotation)
    if not items:
        raise ClevrerError(f"{folder}/video_{split}: no videos such as video_00000-01000/video_00000.mp4")
    whole = scan.open_split("CLEVRER", folder, split, items, examine, **options)
    for name, facts in whole.found.items():
        visible, fastest = facts["visible"][::stride], facts["fastest"][::stride]
        starts = windows(visible, frames_in, frames_out)
        if len(starts):
            targets = fastest[starts + length - 1]
            whole.sources.append(Source(items[name][0], name, len(visible), starts, targets, stride))
    if not whole.sources:
        raise ClevrerError(f"{folder}/video_{split}: {len(items)} videos, but no window of {length} frames", whole)
    return whole


def _videos(folder: Path) -> list[Path]:
    """FOLDER/*/video_*.mp4, sorted. Raises ClevrerError for a folder that cannot be read; a glob would skip it."""
    try:
        blocks = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        files = [entry.path for block in blocks for entry in os.scandir(block)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ClevrerError(f"{error.filename or folder}: {error.strerror}") from None
    return [path for path in map(Path, sorted(files)) if path.name.startswith("video_") and path.suffix == ".mp4"]


def find_root(root: Path) -> Path:
    """The folder that has video_train or another split in it. Raises ClevrerError if there is none."""
    missing = (
        "no CLEVRER here: no video_train or video_validation, not in clevrer/ or CLEVRER/ either; "
        "`vjvcr-fast simulate clevrer` makes scenes in its format"
    )
    splits = [f"video_{name}" for name in SPLITS]
    return scan.find_root(root, ClevrerError, FOLDERS, lambda at: any((at / name).is_dir() for name in splits), missing)


def examine(video: Path, annotation: Path, backend: str) -> dict[str, Any]:
    """What `scan` keeps of a video: frames, height and width; visible, (F, objects) bool; fastest, (F,) float32, the
    speed of the fastest visible object in each frame, 0 if none is visible.

    Raises VideoError, naming the file, if one cannot be read or the annotation has too few frames.
    """
    found: dict[str, Any] = scan.probe(video, backend)
    frames = found["frames"]
    visible, speeds = read_annotation(annotation)
    if len(visible) < frames:
        raise VideoError(f"{annotation}: annotates {len(visible)} frames, {video.name} has {frames}")
    visible, speeds = visible[:frames], speeds[:frames]
    fastest = torch.where(visible, speeds, 0).amax(dim=1) if visible.shape[1] else torch.zeros(frames)
    return found | {"visible": visible, "fastest": fastest}


def read_annotation(path: Path) -> tuple[Tensor, Tensor]:
    """(visible, speed) of every object in every frame, both (F, objects): `inside_camera_view` as bool, and the norm of
    `velocity` as float32. Raises VideoError naming the file and what is wrong with it."""
    with scan.reading(path, "CLEVRER", "annotation"):
        trajectory = json.loads(path.read_bytes())["motion_trajectory"]
        ids = sorted({item["object_id"] for frame in trajectory for item in frame["objects"]})
        column = {number: i for i, number in enumerate(ids)}
        visible = torch.zeros(len(trajectory), len(ids), dtype=torch.bool)
        velocity = torch.zeros(len(trajectory), len(ids), 3)
        for place, frame in enumerate(trajectory):
            if frame["frame_id"] != place:
                raise ValueError(f"frame_id {frame['frame_id']} where {place} is expected")
            for item in frame["objects"]:
                seen, moves = item["inside_camera_view"], torch.tensor(item["velocity"], dtype=torch.float32)
                if seen not in (False, True) or moves.shape != (3,):
                    shape = tuple(moves.shape)
                    raise ValueError(f"inside_camera_view {seen}, velocity of shape {shape} in frame {place}")
                visible[place, column[item["object_id"]]] = seen
                velocity[place, column[item["object_id"]]] = moves
    speed = velocity.norm(dim=2)
    if not speed.isfinite().all():
        raise VideoError(f"{path}: a velocity is not finite")
    return visible, speed


def windows(visible: Tensor, frames_in: int, frames_out: int) -> Tensor:
    """The first frames of a video's windows, (S,) int64. visible: (F, objects) bool.

    A window is excluded if an object is visible in y but not in x, or if no object is visible in its last frame, which
    then has no speed to ask for [ours].
    """
    length = frames_in + frames_out
    if len(visible) < length:
        return torch.empty(0, dtype=torch.int64)
    spans = visible.unfold(0, length, 1)  # (F - length + 1, objects, length)
    in_x, in_y = spans[..., :frames_in].any(dim=2), spans[..., frames_in:].any(dim=2)
    allowed = ~(in_y & ~in_x).any(dim=1) & spans[..., -1].any(dim=1)
    return allowed.nonzero()[:, 0]
