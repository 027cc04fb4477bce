"""DALI gives the CPU decoders' frames in slightly different colours, keeps the order of batches, and names bad files.

Most tests run on any CPU, with VP9, VP8 and Motion-JPEG. Tests marked `cuda` need DALI and NVDEC.
"""

import gc
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode import choices, real_videos
from torch import Tensor
from videos import HARD, KINDS, cut, make_video, read_number, read_numbers

from vjvcr_fast.data.video.clips import ClipLoader, Source, VideoClips
from vjvcr_fast.data.video.dali import LARGEST_BATCH, DaliDecoder, encoded
from vjvcr_fast.data.video.decode import VideoError, open_video, resize

pytest.importorskip("av")
pytest.importorskip("nvidia.dali")

# Levels of 255, against decord. Without colours only the rounding of the conversion differs: measured 1. With them,
# DALI interpolates the half-resolution colour of 4:2:0 and decord repeats it: measured 1.0 on average on the smooth
# gradients of the test videos (16 at the worst pixel), 0.8 on a CLEVRER scene as VP9 (27 at a coloured edge).
DALI_TOLERANCE_GREY = 2  # at any pixel
DALI_TOLERANCE = 2.0  # on average over the frames

# DALI's antialiased bilinear filter against `resize`: measured 0.10 on average, and 8 at the worst pixel of a CLEVRER
# scene.
RESIZE_TOLERANCE = 0.3  # on average

