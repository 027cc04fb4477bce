"""A video file, whatever decodes it: what is in it, whether all of it is there, and its frames as tensors.

Every file is demuxed once before a decoder sees it, which decodes nothing and takes about 4 ms. Faults are therefore
reported alike for all backends, and decoders are given whole videos only. Frames are counted in display order.
"""

import functools
import importlib
import operator
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MATROSKA, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # how the file and its one segment begin
REMEMBERED = 1 << 14  # files whose contents are remembered, at less than 1 kB each


class VideoError(RuntimeError):
    """A video that cannot be read; the message names the file and the reason."""


class UnservedError(VideoError):
    """A whole video that this backend would not read right; another one may."""


class Facts(NamedTuple):
    """What is in a video file. height, width: as stored, before any rotation. open_gops: whether pictures are stored
    after a keyframe that are shown before it."""

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    open_gops: bool


class Video:
    """A video that is whole, opened by a backend. Not to be shared by threads.

    path; backend; device: where frames are delivered; frame_count; fps: frames per second on average, 0 where the file
    does not say; height, width: in pixels, as displayed.
    """

    backend = ""

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self.path, self.device, self.threads = path, device, threads
        self.frame_count, self.fps, self.height, self.width = facts.frames, facts.fps, facts.height, facts.width

    def frames(self, indices: Iterable[int] | Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """Frames in any order, repeats allowed: (T, 3, H, W) uint8 RGB on `device`, channels_last in memory.

        indices: whole numbers in [0, frame_count), at least one: a list, a range, a 1-D tensor. size: height and width
        to `resize` to, an int for both; None: as they are.

        Raises ValueError for other indices and sizes; VideoError where the frames cannot be decoded.
        """
        wanted, shape = self._checked(indices), _pair(size)
        each = sorted(set(wanted))
        try:
            found = self._read(each)
        except (VideoError, MemoryError):
            raise
        except Exception as error:  # every library has its own
            where = f"frames {each[0]} to {each[-1]}"
            raise VideoError(f"{self.path}: {self.backend} cannot decode {where} ({reason(error)})") from error
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
        """(T, H, W, 3) uint8 for strictly ascending indices, on any device."""
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
    """(T, C, H, W) uint8 -> the same at size (height, width), an int for both: bilinear, antialiased, rounded.

    On a CPU in torch's own uint8 arithmetic, within one level of float32's; elsewhere in float32. The memory format of
    `frames` changes no value; channels_last is the fastest. Raises ValueError for other sizes.
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
    """Raises VideoError for whatever is not a whole video; ImportError where av is missing."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
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
    """size and time tell a file from another one of the same name."""
    av = load("av", "video")
    try:
        # Names with a colon are files too, and files that name addresses are not followed.
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError(f"{path}: no video in it that can be decoded")
            if stream.frames > size:  # decord would set memory aside for all of them, and abort
                raise VideoError(f"{path}: damaged: it states {stream.frames:,} frames in {size:,} bytes")
            return _facts(path, container, stream)
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: not a video that can be read ({getattr(error, 'strerror', error)})") from error


def _facts(path: Path, container: Any, stream: Any) -> Facts:
    stored = 0
    open_gops = False
    key: int | None = None
    codec = stream.codec_context
    name = codec.codec.canonical_name
    stated = stream.frames
    if "mp4" in container.format.name:  # an edit list takes frames out of its index
        stated = min(stated, len(stream.index_entries))
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise VideoError(f"{path}: cut off or damaged: frame {stored} of {stated or 'unknown'} is not whole")
        if packet.is_discard:
            raise VideoError(f"{path}: its edit list starts between keyframes, where no decoder finds the right frames")
        stored += 1
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
    return Facts(stored, float(stream.average_rate or 0), codec.height, codec.width, name, open_gops)


def _refreshed_later(packet: bytes, header: bytes) -> bool:
    """Whether an H.264 keyframe is one only after some more frames: its recovery point (SEI 6) counts more than 0."""
    if header[:1] == b"\x01" and len(header) > 4:  # units follow their lengths, as in mp4
        width, at, units = (header[4] & 3) + 1, 0, []
        while at < len(packet):
            start = at + width
            at = start + int.from_bytes(packet[at:start], "big")
            units.append(packet[start:at])
    else:
        units = packet.split(b"\0\0\1")
    for unit in units:
        at = 1
        while unit[:1] and unit[0] & 31 == 6 and at + 2 < len(unit):  # messages: kind, length, content
            kind, at = _sei_number(unit, at)
            length, at = _sei_number(unit, at)
            if kind == 6 and at < len(unit) and not unit[at] & 128:  # 0 is coded as a single 1 bit
                return True
            at += length
    return False


def _sei_number(unit: bytes, at: int) -> tuple[int, int]:
    """A number coded as a sum of bytes, all but the last of them 255, and where it ends."""
    total = 0
    while at < len(unit):
        total, at = total + unit[at], at + 1
        if unit[at - 1] != 255:
            break
    return total, at


def _stated_end(head: bytes) -> int:
    """Where a file says that it ends: AVI, and Matroska and WebM, which do not count frames. 0: it does not say."""
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
    """A number whose first byte tells its length by its leading zeros, and where it ends; all ones: not known, 0."""
    length = 9 - head[at].bit_length() if at < len(head) else 1
    bits = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
    return 0 if bits == (1 << 7 * length) - 1 else bits, at + length


# -- Optional packages ----------------------------------------------------------------------------------------------


def load(module: str, extra: str) -> Any:
    """An optional module. Raises ImportError, naming the extra to install, or why it cannot be imported."""
    package = module.removeprefix("nvidia.").split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ImportError(f"{package} is not installed: pip install 'vjvcr_fast[{extra}]'") from None
    except (ImportError, OSError, RuntimeError) as error:  # its own libraries are missing
        raise ImportError(f"{package} cannot be imported ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """The first line that an error says something in."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
