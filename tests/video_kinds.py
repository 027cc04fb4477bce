"""Kinds of videos that users have, each as a small file, and what each backend makes of it. The table of
docs/guides/own-videos.md is these rows; tests/data/video/test_kinds.py checks both."""

import functools
import struct
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from videos import draw

WIDTH, HEIGHT, FRAMES, FPS = 40, 28, 16, 25
X265 = "log-level=none:keyint=6:min-keyint=6:scenecut=0"
DISPLAY = {  # display matrices (a, b, c, d): a point (x, y) is shown at (a x + c y, b x + d y)
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "left-right": (-1, 0, 0, 1),
    "top-bottom": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "both": (0, -1, -1, 0),
    "45": (0.7071, 0.7071, -0.7071, 0.7071),
}
Make = Callable[[Path], Any]


class Row(NamedTuple):
    """kind: as in the docs. suffix, make: how such a file is made. decord, torchcodec, av: "exact", FFmpeg's frames to
    the bit; a mean difference in levels that frames have at most, as in "1.5"; or "no", refused. stream: of a file."""

    kind: str
    suffix: str
    make: Make
    decord: str = "exact"
    torchcodec: str = "exact"
    av: str = "exact"
    stream: int | None = None


# -- Making files ---------------------------------------------------------------------------------------------------


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = FRAMES,
    size: tuple[int, int] | None = None,
    pixels: str = "yuv420p",
    keys: int = 6,
    b: int = 2,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    container: str | None = None,
    time: Callable[[int], int] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """A video of numbered frames. size: (height, width). time: of frame i, in ms;
    None: 25 frames a second. b: B-frames in a row."""
    av = pytest.importorskip("av")
    height, width = size or ((48, 64) if codec == "libx265" else (HEIGHT, WIDTH))
    with av.open(str(path), "w", format=container, options=muxer or {}) as file:
        stream = file.add_stream(codec, rate=FPS, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = keys, b, 1
        if aspect:
            context.sample_aspect_ratio = aspect
        context.time_base = Fraction(1, 1000 if time else FPS)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(i, height, width).numpy(), format="rgb24")
            if pixels in ("argb", "bgra"):  # a transparent half
                opaque = frame.to_ndarray(format=pixels)
                opaque[: height // 2, :, pixels.index("a")] = 0
                frame = av.VideoFrame.from_ndarray(opaque, format=pixels)
            frame.pts, frame.time_base = time(i) if time else i, context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def made(codec: str = "libx264", **settings: Any) -> Make:
    return functools.partial(encode, codec=codec, **settings)


def ffmpeg(options: str, codec: str = "ffv1", **settings: Any) -> Make:
    """What FFmpeg's command makes with these options from a video without loss, or with others of the same frames."""

    def make(path: Path) -> None:
        source = encode(path.with_suffix(".source.mkv"), codec, **{"pixels": "bgra", "b": 0} | settings)
        run = ["ffmpeg", "-v", "error", "-y", "-i", str(source), *options.format(source=source).split(), str(path)]
        subprocess.run(run, check=True, capture_output=True)

    return make


def boxes(data: bytes, *names: bytes) -> list[tuple[int, int]]:
    """(start, end) of each box on the way to the first that is called so: moov, trak, ..."""
    found, at, end = list[tuple[int, int]](), 0, len(data)
    for name in names:
        while at < end:
            size, kind = struct.unpack_from(">I4s", data, at)
            if kind == name:
                break
            at += size
        else:
            return []
        found.append((at, at + size))
        at, end = at + 8, at + size
    return found


def displayed(path: Path, matrix: Sequence[float]) -> None:
    """Writes a display matrix into an MP4."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(65536 * value) for value in matrix)
    at = boxes(data, b"moov", b"trak", b"tkhd")[-1][0] + 48
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def turned(how: str, codec: str = "libx264", **settings: Any) -> Make:
    return lambda path: displayed(encode(path, codec, **settings), DISPLAY[how])


def edited(*edits: tuple[int, int | None], **settings: Any) -> Make:
    """An MP4 with an edit list of (frames, first frame); None: nothing is shown for so long."""

    def make(path: Path) -> None:
        data = bytearray(encode(path, **settings).read_bytes())
        at = boxes(data, b"moov", b"trak", b"mdia", b"mdhd")[-1][0]
        ticks = struct.unpack_from(">I", data, at + 20)[0] // FPS
        at = boxes(data, b"moov", b"trak", b"edts", b"elst")[-1][0]
        zero = struct.unpack_from(">i", data, at + 20)[0]  # the time of the first frame
        entries = [(40 * n, -1 if first is None else zero + ticks * first, 1, 0) for n, first in edits]
        content = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">iihh", *entry) for entry in entries)
        box = struct.pack(">I4sI4s", 16 + len(content), b"edts", 8 + len(content), b"elst") + content
        *around, (start, end) = boxes(data, b"moov", b"trak", b"edts")
        data[start:end] = box
        for at, stop in around:
            struct.pack_into(">I", data, at, stop - at + len(box) - (end - start))
        path.write_bytes(data)

    return make


def repacked(
    path: Path, first: int = 0, sizes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH),), **settings: Any
) -> None:
    """Packets of raw videos of these sizes, one after another, without the first ones."""
    av = pytest.importorskip("av")
    number = 0
    with av.open(str(path), "w") as target:
        stream = None
        for size in sizes:
            part = encode(path.with_suffix(f".{size[1]}.mkv"), size=size, **settings)
            with av.open(str(part)) as source:
                stream = stream or target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size and number >= first:
                        packet.stream = stream
                        if len(sizes) > 1:
                            packet.pts = packet.dts = 40 * number
                            packet.time_base = Fraction(1, 1000)
                        target.mux(packet)
                    number += bool(packet.size)


def coloured(space: str, value: str) -> Make:
    return ffmpeg(f"-c:v libx264 -pix_fmt yuv420p -colorspace {space} -color_range {value} -color_primaries bt709")


VFR = [0, 10, 30, 60, 70, 470, 480, 500, 510, 900, 910, 1000, 1500, 1510, 1520, 1530]
REORDERED = "b-adapt=0:scenecut=0"
TWO = "-i {source} -map 0 -map 1 -c:v libx264 -pix_fmt yuv420p -filter:v:1 hflip,scale=56:40 -r:v:1 10"
PICTURE = "-frames:v:{0} 1 -c:v:{0} png -disposition:v:{0} attached_pic"
COVER = f"-i {{source}} -map 0 -map 1 -c:v:0 libx264 -pix_fmt:v:0 yuv420p {PICTURE.format(1)}"
SOUND = "-f lavfi -i sine=d=0.6 -map 1 -map 0"
CROPPED = "-c:v copy -bsf:v h264_metadata=crop_left=2:crop_right=6:crop_top=4:crop_bottom=2"
TRANSPOSED_10 = turned("90", "libx265", pixels="yuv420p10le", options={"x265-params": X265})
GROWN = functools.partial(repacked, sizes=((28, 40), (56, 80)), b=0, options={"x264-params": "repeat-headers=1"})
NO_BOTH = {"decord": "no", "torchcodec": "no"}

ROWS = [
    # How frames are turned
    *(Row(f"turned by {angle} degrees", "mp4", turned(angle)) for angle in ("90", "180", "270")),
    Row("mirrored left-right", "mp4", turned("left-right")),
    Row("mirrored top-bottom", "mp4", turned("top-bottom")),
    Row("turned by 90 degrees and mirrored", "mp4", turned("transposed")),
    Row("turned by 270 degrees and mirrored", "mp4", turned("both")),
    Row("turned by 90 degrees, odd sizes, 4:4:4", "mp4", turned("90", size=(37, 51), pixels="yuv444p")),
    Row("turned by 90 degrees, HEVC, 10 bits", "mp4", TRANSPOSED_10, "no", "1"),
    Row("turned by 90 degrees, 4:2:2", "mp4", turned("90", pixels="yuv422p"), "1.5", "exact", "1.5"),
    # Edit lists
    Row("edit list: starts at a keyframe", "mp4", edited((10, 6))),
    Row("edit list: starts between keyframes", "mp4", edited((8, 8)), **NO_BOTH),
    Row("edit list: the first keyframe is not shown", "mp4", edited((15, 1)), **NO_BOTH),
    Row("edit list: ends early", "mp4", edited((9, 0)), "no"),
    Row("edit list: starts at a keyframe, ends early", "mp4", edited((5, 6)), "no"),
    Row("edit list: nothing is shown at first", "mp4", edited((10, None), (16, 0))),
    Row("edit list: several parts", "mp4", edited((3, 0), (4, 6)), **NO_BOTH),
    Row("edit list: parts repeated or backwards", "mp4", edited((4, 6), (3, 1), (3, 1)), **NO_BOTH),
    # Times
    Row("variable frame rate", "mp4", made(time=VFR.__getitem__)),
    Row("variable frame rate, Matroska", "mkv", made(time=VFR.__getitem__)),
    Row("a gap of a minute", "mp4", made(time=lambda i: 40 * i + 60_000 * (i > 7))),
    Row("times do not start at 0", "mkv", made(time=lambda i: 5000 + 40 * i)),
    Row("AVI with B-frames, H.264", "avi", made(), **NO_BOTH),
    Row("AVI with B-frames, MPEG-4 (DivX, Xvid)", "avi", made("mpeg4"), **NO_BOTH),
    Row("AVI without B-frames, MPEG-4", "avi", made("mpeg4", b=0)),
    Row("ASF (WMV), H.264", "asf", ffmpeg("-c:v libx264 -pix_fmt yuv420p"), **NO_BOTH),
    Row("a bare H.264 stream", "h264", made(container="h264"), **NO_BOTH),
    # The order of frames
    Row("16 B-frames in a row", "mp4", made(frames=40, keys=30, b=16, options={"x264-params": REORDERED})),
    Row(
        "open groups of pictures, H.264",
        "mp4",
        made(frames=30, b=3, options={"x264-params": f"open-gop=1:{REORDERED}"}),
        "no",
    ),
    Row(
        "open groups of pictures, HEVC",
        "mp4",
        made("libx265", frames=30, options={"x265-params": f"{X265}:open-gop=1"}),
        "no",
    ),
    Row(
        "gradual refresh",
        "mp4",
        made(frames=30, b=0, size=(56, 80), options={"x264-params": "intra-refresh=1"}),
        **NO_BOTH,
    ),
    Row("starts between keyframes", "mkv", functools.partial(repacked, first=3, keys=8), **NO_BOTH),
    Row("MPEG transport stream, H.264", "ts", made(), **NO_BOTH),
    Row("MPEG program stream, MPEG-2", "mpg", made("mpeg2video"), **NO_BOTH),
    Row("fragmented MP4", "mp4", made(muxer={"movflags": "frag_keyframe+empty_moov"})),
    Row("one frame", "mp4", made(frames=1)),
    Row("interlaced, H.264", "mp4", made(size=(64, 64), options={"x264-params": "tff=1"})),
    Row("interlaced, MPEG-2 in MP4", "mp4", made("mpeg2video", size=(64, 64), options={"flags": "+ilme+ildct"}), "no"),
    # Pixels
    Row("10 bits, H.264", "mp4", made(pixels="yuv420p10le")),
    Row("10 bits, HEVC", "mp4", made("libx265", pixels="yuv420p10le", options={"x265-params": X265}), "no"),
    Row("12 bits, HEVC", "mp4", made("libx265", pixels="yuv420p12le", options={"x265-params": X265}), "no"),
    Row("10 bits, VP9", "webm", ffmpeg("-c:v libvpx-vp9 -pix_fmt yuv420p10le")),
    Row("4:2:2", "mp4", made(pixels="yuv422p")),
    Row("4:4:4", "mp4", made(pixels="yuv444p")),
    Row("RGB, H.264", "mp4", made("libx264rgb", pixels="rgb24")),
    Row("odd sizes, 4:2:0", "webm", ffmpeg("-c:v libvpx-vp9 -pix_fmt yuv420p", size=(37, 51))),
    Row("32 pixels wide", "mp4", made(size=(24, 32)), "no"),
    Row("full range", "mp4", coloured("bt709", "pc")),
    Row("BT.601", "mp4", coloured("smpte170m", "tv")),
    Row("BT.709", "mp4", coloured("bt709", "tv")),
    Row("BT.2020", "mp4", coloured("bt2020nc", "tv")),
    Row("pixels that are not square (frames as stored)", "mp4", made(aspect=Fraction(4, 3))),
    Row("alpha, VP9 (left out)", "webm", ffmpeg("-c:v libvpx-vp9 -pix_fmt yuva420p -auto-alt-ref 0")),
    Row("alpha, QuickTime RLE (left out)", "mov", made("qtrle", pixels="argb", b=0), "no"),
    Row("frames cropped otherwise than stated", "mp4", ffmpeg(CROPPED, "libx264", pixels="yuv420p"), **NO_BOTH),
    Row("another size midway (scaled to the first)", "mkv", GROWN),
    # Codecs
    Row("VP8", "webm", made("libvpx", b=0)),
    Row(
        "VP9 with hidden frames",
        "webm",
        ffmpeg("-c:v libvpx-vp9 -pix_fmt yuv420p -auto-alt-ref 1 -lag-in-frames 25 -b:v 60k"),
    ),
    Row("AV1", "mkv", ffmpeg("-c:v libaom-av1 -pix_fmt yuv420p -cpu-used 8"), "no"),
    Row("Motion-JPEG", "avi", made("mjpeg", pixels="yuvj420p", b=0)),
    Row("ProRes", "mov", made("prores_ks", pixels="yuv422p10le", b=0), "no"),
    Row("FFV1", "mkv", made("ffv1", b=0), "no"),
    Row("WMV", "wmv", made("wmv2", b=0), "no"),
    Row("GIF", "gif", made("gif", pixels="rgb8", b=0), "no"),
    # Streams
    Row("two video streams", "mp4", ffmpeg(TWO)),
    Row("two video streams, stream=1", "mp4", ffmpeg(TWO), "no", stream=1),
    Row("cover picture", "mp4", ffmpeg(COVER)),
    Row("sound before the video", "mkv", ffmpeg(f"{SOUND} -c:v libx264 -pix_fmt yuv420p")),
    # What nothing reads
    Row("turned by another angle", "mp4", turned("45"), "no", "no", "no"),
    Row("sound with a cover picture", "m4a", ffmpeg(f"{SOUND} {PICTURE.format(0)}"), "no", "no", "no"),
]


def table() -> str:
    """ROWS in Markdown."""
    cells = {"exact": "exact", "no": "-"}
    lines = ["| kind of video | decord | torchcodec | av |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        values = (cells.get(value, f"within {value}") for value in (row.decord, row.torchcodec, row.av))
        lines.append(f"| {row.kind} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"
