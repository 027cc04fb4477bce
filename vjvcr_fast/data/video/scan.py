"""Looking at every file of a data set once, before training: what is there, and what is wrong with it.

What was found is kept beside the data (`vjvcr-cache/`, where that can be written), by size and time of the files, so
that only new and changed ones are looked at again.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vjvcr_fast.data import files
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.clips import Source
from vjvcr_fast.data.video.decode import VideoError, open_video

ON_BAD = ("stop", "skip")
SIMULATED = "simulated.json"  # in a folder of scenes that `vjvcr-fast simulate` made


class DataError(RuntimeError):
    """A data set was asked for and is not there, or not usable; the message names the folder and what to do."""


class Split:
    """The videos of one split of a data set, with their windows.

    title: of the data set. name: "train", "validation", ... sources: the videos that have a window. possible, dropped:
    windows, and how many of them the data set's rules left out. bad: {name: reason} of videos left out
    (on_bad="skip"). notes: what else a person should know. pool: the processes that read the files.
    """

    def __init__(self, title: str, root: Path, name: str, pool: workers.Pool) -> None:
        self.title, self.root, self.name, self.pool = title, root, name, pool
        self.sources: list[Source] = []
        self.bad: dict[str, str] = {}
        self.possible = self.dropped = 0
        self.notes: list[str] = []
        self.caches: dict[Any, Any] = {}  # that have been opened, for whoever opens them to find again

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def source(self) -> str:
        """A line about all of it, for results to print."""
        left_out = f", {len(self.bad)} unreadable left out" if self.bad else ""
        simulated = (self.root / SIMULATED).exists()
        title = f"simulated scenes in {self.title}'s format" if simulated else self.title
        return f"{title}: {len(self):,} videos{left_out}"

    def fingerprint(self) -> str:
        """A short hash of the videos' names, windows and targets."""
        content = hashlib.sha256()
        for source in self.sources:
            content.update(source.name.encode())
            content.update(source.starts.numpy().tobytes())
            content.update(source.targets.numpy().tobytes())
        return content.hexdigest()[:16]

    def remarks(self) -> list[str]:
        """Lines for a person to read: the notes, and every video that was left out."""
        left_out = [f"{len(self.bad)} left out, unreadable:", *(f"  {reason}" for reason in self.bad.values())]
        return [*self.notes, *(left_out if self.bad else [])]


class Scanned(NamedTuple):
    """found: {name: what `examine` returned}; bad: {name: reason}, of files that cannot be used."""

    found: dict[str, Any]
    bad: dict[str, str]


def probe(path: Path, backend: str) -> dict[str, int]:
    """frames, height and width of a video whose first frame can be decoded. Raises VideoError.

    backend: of a CPU; "dali", which a CPU cannot use for most videos, leaves the choice to `open_video`.
    """
    video = open_video(path, "auto" if backend == "dali" else backend)
    video.frames([0])
    return {"frames": video.frame_count, "height": video.height, "width": video.width}


def scan(
    items: Mapping[str, tuple[Path, ...]],
    examine: Callable[..., dict[str, Any]],
    pool: workers.Pool,
    index: Path | None = None,
    *,
    on_bad: str = "stop",
    any_size: bool = False,
    desc: str = "scan",
) -> Scanned:
    """examine(*paths) -> dict of plain values and tensors, for every item, in worker processes.

    items: {name: its files, the video first}. examine: a function of a module, or a functools.partial of one. index:
    where findings are kept. on_bad: "stop" raises the first VideoError, "skip" collects them; a video of another size
    than most is one too, unless they may have any_size.
    """
    if on_bad not in ON_BAD:
        raise ValueError(f"on_bad={on_bad!r}: choose {' or '.join(ON_BAD)}")
    known = _load(index)
    stamps = {name: _stamp(paths) for name, paths in items.items()}
    fresh = {n: known[n]["found"] for n in items if n in known and known[n]["stamp"] == stamps[n] is not None}
    left = [name for name in items if name not in fresh]
    bad: dict[str, str] = {}
    try:
        with files.progress(total=len(items), initial=len(fresh), desc=desc, unit="video", disable=not left) as bar:
            waiting: list[tuple[str, workers.Task]] = []
            for name in [*left, *[None] * (2 * pool.workers)]:
                if name is not None:
                    waiting.append((name, pool.submit(items[name][0], examine, *items[name][1:])))
                if waiting and (name is None or len(waiting) > 2 * pool.workers):
                    done, task = waiting.pop(0)
                    try:
                        fresh[done] = task.result()
                    except VideoError as error:
                        if on_bad == "stop":
                            raise
                        bad[done] = str(error)
                    bar.update()
    finally:
        _store(index, {n: {"stamp": stamps[n], "found": found} for n, found in fresh.items()}, known, bool(left))
    found = {name: fresh[name] for name in items if name in fresh}
    for name, reason in ({} if any_size else _odd_sizes(items, found)).items():
        if on_bad == "stop":
            raise VideoError(reason)
        bad[name] = reason
        del found[name]
    return Scanned(found, bad)


def _odd_sizes(items: Mapping[str, tuple[Path, ...]], found: Mapping[str, Any]) -> dict[str, str]:
    """Videos of another size than most: a file that does not belong there."""
    sizes = [(value["width"], value["height"]) for value in found.values()]
    usual = max(set(sizes), key=sizes.count, default=(0, 0))
    odd = {n: s for n, s in zip(found, sizes, strict=True) if s != usual}
    return {
        n: f"{items[n][0]}: frames are {w}x{h}, those of the other videos {usual[0]}x{usual[1]}"
        for n, (w, h) in odd.items()
    }


def _stamp(paths: tuple[Path, ...]) -> list[int] | None:
    """Sizes and times of files; None where one is not there."""
    try:
        stats = [os.stat(path) for path in paths]
    except OSError:
        return None
    return [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]


def _load(index: Path | None) -> dict[str, Any]:
    """What an earlier scan kept; anything unreadable is as good as none."""
    if index is None or not index.exists():
        return {}
    try:
        return dict(torch.load(index, weights_only=True))
    except Exception:  # what a damaged file makes torch raise has no end
        return {}


def _store(index: Path | None, entries: dict[str, Any], known: dict[str, Any], changed: bool) -> None:
    if index is None or not changed:
        return
    with contextlib.suppress(OSError):  # data on a read-only disk is scanned each time
        files.replace(index, lambda file: torch.save(known | entries, file))
