"""CATER's max2action: objects that slide, are picked up, rotate and contain each other, in videos of 301 frames.

    ROOT/videos/CLEVR_new_000000.avi            Motion-JPEG, 320x240, 24 fps
    ROOT/scenes/CLEVR_new_000000.json           objects, and movements: {instance: [[action, other, start, end], ...]}
    ROOT/lists/actions_present/train.txt        lines "CLEVR_new_000000.avi 0,3,7": the classes of a video; and val.txt

A scene file may also lie beside its video. Every third frame is taken, 8 a second. A movement is active in the
original frames start (inclusive) to end (exclusive); sampled frame t stands for the original frames 3 t, 3 t + 1 and
3 t + 2, and an action is active in it where it is active in one of those [ours]. The union over sampled frames 50 to
99 is then that over the original frames 150 to 299, which the paper asks about.
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

CLASSES = (
    *("sphere slide", "sphere pick_place", "spl slide", "spl pick_place", "spl rotate"),
    *("cylinder pick_place", "cylinder slide", "cylinder rotate", "cube slide", "cube pick_place", "cube rotate"),
    *("cone contain", "cone pick_place", "cone slide"),
)
NUMBERS = [str(number) for number in range(len(CLASSES))]
LISTS = {"train": "train.txt", "validation": "val.txt"}
LIST_FOLDER = "lists/actions_present"
STRIDE = 3  # of 24 frames a second
SIZE = (240, 320)  # height and width of the published videos
FOLDERS = ("", "max2action", "cater", "CATER", "CATER/max2action", "cater/max2action")  # inside a root
MOST_MISMATCHES = 10  # that are named one by one


class CaterError(DataError):
    """CATER was asked for and is not there, or not usable; the message names the folder and what to do."""


def load_split(
    root: Path,
    split: str,
    frames_in: int,
    frames_out: int,
    stride: int = STRIDE,
    *,
    backend: str = "auto",
    pool: Pool | None = None,
    index: Path | None = None,
    on_bad: str = "stop",
) -> Split:
    """Scans the videos that the list of `split` ("train" or "validation") names and that are there.

    Each has one window, from sampled frame 0 on; its target is the (14, frames_in + frames_out) float32 tensor of
    actions. Classes that a list and a scene do not agree on are counted and named in the split's notes. pool, index,
    on_bad: as of `clevrer.load_split`.

    Raises CaterError where there is no such folder, list or video; VideoError.
    """
    folder = find_root(root)
    labels = read_list(folder / LIST_FOLDER / LISTS[split])
    items = {}
    for name in sorted(labels):
        video = folder / "videos" / name
        if os.path.exists(video):  # unlike Path.exists it has an answer for any name
            items[f"videos/{name}"] = (video, _scene_of(folder, video))
    if not items:
        raise CaterError(f"{folder}/videos: none of the {len(labels)} videos of {LISTS[split]} is there")
    whole = Split("CATER", folder, split, pool or Pool(0))
    examined = scan(items, partial(examine, backend=backend), whole.pool, index, on_bad=on_bad, desc=split)
    whole.bad = examined.bad
    mismatches, length = [], frames_in + frames_out
    for name, found in examined.found.items():
        actions = sampled(found["active"], stride)
        listed, seen = labels[items[name][0].name], set(found["active"].any(dim=1).nonzero()[:, 0].tolist())
        if listed != seen:
            mismatches.append(f"{items[name][0].name}: {_difference(listed, seen)}")
        possible = int(actions.shape[1] >= length)
        whole.possible += possible
        if possible:
            target, start = actions[None, :, :length].float(), torch.zeros(1, dtype=torch.int64)
            whole.sources.append(Source(items[name][0], name, actions.shape[1], start, target, stride))
    if not whole.sources:
        raise CaterError(f"{folder}/videos: {len(items)} videos, but none with {length} times {stride} frames")
    whole.notes = _mismatch_notes(mismatches, len(items), LISTS[split])
    return whole


def find_root(root: Path) -> Path:
    """The folder with videos/ and lists/ in it. Raises CaterError naming what is missing."""
    if not root.is_dir():
        raise CaterError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    for name in FOLDERS:
        if (root / name / "videos").is_dir() and (root / name / LIST_FOLDER).is_dir():
            return root / name
    raise CaterError(
        f"{root}: no CATER here: no videos/ beside {LIST_FOLDER}/, not in max2action/, cater/ or CATER/ either; "
        "`vjvcr-fast simulate cater` makes scenes in its format"
    )


def read_list(path: Path) -> dict[str, set[int]]:
    """{file name: numbers of CLASSES}. Raises CaterError naming the file and the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise CaterError(f"{path}: {reason}") from None
    labels: dict[str, set[int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split()
        classes = [text for part in rest for text in part.split(",") if text]
        known = all(text in NUMBERS for text in classes)
        if not known or Path(name).name != name or name in labels:
            allowed = f"a file's name, each once, and numbers below {len(CLASSES)}"
            raise CaterError(f"{path}, line {number}: {one_line(repr(line))}: must be {allowed}")
        labels[name] = {int(text) for text in classes}
    return labels


def examine(video: Path, scene: Path, backend: str) -> dict[str, Any]:
    """frames, height, width of a video; active: (14, frames) bool, which action in which frame.

    Raises VideoError naming the file: unreadable, or a scene that is not CATER's.
    """
    found: dict[str, Any] = probe(video, backend)
    active = read_scene(scene, found["frames"])
    return found | {"active": active}


def read_scene(path: Path, frames: int) -> Tensor:
    """(14, frames) bool: which action is active in which original frame, start inclusive, end exclusive.

    Raises VideoError naming the file: missing, another schema, an unknown action or instance, a time out of order.
    """
    active = torch.zeros(len(CLASSES), frames, dtype=torch.bool)
    number = {name: i for i, name in enumerate(CLASSES)}
    try:
        scene = json.loads(path.read_bytes())
        shapes = {item["instance"]: str(item["shape"]).lower() for item in scene["objects"]}
        for instance, movements in scene["movements"].items():
            for action, _, start, end in movements:
                if action == "_no_op":
                    continue
                name = f"{shapes[instance]} {str(action).lstrip('_')}"
                if name not in number:
                    raise ValueError(f"{instance} does {action}: none of CATER's {len(CLASSES)} classes")
                if not 0 <= start <= end:
                    raise ValueError(f"{instance}: {action} from {start} to {end}")
                active[number[name], start:end] = True
    except FileNotFoundError:
        raise VideoError(f"{path}: there is no such scene") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise VideoError(f"{path}: not a CATER scene ({type(error).__name__}: {one_line(error)})") from None
    return active


def sampled(active: Tensor, stride: int) -> Tensor:
    """(14, F) bool, of original frames -> (14, ceil(F / stride)) bool, of sampled ones."""
    missing = -active.shape[1] % stride
    return torch.nn.functional.pad(active, (0, missing)).unflatten(1, (-1, stride)).any(dim=2)


def _scene_of(folder: Path, video: Path) -> Path:
    beside = video.with_suffix(".json")
    return beside if os.path.exists(beside) else folder / "scenes" / beside.name


def _difference(listed: set[int], seen: set[int]) -> str:
    parts = {"listed, not in the scene": listed - seen, "in the scene, not listed": seen - listed}
    return "; ".join(f"{', '.join(CLASSES[i] for i in sorted(of))} {what}" for what, of in parts.items() if of)


def _mismatch_notes(mismatches: list[str], count: int, name: str) -> list[str]:
    if not mismatches:
        return []
    more = len(mismatches) - MOST_MISMATCHES
    return [
        f"{name} and the scenes disagree about {len(mismatches)} of {count} videos; the scenes are used:",
        *(f"  {line}" for line in mismatches[:MOST_MISMATCHES]),
        *([f"  and {more} more"] if more > 0 else []),
    ]
