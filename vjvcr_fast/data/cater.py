"""CATER's max2action: objects that slide, are picked up, rotate and contain each other, in videos of 301 frames.

    ROOT/videos/CLEVR_new_000000.avi            Motion-JPEG, 320x240, 24 fps
    ROOT/scenes/CLEVR_new_000000.json           objects, and movements: {instance: [[action, other, start, end], ...]}
    ROOT/lists/actions_present/train.txt        lines "CLEVR_new_000000.avi 0,3,7": the classes of a video; and val.txt

A scene file may also lie beside its video.

Every third frame is taken, so 8 a second. A movement is active in the original frames from start up to, but not
including, end. Sampled frame t stands for the original frames 3 t, 3 t + 1 and 3 t + 2, and an action is active in it
if it is active in one of them [ours]. So the union over the sampled frames 50 to 99 is the union over the original
frames 150 to 299, which the paper asks for.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import one_line
from vjvcr_fast.data.video import scan
from vjvcr_fast.data.video.file import Source
from vjvcr_fast.data.video.scan import DataError, Split

CLASSES = (
    *("sphere slide", "sphere pick_place", "spl slide", "spl pick_place", "spl rotate"),
    *("cylinder pick_place", "cylinder slide", "cylinder rotate", "cube slide", "cube pick_place", "cube rotate"),
    *("cone contain", "cone pick_place", "cone slide"),
)
NUMBERS = [str(number) for number in range(len(CLASSES))]
LISTS = {"train": "train.txt", "validation": "val.txt"}
LIST_FOLDER = "lists/actions_present"
STRIDE = 3  # of 24 frames a second
FOLDERS = ("", "max2action", "cater", "CATER", "CATER/max2action", "cater/max2action")  # inside a root
MOST_MISMATCHES = 10  # so many are named, the others counted


class CaterError(DataError):
    """CATER is missing or cannot be used. The message names the folder and what to do."""


def load_split(root: Path, split: str, frames_in: int, frames_out: int, stride: int = STRIDE, **options: Any) -> Split:
    """Scans the videos that are there and that the list of `split` names.

    Each video has one window, which starts at frame 0. Its target are the actions of each sampled frame, a float32
    tensor (14, frames_in + frames_out). Videos whose list and scene state different classes are counted and named in
    the split's notes.

    split: "train" or "validation". stride: every so many frames count. options: backend, pool, index, on_bad and
    every_frame of `scan.open_split`.

    Raises CaterError if there is no such folder, list or video; VideoError for a file that cannot be used.
    """
    folder, length = find_root(root), frames_in + frames_out
    labels = read_list(folder / LIST_FOLDER / LISTS[split])
    items = {}
    for name in sorted(labels):
        video = folder / "videos" / name
        if os.path.exists(video):  # unlike Path.exists it accepts any name
            items[f"videos/{name}"] = (video, _scene_of(folder, video))
    if not items:
        raise CaterError(f"{folder}/videos: none of the {len(labels)} videos of {LISTS[split]} is there")
    whole = scan.open_split("CATER", folder, split, items, examine, **options)
    mismatches = []
    for name, facts in whole.found.items():
        video, actions = items[name][0], sampled(facts["active"], stride)
        listed, seen = labels[video.name], set(facts["active"].any(dim=1).nonzero()[:, 0].tolist())
        if listed != seen:
            mismatches.append(f"{video.name}: {_difference(listed, seen)}")
        if actions.shape[1] >= length:
            target, start = actions[None, :, :length].float(), torch.zeros(1, dtype=torch.int64)
            whole.sources.append(Source(video, name, actions.shape[1], start, target, stride))
    if not whole.sources:
        none = f"{len(items)} videos, but none has {length} frames at stride {stride}"
        raise CaterError(f"{folder}/videos: {none}", whole)
    whole.notes = _mismatch_notes(mismatches, len(items), LISTS[split])
    return whole


def find_root(root: Path) -> Path:
    """The folder that has videos/ and lists/ in it. Raises CaterError if there is none."""
    missing = (
        f"no CATER here: no videos/ beside {LIST_FOLDER}/, not in max2action/, cater/ or CATER/ either; "
        "`vjvcr-fast simulate cater` makes scenes in its format"
    )
    needed = ("videos", LIST_FOLDER)
    return scan.find_root(root, CaterError, FOLDERS, lambda at: all((at / name).is_dir() for name in needed), missing)


def read_list(path: Path) -> dict[str, set[int]]:
    """Reads a list: {file name: indices into CLASSES}. Raises CaterError naming the file and the line."""
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
    """What `scan` keeps of a video: frames, height and width; active, (14, frames) bool, which action is active when.

    Raises VideoError, naming the file, if one cannot be read or the scene is not CATER's.
    """
    found: dict[str, Any] = scan.probe(video, backend)
    return found | {"active": read_scene(scene, found["frames"])}


def read_scene(path: Path, frames: int) -> Tensor:
    """Which action is active in which original frame: (14, frames) bool.

    Raises VideoError, naming the file, if it is missing, has another format, an unknown action or instance, or an end
    before its start.
    """
    active = torch.zeros(len(CLASSES), frames, dtype=torch.bool)
    with scan.reading(path, "CATER", "scene"):
        scene = json.loads(path.read_bytes())
        shapes = {item["instance"]: str(item["shape"]).lower() for item in scene["objects"]}
        for instance, movements in scene["movements"].items():
            for action, _, start, end in movements:
                if action == "_no_op":
                    continue
                name = f"{shapes[instance]} {str(action).lstrip('_')}"
                if name not in CLASSES:
                    raise ValueError(f"{instance} does {action}: none of CATER's {len(CLASSES)} classes")
                if not 0 <= start <= end:
                    raise ValueError(f"{instance}: {action} from {start} to {end}")
                active[CLASSES.index(name), start:end] = True
    return active


def sampled(active: Tensor, stride: int) -> Tensor:
    """From the original frames, (14, F) bool, to the sampled ones, (14, ceil(F / stride)) bool."""
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
