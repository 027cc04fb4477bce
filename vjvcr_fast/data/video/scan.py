"""Looks at every file of a data set once, before training: what is there, and what is wrong with it.

What was found is kept in `vjvcr-cache/` beside the data, if that folder can be written, with the size and time of each
file. The next scan only looks at files that are new or have changed.

All packets of a file are read, its first frame is decoded, and its last one if that is quick (see TAIL). Damage in
between is only found by decoding everything, with `every_frame`. A file that this found damaged stays so for later
scans, until it changes.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vjvcr_fast.data import files
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.decode import VideoError, open_video
from vjvcr_fast.data.video.file import Source, find_damage
from vjvcr_fast.data.video.file import examine as facts_of

# Decoding the last frame means decoding from the last keyframe on. If that is so many frames, a second of video, a scan
# takes twice as long (10 ms instead of 5 at 480x320). CLEVRER's videos have 128 frames: 127 ms instead of 14.
TAIL = 25
FORMAT = 2  # of the index: results of another one are not used; 1 had sizes and counts before rotations and edits
ON_BAD = ("stop", "skip")
SIMULATED = "simulated.json"  # in a folder of scenes that `vjvcr-fast simulate` made


class DataError(RuntimeError):
    """A data set is missing or cannot be used. The message names the folder and what to do.

    split: what was found, if the files were looked at.
    """

    def __init__(self, message: str, split: "Split | None" = None) -> None:
        super().__init__(message)
        self.split = split


class Split:
    """The videos of one split of a data set, with their windows.

    title: the data set. root: its folder. name: "train", "validation", ... pool: the processes that read its files.
    sources: the videos that have a window. found: {name: what the scan found} of all that can be read. bad: {name:
    reason} of videos left out (on_bad="skip"). notes: lines that tell what else a person should know.
    """

    def __init__(self, title: str, root: Path, name: str, pool: workers.Pool) -> None:
        self.title, self.root, self.name, self.pool = title, root, name, pool
        self.sources: list[Source] = []
        self.found: dict[str, dict[str, Any]] = {}
        self.bad: dict[str, str] = {}
        self.notes: list[str] = []
        self.caches: dict[Any, Any] = {}  # the caches that were opened, kept here by whoever opens them

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def source(self) -> str:
        """A line that describes the split, for results to print."""
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
    """found: {name: what `examine` returned}; bad: {name: reason} of files that cannot be used."""

    found: dict[str, Any]
    bad: dict[str, str]


def find_root(
    root: Path,
    error: type[DataError],
    names: tuple[str, ...] = ("",),
    holds: Callable[[Path], bool] = Path.is_dir,
    missing: str = "",
) -> Path:
    """The first folder root / name that `holds` the data set. Raises `error` if there is none, saying what is
    `missing`."""
    if not root.is_dir():
        raise error(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    for folder in (root / name for name in names):
        if holds(folder):
            return folder
    raise error(f"{root}: {missing}")


def open_split(
    title: str,
    root: Path,
    name: str,
    items: Mapping[str, tuple[Path, ...]],
    examine: Callable[..., dict[str, Any]],
    *,
    backend: str = "auto",
    pool: workers.Pool | None = None,
    index: Path | None = None,
    on_bad: str = "stop",
    any_size: bool = False,
    every_frame: bool = False,
) -> Split:
    """Scans the files of a split. Returns a Split without sources yet.

    title, root, name: as in `Split`. pool: the processes that look at the files; None: none. The others: as in `scan`.
    """
    split = Split(title, root, name, pool or workers.Pool(0))
    how = {"any_size": any_size, "every_frame": every_frame}
    split.found, split.bad = scan(items, examine, split.pool, index, backend=backend, on_bad=on_bad, desc=name, **how)
    return split


@contextlib.contextmanager
def reading(path: Path, title: str, what: str) -> Iterator[None]:
    """Turns any error that a file's content causes into a VideoError that names the file.

    title, what: what the file should be, such as a "CATER" "scene".
    """
    try:
        yield
    except FileNotFoundError:
        raise VideoError(f"{path}: there is no such {what}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = f"{type(error).__name__}: {files.one_line(error)}"
        raise VideoError(f"{path}: not a {title} {what} ({why})") from None


def probe(path: Path, backend: str) -> dict[str, Any]:
    """What every scan finds of a video, after decoding its first frame, and its last one if TAIL allows. Raises
    VideoError.

    backend: a decoder that works on a CPU. "dali" does not for most videos, so `open_video` then chooses one.
    """
    video, facts = open_video(path, "auto" if backend == "dali" else backend), facts_of(path)
    video.frames([0, video.frame_count - 1] if facts.tail <= TAIL else [0])
    return {
        "frames": video.frame_count,
        "height": video.height,
        "width": video.width,
        "fps": video.fps,
        "codec": facts.codec,
        "container": facts.container,
        "decoder": video.backend,
    }


def decode_all(path: Path, *others: Path, examine: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What `examine` returns, or {"damaged": which frame cannot be decoded}."""
    found = examine(path, *others)
    damage = find_damage(path)
    return {"damaged": damage} if damage else found


