"""The decode-once cache: the frames of video files at training resolution, in one memory-mapped file.

A video with a single keyframe costs decoding from frame 0 for every window; from here a window costs a copy. A folder:

    meta.json    what all frames have in common: size, and the decoder that made them
    frames.u8    the videos one after another, each (F, 3, H, W) uint8
    index.jsonl  a line for each video whose frames are on the disk: name, bytes of its file, frames, place, CRC-32

A line is written after its frames have reached the disk, so a killed `fill` leaves at most frames that no line speaks
of; the next call overwrites them. Every video is checked against its sum when it is first read.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vjvcr_fast.data.files import one_line, progress, write_atomic
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.decode import VideoError

FAMILIES = ("ffmpeg", "dali")
SYNC_SECONDS = 2.0  # how often frames are forced to the disk, and their lines written
ON_DEVICE = 0.4  # of the free memory of a GPU: up to there the cache moves into it


class CacheError(RuntimeError):
    """A cache that cannot be used or filled; the message names the folder, the reason and what to do."""


class Video(Protocol):
    """What the cache needs to know of a video: a `clips.Source` has it."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def frames(self) -> int: ...
    @property
    def stride(self) -> int: ...


class Line(NamedTuple):
    """A line of index.jsonl; `first` counts frames from the start of frames.u8."""

    video: str
    bytes: int
    frames: int
    stride: int
    first: int
    crc32: int


class Filled(NamedTuple):
    """What `fill` did: videos written now, those that were there, and {name: reason} of those that cannot be read."""

    written: int
    kept: int
    bad: dict[str, str]


class FrameCache:
    """A cache to read from. folder: as `fill` left it, finished or not.

    Raises CacheError where there is none, it is damaged, or its frames are not of (height, width) `size` or, unless
    `backend` is "auto", not from a decoder that gives the same ones.
    """

    def __init__(self, folder: Path, size: tuple[int, int], backend: str = "auto") -> None:
        self.folder, self.size = folder, size
        meta = _read_meta(folder)
        if meta is None:
            raise CacheError(f"{folder}: there is no cache; `vjvcr-fast cache` makes one")
        _check_meta(folder, meta, size, backend)
        self.lines = _separate(_read_index(folder, size))
        self._served: list[tuple[Sequence[Video], torch.device, Serving]] = []

    def serving(self, sources: Sequence[Video], device: torch.device) -> "Serving":
        """A view of the cache by the numbers of `sources`, on `device` where there is room for it: the same one for
        the same list, so that a GPU holds the frames once."""
        for others, place, served in self._served:
            if others is sources and place == device:
                return served
        self._served.append((sources, device, Serving(self, sources, device)))
        return self._served[-1][2]


class Serving:
    """Windows of `sources`, by their numbers. complete: whether all of them are cached."""

    def __init__(self, cache: FrameCache, sources: Sequence[Video], device: torch.device) -> None:
        height, width = cache.size
        self._cache, self.device = cache, device
        self._lines = [_valid_line(cache.lines, source) for source in sources]
        self.complete = all(line is not None for line in self._lines)
        frames = max((line.first + line.frames for line in cache.lines.values()), default=0)
        shape = (frames, 3, height, width)
        file, length = str(cache.folder / "frames.u8"), math.prod(shape)
        # Mapped privately, so that a cache on a read-only disk serves too; torch maps no file of length 0.
        try:
            mapped = torch.from_file(file, False, length, dtype=torch.uint8) if length else torch.empty(0).byte()
        except RuntimeError as error:
            raise CacheError(f"{file}: cannot be read ({one_line(error)})") from None
        self._data = mapped.view(shape)
        self._unchecked = {number for number, line in enumerate(self._lines) if line is not None}
        if device.type == "cuda" and mapped.numel() < ON_DEVICE * torch.cuda.mem_get_info(device)[0]:
            for number in sorted(self._unchecked):
                self._check(number)
            self._data = self._data.to(device)

    def has(self, source: int) -> bool:
        return self._lines[source] is not None

    def read(self, places: Sequence[tuple[int, int]], count: int) -> Tensor:
        """(N, count, 3, H, W) uint8 on the device: frames first .. first + count - 1 of each (source, first)."""
        rows = []
        for source, first in places:
            line = self._lines[source]
            if line is None or not 0 <= first <= line.frames - count:
                raise IndexError(f"source {source}, frames {first} to {first + count - 1}: not in the cache")
            if source in self._unchecked:
                self._check(source)
            rows.append(line.first + first)
        index = (torch.tensor(rows)[:, None] + torch.arange(count)).flatten().to(self._data.device, non_blocking=True)
        if self._data.device.type == self.device.type:  # "cuda" is not equal to the "cuda:0" that a tensor is on
            found = self._data.index_select(0, index)
        else:
            found = torch.empty(len(index), *self._data.shape[1:], dtype=torch.uint8, pin_memory=True)
            torch.index_select(self._data, 0, index, out=found)
        return found.unflatten(0, (len(rows), count)).to(self.device, non_blocking=True)

    def _check(self, source: int) -> None:
        line = self._lines[source]
        assert line is not None
        if _sum(self._data[line.first : line.first + line.frames]) != line.crc32:
            raise CacheError(f"{self._cache.folder}: damaged at {line.video}: `vjvcr-fast cache --verify` repairs it")
        self._unchecked.discard(source)


