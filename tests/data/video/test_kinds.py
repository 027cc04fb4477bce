"""Any video a user has: each backend returns the frames that FFmpeg's command shows, to the bit unless the row says
otherwise, in any order; or refuses the file."""

import contextlib
import importlib.util
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import video_kinds
from video_kinds import FRAMES, HEIGHT, ROWS, WIDTH, Row, edited, encode
from videos import quick_workers, read_numbers

from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.decode import VideoError, for_dali, open_video

# Not imported: the processes that read have to load the decoders as the package does.
MISSING = [name for name in ("av", "decord", "torchcodec", "pebble") if importlib.util.find_spec(name) is None]
if MISSING or shutil.which("ffmpeg") is None:
    pytest.skip(f"not installed: {', '.join(MISSING) or 'the command ffmpeg'}", allow_module_level=True)
BACKENDS = ("decord", "torchcodec", "av")
PAGE = Path(__file__).parents[3] / "docs" / "guides" / "own-videos.md"


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, workers.Pool]]:
    """A process for each backend, because each brings an FFmpeg of its own."""
    with quick_workers():
        found = {name: workers.Pool(1, backend=name) for name in BACKENDS}
        yield found
        for pool in found.values():
            pool.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


def shown(path: Path, stream: int | None) -> np.ndarray:
    """The frames that FFmpeg's command shows: (F, H, W, 3) uint8."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-map", f"0:v:{stream or 0}", "-fps_mode", "passthrough"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    pictures, frames = subprocess.run(command, check=True, capture_output=True).stdout, []
    while pictures:
        width, height = map(int, pictures.split(b"\n", 2)[1].split())
        start = len(b"P6\n%d %d\n255\n" % (width, height))
        end = start + 3 * width * height
        frames.append(np.frombuffer(pictures[start:end], np.uint8).reshape(height, width, 3))
        pictures = pictures[end:]
    return np.stack(frames)


def read(path: Path, backend: str, stream: int | None) -> np.ndarray:
    """All frames, (F, H, W, 3) uint8, after they were read one by one in another order, with the same result."""
    video = open_video(path, backend, stream=stream)
    frames = video.frames(range(video.frame_count))
    order = [*range(video.frame_count)]
    random.Random(0).shuffle(order)
    again = open_video(path, backend, stream=stream)
    for i in order:
        assert again.frames([i])[0].equal(frames[i]), f"frame {i} differs after a seek"
    assert frames.shape[1:] == (3, video.height, video.width)
    return frames.permute(0, 2, 3, 1).contiguous().numpy()


def usual(path: Path, stream: int | None) -> str:
    return open_video(path, stream=stream).backend


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_kind(row: Row, folder: Path, pools: dict[str, workers.Pool]) -> None:
    path = folder / f"{re.sub(r'[^a-z0-9=]+', '-', row.kind.lower())}.{row.suffix}"
    row.make(path)
    expected = {"decord": row.decord, "torchcodec": row.torchcodec, "av": row.av}
    tasks = {name: pools[name].submit(path, read, name, row.stream) for name in BACKENDS}
    truth = None if {*expected.values()} == {"no"} else shown(path, row.stream)
    for name, task in tasks.items():
        if expected[name] == "no":
            with pytest.raises(VideoError, match=re.escape(str(path))):
                task.result()
            continue
        frames = task.result()
        assert truth is not None
        assert frames.shape == truth.shape, name
        if expected[name] == "exact":
            assert np.array_equal(frames, truth), name
        else:
            assert np.abs(frames.astype(int) - truth).mean() < float(expected[name]), name
    if truth is not None:
        right = [name for name in BACKENDS if expected[name] != "no"]
        chosen = pools["av"].submit(path, usual, row.stream).result()  # torchcodec first where it is loaded already
        assert chosen == right[0] or (chosen == "torchcodec" and chosen in right)


def test_the_page_has_these_rows() -> None:
    page = PAGE.read_text()
    assert page.split("<!-- kinds -->\n\n")[1].split("\n<!-- /kinds -->")[0] == video_kinds.table()


def test_turned_by_its_frames(folder: Path) -> None:
    """An H.264 stream may ask for a rotation itself: anticlockwise. FFmpeg before 7.0 turned the other way."""
    path = folder / "turned-inside.mp4"
    video_kinds.ffmpeg(
        "-c:v copy -bsf:v h264_metadata=display_orientation=insert:rotate=90", "libx264", pixels="yuv420p"
    )(path)
    plain = open_video(path.with_suffix(".source.mkv"), "av").frames(range(FRAMES))
    video = open_video(path)
    assert (video.backend, video.height, video.width) == ("av", WIDTH, HEIGHT)
    assert video.frames(range(FRAMES)).equal(plain.rot90(1, (2, 3)))


def test_av1_after_decord(folder: Path, pools: dict[str, workers.Pool]) -> None:
    """torchcodec's FFmpeg must find its own libdav1d, not decord's."""
    paths = folder / "any.mp4", folder / "av1.webm"
    encode(paths[0])
    video_kinds.ffmpeg("-c:v libaom-av1 -pix_fmt yuv420p -cpu-used 8")(paths[1])
    pool = workers.Pool(1)
    for path, backend in ((paths[0], "decord"), (paths[1], "torchcodec"), (paths[1], "av"), (paths[0], "decord")):
        assert len(pool.submit(path, read, backend, None).result()) == FRAMES
    pool.close()


def test_streams(folder: Path) -> None:
    path = folder / "two.mp4"
    video_kinds.ffmpeg(video_kinds.TWO)(path)
    first, second = (open_video(path, "av", stream=number) for number in (0, 1))
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    assert (second.height, second.width) == (40, 56)
    for number in (-1, 2):
        with pytest.raises(VideoError, match=f"{path}: has 2 video streams, from 0 on; there is no stream {number}"):
            open_video(path, stream=number)


def test_dali_does_not_get_what_it_would_read_wrong(folder: Path) -> None:
    path = folder / "for-dali.mp4"
    for make, why in ((video_kinds.turned("90"), "turned to be shown"), (edited((8, 8)), "its edit list")):
        make(path)
        with pytest.raises(VideoError, match=rf"{path}: dali does not read this kind of video right \({why}"):
            for_dali(path)


# -- Names and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a b.mp4", "Überraschung für Zoë.mp4", "-i.mp4", "日本語.mp4", "a'b\"c;&.mp4", "100%d.mp4"]
)
def test_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: dict[str, workers.Pool]) -> None:
    path = encode(tmp_path / name, frames=4)
    linked = tmp_path / "linked" / "video"
    linked.parent.mkdir()
    linked.symlink_to(Path("..") / name)  # without a suffix, too
    for place in (path, linked):
        for backend, pool in pools.items():
            assert read_numbers(
                torch.from_numpy(pool.submit(place, read, backend, None).result()).permute(0, 3, 1, 2)
            ) == [0, 1, 2, 3]
    monkeypatch.chdir(tmp_path)
    assert open_video(name, "av").frame_count == 4


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = encode(tmp_path / "closed" / "a.mp4")
    path.parent.chmod(0)
    try:
        with pytest.raises(VideoError, match=rf"{path}: cannot be read \(Permission denied\)"):
            open_video(path)
    finally:
        path.parent.chmod(0o700)


def test_a_broken_link(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.symlink_to("nowhere.mp4")
    with pytest.raises(VideoError, match=rf"{path}: cannot be read \(No such file or directory\)"):
        open_video(path)


def test_a_file_that_grows(tmp_path: Path) -> None:
    """Either what is there is whole, or it is refused; once it is whole, all of it is read."""
    whole = encode(tmp_path / "whole.mp4", frames=30, muxer={"movflags": "frag_keyframe+empty_moov"}).read_bytes()
    path, counts = tmp_path / "growing.mp4", list[int]()
    for share in (0.2, 0.4, 0.6, 0.8, 1.0):
        path.write_bytes(whole[: int(share * len(whole))])
        with contextlib.suppress(VideoError):
            video = open_video(path)
            counts.append(video.frame_count)
            assert read_numbers(video.frames(range(video.frame_count))) == [*range(video.frame_count)]
    assert counts[-1] == 30
    assert counts == sorted(counts)


@pytest.mark.slow
def test_two_hours(tmp_path: Path, pools: dict[str, workers.Pool]) -> None:
    """Frames at the end cost no more than at the start, where the backend seeks."""
    path = tmp_path / "long.mp4"
    command = (
        "ffmpeg -v error -f lavfi -i testsrc2=size=64x48:rate=5:duration=7200 -c:v libx264 -preset ultrafast -g 50"
    )
    subprocess.run([*command.split(), str(path)], check=True)
    for backend in ("decord", "torchcodec"):
        early, late = (pools[backend].submit(path, seconds, backend, first).result() for first in (100, 35_900))
        assert late < 3 * early + 0.2, (backend, early, late)


def seconds(path: Path, backend: str, first: int) -> float:
    video = open_video(path, backend)
    assert video.frame_count == 36_000
    began = time.perf_counter()
    video.frames(range(first, first + 16))
    return time.perf_counter() - began
