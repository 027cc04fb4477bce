"""Decoding and loading videos: each backend against its library called directly, and the cache against decoding.

    pytest benchmarks/bench_decode.py                        checks and times
    pytest benchmarks/bench_decode.py --benchmark-disable    checks alone

We generate the videos: 480x320, 128 frames, H.264 with a single keyframe, as large as CLEVRER's, so that a random
window of 26 frames has to be decoded from frame 0. A backend reads the same windows as its library, with one thread,
and we compare the frames first. `clips` are batches of 16 windows at 64x64: decoded by as many processes as there are
cores, or read from the cache of decoded frames.
"""

import importlib.util
import itertools
import math
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from records import Row, goals

from vjvcr_fast.bench.timing import Cuda, Device, Host, timed
from vjvcr_fast.data.simulated import clevrer, make
from vjvcr_fast.data.video.cache import FrameCache, fill
from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.decode import BACKENDS, open_video
from vjvcr_fast.data.video.workers import Pool

WIDTH, HEIGHT, FRAMES, WINDOW, VIDEOS, BATCH, SIZE = 480, 320, 128, 26, 8, 16, (64, 64)
SECONDS, SECONDS_FULL = 3.0, 8.0

pytest.importorskip("av", reason="the extra video is not installed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder, starts = tmp_path_factory.mktemp("videos"), torch.arange(FRAMES - WINDOW + 1)
    paths = [folder / f"video_{i:05d}.mp4" for i in range(VIDEOS)]
    for number, path in enumerate(paths):
        generate(path, number)
    return [Source(path, path.name, FRAMES, starts, torch.zeros(len(starts))) for path in paths]


def generate(path: Path, seed: int) -> None:
    """A soft picture that moves, with the grain that makes the file as large as CLEVRER's, 1.1 to 1.6 MB."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 60 + 120 * torch.rand(1, 3, 5, 7, generator=generator)
    soft = torch.nn.functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[0].permute(1, 2, 0)

    def picture(t: int) -> Any:
        grain = 1.6 * torch.randn(HEIGHT, WIDTH, 1, generator=generator)
        return (soft.roll(t, dims=1) + grain).clamp(0, 255).byte().numpy()

    make.write_video(path, map(picture, range(FRAMES)), (WIDTH, HEIGHT), clevrer.ENCODING)


def direct_decord(path: Path, frames: range) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return torch.from_numpy(reader.get_batch(frames).asnumpy()).permute(0, 3, 1, 2)


def direct_torchcodec(path: Path, frames: range) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_in_range(frames.start, frames.stop).data


def direct_av(path: Path, frames: range) -> torch.Tensor:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = itertools.islice(container.decode(video=0), frames.start, frames.stop)
        pictures = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded]
    return torch.stack(pictures).permute(0, 3, 1, 2)


DIRECT_CALLS = {"decord": direct_decord, "torchcodec": direct_torchcodec, "av": direct_av}
assert {*DIRECT_CALLS, "dali"} == {*BACKENDS}, "a backend that nothing measures"


def compared(backend: str, asked: list[tuple[Path, range]], seconds: float | None) -> dict[str, Any]:
    """Our frames and the library's are equal; the times of both, on one thread; seconds=None: no times."""
    functions = {
        "ours": lambda: [open_video(path, backend).frames(frames) for path, frames in asked],
        "directly": lambda: [DIRECT_CALLS[backend](path, frames) for path, frames in asked],
    }
    for one, other in zip(functions["ours"](), functions["directly"](), strict=True):
        assert one.equal(other)
    torch.set_num_threads(1)
    return {} if seconds is None else timed(Host(), functions, seconds, 5, 40)


@pytest.mark.parametrize("backend", DIRECT_CALLS)
def test_backend(backend: str, sources: list[Source], full: bool, check_only: bool, report: Any) -> None:
    """In a process that has the one decoder, and not the other."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    chosen = random.Random(0)
    starts = [chosen.randrange(FRAMES - WINDOW + 1) for _ in range(4)]
    asked = [(chosen.choice(sources).path, range(start, start + WINDOW)) for start in starts]
    seconds = None if check_only else SECONDS_FULL if full else SECONDS
    with Pool(1, math.inf, backend=backend) as pool:
        times = pool.schedule(compared, backend, asked, seconds).result()
    if times:
        rows = [{"what": f"{backend}, {name}", **row} for name, row in times.items()]
        report(against(rows, "directly", {f"{backend}, ours": 0.9}, len(asked) * WINDOW))


def test_clips(
    sources: list[Source], tmp_path: Path, device: Device, full: bool, check_only: bool, report: Any
) -> None:
    """Batches from the cache, and from DALI if it is there and a GPU too, against batches decoded on all cores."""
    options: dict[str, Any] = {"frames": WINDOW, "size": SIZE, "seed": 0, "stream": "bench"}
    with Pool() as pool:
        assert fill(sources, tmp_path, SIZE, "auto", pool).written == VIDEOS
        streaming = VideoClips(sources, **options, pool=pool)
        cached = VideoClips(sources, **options, cache=FrameCache(tmp_path, SIZE))
        assert streaming.batch(0, BATCH).frames.equal(cached.batch(0, BATCH).frames)
        ways = {"stream": streaming, "cache": cached}
        if isinstance(device, Cuda) and importlib.util.find_spec("nvidia.dali"):
            ways["DALI"] = VideoClips(sources, **options, backend="dali", device="cuda")
        if check_only:
            return

        def batch(clips: VideoClips, starts: Iterator[int]) -> None:
            clips.batch(next(starts), BATCH)
            device.synchronize()

        functions = {name: partial(batch, clips, itertools.count(0, BATCH)) for name, clips in ways.items()}
        times = timed(Host(), functions, 4 * SECONDS_FULL if full else SECONDS, 3, 10)
    rows = [{"what": f"clips, {name}", **row} for name, row in times.items()]
    # DALI's goal is a share of what the CPU decoders reach on 16 cores: it leaves the cores free.
    report(against(rows, "stream", {"clips, cache": 100.0, "clips, DALI": 0.7}, BATCH * WINDOW))


def against(rows: list[Row], name: str, bounds: dict[str, float], frames: int) -> list[Row]:
    """The rows with their ratio to the provider called `name`, and its goal."""
    (first,) = (row["_median_ms"] for row in rows if row["what"].endswith(name))
    for row in rows:
        row |= {f"x {name}": first / row["_median_ms"], "_frames_per_second": 1e3 * frames / row["_median_ms"]}
    return [goals(row, {f"x {name}": bounds[row["what"]]} if row["what"] in bounds else {}) for row in rows]
