"""What all decoders share: what a video file contains, whether it is complete, and its frames as tensors.

`examine` reads the packets of every file once before a decoder opens it, and decodes its first frame. So all backends
report the same faults, and decoders only get complete videos. Frames are numbered in display order, and are upright.

Where to add another kind of video:
- what a file says about itself, such as a rotation or an edit list, is read and judged in `_facts`;
- if decord and torchcodec return other frames than FFmpeg in some order of reading, it is a reason in `Facts.alone`;
- decoded frames are changed, for example mirrored, in `Video.frames`, between `_read` and the check of their shape.
"""

import contextlib
import functools
import math
import operator
import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast.data.files import load, reason
from vjvcr_fast.data.video.formats import refreshed_later, stated_end

# No frame of these is stored as zeros only; a part of a file that was never written is.
NEVER_ZERO = ("av1", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9")
REMEMBERED = 1 << 14  # files whose facts are remembered, at less than 1 kB each
UPRIGHT = (1, 0, 0, 1)
# Display matrices, by their signs (a, b, c, d): what turns the stored frame as it is to be shown, as FFmpeg's filters.
# decord and torchcodec turn frames too, but where the matrix mirrors (a d - b c < 0) they forget to.
TURNS = {
    UPRIGHT: (),
    (0, 1, -1, 0): (("transpose", "clock"),),
    (-1, 0, 0, -1): (("hflip", ""), ("vflip", "")),
    (0, -1, 1, 0): (("transpose", "cclock"),),
    (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),),
    (0, 1, 1, 0): (("transpose", "cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "clock_flip"),),
}
NO_INDEX = ("mpeg", "mpegts")  # containers without an index of frames: after a seek decoders are lost
NO_TIMES = ("asf", "avi")  # containers without times of display


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
    """What a video file contains. height, width: in pixels, as shown. container: FFmpeg's name of it, such as "mp4".
    open_gops: whether frames are stored after a keyframe but shown before it. tail: how many frames are decoded to get
    the last one. matrix: how stored frames are turned to be shown, a key of TURNS. stream: the number of the video's
    stream in the file. asked: its number among the video streams, if decoders take another one unasked. alone: why only
    "av" reads it right; "" if others may."""

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    container: str
    open_gops: bool
    tail: int
    matrix: tuple[int, int, int, int]
    stream: int
    asked: int | None
    alone: str

    @property
    def mirrored(self) -> bool:
        """Whether stored frames are shown as in a mirror: the matrix has a negative determinant."""
        a, b, c, d = self.matrix
        return a * d - b * c < 0


class Video:
    """A complete video, opened by a backend. Do not share it between threads.

    path: the file. backend: its decoder. device: where frames are delivered. frame_count: how many there are. fps:
    frames per second on average, 0 if the file does not say. height, width: in pixels, as frames are shown.
    """

    backend = ""
    mirrors = False  # whether `_read` also mirrors, where the display matrix does
    otherwise: "Callable[[], Video] | None" = None  # opens it for another backend, to ask if this one cannot decode

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self.path, self.device, self.threads, self._facts = path, device, threads, facts
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
        if self._facts.mirrored and not self.mirrors:
            found = found.flip(1 if self._facts.matrix[0] else 2)  # of what was turned by 90 degrees, left and right
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


def examine(path: Path, stream: int | None = None) -> Facts:
    """Reads what a video file contains. stream: which of its video streams, counted from 0; None: the one that FFmpeg
    takes. Pictures that are attached to a file, such as a cover, are none.

    Raises VideoError if it is not a whole video; ImportError if av is missing.
    """
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
    end = stated_end(head)
    if end > status.st_size:
        raise VideoError(f"{path}: cut off: {status.st_size:,} of {end:,} bytes")
    return _demux(path, status.st_size, status.st_mtime_ns, stream)


def opened(path: Path) -> Any:
    """The file in PyAV, to be used with `with`."""
    # "file:" allows names with a colon. The whitelist keeps playlists from opening other addresses.
    return load("av", "video").open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="ignore")


@functools.lru_cache(REMEMBERED)
def _demux(path: Path, size: int, time: int, number: int | None) -> Facts:
    """Reads all packets. size and time are part of the cache key, so that a changed file is read again."""
    av = load("av", "video")
    try:
        with opened(path) as container:
            stream = _chosen(path, container, number)
            if stream.frames > size:  # decord would allocate memory for all of them, and abort
                raise VideoError(f"{path}: damaged: it states {stream.frames:,} frames in {size:,} bytes")
            asked = None if stream == container.streams.best("video") else number or 0
            return _facts(path, container, stream)._replace(asked=asked)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: not a video that can be read ({getattr(error, 'strerror', error)})") from error


def _chosen(path: Path, container: Any, number: int | None) -> Any:
    """The video stream with this number, or the one that FFmpeg takes."""
    picture = load("av", "video").stream.Disposition.attached_pic
    videos = [s for s in container.streams.video if s.codec_context and not s.disposition & picture]
    best = container.streams.best("video")
    if not videos:
        raise VideoError(f"{path}: no video in it that can be decoded" + (", only a picture" if best else ""))
    if number is None:
        return best if best in videos else videos[0]
    if not 0 <= number < len(videos):
        raise VideoError(f"{path}: has {len(videos)} video streams, from 0 on; there is no stream {number}")
    return videos[number]


def find_damage(path: Path) -> str | None:
    """Decodes a whole video and names the first frame that cannot be decoded, or only with a guess in place of what is
    damaged, as in "frame 30 is damaged"; None if there is none. Keeps one frame in memory. decord and torchcodec do not
    report guesses. Some damage, of VP9 above all, is not noticed here either. Raises VideoError if reading fails."""
    av, facts = load("av", "video"), examine(path)
    times, shown = list[int](), set[int]()
    first: tuple[float, str] | None = None  # the time of what is damaged
    try:
        with opened(path) as container:
            stream = container.streams[facts.stream]
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
    if first is None and lost and not facts.alone:  # whose times are guesses, or which starts with what is left out
        first = min(lost), "cannot be decoded (it is left out)"
    return first and f"frame {sum(time < first[0] for time in times)} {first[1]}"


def _facts(path: Path, container: Any, stream: Any) -> Facts:
    codec = stream.codec_context
    kind = "mp4" if "mp4" in container.format.name else container.format.name.split(",")[0]
    codec.thread_count = 1
    name, size = codec.codec.canonical_name, (codec.height, codec.width)
    stated = 0 if kind == "avi" else stream.frames  # AVI also counts frames that only repeat the one before
    if kind == "mp4":  # an edit list removes frames from the index
        stated = min(stated, len(stream.index_entries))
    stored = tail = 0
    swapped = refreshed = beheaded = open_gops = False
    first = start = key = None
    times, hidden = list[int](), list[int]()
    for packet in container.demux(stream):
        first = first or _decoded(codec, packet)
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise VideoError(f"{path}: cut off or damaged: frame {stored} of {stated or 'unknown'} is not whole")
        if name in NEVER_ZERO and not any(bytes(packet)):
            raise VideoError(f"{path}: cut off or damaged: frame {stored} of {stated or 'unknown'} is all zeros")
        stored, tail = stored + 1, 1 if packet.is_keyframe else tail + 1
        swapped |= packet.pts != packet.dts
        if packet.pts is not None:
            (hidden if packet.is_discard else times).append(packet.pts)
        if packet.is_keyframe:
            beheaded |= start is None and stored > 1
            key = -math.inf if packet.pts is None else packet.pts
            start = key if start is None else start
            refreshed |= name == "h264" and refreshed_later(bytes(packet), codec.extradata or b"")
        elif packet.pts is not None and key is not None and packet.pts < key:
            open_gops, beheaded = True, beheaded or packet.pts < start
    if stored < stated:
        raise VideoError(f"{path}: cut off: {stored} of {stated} frames")
    shown = stored - len(hidden)
    misread = name == "mpeg4" and codec.has_b_frames and (kind == "avi" or times == sorted(times))
    matrix, found = _matrix(path, first), size if first is None else (first.height, first.width)
    alone = {
        "it starts between keyframes": beheaded,
        "its keyframes are whole only some frames later, a gradual refresh": refreshed,
        "its edit list starts between keyframes": bool(hidden and times) and min(hidden) < max(times),
        "MPEG files have no index of frames": kind in NO_INDEX,
        "its frames have no times of display": len(times) < shown or misread or (kind in NO_TIMES and swapped),
        "some of its frames have the same time": len({*times}) < len(times),
        "its frames have another size than it states": found != size,
        "its frames themselves say how to turn them": matrix != UPRIGHT and _turned_inside(path, stream),
    }
    if beheaded or refreshed or misread:
        shown = _counted(path, stream.index)
    if not shown:
        raise VideoError(f"{path}: a video without frames")
    height, width = found if matrix[0] else found[::-1]
    why, fps = next((why for why, holds in alone.items() if holds), ""), float(stream.average_rate or 0)
    tail = shown if why else tail
    return Facts(shown, fps, height, width, name, kind, open_gops, tail, matrix, stream.index, None, why)


def _decoded(codec: Any, packet: Any) -> Any:
    """The frame that comes out of a decoder when a packet is put in, if one does."""
    with contextlib.suppress(load("av", "video").FFmpegError):  # reported when it is read
        return next(iter(codec.decode(packet if packet.size else None)), None)


def _matrix(path: Path, frame: Any) -> tuple[int, int, int, int]:
    """How a frame is turned to be shown: a key of TURNS. Raises VideoError for other angles."""
    stated = frame and frame.side_data.get("DISPLAYMATRIX")
    if not stated:
        return UPRIGHT
    a, b, _, c, d = struct.unpack("5i", bytes(stated)[:20])
    small = max(map(abs, (a, b, c, d))) / 64  # within a degree, as FFmpeg
    a, b, c, d = ((x > small) - (x < -small) for x in (a, b, c, d))
    if (a, b, c, d) not in TURNS:
        raise VideoError(f"{path}: is to be turned by other than 90, 180 or 270 degrees before it is shown")
    return a, b, c, d


def _turned_inside(path: Path, stream: Any) -> bool:
    """Whether frames state how to turn them, which decord and torchcodec do not see, not only the file."""
    codec = stream.codec_context
    bare = type(codec).create(codec.codec.name, "r")
    bare.extradata = codec.extradata
    with opened(path) as container:
        frames = (_decoded(bare, packet) for packet in container.demux(container.streams[stream.index]))
        first = next((frame for frame in frames if frame), None)
    return _matrix(path, first) != UPRIGHT


def _counted(path: Path, stream: int) -> int:
    """The number of frames that are shown, found by decoding all of them."""
    with opened(path) as container:
        return sum(1 for _ in container.decode(container.streams[stream]))
