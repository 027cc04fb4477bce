"""Any folder of videos: files below it, of any names, sizes and kinds that the decoders know, without annotations.

    ROOT/train/**, ROOT/validation/** (or val/)      where both are there
    ROOT/**                                          else: one video in ten for validation, by its name

Files are known by their suffix; hidden ones, and what `vjvcr-cache` holds, are left out. Which split a video belongs to
depends on its name alone, so that it stays there when others come. A window may start at any frame; there is nothing
to ask of it, so targets are zeros.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.scan import DataError, Split, probe, scan
from vjvcr_fast.data.video.workers import Pool

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
SPLITS = {"train": ("train",), "validation": ("validation", "val")}
CACHE = "vjvcr-cache"
HELD_OUT = 10  # one video in so many


class FolderError(DataError):
    """A folder of videos was asked for and is not there, or has none to use; the message names it and what to do."""


class ClipFolder(VideoClips):
    """Windows of `frames` frames from the videos of a folder, as batches on a device (`VideoClips`).

        clips = ClipFolder("my-videos", frames=16, size=(64, 64))
        for batch in clips.batches(step=0, n=32): ...          # batch.frames (32, 16, 3, 64, 64) uint8

    root: the folder. split: "train", "validation", or None for all. stride: every so many frames is taken. workers:
    processes that decode; 0 decodes in this one. on_bad, and other options: as of `VideoClips`.

    Raises FolderError where there is no such folder or no video long enough; VideoError.
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
    root: Path,
    split: str | None,
    frames_in: int,
    frames_out: int,
    stride: int = 1,
    *,
    backend: str = "auto",
    pool: Pool | None = None,
    index: Path | None = None,
    on_bad: str = "stop",
) -> Split:
    """Scans the videos of one split, "train" or "validation", or all of them (None). Arguments as `clevrer.load_split`.

    Raises FolderError where there is no such folder, video or window; VideoError.
    """
    folder = find_root(root)
    items = {path.relative_to(folder).as_posix(): (path,) for path in _of_split(folder, split)}
    if not items:
        raise FolderError(
            f"{folder}: no videos{f' for {split}' if split else ''}; of files named *{', *'.join(SUFFIXES)}"
        )
    whole = Split("folder of videos", folder, split or "all", pool or Pool(0))
    examine = partial(probe, backend=backend)
    examined = scan(items, examine, whole.pool, index, on_bad=on_bad, any_size=True, desc=whole.name)
    whole.bad = examined.bad
    length, short = frames_in + frames_out, []
    for name, found in examined.found.items():
        count = -(-found["frames"] // stride)
        starts = torch.arange(max(count - length + 1, 0))
        whole.possible += len(starts)
        if len(starts):
            whole.sources.append(Source(items[name][0], name, count, starts, torch.zeros(len(starts)), stride))
        else:
            short.append(name)
    if not whole.sources:
        raise FolderError(
            f"{folder}: {len(items)} videos for {whole.name}, but none with {length} times {stride} frames"
        )
    if short:
        shown = ", ".join(short[:3]) + (" ..." if len(short) > 3 else "")
        whole.notes = [f"{whole.name}: {len(short)} shorter than {length} times {stride} frames left out: {shown}"]
    return whole


def find_root(root: Path) -> Path:
    """The folder itself. Raises FolderError where it is none."""
    if not root.is_dir():
        raise FolderError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    return root


def videos_below(folder: Path) -> list[Path]:
    """Every file with one of SUFFIXES, sorted by its path; links are followed, but into no folder twice. Raises
    FolderError for a folder that cannot be read."""

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

    return sorted(path for path in walk() if path.suffix.lower() in SUFFIXES)


def _of_split(folder: Path, split: str | None) -> list[Path]:
    named = {s: [folder / n for n in names if (folder / n).is_dir()] for s, names in SPLITS.items()}
    if split is None:
        return videos_below(folder)
    if all(named.values()):
        return [path for top in named[split] for path in videos_below(top)]
    found = videos_below(folder)
    if len(found) == 1:
        raise FolderError(
            f"{folder}: one video alone, which cannot be for training and for validation; or use train/ and val/"
        )
    draws = {path: key(0, "split", path.relative_to(folder).as_posix()) for path in found}
    held_out = [path for path in found if draws[path] % HELD_OUT == 0]
    # With few videos chance may leave a side empty: it gets the one that is next.
    held_out = held_out or sorted(found, key=draws.__getitem__)[:1]
    held_out = held_out if len(held_out) < len(found) else held_out[1:]
    return held_out if split == "validation" else [path for path in found if path not in set(held_out)]