def scan(
    items: Mapping[str, tuple[Path, ...]],
    examine: Callable[..., dict[str, Any]],
    pool: workers.Pool,
    index: Path | None = None,
    *,
    backend: str = "auto",
    on_bad: str = "stop",
    any_size: bool = False,
    every_frame: bool = False,
    desc: str = "scan",
) -> Scanned:
    """Calls examine(*paths, backend=...) in worker processes for every item that is not in the index yet.

    items: {name: its files, the video first}. examine: a module's function that returns a dict of plain values and
    tensors. index: the file where results are kept. backend: the decoder. on_bad: "stop" raises the first VideoError,
    "skip" collects them. any_size: if False, a video of another size than most counts as bad. every_frame: also decode
    every frame of videos that were not decoded like this before.
    """
    if on_bad not in ON_BAD:
        raise ValueError(f"on_bad={on_bad!r}: choose {' or '.join(ON_BAD)}")
    known = _load(index)
    stamps = {name: _stamp(paths, backend) for name, paths in items.items()}
    examine = partial(examine, backend=backend)
    entries = {n: known[n] for n in items if n in known and known[n]["stamp"] == stamps[n] is not None}
    if every_frame:
        examine = partial(decode_all, examine=examine)
        entries = {name: entry for name, entry in entries.items() if entry["every_frame"]}
    left = [name for name in items if name not in entries]
    bad: dict[str, str] = {}
    tasks = ((name, pool.submit(items[name][0], examine, *items[name][1:])) for name in left)
    try:
        with files.progress(total=len(items), initial=len(entries), desc=desc, unit="video", disable=not left) as bar:
            for name, task in files.ahead(tasks, 2 * pool.workers):
                try:
                    entries[name] = {"stamp": stamps[name], "every_frame": every_frame, "found": task.result()}
                except VideoError as error:
                    if on_bad == "stop":
                        raise
                    bad[name] = str(error)
                bar.update()
    finally:
        _store(index, entries, known, bool(left))
    found = {name: entries[name]["found"] for name in items if name in entries}
    wrong = {name: f"{items[name][0]}: {value['damaged']}" for name, value in found.items() if "damaged" in value}
    if not any_size:
        wrong |= _odd_sizes(items, {name: value for name, value in found.items() if name not in wrong})
    for name, reason in wrong.items():
        if on_bad == "stop":
            raise VideoError(reason)
        bad[name] = reason
        del found[name]
    return Scanned(found, {name: bad[name] for name in items if name in bad})


def _odd_sizes(items: Mapping[str, tuple[Path, ...]], found: Mapping[str, Any]) -> dict[str, str]:
    """{name: reason} of the videos of another size than most, which probably do not belong there."""
    sizes = {name: (value["width"], value["height"]) for name, value in found.items()}
    usual = max(set(sizes.values()), key=[*sizes.values()].count, default=(0, 0))
    return {
        name: f"{items[name][0]}: frames are {w}x{h}, those of the other videos {usual[0]}x{usual[1]}"
        for name, (w, h) in sizes.items()
        if (w, h) != usual
    }


def _stamp(paths: tuple[Path, ...], backend: str) -> list[int | str] | None:
    """FORMAT, the decoder, sizes and times of the files; None if one is missing."""
    try:
        stats = [os.stat(path) for path in paths]
    except OSError:
        return None
    return [FORMAT, backend, *(value for stat in stats for value in (stat.st_size, stat.st_mtime_ns))]


def _load(index: Path | None) -> dict[str, Any]:
    """The results of an earlier scan; none if the index cannot be read."""
    if index is None or not index.exists():
        return {}
    try:
        return dict(torch.load(index, weights_only=True))
    except Exception:  # a damaged file makes torch raise errors of many kinds
        return {}


def _store(index: Path | None, entries: dict[str, Any], known: dict[str, Any], changed: bool) -> None:
    if index is None or not changed:
        return
    with contextlib.suppress(OSError, RuntimeError):  # torch's for a full disk; then data is scanned each time
        files.replace(index, lambda file: torch.save(known | entries, file))
