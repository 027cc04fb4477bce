"""Videos for tests, made with PyAV. Each frame shows its own number, in blocks that survive any compression."""

import contextlib
import functools
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import NamedTuple

import processes  # noqa: F401 - says what the server that others fork from imports
import pytest
import torch
from torch import Tensor

from vjvcr_fast.data.simulated import make
from vjvcr_fast.data.video import workers

BITS = 8
FPS = 25


class Kind(NamedTuple):
    """How a test video is stored. keys: frames from one keyframe to the next; b: the most B-frames in a row."""

    codec: str
    suffix: str
    height: int = 48
    width: int = 80
    keys: int = 12
    b: int = 0
    pixels: str = "yuv420p"
    options: dict[str, str] = {}  # noqa: RUF012


X265 = "log-level=none:keyint=12:min-keyint=12:scenecut=0:open-gop="
KINDS = {
    "h264": Kind("libx264", "mp4", b=3),
    "h264-no-b": Kind("libx264", "mp4"),
    "h264-one-key": Kind("libx264", "mp4", keys=1000, b=2),
    "h264-mkv": Kind("libx264", "mkv", b=2),
    "h264-38x50": Kind("libx264", "mp4", 38, 50, b=3),
    "h264-37x51": Kind("libx264", "mp4", 37, 51, b=3, pixels="yuv444p"),
    "h264-10-bit": Kind("libx264", "mp4", b=2, pixels="yuv420p10le"),
    "mpeg4": Kind("mpeg4", "avi"),
    "mjpeg": Kind("mjpeg", "avi", pixels="yuvj420p"),
    "mjpeg-37x51": Kind("mjpeg", "avi", 37, 51, pixels="yuvj420p"),
    "vp8": Kind("libvpx", "webm"),
    "vp9": Kind("libvpx-vp9", "webm"),
    "vp9-mp4": Kind("libvpx-vp9", "mp4"),
    "vp9-37x51": Kind("libvpx-vp9", "webm", 37, 51),
}
# What decord does not read correctly.
HARD = {
    "h264-open": Kind("libx264", "mp4", b=3, options={"x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "hevc-open": Kind("libx265", "mp4", options={"x265-params": X265 + "1"}),
    "hevc-closed": Kind("libx265", "mp4", options={"x265-params": X265 + "0"}),
    "av1": Kind("libsvtav1", "mkv", 64, 96),
}
Make = Callable[..., Path]


def make_video(
    folder: Path, kind: str | Kind, frames: int = 40, *, grey: bool = False, first: int = 0, **muxer: str
) -> Path:
    """Frame i shows the number first + i. grey: no colours. muxer: options of the container."""
    av = pytest.importorskip("av")
    k = (KINDS | HARD)[kind] if isinstance(kind, str) else kind
    path = folder / f"{kind if isinstance(kind, str) else 'video'}-{first}-{frames}{'-grey' * grey}.{k.suffix}"
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(k.codec, rate=FPS, options=dict(k.options))
        stream.height, stream.width, stream.pix_fmt = k.height, k.width, k.pixels
        stream.gop_size, stream.max_b_frames = k.keys, k.b
        stream.bit_rate = 2_000_000
        for i in range(frames):
            picture = draw(first + i, k.height, k.width, grey)
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw(number: int, height: int, width: int, grey: bool = False) -> Tensor:
    """(H, W, 3) uint8: the bits of `number` as white (1) and black (0) blocks above a moving gradient."""
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    red, green = 60 + 120 * x + 0 * y, 60 + 120 * y + 0 * x
    blue = 120 + 60 * torch.sin(6 * (x + y) + number / 5)
    picture = torch.stack([blue, blue, blue] if grey else [red, green, blue], dim=2).round().to(torch.uint8)
    for bit in range(BITS):
        picture[: height // 2, slice(*_block(bit, width))] = 255 if number >> bit & 1 else 0
    return picture.contiguous()


def read_number(frame: Tensor) -> int:
    """(3, H, W) uint8 of any size -> the number that `draw` wrote."""
    height, width = frame.shape[1:]
    number = 0
    for bit in range(BITS):
        left, right = _block(bit, width)
        margin = (right - left) // 4
        number |= (
            int(frame[:, height // 8 : height * 3 // 8, left + margin : right - margin].float().mean() > 127) << bit
        )
    return number


def needs(*backends: str) -> None:
    """Skips a test if a decoder is not installed. Unlike importorskip, it does not load torchcodec beside decord."""
    for backend in backends:
        if importlib.util.find_spec({"dali": "nvidia"}.get(backend, backend)) is None:
            pytest.skip(f"{backend} is not installed")
        if backend == "dali":
            pytest.importorskip("nvidia.dali")


def read_numbers(frames: Tensor) -> list[int]:
    return [read_number(frame) for frame in frames]


def cut(path: Path, share: float) -> Path:
    """The first part of a file, under another name."""
    content = path.read_bytes()
    short = path.with_name(f"cut-{share}-{path.name}")
    short.write_bytes(content[: int(len(content) * share)])
    return short


def damage(path: Path, frames: range, *, zeros: bool = False) -> Path:
    """A copy in which what is stored of these frames is noise, or zeros. All else is right, the headers too."""
    av = pytest.importorskip("av")
    bad, content = path.with_name(f"damaged-{frames.start}-{frames.stop}-{path.name}"), bytearray(path.read_bytes())
    with av.open(str(path)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
    for packet in sorted(packets, key=lambda packet: packet.pts)[frames.start : frames.stop]:
        at = content.index(bytes(packet), packet.pos)
        noise = b"\xff\xff" + Random(at).randbytes(packet.size - 2)  # VP9 might read other bytes as a frame
        content[at : at + packet.size] = bytes(packet.size) if zeros else noise
    bad.write_bytes(content)
    return bad


def _block(bit: int, width: int) -> tuple[int, int]:
    return bit * width // BITS, (bit + 1) * width // BITS


# -- Simulated ones -------------------------------------------------------------------------------------------------


@functools.cache
def drawing() -> tuple[str, str]:
    """(what MuJoCo draws with, ""), or ("", why it cannot draw). Found out once, in a process of its own."""
    try:
        return make.gl_backend(), ""
    except RuntimeError as error:
        return "", str(error)


@contextlib.contextmanager
def quick_workers(how: str = "forkserver") -> Iterator[None]:
    """Lets the workers of pools fork from a process that has imported torch, which saves two seconds each. Also finds
    out only once what can draw. Tests without this use spawned processes, as in real use."""
    context, backend = multiprocessing.get_context(how), drawing()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "gl_backend", lambda: backend)
        patch.setattr(workers, "_Context", lambda: context)
        yield
