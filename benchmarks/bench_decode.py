"""Decoding and loading video: each backend against its library called directly, streaming against the cache.

    pytest benchmarks/bench_decode.py                        checks and times
    pytest benchmarks/bench_decode.py --benchmark-disable    checks alone

Videos are generated: 480x320, 128 frames, H.264 with one keyframe and CLEVRER's bit rate, so that a random window of 26
frames costs decoding from frame 0. One thread a decoder, frames of the same windows, which are compared first. `clips`:
batches of 16 windows at 64x64, decoded by as many processes as there are cores, and from the decode-once cache.
`training`: steps of the preset clevrer-mini and the share of their time that the loop waits for data.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from records import Row
from timing import BusyElsewhere, Host, Region, spread, take_turns

from vjvcr_fast.config import override, preset
from vjvcr_fast.data.video.cache import FrameCache, fill
from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.decode import BACKENDS, open_video
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.training import loop

WIDTH, HEIGHT, FRAMES, WINDOW, VIDEOS, BATCH, SIZE = 480, 320, 128, 26, 8, 16, (64, 64)
SECONDS, SECONDS_FULL, ROUNDS = 3.0, 8.0, (5, 40)
DIRECT, CACHE, WAIT = 0.9, 100.0, 0.01  # targets: of the library's own rate, of streaming's, of the time of a step

pytest.importorskip("av", reason="the extra video is not installed")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"video_{i:05d}.mp4" for i in range(VIDEOS)]
    for number, path in enumerate(paths):
        generate(path, number)
    return paths


@pytest.fixture(scope="module")
def sources(videos: list[Path]) -> list[Source]:
    starts = torch.arange(FRAMES - WINDOW + 1)
    return [Source(path, path.name, FRAMES, starts, torch.zeros(len(starts))) for path in videos]


def generate(path: Path, seed: int) -> None:
    """Discs that move over a soft background, with the grain that makes CLEVRER's files 1.1 to 1.6 MB."""
    import av

    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 7, generator=generator) * 120 + 60
    background = torch.nn.functional.interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[0]
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    start = torch.rand(5, 2, generator=generator) * torch.tensor([HEIGHT, WIDTH])
    step, colours = torch.randn(5, 2, generator=generator) * 2, torch.rand(5, 3, generator=generator) * 255
    with av.open(str(path), "w") as container:
        options = {"b": "2300000", "g": "9999", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for t in range(FRAMES):
            picture = background + 6 * torch.randn(HEIGHT, WIDTH, generator=generator)
            for place, colour in zip(start + t * step, colours, strict=True):
                disc = (rows - place[0]) ** 2 + (columns - place[1]) ** 2 < 30**2
                picture = torch.where(disc, colour[:, None, None], picture)
            array = picture.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))


def windows(paths: list[Path], count: int) -> list[tuple[Path, range]]:
    chosen = random.Random(0)
    starts = [chosen.randrange(FRAMES - WINDOW + 1) for _ in range(count)]
    return [(chosen.choice(paths), range(start, start + WINDOW)) for start in starts]


def direct_decord(path: Path, frames: range) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return torch.from_numpy(reader.get_batch(frames).asnumpy()).permute(0, 3, 1, 2)


def direct_torchcodec(path: Path, frames: range) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_in_range(frames.start, frames.stop).data


DIRECT_CALLS = {"decord": direct_decord, "torchcodec": direct_torchcodec}
assert {*DIRECT_CALLS, "dali"} == {*BACKENDS}, "a backend that nothing measures"


@pytest.mark.parametrize("backend", DIRECT_CALLS)
def test_backend(backend: str, videos: list[Path], full: bool, benchmark, report) -> None:
    pytest.importorskip(backend)
    asked = windows(videos, 4)

    def ours() -> list[torch.Tensor]:
        return [open_video(path, backend).frames(frames) for path, frames in asked]

    def directly() -> list[torch.Tensor]:
        return [DIRECT_CALLS[backend](path, frames) for path, frames in asked]

    for one, other in zip(ours(), directly(), strict=True):
        assert one.equal(other)
    if benchmark.disabled:
        return
    busy = BusyElsewhere()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = take_turns(
        Host(), {"ours": Region(ours), "directly": Region(directly)}, SECONDS_FULL if full else SECONDS, *ROUNDS
    )
    torch.set_num_threads(threads)
    rows = []
    for name, of_one in times.items():
        rate = len(asked) * WINDOW / (1e-3 * spread(of_one).median)
        row: Row = {"what": f"{backend}, {name}", "_frames_per_second": rate, "_busy_elsewhere": busy.share()}
        row["x directly"] = spread(times["directly"]).median / spread(of_one).median
        rows.append(row)
    report([judged(rows[0], "x directly", DIRECT), rows[1]])


