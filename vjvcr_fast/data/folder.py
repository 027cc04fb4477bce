"""Any folder of videos without annotations: files of any name, size and kind that a decoder can read.

    ROOT/train/**, ROOT/validation/** (or val/)      if both are there
    ROOT/**                                          else: one video in ten is for validation, chosen by its name

Videos are found by their suffix. Hidden files and folders, and `vjvcr-cache`, are left out. A video's split only
depends on its name, so it does not change when other videos are added. A window may start at any frame. There
are no labels, so every target is 0.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.video import scan
from vjvcr_fast.data.video.clips import VideoClips
from vjvcr_fast.data.video.file import Source
from vjvcr_fast.data.video.scan import DataError, Split
from vjvcr_fast.data.video.workers import Pool

SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
SPLITS = {"train": ("train",), "validation": ("validation", "val")}
CACHE = "vjvcr-cache"  # the folder of decoded frames, inside that of the data
HELD_OUT = 10  # one video in so many is for validation


class FolderError(DataError):
    """A folder of videos is missing or has no video to use. The message names it and what to do."""


class ClipFolder(VideoClips):
    """Windows of `frames` frames from the videos of a folder, as batches on a device (see `VideoClips`).

        clips = ClipFolder("my-videos", frames=16, size=(64, 64))
        for batch in clips.batches(step=0, n=32): ...          # batch.frames (32, 16, 3, 64, 64) uint8

    root: the folder. split: "train", "validation", or None for all videos. stride: every so many frames are taken.
    workers: processes that decode; 0 decodes in this process. on_bad and other options: as in `VideoClips`.

    Raises FolderError if there is no such folder or no video is long enough; VideoError for a file that cannot be used.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        frames: int,
        size: tuple[int, int],
        split: str | None = None,
        stride: int = 1,
        seed: int = 0,
        stream: str = "train",
        workers: int = 0,
        on_bad: str = "stop",
        **options: Any,
    ) -> None:
        self.split = load_split(Path(root), split, frames, 0, stride, pool=Pool(workers), on_bad=on_bad)
        options |= {"pool": self.split.pool, "on_bad": on_bad}
        super().__init__(self.split.sources, frames=frames, size=size, seed=seed, stream=stream, **options)


def load_split(
    root: Path, split: str | None, frames_in: int, frames_out: int, stride: int = 1, **options: Any
) -> Split:
    """Scans the videos of one split, "train" or "validation", or of all of them (None).

    stride: every so many frames count. options: backend, pool, index, on_bad and every_frame of
    `scan.open_split`.

    Raises FolderError if there is no such folder, video or window; VideoError for a file that cannot be used.
    """
    folder, length = find_root(root), frames_in + frames_out
    items = {path.relative_to(folder).as_posix(): (path,) for path in _of_split(folder, split)}
    if not items:
        raise FolderError(
            f"{folder}: no videos{f' for {split}' if split else ''}; of files named *{', *'.join(SUFFIXES)}"
        )
    options |= {"any_size": True}
    whole = scan.open_split("folder of videos", folder, split or "all", items, scan.probe, **options)
    short = []
    for name, facts in whole.found.items():
        count = -(-facts["frames"] // stride)
        starts = torch.arange(max(count - length + 1, 0))
        if len(starts):
            whole.sources.append(Source(items[name][0], name, count, starts, torch.zeros(len(starts)), stride))
        else:
            short.append(name)
    if not whole.sources:
        none = f"{len(items)} videos for {whole.name}, but none has {length} frames at stride {stride}"
        raise FolderError(f"{folder}: {none}" + (f"; {len(whole.bad)} cannot be read" if whole.bad else ""), whole)
    if short:
        shown = ", ".join(short[:3]) + (" ..." if len(short) > 3 else "")
        fewer = f"fewer than {length} frames at stride {stride}"
        whole.notes = [f"{whole.name}: {len(short)} with {fewer} left out: {shown}"]
    return whole


def find_root(root: Path) -> Path:
    """The folder itself. Raises FolderError if it is none."""
    return scan.find_root(root, FolderError)


def videos_below(folder: Path) -> list[Path]:
    """The files of `files_below` with one of SUFFIXES."""
    return [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]


def files_below(folder: Path) -> list[Path]:
    """Every file in or below a folder that is not hidden, sorted by path. Links are followed, but no folder is entered
    twice. Raises FolderError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise FolderError(f"{error.filename}: {error.strerror}")

    seen: set[tuple[int, int]] = set()

    def walk() -> Iterator[Path]:
        for top, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            place = os.stat(top)
            if (place.st_dev, place.st_ino) in seen:
                folders.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != CACHE)
            yield from (Path(top, name) for name in names if not name.startswith("."))

    return sorted(walk())


def _of_split(folder: Path, split: str | None) -> list[Path]:
    named = {s: [folder / n for n in names if (folder / n).is_dir()] for s, names in SPLITS.items()}
    if split is None:
        return videos_below(folder)
    if all(named.values()):
        return [path for top in named[split] for path in videos_below(top)]
    found = videos_below(folder)
    if len(found) == 1:
        raise FolderError(
            f"{folder}: only one video; training and validation need one each, or folders train/ and val/"
        )
    draws = {path: key(0, "split", path.relative_to(folder).as_posix()) for path in found}
    held_out = [path for path in found if draws[path] % HELD_OUT == 0]
    # With few videos, one split may get none by chance. It then gets the video that is next in line.
    held_out = held_out or sorted(found, key=draws.__getitem__)[:1]
    held_out = held_out if len(held_out) < len(found) else held_out[1:]
    return held_out if split == "validation" else [path for path in found if path not in set(held_out)]
