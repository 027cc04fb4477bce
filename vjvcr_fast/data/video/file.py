"""What all decoders share: what a video file contains, whether it is complete, and its frames as tensors.

`examine` reads the packets of every file once before a decoder opens it. It decodes nothing and takes about 4 ms. So
all backends report the same faults, and decoders only get complete videos. Frames are numbered in display order.

Where to add another kind of video:
- what a file says about itself, such as a rotation or an edit list, is read and judged in `_facts`;
- decoded frames are changed, for example turned upright, in `Video.frames`, between `_read` and the check of their
  shape. Today no rotation is read: torchcodec turns frames by itself and then states their size. decord does not turn
  them, so such a video needs a turn for decord only.
"""

import contextlib
import functools
import math
import operator
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast.data.files import load, reason

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # the first bytes of the file and of its one segment
# No frame of these is stored as zeros only; a part of a file that was never written is.
NEVER_ZERO = ("av1", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9")
REMEMBERED = 1 << 14  # files whose facts are remembered, at less than 1 kB each


class VideoError(RuntimeError):
    """A video cannot be read. The message names the file and the reason."""


class DamagedError(VideoError):
    """Frames of a video cannot be decoded. Others of the same video may."""


class UnservedError(VideoError):
    """The video is complete, but this backend would not read it correctly. Another backend may."""


class Source(NamedTuple):
    """A video of a data set, and the windows that may be taken from it. Frames are counted with the stride: frame i is
    frame i * stride of the file.

    path: the file. name: its path inside the data set. frames: how many it has. starts: (S,) int64, the first frames
    of the S windows. targets: (S, ...), the label of each window. stride: 2 uses every second frame of the file.
    """

    path: Path
    name: str
    frames: int
    starts: Tensor
    targets: Tensor
    stride: int = 1


class Facts(NamedTuple):
    """What a video file contains. height, width: in pixels, as stored, before any rotation. container: FFmpeg's name of
    it, such as "mp4". open_gops: whether frames are stored after a keyframe but shown before it. tail: the frames from
    the last keyframe to the end."""

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    container: str
    open_gops: bool
    tail: int


class Video:
    """A complete video, opened by a backend. Do not share it between threads.

    path: the file. backend: its decoder. device: where frames are delivered. frame_count: how many there are. fps:
    frames per second on average, 0 if the file does not say. height, width: in pixels, as the decoder displays them.
    """

    backend = ""
    otherwise: "Callable[[], Video] | None" = None  # opens it for another backend, to ask if this one cannot decode

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self.path, self.device, self.threads = path, device, threads
        self.frame_count, self.fps, self.height, self.width = facts.frames, facts.fps, facts.height, facts.width

    def frames(self, indices: Iterable[int] | Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Decodes frames: (T, 3, H, W) uint8 RGB on `device`, channels_last in memory.

        indices: T >= 1 whole numbers in [0, frame_count), in any order, repeats allowed: a list, a range, a 1-D tensor.
        size: (height, width) to `resize` to, or one int for both; None: as they are.

        Raises ValueError for other indices or sizes; DamagedError, with the first frame that is damaged, if the frames
        cannot be decoded.
        """
        wanted, shape = self._checked(indices), _pair(size)
        each = sorted(set(wanted))
        try:
            found = self._read(each)
        except (VideoError, MemoryError):
            raise
        except Exception as error:  # every decoder has errors of its own
            if self.otherwise is not None:
                with contextlib.suppress(ImportError, UnservedError):
                    return self.otherwise().frames(wanted, size)
            where = f"{self.backend} cannot decode frames {each[0]} to {each[-1]} ({reason(error)})"
            damage = None
            with contextlib.suppress(VideoError):
                damage = find_damage(self.path)
            raise DamagedError(f"{self.path}: {where}{f'; {damage}' if damage else ''}") from error
        expected = (len(each), self.height, self.width, 3)
        if found.shape != expected:
            raise VideoError(f"{self.path}: {self.backend} decodes {tuple(found.shape)}, the file states {expected}")
        frames = found.permute(0, 3, 1, 2)
        if shape is not None:
            frames = resize(frames, shape)
        if wanted != each:
            place = {frame: row for row, frame in enumerate(each)}
            rows = torch.tensor([place[frame] for frame in wanted], device=frames.device)
            frames = frames.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
        return frames.to(self.device)

    def _read(self, indices: list[int]) -> Tensor:
        """Decodes (T, H, W, 3) uint8, on any device, for strictly ascending indices."""
        raise NotImplementedError

    def _checked(self, indices: Iterable[int] | Tensor) -> list[int]:
        allowed = f"indices of {self.path} must be whole numbers in [0, {self.frame_count}), at least one"
        try:
            wanted = [operator.index(i) for i in (indices.tolist() if isinstance(indices, Tensor) else indices)]
        except TypeError:
            raise ValueError(f"{allowed}, got {indices!r}") from None
        wrong = [i for i in wanted if not 0 <= i < self.frame_count]
        if wrong or not wanted:
            raise ValueError(f"{allowed}, got {wrong[0] if wrong else 'none'}")
        return wanted


def resize(frames: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resizes (T, C, H, W) uint8 frames to (height, width) `size`, or one int for both: bilinear, antialiased, rounded.

    A CPU uses torch's uint8 arithmetic, which is within one level of float32's; other devices use float32. The memory
    format of `frames` does not change the result; channels_last is fastest. Raises ValueError for other sizes.
    """
    shape = _pair(size)
    if frames.shape[-2:] == shape:
        return frames
    if frames.device.type == "cpu":
        return F.interpolate(frames, size=shape, mode="bilinear", antialias=True)
    resized = F.interpolate(frames.float(), size=shape, mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        height, width = (size, size) if isinstance(size, int) else map(operator.index, size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"size must be a whole number of pixels, or (height, width), at least 1, got {size!r}")
    return height, width


# -- Files ----------------------------------------------------------------------------------------------------------


def examine(path: Path) -> Facts:
    """Reads what a video file contains. Raises VideoError if it is not a whole video; ImportError if av is missing."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise VideoError(f"{path}: {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a file'}, not a video")
        with path.open("rb") as file:
            head = file.read(4096)
    except (OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not head:
        raise VideoError(f"{path}: an empty file")
    end = _stated_end(head)
    if end > status.st_size:
        raise VideoError(f"{path}: cut off: {status.st_size:,} of {end:,} bytes")
    return _demux(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(REMEMBERED)
def _demux(path: Path, size: int, time: int) -> Facts:
    """Reads all packets. size and time are part of the cache key, so that a changed file is read again."""
    av = load("av", "video")
    try:
        # "file:" allows names with a colon. The whitelist keeps playlists from opening other addresses.
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError(f"{path}: no video in it that can be decoded")
            if stream.frames > size:  # decord would allocate memory for all of them, and abort
                raise VideoError(f"{path}: damaged: it states {stream.frames:,} frames in {size:,} bytes")
            return _facts(path, container, stream)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: not a video that can be read ({getattr(error, 'strerror', error)})") from error


def find_damage(path: Path) -> str | None:
    """Decodes a whole video and names the first frame that cannot be decoded, or only with a guess in place of what is
    damaged, as in "frame 30 is damaged"; None if there is none. Keeps one frame in memory. decord and torchcodec do not
    report guesses. Some damage, of VP9 above all, is not noticed here either. Raises VideoError if reading fails."""
    av = load("av", "video")
    times, shown = list[int](), set[int]()
    first: tuple[float, str] | None = None  # the time of what is damaged
    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            stream.codec_context.thread_count = 1  # so that an error belongs to the packet that was sent
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None and not packet.is_discard:
                    times.append(packet.pts)
                if first is not None:
                    continue
                try:
                    for frame in packet.decode():
                        shown.add(frame.pts)
                        if frame.is_corrupt:
                            first = first or (frame.pts, "is damaged")
                except av.FFmpegError as error:
                    time = math.inf if packet.pts is None else packet.pts
                    first = time, f"cannot be decoded ({getattr(error, 'strerror', error)})"
    except (av.FFmpegError, ValueError, AttributeError) as error:
        raise VideoError(f"{path}: cannot be read to its end ({getattr(error, 'strerror', error)})") from None
    lost = set(times) - shown
    if first is None and lost:
        first = min(lost), "cannot be decoded (it is left out)"
    return first and f"frame {sum(time < first[0] for time in times)} {first[1]}"


def _facts(path: Path, container: Any, stream: Any) -> Facts:
    stored = tail = 0
    open_gops = False
    key: int | None = None
    codec = stream.codec_context
    name = codec.codec.canonical_name
    kind = "mp4" if "mp4" in container.format.name else container.format.name.split(",")[0]
    stated = stream.frames
    if kind == "mp4":  # an edit list removes frames from the index
        stated = min(stated, len(stream.index_entries))
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise VideoError(f"{path}: cut off or damaged: frame {stored} of {stated or 'unknown'} is not whole")
        if packet.is_discard:
            raise VideoError(f"{path}: its edit list starts between keyframes, where no decoder finds the right frames")
        if name in NEVER_ZERO and not any(bytes(packet)):
            raise VideoError(f"{path}: cut off or damaged: frame {stored} of {stated or 'unknown'} is all zeros")
        stored, tail = stored + 1, 1 if packet.is_keyframe else tail + 1
        if packet.is_keyframe:
            key = packet.pts
            if name == "h264" and _refreshed_later(bytes(packet), codec.extradata or b""):
                raise VideoError(f"{path}: H.264 with gradual refresh, whose frames no decoder finds after a seek")
        elif packet.pts is not None and key is not None and packet.pts < key:
            open_gops = True
    if stored < stated:
        raise VideoError(f"{path}: cut off: {stored} of {stated} frames")
    if not stored:
        raise VideoError(f"{path}: a video without frames")
    return Facts(stored, float(stream.average_rate or 0), codec.height, codec.width, name, kind, open_gops, tail)


def _refreshed_later(packet: bytes, header: bytes) -> bool:
    """Whether an H.264 keyframe is incomplete until some frames later (gradual refresh).

    Its recovery point, an SEI message of kind 6, then states a number of frames above 0.
    """
    if header[:1] == b"\x01" and len(header) > 4:  # as in mp4: the length of each unit comes before it
        width, at, units = (header[4] & 3) + 1, 0, []
        while at < len(packet):
            start = at + width
            at = start + int.from_bytes(packet[at:start], "big")
            units.append(packet[start:at])
    else:
        units = packet.split(b"\0\0\1")
    for unit in units:
        at = 1
        while unit[:1] and unit[0] & 31 == 6 and at + 2 < len(unit):  # an SEI unit: messages of kind, length, content
            kind, at = _sei_number(unit, at)
            length, at = _sei_number(unit, at)
            if kind == 6 and at < len(unit) and not unit[at] & 128:  # the number 0 is coded as one bit, a 1
                return True
            at += length
    return False


def _sei_number(unit: bytes, at: int) -> tuple[int, int]:
    """Reads a number coded as a sum of bytes, of which all but the last are 255. Returns it and where it ends."""
    number = 0
    while at < len(unit):
        number, at = number + unit[at], at + 1
        if unit[at - 1] != 255:
            break
    return number, at


def _stated_end(head: bytes) -> int:
    """The size in bytes that a file states, which tells whether it was cut off; 0 if it states none.

    AVI, Matroska and WebM files state one. The last two do not state a number of frames.
    """
    if head.startswith(b"RIFF"):
        return 8 + int.from_bytes(head[4:8], "little")
    if not head.startswith(MATROSKA):
        return 0
    size, at = _matroska_size(head, 4)
    if head[at + size : at + size + 4] != SEGMENT:
        return 0
    size, at = _matroska_size(head, at + size + 4)
    return at + size


def _matroska_size(head: bytes, at: int) -> tuple[int, int]:
    """Reads a number whose length in bytes is 1 + the leading zeros of its first byte. Returns it and where it ends.

    All bits after the length set mean "unknown", which is returned as 0.
    """
    length = 9 - head[at].bit_length() if at < len(head) else 1
    bits = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
    return 0 if bits == (1 << 7 * length) - 1 else bits, at + length