CPU_KINDS = [kind for kind in KINDS if kind.startswith(("vp", "mjpeg"))]
GPU_KINDS = [kind for kind, about in (KINDS | HARD).items() if about.pixels == "yuv420p" and about.height % 2 == 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def vp9(folder: Path) -> list[Path]:
    """Three videos of 20 frames that show 0 to 19, 40 to 59, 80 to 99."""
    return [make_video(folder, "vp9", 20, first=first) for first in (0, 40, 80)]


def mean_difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


# -- One video ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_frames(folder: Path, kind: str) -> None:
    path = make_video(folder, kind)
    video, judge = open_video(path, "dali"), open_video(path)
    assert (video.backend, video.frame_count, video.fps) == ("dali", 40, 25.0)
    assert (video.height, video.width) == (judge.height, judge.width)
    for indices in choices(40):
        frames = video.frames(indices)
        assert read_numbers(frames) == indices
        assert frames.is_contiguous(memory_format=torch.channels_last)
        assert mean_difference(frames, judge.frames(indices)) <= DALI_TOLERANCE
    assert video.frames([7, 7, 3], (20, 30)).equal(resize(video.frames([7, 7, 3]), (20, 30)))


@pytest.mark.parametrize("kind", CPU_KINDS)
def test_grey_frames_are_nearly_equal(folder: Path, kind: str) -> None:
    path = make_video(folder, kind, grey=True)
    a, b = (open_video(path, name).frames(range(40)) for name in ("dali", "auto"))
    assert (a.int() - b.int()).abs().max() <= DALI_TOLERANCE_GREY


def test_frames_outlive_their_video(vp9: list[Path]) -> None:
    video = open_video(vp9[0], "dali")
    frames = video.frames(range(20))
    kept = frames.clone()
    for indices in choices(20):
        video.frames(indices)
    del video
    gc.collect()
    assert frames.equal(kept)


@pytest.mark.parametrize("kind", ["h264", "hevc-closed", "mpeg4"])
def test_codecs_that_need_a_gpu(folder: Path, kind: str) -> None:
    path = make_video(folder, kind)
    with pytest.raises(VideoError, match=rf"{path}: .* on a CPU, DALI decodes only VP8, VP9 and Motion-JPEG"):
        open_video(path, "dali")


def test_faults(folder: Path, vp9: list[Path]) -> None:
    for path, why in ((folder / "none.webm", "No such file"), (folder, "a folder"), (cut(vp9[0], 0.6), "cut off")):
        with pytest.raises(VideoError, match=f"^{path}: .*{why}"):
            open_video(path, "dali")


def test_a_video_that_fails_can_be_read_again(vp9: list[Path], folder: Path) -> None:
    path = folder / "changes.webm"
    path.write_bytes(vp9[0].read_bytes())
    video: Any = open_video(path, "dali")
    good, video._encoded = video._encoded, video._encoded[:100]
    with pytest.raises(VideoError, match=rf"{path}: dali cannot decode frames 0 to 0 \(.+\)"):
        video.frames([0])
    video._encoded = good
    assert read_numbers(video.frames([5])) == [5]


def test_without_dali(vp9: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"dali is not installed: pip install 'vjvcr_fast\[dali\]'"):
        open_video(vp9[0], "dali")
    with pytest.raises(ImportError, match=r"pip install 'vjvcr_fast\[dali\]'"):
        DaliDecoder(torch.device("cpu"), 1)


# -- Batches --------------------------------------------------------------------------------------------------------


Request = list[tuple[Path, int]]


def decoded(asked: Iterable[Request], frames: int, size: tuple[int, int], device: str = "cpu") -> Iterator[Tensor]:
    """A batch for each list of (file, first frame), all from one decoder."""
    decoder = DaliDecoder(torch.device(device), 2, size)
    for request in asked:
        windows = [(path, range(first, first + frames)) for path, first in request]
        yield decoder.read(windows, [encoded(path) for path, _ in request])


def requests(videos: list[Path], batches: int, frames: int, seed: int = 0) -> list[list[tuple[Path, int]]]:
    """Random windows, batches of 1 to 4."""
    rng = random.Random(seed)
    return [
        [(rng.choice(videos), rng.randrange(21 - frames)) for _ in range(rng.randint(1, 4))] for _ in range(batches)
    ]


def expected_numbers(videos: list[Path], request: list[tuple[Path, int]], frames: int) -> list[list[int]]:
    return [[40 * videos.index(path) + first + t for t in range(frames)] for path, first in request]


def test_windows_come_in_the_order_they_were_asked_for(vp9: list[Path]) -> None:
    asked = requests(vp9, 9, 6)
    batches = list(decoded(asked, 6, (48, 80)))
    assert len(batches) == len(asked)
    for request, batch in zip(asked, batches, strict=True):  # all of them are kept: none may write over another
        assert batch.shape == (len(request), 6, 3, 48, 80)
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous()
        assert [read_numbers(clip) for clip in batch] == expected_numbers(vp9, request, 6)
        for clip, (path, first) in zip(batch, request, strict=True):
            assert clip.equal(open_video(path, "dali").frames(range(first, first + 6)))


def test_codecs_may_be_mixed(folder: Path) -> None:
    paths = [make_video(folder, kind) for kind in ("mjpeg", "vp8", "vp9-mp4", "vp9-37x51")]
    (batch,) = decoded([[(path, 3) for path in paths]], 5, (48, 80))
    assert [read_numbers(clip) for clip in batch] == [[3, 4, 5, 6, 7]] * 4


@pytest.mark.parametrize("size", [(24, 24), (17, 90), (60, 100)])
def test_resizing(vp9: list[Path], size: tuple[int, int]) -> None:
    (batch,) = decoded([[(vp9[1], 2)]], 8, size)
    judge = resize(open_video(vp9[1], "dali").frames(range(2, 10)), size)
    assert mean_difference(batch[0], judge) <= RESIZE_TOLERANCE
    assert read_numbers(batch[0]) == [*range(42, 50)]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_clips_as_on_a_gpu(vp9: list[Path], prefetch: int, stride: int) -> None:
    """The loader's batches where DALI decodes; here on a CPU."""
    count = 20 // stride
    sources = [Source(p, p.name, count, torch.arange(count - 3), torch.arange(count - 3), stride) for p in vp9]
    clips = VideoClips(sources, frames=4, size=(48, 80), seed=0, stream="train")
    clips._on_gpu = True
    loader = ClipLoader(clips, 5, step=1, prefetch=prefetch)
    for step in (1, 2, 3):
        batch = next(loader)
        windows = clips.sampler.windows(5 * step, 5)
        starts = [int(sources[w.source].starts[w.choice]) for w in windows]
        numbers = [40 * w.source + start * stride for w, start in zip(windows, starts, strict=True)]
        assert [read_numbers(clip) for clip in batch.frames] == [[n + t * stride for t in range(4)] for n in numbers]
        assert batch.target.tolist() == starts
    loader.close()


def test_a_file_that_fails_ends_the_clips_after_those_before_it(vp9: list[Path], folder: Path) -> None:
    bad = folder / "bad.webm"
    bad.write_bytes(random.Random(0).randbytes(5000))
    sources = [Source(p, p.name, 20, torch.arange(17), torch.zeros(17)) for p in (vp9[0], bad)]
    clips = VideoClips(sources, frames=4, size=(48, 80), seed=0, stream="train")
    clips._on_gpu = True
    batches = clips.in_order(17)
    assert [read_number(clip[0]) for clip in next(batches).frames] == [*range(17)]
    with pytest.raises(VideoError, match=str(bad)):
        next(batches)


def test_files_that_cannot_be_decoded_are_named(vp9: list[Path], folder: Path) -> None:
    """After the batches before them have come."""
    noise, h264 = folder / "noise.webm", make_video(folder, "h264")
    noise.write_bytes(random.Random(0).randbytes(5000))
    for bad in (noise, h264):
        batches = decoded([[(vp9[0], 0)], [(vp9[1], 1), (bad, 0)], [(vp9[2], 0)]], 4, (48, 80))
        assert read_numbers(next(batches)[0]) == [0, 1, 2, 3]
        with pytest.raises(
            VideoError, match=rf"^{bad}: DALI cannot decode it \(.+\); on a CPU, DALI decodes only"
        ) as got:
            next(batches)
        assert str(vp9[1]) not in str(got.value)


def test_windows_past_the_end(vp9: list[Path]) -> None:
    with pytest.raises(VideoError, match=rf"{vp9[0]}: .*out-of-bounds frame index 20"):
        list(decoded([[(vp9[1], 0), (vp9[0], 18)]], 4, (48, 80)))


def test_files_that_cannot_be_read(vp9: list[Path], folder: Path) -> None:
    missing, empty = folder / "missing.webm", folder / "empty.webm"
    empty.touch()
    for bad in (missing, empty):
        batches = decoded([[(vp9[0], 0)], [(bad, 0)]], 4, (48, 80))
        assert read_numbers(next(batches)[0]) == [0, 1, 2, 3]
        with pytest.raises(VideoError, match=str(bad)):
            next(batches)


def test_a_decoder_that_failed_decodes_again(vp9: list[Path], folder: Path) -> None:
    bad = folder / "bad.webm"
    bad.write_bytes(random.Random(1).randbytes(5000))
    decoder = DaliDecoder(torch.device("cpu"), 2, (48, 80))
    with pytest.raises(VideoError, match=str(bad)):
        decoder.read([(bad, range(4))], [encoded(bad)])
    assert read_numbers(decoder.read([(vp9[1], range(4))], [encoded(vp9[1])])[0]) == [40, 41, 42, 43]


def test_too_large_a_batch(vp9: list[Path]) -> None:
    with pytest.raises(ValueError, match="a batch must have at most 4,096 windows, got 4097"):
        DaliDecoder(torch.device("cpu"), 1, (4, 4)).read([(vp9[0], range(1))] * (LARGEST_BATCH + 1), [])


def test_nothing_leaks(vp9: list[Path]) -> None:
    def used() -> tuple[int, float]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGESIZE") / 2**20

    for _ in range(40):
        open_video(vp9[0], "dali").frames([2])
    files, memory = used()
    for _ in range(200):
        open_video(vp9[0], "dali").frames([2])
    more_files, more_memory = used()
    assert more_files <= files + 2
    assert more_memory - memory < 30  # MiB


# -- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("kind", GPU_KINDS)
def test_frames_on_a_gpu(folder: Path, kind: str) -> None:
    """Larger than the others, since NVDEC refuses very small pictures."""
    about = (KINDS | HARD)[kind]._replace(height=256, width=320)
    path = make_video(folder, about)
    video = open_video(path, "dali", "cuda")
    assert (video.backend, video.frame_count) == ("dali", 40)
    judge = open_video(path)
    for indices in choices(40):
        frames = video.frames(indices)
        assert frames.device.type == "cuda"
        assert read_numbers(frames.cpu()) == indices
        assert mean_difference(frames.cpu(), judge.frames(indices)) <= DALI_TOLERANCE


@pytest.mark.cuda
def test_auto_is_dali_on_a_gpu(folder: Path) -> None:
    path = make_video(folder, KINDS["h264"]._replace(height=256, width=320))
    assert open_video(path, device="cuda").backend == "dali"


@pytest.mark.cuda
def test_real_clips_on_a_gpu() -> None:
    """The windows of CLEVRER that a CPU decoder gives, and tensors that are safe to use at once on another stream."""
    paths = real_videos() or pytest.skip("no CLEVRER videos in VJVCR_DATA or ../shared/data")
    rng = random.Random(0)
    asked = [[(rng.choice(paths), rng.randrange(113)) for _ in range(rng.randint(1, 8))] for _ in range(6)]
    batches = list(decoded(asked, 16, (64, 64), "cuda"))
    for request, batch in zip(asked, batches, strict=True):
        assert batch.shape == (len(request), 16, 3, 64, 64)
        assert batch.device.type == "cuda"
        for clip, (path, first) in zip(batch, request, strict=True):
            judge = open_video(path).frames(range(first, first + 16), 64)
            assert mean_difference(clip.cpu(), judge) <= DALI_TOLERANCE


@pytest.mark.cuda
def test_a_gpu_iterator_does_not_wait() -> None:
    """torch sees no synchronisation of the host while batches are handed over."""
    paths = real_videos() or pytest.skip("no CLEVRER videos in VJVCR_DATA or ../shared/data")
    batches = decoded([[(paths[0], k)] * 4 for k in range(8)], 16, (64, 64), "cuda")
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum(batch.float().sum() for batch in batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(total) > 0