def test_clips(sources: list[Source], tmp_path: Path, full: bool, benchmark, report) -> None:
    """Batches from the cache against batches decoded by all cores."""
    with Pool() as pool:
        options = {"frames": WINDOW, "size": SIZE, "seed": 0, "stream": "bench"}
        streaming = VideoClips(sources, **options, pool=pool)
        done = fill(sources, tmp_path, SIZE, "auto", pool)
        assert done.written == VIDEOS
        cached = VideoClips(sources, **options, cache=FrameCache(tmp_path, SIZE))
        assert streaming.batch(0, BATCH).frames.equal(cached.batch(0, BATCH).frames)
        if benchmark.disabled:
            return
        busy = BusyElsewhere()
        regions = {name: Region(next_batch(clips)) for name, clips in {"stream": streaming, "cache": cached}.items()}
        times = take_turns(Host(), regions, 4 * SECONDS_FULL if full else SECONDS, 3, 10)
        rows = []
        for name, of_one in times.items():
            median = spread(of_one).median
            row: Row = {"what": f"clips, {name}", "_batches_per_second": 1e3 / median, "_busy_elsewhere": busy.share()}
            row["x stream"] = spread(times["stream"]).median / median
            rows.append(row)
    report([rows[0], judged(rows[1], "x stream", CACHE)])


def next_batch(clips: VideoClips) -> Callable[[], object]:
    starts = iter(range(0, 10**9, BATCH))
    return lambda: clips.batch(next(starts), BATCH)


def test_training(sources: list[Source], tmp_path: Path, full: bool, monkeypatch, benchmark, report) -> None:
    """The share of its time that the training loop waits for data, and its videos/s: decoders use the same cores."""
    steps, batch = (40, 32) if full else (16, 8)
    changes = {"train.steps": steps, "train.validate_every": steps, "train.log_every": steps // 2}
    changes |= {"train.tensorboard": False, "train.validation_videos": 32, "train.batch": batch}
    config = override(preset("clevrer-mini"), changes)
    size, frames = (config.data.canvas,) * 2, config.data.frames_in + config.data.frames_out
    rows: list[Row] = []
    monkeypatch.setattr(loop, "build_data", lambda *_: (Part(), Part()))
    with Pool() as pool:
        fill(sources, tmp_path / "cache", size, "auto", pool)
        for name, cache in {"stream": None, "cache": FrameCache(tmp_path / "cache", size)}.items():
            options = {"frames": frames, "size": size, "seed": 0, "cache": cache, "pool": pool}
            build = partial(clips_for, sources, options)
            monkeypatch.setattr(loop, "build_videos", build)
            busy = BusyElsewhere()
            loop.train(config, tmp_path / name)
            elsewhere = busy.share()  # while the workers live: their time counts as ours
            lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            last = [line for line in lines if "data_wait" in line][-1]  # the first has the start in it
            row: Row = {"what": f"training, {name}", "waits": last["data_wait"], "_busy_elsewhere": elsewhere}
            rows.append(row | {"_videos_per_second": last["videos_per_second"]})
    for row in rows:
        row["x stream"] = row["_videos_per_second"] / rows[0]["_videos_per_second"]
    if not benchmark.disabled:
        report([rows[0], judged(rows[1], "waits", WAIT, most=True)])


def clips_for(sources, options, config, part, stream, device) -> VideoClips:
    """In the place of `build_videos`."""
    return VideoClips(sources, **options, stream=stream, device=device)


class Part:
    """What the loop asks of a data set."""

    source = "generated videos"

    def fingerprint(self) -> str:
        return "generated"


def judged(row: Row, metric: str, target: float, most: bool = False) -> Row:
    met = row[metric] <= target if most else row[metric] >= target
    return row | {"target": f"{'<=' if most else '>='} {target:g}", "met": "yes" if met else "no"}