def fill(
    videos: Sequence[Video],
    folder: Path,
    size: tuple[int, int],
    backend: str,
    pool: workers.Pool,
    *,
    device: str | torch.device = "cpu",
    on_bad: str = "stop",
    verify: bool = False,
    desc: str = "cache",
) -> Filled:
    """Decodes into `folder` whatever of `videos` is not there yet, every frame resized to (height, width) `size`.

    backend: "auto", "decord" or "torchcodec", whose frames are equal, or "dali", which decodes on `device`. on_bad:
    "stop" raises the VideoError of a video that cannot be read, after everything before it is safe; "skip" goes on and
    returns it. verify: check all sums and decode anew what is damaged.

    Raises CacheError: no room on the disk, another process at work in the folder, frames of another size or decoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        meta = _read_meta(folder)
        if meta is None:
            write_atomic(folder / "meta.json", json.dumps({"size": list(size), "decoder": _family(backend)}) + "\n")
        else:
            _check_meta(folder, meta, size, backend)
        (folder / "frames.u8").touch()
        everything = _read_index(folder, size)
        lines = _separate(everything)
        valid = {video.name: line for video in videos if (line := _valid_line(lines, video)) is not None}
        kept = {name for name, line in valid.items() if not (verify and _damaged(folder, size, line))}
        missing = [video for video in videos if video.name not in kept]
        _check_room(folder, size, missing, lines)
        end = max((line.first + line.frames for line in everything.values()), default=0)
        writer, bad = _Writer(folder, size, lines, end), dict[str, str]()
        bar = progress(total=len(videos), initial=len(kept), desc=desc, unit="video", disable=not missing)
        with bar, contextlib.closing(writer):
            for video, found in _decoded(missing, backend, size, pool, torch.device(device)):
                try:
                    writer.add(video, found())
                except VideoError as error:
                    if on_bad == "stop":
                        raise
                    bad[video.name] = str(error)
                bar.update()
        return Filled(len(missing) - len(bad), len(kept), bad)


def _decoded(
    videos: Sequence[Video], backend: str, size: tuple[int, int], pool: workers.Pool, device: torch.device
) -> Iterator[tuple[Video, Callable[[], Tensor]]]:
    """Videos with what gives their frames, or raises VideoError; a few are in work beyond the one waited for."""
    if backend == "dali" and device.type == "cuda":
        yield from _decoded_on_gpu(videos, size, device)
        return
    waiting: list[tuple[Video, Callable[[], Tensor]]] = []
    for video in videos:
        task = pool.submit(video.path, workers.decode, backend, 0, video.frames, video.stride, size)
        waiting.append((video, partial(_received, task)))
        if len(waiting) > 2 * pool.workers:
            yield waiting.pop(0)
    yield from waiting


def _received(task: workers.Task) -> Tensor:
    return workers.received(task.result())


def _decoded_on_gpu(
    videos: Sequence[Video], size: tuple[int, int], device: torch.device
) -> Iterator[tuple[Video, Callable[[], Tensor]]]:
    """By the same pipeline that decodes for training, so that the cache holds the same frames."""
    from vjvcr_fast.data.video.dali import DaliClips

    for length, group in groupby(sorted(videos, key=lambda video: video.frames), key=lambda video: video.frames):
        left = list(group)
        while left:
            requests = [[(video.path, 0)] for video in left]
            clips = iter(DaliClips(requests, length, size, device, stride=left[0].stride))
            failed = False
            while left and not failed:
                try:
                    frames = next(clips)[0].cpu()
                    yield left.pop(0), partial(workers.given, frames)
                except VideoError as error:  # ends the pipeline, which starts anew behind the video
                    failed = True
                    yield left.pop(0), partial(workers.refused, error)


class _Writer:
    """Puts videos into their old places or after frame `end`; their lines follow when their frames are on the disk."""

    def __init__(self, folder: Path, size: tuple[int, int], lines: dict[str, Line], end: int) -> None:
        self._bytes, self._next = 3 * size[0] * size[1], end  # bytes of a frame
        self._frames, self._index = (folder / "frames.u8").open("r+b"), (folder / "index.jsonl").open("a")
        _end_line(self._index, folder)
        self._places = lines
        self._waiting: list[Line] = []
        self._synced = time.monotonic()

    def add(self, video: Video, frames: Tensor) -> None:
        if len(frames) != video.frames:
            raise VideoError(f"{video.path}: {len(frames)} frames decoded, {video.frames} expected")
        old = self._places.get(video.name)
        first = old.first if old is not None and old.frames == video.frames else self._next
        self._next = max(self._next, first + video.frames)
        self._frames.seek(first * self._bytes)
        self._frames.write(frames.contiguous().numpy().data)
        self._waiting.append(
            Line(video.name, video.path.stat().st_size, video.frames, video.stride, first, _sum(frames))
        )
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        try:
            self._sync()
        finally:
            self._frames.close()
            self._index.close()

    def _sync(self) -> None:
        _to_disk(self._frames)
        self._index.writelines(json.dumps(line._asdict()) + "\n" for line in self._waiting)
        _to_disk(self._index)
        self._waiting, self._synced = [], time.monotonic()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _end_line(index: Any, folder: Path) -> None:
    """A line that a crash cut off must not swallow the next."""
    content = (folder / "index.jsonl").read_bytes()
    if content and not content.endswith(b"\n"):
        index.write("\n")


def _read_meta(folder: Path) -> dict[str, Any] | None:
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_bytes())
        size, decoder = tuple(meta["size"]), meta["decoder"]
        if [*map(type, size)] != [int, int] or min(size) < 1 or decoder not in FAMILIES:
            raise ValueError(f"size {size}, decoder {decoder!r}")
        return {"size": size, "decoder": decoder}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise CacheError(f"{file}: cannot be read ({why}); remove {folder}") from None


def _check_meta(folder: Path, meta: dict[str, Any], size: tuple[int, int], backend: str) -> None:
    if meta["size"] != tuple(size):
        shown = ["x".join(map(str, s)) for s in (meta["size"], size)]
        raise CacheError(f"{folder}: holds frames of {shown[0]}, asked for are {shown[1]}; choose another folder")
    if backend != "auto" and meta["decoder"] != _family(backend):
        raise CacheError(
            f"{folder}: was filled by {meta['decoder']}, whose frames differ from those of {backend}; choose another "
            "folder, or --data.decoder auto"
        )


def _family(backend: str) -> str:
    """decord and torchcodec give the same frames to the bit."""
    return FAMILIES[backend == "dali"]


def _read_index(folder: Path, size: tuple[int, int]) -> dict[str, Line]:
    """The last line of every video. Lines that are not whole, or of frames that are not there, are as good as none."""
    lines: dict[str, Line] = {}
    index, frames = folder / "index.jsonl", folder / "frames.u8"
    try:
        texts = index.read_bytes().splitlines() if index.exists() else []
        there = frames.stat().st_size // (3 * size[0] * size[1]) if frames.exists() else 0
    except OSError as error:
        raise CacheError(f"{folder}: cannot be read ({error.strerror}); remove it") from None
    for text in texts:
        try:
            line = Line(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            continue
        video, *numbers = line
        if type(video) is str and all(type(number) is int and number >= 0 for number in numbers):
            lines[video] = line
    return {video: line for video, line in lines.items() if line.first + line.frames <= there}


def _separate(lines: dict[str, Line]) -> dict[str, Line]:
    """Without those that claim the same frames, of which one is wrong: to repair one would damage the other."""
    wrong, last = set[str](), Line("", 0, 0, 0, 0, 0)  # last: of those before, the one that ends last
    for line in sorted(lines.values(), key=lambda line: line.first):
        if line.first < last.first + last.frames:
            wrong |= {line.video, last.video}
        last = max(last, line, key=lambda line: line.first + line.frames)
    return {video: line for video, line in lines.items() if video not in wrong}


def _valid_line(lines: dict[str, Line], video: Video) -> Line | None:
    """The line of a video, unless its file is another one now."""
    line = lines.get(video.name)
    if line is None or (line.frames, line.stride) != (video.frames, video.stride):
        return None
    return line if line.bytes == video.path.stat().st_size else None


def _damaged(folder: Path, size: tuple[int, int], line: Line) -> bool:
    length = 3 * size[0] * size[1]
    with (folder / "frames.u8").open("rb") as file:
        file.seek(line.first * length)
        return zlib.crc32(file.read(line.frames * length)) != line.crc32


def _check_room(folder: Path, size: tuple[int, int], missing: Sequence[Video], lines: dict[str, Line]) -> None:
    new = sum(v.frames for v in missing if v.name not in lines)
    needed, free = new * 3 * size[0] * size[1], shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on its disk")


def _sum(frames: Tensor) -> int:
    return zlib.crc32(frames.contiguous().numpy().data)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CacheError(f"{folder}: another process is filling it") from None
        yield
