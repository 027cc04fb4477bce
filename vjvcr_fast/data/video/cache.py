"""The decode-once cache: the frames of video files at training resolution, in one memory-mapped file.

To read a window of a video with a single keyframe, a decoder must start at frame 0. From the cache, a window only costs
a copy. A cache is a folder:

    meta.json    what all frames have in common: their size and the decoder that made them
    frames.u8    one video after another, each (F, 3, H, W) uint8
    index.jsonl  one line for each video whose frames are on the disk: `Line`

A line is only written after its frames have reached the disk. So if `fill` is killed, there are at most frames without
a line, and the next call overwrites them. Each video's checksum is checked when it is first read.
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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast.data.files import ahead, one_line, progress, write_atomic
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.decode import VideoError, decode, for_dali
from vjvcr_fast.data.video.file import Source

FAMILIES = ("ffmpeg", "dali")
SYNC_SECONDS = 2.0  # how often frames are forced to the disk, and their lines written
ON_DEVICE = 0.4  # the share of a GPU's free memory that a cache may take; a larger one stays on the disk


class CacheError(RuntimeError):
    """A cache cannot be used or filled. The message names the folder, the reason and what to do."""


class Line(NamedTuple):
    """A line of index.jsonl: the video's name, the size of its file, its frames and stride as in `Source`, the place of
    its first frame in frames.u8, and the CRC-32 of its frames."""

    video: str
    bytes: int
    frames: int
    stride: int
    first: int
    crc32: int


class Filled(NamedTuple):
    """What `fill` did: the number of videos written now, the number already there, {name: reason} of the unreadable."""

    written: int
    kept: int
    bad: dict[str, str]


class FrameCache:
    """A cache to read from, complete or not. Frames come on `device`. A GPU holds all of them if they fit.

    Raises CacheError if there is no cache in `folder`, if it is damaged, if its frames are not of (height, width)
    `size`, or if they are from a decoder whose frames differ from those of `backend` ("auto" accepts any).
    """

    def __init__(
        self, folder: Path, size: tuple[int, int], backend: str = "auto", device: str | torch.device = "cpu"
    ) -> None:
        _check_meta(folder, size, backend)
        self.folder, self.device = folder, torch.device(device)
        lines = _read_index(folder, size)
        self.end = max((line.first + line.frames for line in lines.values()), default=0)
        self.lines = _separate(lines)
        shape = (self.end, 3, *size)
        file, length = str(folder / "frames.u8"), math.prod(shape)
        # Mapped privately, so that the cache may be on a read-only disk. torch cannot map a file of length 0.
        try:
            mapped = torch.from_file(file, False, length, dtype=torch.uint8) if length else torch.empty(0).byte()
        except RuntimeError as error:
            raise CacheError(f"{file}: cannot be read ({one_line(error)})") from None
        self._mapped = self._data = mapped.view(shape)
        self._checked: set[Line] = set()
        if self.device.type == "cuda" and length < ON_DEVICE * torch.cuda.mem_get_info(self.device)[0]:
            self._data = self._mapped.to(self.device)

    def find(self, source: Source) -> Line | None:
        """The line of a video, to read it by; None if the video is not in the cache or its file has changed."""
        line = self.lines.get(source.name)
        if line is None or (line.frames, line.stride) != (source.frames, source.stride):
            return None
        return line if line.bytes == source.path.stat().st_size else None

    def is_whole(self, line: Line) -> bool:
        """Whether the frames of a line have its checksum."""
        return _sum(self._mapped[line.first : line.first + line.frames]) == line.crc32

    def read(self, windows: Sequence[tuple[Line, int]], count: int) -> Tensor:
        """Reads frames first, ..., first + count - 1 of each (line, first): (N, count, 3, H, W) uint8 on the device."""
        rows = []
        for line, first in windows:
            if not 0 <= first <= line.frames - count:
                raise IndexError(f"{line.video}: frames {first} to {first + count - 1} of {line.frames}")
            if line not in self._checked:
                if not self.is_whole(line):
                    raise CacheError(f"{self.folder}: damaged at {line.video}: `vjvcr-fast cache --verify` repairs it")
                self._checked.add(line)
            rows.append(line.first + first)
        index = (torch.tensor(rows)[:, None] + torch.arange(count)).flatten().to(self._data.device, non_blocking=True)
        if self._data.device.type == self.device.type:  # "cuda" is not equal to the "cuda:0" that a tensor is on
            found = self._data.index_select(0, index)
        else:
            found = torch.empty(len(index), *self._data.shape[1:], dtype=torch.uint8, pin_memory=True)
            torch.index_select(self._data, 0, index, out=found)
        return found.unflatten(0, (len(rows), count)).to(self.device, non_blocking=True)


def fill(
    videos: Sequence[Source],
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
    """Decodes the videos that are not in the cache `folder` yet, and resizes their frames to (height, width) `size`.

    backend: "auto", "decord", "torchcodec" or "av", which give equal frames, or "dali", which decodes on `device`.
    pool: the processes that decode. on_bad: "stop" raises the VideoError of the first video that cannot be read, after
    the videos before it are safe; "skip" goes on and returns the reasons. verify: check all sums, and decode damaged
    videos again.

    Raises CacheError if the disk is too small, another process fills the folder, or its frames have another size or
    decoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (folder / "meta.json").exists():
            write_atomic(folder / "meta.json", json.dumps({"size": list(size), "decoder": _family(backend)}) + "\n")
        (folder / "frames.u8").touch()
        cache = FrameCache(folder, size, backend)
        missing = [v for v in videos if (line := cache.find(v)) is None or (verify and not cache.is_whole(line))]
        kept = len(videos) - len(missing)
        new = sum(video.frames for video in missing if video.name not in cache.lines)
        needed, free = new * 3 * math.prod(size), shutil.disk_usage(folder).free
        if needed > free:
            raise CacheError(f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on its disk")
        writer, bad = _Writer(folder, size, cache.lines, cache.end), dict[str, str]()
        bar = progress(total=len(videos), initial=kept, desc=desc, unit="video", disable=not missing)
        with bar, contextlib.closing(writer):
            for video, decoded in _decoded(missing, backend, size, pool, torch.device(device)):
                try:
                    writer.add(video, torch.as_tensor(decoded()))
                except VideoError as error:
                    if on_bad == "stop":
                        raise
                    bad[video.name] = str(error)
                bar.update()
        return Filled(len(missing) - len(bad), kept, bad)


def _decoded(
    videos: Sequence[Source], backend: str, size: tuple[int, int], pool: workers.Pool, device: torch.device
) -> Iterator[tuple[Source, Callable[[], Any]]]:
    """Each video with a function that returns its frames or raises VideoError. The pool decodes some videos ahead."""
    places = [(video, range(0, video.frames * video.stride, video.stride)) for video in videos]
    if backend == "dali" and device.type == "cuda":
        from vjvcr_fast.data.video.dali import DaliDecoder

        decoder = DaliDecoder(device, 2, size)  # it also decodes for training, so the frames are the same

        def on_gpu(path: Path, frames: range) -> Tensor:
            return decoder.read([(path, frames)], [for_dali(path)])[0].cpu()

        yield from ((video, partial(on_gpu, video.path, frames)) for video, frames in places)
    else:
        tasks = ((v, pool.submit(v.path, decode, backend, frames, size)) for v, frames in places)
        for video, task in ahead(tasks, 2 * pool.workers):
            yield video, task.result


class _Writer:
    """Writes videos into their old places, or after all others. Lines follow when the frames have reached the disk."""

    def __init__(self, folder: Path, size: tuple[int, int], lines: dict[str, Line], end: int) -> None:
        self._places, self._next = lines, end
        self._bytes = 3 * size[0] * size[1]  # of a frame
        # Written anew, without the half line that a crash may have left.
        write_atomic(folder / "index.jsonl", "".join(map(_text, lines.values())))
        self._frames, self._index = (folder / "frames.u8").open("r+b"), (folder / "index.jsonl").open("a")
        self._waiting: list[Line] = []
        self._synced = time.monotonic()

    def add(self, video: Source, frames: Tensor) -> None:
        if len(frames) != video.frames:
            raise VideoError(f"{video.path}: {len(frames)} frames decoded, {video.frames} expected")
        old = self._places.get(video.name)
        first = old.first if old is not None and old.frames == video.frames else self._next
        self._next = max(self._next, first + video.frames)
        self._frames.seek(first * self._bytes)
        self._frames.write(frames.contiguous().numpy().data)
        size = video.path.stat().st_size
        self._waiting.append(Line(video.name, size, video.frames, video.stride, first, _sum(frames)))
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
        self._index.writelines(map(_text, self._waiting))
        _to_disk(self._index)
        self._waiting, self._synced = [], time.monotonic()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _text(line: Line) -> str:
    return json.dumps(line._asdict()) + "\n"


def _check_meta(folder: Path, size: tuple[int, int], backend: str) -> None:
    """Raises CacheError if there is no cache, or one of another size or decoder."""
    file = folder / "meta.json"
    try:
        meta = json.loads(file.read_bytes())
        found, decoder = tuple(meta["size"]), meta["decoder"]
        if [*map(type, found)] != [int, int] or min(found) < 1 or decoder not in FAMILIES:
            raise ValueError(f"size {found}, decoder {decoder!r}")
    except FileNotFoundError:
        raise CacheError(f"{folder}: there is no cache; `vjvcr-fast cache` makes one") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise CacheError(f"{file}: cannot be read ({why}); remove {folder}") from None
    if found != size:
        shown = ["x".join(map(str, s)) for s in (found, size)]
        raise CacheError(f"{folder}: holds frames of {shown[0]}, asked for are {shown[1]}; choose another folder")
    if backend != "auto" and decoder != _family(backend):
        raise CacheError(
            f"{folder}: was filled by {decoder}, whose frames differ from those of {backend}; "
            "choose another folder, or --data.decoder auto"
        )


def _family(backend: str) -> str:
    """The group of decoders that `backend` belongs to. decord, torchcodec and av give the same frames."""
    return FAMILIES[backend == "dali"]


def _read_index(folder: Path, size: tuple[int, int]) -> dict[str, Line]:
    """The last line of every video, except damaged lines and lines of frames that are not in the file."""
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
    """Removes lines that claim the same frames. One of them must be wrong, and repairing one would damage the other."""
    ordered = sorted(lines.values(), key=lambda line: line.first)
    clashes = [pair for pair in pairwise(ordered) if pair[1].first < pair[0].first + pair[0].frames]
    wrong = {line.video for pair in clashes for line in pair}
    return {video: line for video, line in lines.items() if video not in wrong}


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
