"""CLEVRER: colliding objects in 128-frame videos, in the data set's own folders and annotation schema.

    ROOT/video_train/video_00000-01000/video_00000.mp4
    ROOT/annotation_train/annotation_00000-01000/annotation_00000.json

Splits are by index, as published: 0 to 9,999 train, 10,000 to 14,999 validation, and 15,000 to 19,999 test, which has
no annotations. Any part of a download will do. Velocities are the annotations' own: the norm of `velocity`, in scene
units per second of the simulator, whose clock runs at 0.7 of the video's 25 frames per second (in the real files a
location moves by 0.7 / 25 of the velocity in a frame).
"""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import one_line
from vjvcr_fast.data.video.clips import Source
from vjvcr_fast.data.video.decode import VideoError
from vjvcr_fast.data.video.scan import DataError, Split, probe, scan
from vjvcr_fast.data.video.workers import Pool

SPLITS = {"train": range(10_000), "validation": range(10_000, 15_000), "test": range(15_000, 20_000)}
SIZE = (320, 480)  # height and width of the published videos
FOLDERS = ("", "clevrer", "CLEVRER")  # inside a root


class ClevrerError(DataError):
    """CLEVRER was asked for and is not there, or not usable; the message names the folder and what to do."""


def load_split(
    root: Path,
    split: str,
    frames_in: int,
    frames_out: int,
    stride: int = 1,
    *,
    backend: str = "auto",
    pool: Pool | None = None,
    index: Path | None = None,
    on_bad: str = "stop",
) -> Split:
    """Scans one split of the data set in `root`, or in clevrer/ or CLEVRER/ inside it.

    stride: of the frames that count; windows have frames_in + frames_out of those.
    pool: the processes that look at the files. index: where findings are kept for the next time. on_bad: "stop" raises
    a VideoError for the first file that cannot be used, "skip" leaves such files out.

    Raises ClevrerError where there is no such folder, video or window; VideoError.
    """
    folder = find_root(root)
    items = {}
    for video in _videos(folder / f"video_{split}"):
        number = video.stem.removeprefix("video_")
        if number.isdecimal() and int(number) in SPLITS[split]:
            block = video.parent.name.replace("video", "annotation")
            annotation = folder / f"annotation_{split}" / block / f"annotation_{number}.json"
            items[video.relative_to(folder).as_posix()] = (video, annotation)
    if not items:
        raise ClevrerError(f"{folder}/video_{split}: no videos such as video_00000-01000/video_00000.mp4")
    whole = Split("CLEVRER", folder, split, pool or Pool(0))
    examined = scan(items, partial(examine, backend=backend), whole.pool, index, on_bad=on_bad, desc=split)
    whole.bad = examined.bad
    for name, found in examined.found.items():
        visible, fastest = found["visible"][::stride], found["fastest"][::stride]
        starts = windows(visible, frames_in, frames_out)
        targets = fastest[starts + frames_in + frames_out - 1]
        possible = max(len(visible) - frames_in - frames_out + 1, 0)
        whole.possible += possible
        whole.dropped += possible - len(starts)
        if len(starts):
            whole.sources.append(Source(items[name][0], name, len(visible), starts, targets, stride))
    if not whole.sources:
        length = frames_in + frames_out
        raise ClevrerError(f"{folder}/video_{split}: {len(items)} videos, but no window of {length} frames")
    return whole


def _videos(folder: Path) -> list[Path]:
    """FOLDER/*/video_*.mp4, sorted. Raises ClevrerError for a folder that cannot be read, which a glob passes over."""
    try:
        blocks = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        files = [entry.path for block in blocks for entry in os.scandir(block)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ClevrerError(f"{error.filename or folder}: {error.strerror}") from None
    return [path for path in map(Path, sorted(files)) if path.name.startswith("video_") and path.suffix == ".mp4"]


def find_root(root: Path) -> Path:
    """The folder with video_train in it. Raises ClevrerError naming what is missing."""
    if not root.is_dir():
        raise ClevrerError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    for name in FOLDERS:
        if any((root / name / f"video_{split}").is_dir() for split in SPLITS):
            return root / name
    raise ClevrerError(
        f"{root}: no CLEVRER here: no video_train or video_validation, not in clevrer/ or CLEVRER/ either; "
        "`vjvcr-fast simulate clevrer` makes scenes in its format"
    )


def examine(video: Path, annotation: Path, backend: str) -> dict[str, Any]:
    """frames, height, width of a video; visible: (F, objects) bool; fastest: (F,) float32, the speed of the fastest
    visible object, 0 where none is. Raises VideoError naming the file: unreadable, or annotated for fewer frames."""
    found: dict[str, Any] = probe(video, backend)
    visible, speeds = read_annotation(annotation)
    if len(visible) < found["frames"]:
        raise VideoError(f"{annotation}: annotates {len(visible)} frames, {video.name} has {found['frames']}")
    visible, speeds = visible[: found["frames"]], speeds[: found["frames"]]
    fastest = torch.where(visible, speeds, 0).amax(dim=1) if visible.shape[1] else torch.zeros(len(visible))
    return found | {"visible": visible, "fastest": fastest}


def read_annotation(path: Path) -> tuple[Tensor, Tensor]:
    """(visible, speed) of every object in every frame, (F, objects) bool and float32: `inside_camera_view` and the norm
    of `velocity`. Raises VideoError naming the file and what is wrong with it."""
    try:
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
                    raise ValueError(
                        f"inside_camera_view {seen}, velocity of shape {tuple(moves.shape)} in frame {place}"
                    )
                visible[place, column[item["object_id"]]] = seen
                velocity[place, column[item["object_id"]]] = moves
    except FileNotFoundError:
        raise VideoError(f"{path}: there is no such annotation") from None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        raise VideoError(f"{path}: not a CLEVRER annotation ({type(error).__name__}: {one_line(error)})") from None
    speed = velocity.norm(dim=2)
    if not speed.isfinite().all():
        raise VideoError(f"{path}: a velocity is not finite")
    return visible, speed


def windows(visible: Tensor, frames_in: int, frames_out: int) -> Tensor:
    """First frames of the windows of a video, (S,) int64, from visible (F, objects) bool.

    Left out is a window in which an object is visible in some frame of y and in none of x, and one without a visible
    object in its last frame, whose speed could not be asked for [ours].
    """
    length = frames_in + frames_out
    if len(visible) < length:
        return torch.empty(0, dtype=torch.int64)
    spans = visible.unfold(0, length, 1)  # (F - length + 1, objects, length)
    in_x, in_y = spans[..., :frames_in].any(dim=2), spans[..., frames_in:].any(dim=2)
    allowed = ~(in_y & ~in_x).any(dim=1) & spans[..., -1].any(dim=1)
    return allowed.nonzero()[:, 0]
