"""Decoding on the CPU: both decoders give the right frames of every codec, bit for bit; each fault is a VideoError."""

import gc
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from videos import HARD, KINDS, Kind, cut, make_video, needs, quick_workers, read_numbers

from vjvcr_fast.data.digits import ENVIRONMENT
from vjvcr_fast.data.video import decode, workers
from vjvcr_fast.data.video.decode import BACKENDS, VideoError, explain, open_video, resize

pytest.importorskip("av")
CPU = ("decord", "torchcodec", "av")


@pytest.fixture(params=CPU)
def backend(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return request.param


@pytest.fixture(scope="module", autouse=True)
def kept() -> Iterator[workers.Pool]:
    """The process that reads with torchcodec, because this one has loaded decord."""
    with quick_workers():
        yield decode._pool(None, "torchcodec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[[str], Path]:
    """Each kind of video once."""
    paths: dict[str, Path] = {}
    return lambda kind: paths.get(kind) or paths.setdefault(kind, make_video(folder, kind))


def real_videos() -> list[Path]:
    roots = [os.environ.get(ENVIRONMENT), Path(__file__).parents[4] / "shared" / "data"]
    found = [sorted(Path(root).glob("**/video_*/video_*/video_*.mp4")) for root in roots if root]
    return next((paths for paths in found if paths), [])


# -- Frames ---------------------------------------------------------------------------------------------------------


def choices(count: int) -> Iterator[list[int]]:
    """Ways to ask for frames, in an order that makes decoders seek back and forth."""
    rng = random.Random(0)
    yield [count - 1]
    yield [*range(count)]
    yield [*range(5, 13)]
    yield [*range(count)][::-1]
    yield [7, 7, 0, 7]
    yield [*range(1, count, 7)]
    for _ in range(4):
        yield [rng.randrange(count) for _ in range(6)]
        start = rng.randrange(count - 6)
        yield [*range(start, start + 6)]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_the_ones_asked_for(made: Callable[[str], Path], kind: str, backend: str) -> None:
    about = KINDS[kind]
    video = open_video(str(made(kind)), backend)
    assert (video.backend, video.path, video.device) == (backend, made(kind), torch.device("cpu"))
    assert (video.frame_count, video.fps) == (40, 25.0)
    assert (video.height, video.width) == (about.height, about.width)
    for indices in choices(40):
        frames = video.frames(indices)
        assert frames.shape == (len(indices), 3, about.height, about.width)
        assert frames.dtype == torch.uint8
        assert frames.is_contiguous(memory_format=torch.channels_last)
        assert read_numbers(frames) == indices


@pytest.mark.parametrize("kind", KINDS)
def test_decoders_agree_to_the_bit(made: Callable[[str], Path], kind: str) -> None:
    needs(*CPU)
    a, *others = (open_video(made(kind), name) for name in CPU)
    for b in others:
        for indices in choices(40):
            assert a.frames(indices).equal(b.frames(indices))
        for size in (16, (30, 20), (64, 100)):
            assert a.frames([9, 3, 3], size).equal(b.frames([9, 3, 3], size))


@pytest.mark.parametrize("kind", HARD)
def test_what_decord_would_read_wrong_is_left_to_torchcodec(made: Callable[[str], Path], kind: str) -> None:
    needs("decord")
    with pytest.raises(VideoError, match=rf"{made(kind)}: decord does not read this kind of video right .*torchcodec"):
        open_video(made(kind), "decord")
    needs("torchcodec")
    video = open_video(made(kind))
    assert video.backend == "torchcodec"
    for indices in choices(40):
        assert read_numbers(video.frames(indices)) == indices
        assert video.frames(indices).equal(video.frames(range(40))[indices])


def test_edit_lists(tmp_path: Path, backend: str) -> None:
    """What comes before a keyframe can be cut away; with less than that, only FFmpeg finds the right frames."""
    video = open_video(later(make_video(tmp_path, "h264"), 12), backend)
    assert video.frame_count == 28
    for indices in choices(28):
        assert read_numbers(video.frames(indices)) == [12 + i for i in indices]
    path = later(make_video(tmp_path, "h264"), 15)
    if backend != "av":
        with pytest.raises(VideoError, match=r"edit list starts between keyframes\); av does"):
            open_video(path, backend)
    video = open_video(path)
    assert (video.backend, video.frame_count) == ("av", 25)
    for indices in choices(25):
        assert read_numbers(video.frames(indices)) == [15 + i for i in indices]


def later(path: Path, frames: int) -> Path:
    """The same packets, `frames` of them before time 0."""
    import av

    moved = path.with_name(f"later-{path.name}")
    with av.open(str(path)) as source, av.open(str(moved), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = int(frames / 25 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    return moved


def test_gradual_refresh(tmp_path: Path, backend: str) -> None:
    """Its keyframes are whole only some frames later: after a seek decoders are off."""
    path = make_video(tmp_path, Kind("libx264", "mp4", 96, 128, options={"x264-params": "intra-refresh=1"}))
    if backend != "av":
        with pytest.raises(VideoError, match=r"gradual refresh\); av does"):
            open_video(path, backend)
    video = open_video(path)
    for indices in choices(40):
        assert read_numbers(video.frames(indices)) == indices


def test_kinds_of_indices(made: Callable[[str], Path], backend: str) -> None:
    video = open_video(made("h264"), backend)
    expected = video.frames([4, 5])
    for indices in (range(4, 6), torch.tensor([4, 5]), torch.tensor([4, 5], dtype=torch.int32), (4, 5), iter([4, 5])):
        assert video.frames(indices).equal(expected)
    wrong: list[Any] = [[-1], [40], [3, 41], [], [0.5], "ab", torch.tensor([[1]]), torch.tensor([1.0]), torch.tensor(1)]
    for indices in wrong:
        with pytest.raises(
            ValueError, match=r"indices of .*h264.* must be whole numbers in \[0, 40\), at least one, got"
        ):
            video.frames(indices)
    for size in (0, (3, 0), (3,), -2, "64", (1.5, 2)):
        with pytest.raises(ValueError, match="size must be"):
            video.frames([0], size)


def test_frames_outlive_their_video(made: Callable[[str], Path], backend: str) -> None:
    frames = open_video(made("h264"), backend).frames(range(40))
    kept = frames.clone()
    for _ in range(5):
        open_video(made("h264-no-b"), backend).frames(range(40))
    gc.collect()
    assert frames.equal(kept)


def test_threads_change_nothing(made: Callable[[str], Path], backend: str) -> None:
    one, two = (open_video(made("h264"), backend, threads=n).frames(range(40)) for n in (1, 2))
    assert one.equal(two)


def test_odd_names(made: Callable[[str], Path], tmp_path: Path, backend: str) -> None:
    path = tmp_path / "concat:a ü%03d.mp4"
    path.write_bytes(made("h264").read_bytes())
    assert read_numbers(open_video(path, backend).frames([11])) == [11]


def test_a_changed_file_is_looked_at_again(made: Callable[[str], Path], tmp_path: Path, backend: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(made("h264").read_bytes())
    assert open_video(path, backend).frame_count == 40
    path.write_bytes(make_video(tmp_path, "h264", 12).read_bytes())
    assert open_video(path, backend).frame_count == 12


def test_real_videos(backend: str) -> None:
    paths = real_videos() or pytest.skip(f"no CLEVRER videos in {ENVIRONMENT} or ../shared/data")
    for path in paths[:2]:
        video = open_video(path, backend)
        assert (video.frame_count, video.fps, video.height, video.width) == (128, 25.0, 320, 480)
        frames = video.frames(range(40, 56))
        assert video.frames([50, 40, 127])[:2].equal(frames[[10, 0]])
        if backend != CPU[0] and "decord" in sys.modules:
            assert frames.equal(open_video(path, "decord").frames(range(40, 56)))


@pytest.mark.cuda
def test_frames_move_to_the_gpu(made: Callable[[str], Path], backend: str) -> None:
    frames = open_video(made("h264"), backend, "cuda").frames([3, 1])
    assert frames.device.type == "cuda"
    assert frames.cpu().equal(open_video(made("h264"), backend).frames([3, 1]))


# -- Resizing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (20, 41), (96, 160), (7, 200)])
def test_resize(size: tuple[int, int]) -> None:
    frames = torch.randint(256, (3, 3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = resize(frames, size)
    assert resized.shape == (3, 3, *size)
    assert resized.dtype == torch.uint8
    judge = F.interpolate(frames.double(), size=size, mode="bilinear", antialias=True)
    assert (resized - judge).abs().max() <= 1.5  # rounded once in each direction, half a level; weights of 16 bits
    assert resize(frames.contiguous(memory_format=torch.channels_last), size).equal(resized)


def test_resize_to_the_same_size_is_free() -> None:
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert resize(frames, 8) is frames
    assert resize(frames, (8, 4)).shape == (2, 3, 8, 4)
    with pytest.raises(ValueError, match="size must be"):
        resize(frames, 0)


# -- Faults ---------------------------------------------------------------------------------------------------------


def audio(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path: Path) -> None:
    """An mp4 without samples: `ftyp` and a `moov` with nothing in it."""
    boxes = [(b"ftyp", b"isom\0\0\2\0isomiso2"), (b"moov", b""), (b"mdat", b"")]
    path.write_bytes(b"".join(struct.pack(">I4s", 8 + len(content), name) + content for name, content in boxes))


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "No such file"),
    "folder": (Path.mkdir, "a folder, not a video"),
    "pipe": (os.mkfifo, "not a file, not a video"),
    "empty": (Path.touch, "an empty file"),
    "text": (lambda path: path.write_text("frame 1\n" * 500), "not a video that can be read"),
    "noise": (lambda path: path.write_bytes(random.Random(0).randbytes(40_000)), "not a video that can be read"),
    "zeros": (lambda path: path.write_bytes(bytes(40_000)), "not a video that can be read"),
    "playlist": (lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"), "not a video"),
    "audio": (audio, "no video in it"),
    "no frames": (no_frames, "no video in it|without frames|not a video"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, tmp_path: Path, backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, why = FAULTS[fault]
    path = tmp_path / "bad.mp4"
    make(path)
    capfd.readouterr()
    with pytest.raises(VideoError, match=rf"^{path}: .*({why})"):
        open_video(path, backend)
    assert capfd.readouterr().err == ""


def test_no_permission(made: Callable[[str], Path], backend: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        path = Path(name) / "a.mp4"
        path.write_bytes(made("h264").read_bytes())
        path.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # nobody: root may read everything
        try:
            with pytest.raises(VideoError, match=rf"{path}: cannot be read \(Permission denied\)"):
                open_video(path, backend)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.parametrize("kind", ["h264", "h264-one-key", "vp9-mp4", "vp9", "mjpeg"])
def test_files_that_are_cut_off(tmp_path: Path, kind: str, backend: str) -> None:
    """Their headers come first and are whole, so that they open."""
    path = make_video(tmp_path, kind, movflags="faststart")
    for share in (0.2, 0.5, 0.8, 0.95, 0.999):
        with pytest.raises(VideoError, match=r"cut-0\.\d+.*: (cut off|a video without frames|not a video)"):
            open_video(cut(path, share), backend)


@pytest.mark.parametrize("movflags", ["default_base_moof", "frag_keyframe+empty_moov"])
def test_mp4_without_its_end(tmp_path: Path, movflags: str, backend: str) -> None:
    path = make_video(tmp_path, "h264", movflags=movflags)
    for share in (0.3, 0.9):
        with pytest.raises(VideoError, match=r"cut off|not a video that can be read"):
            open_video(cut(path, share), backend)


def test_damage_inside_neither_crashes_nor_hangs(made: Callable[[str], Path], tmp_path: Path, backend: str) -> None:
    content = bytearray(made("h264").read_bytes())
    path = tmp_path / "damaged.mp4"
    for start in range(1000, len(content) - 4000, len(content) // 5):
        path.write_bytes(bytes(content[:start]) + random.Random(start).randbytes(2000) + bytes(content[start + 2000 :]))
        try:
            frames = open_video(path, backend).frames(range(40))
        except VideoError:
            continue
        assert frames.shape == (40, 3, 48, 80)


def test_a_file_that_fails_while_it_is_read(tmp_path: Path, backend: str) -> None:
    # Larger than what is read ahead.
    path = make_video(tmp_path, Kind("libx264", "mp4", 240, 320, 1000, options={"qp": "1"}), movflags="faststart")
    video = open_video(path, backend)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(VideoError, match=rf"{path}: {backend} cannot decode frames 0 to 39 \(.+\)"):
        video.frames(range(40))


def test_fewer_frames_than_the_file_states(tmp_path: Path, backend: str) -> None:
    """40 are stored, the last 12 of them not to be shown: an error, not an endless search for them."""
    import av

    path, whole = tmp_path / "hidden.webm", make_video(tmp_path, "vp8")
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            content[0] &= ~16 if number >= 28 else 255  # VP8's bit "show this frame"
            changed = av.Packet(bytes(content))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, stream
            target.mux(changed)
    video = open_video(path, backend)
    assert video.frame_count == 40
    assert read_numbers(video.frames(range(20))) == [*range(20)]
    with pytest.raises(VideoError, match=rf"{path}: {backend} cannot decode frames 0 to 39 \("):
        video.frames(range(40))


def used() -> tuple[int, float]:
    """The files that this process has open, and its MiB of memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGESIZE") / 2**20


def taken(path: Path, backend: str) -> tuple[int, float]:
    """The files and MiB that reading a frame 500 times takes."""
    for _ in range(60):
        open_video(path, backend).frames([2])
    files, memory = used()
    for _ in range(500):
        open_video(path, backend).frames([2])
    more_files, more_memory = used()
    return more_files - files, more_memory - memory


@pytest.mark.slow
def test_nothing_leaks(made: Callable[[str], Path], backend: str, kept: workers.Pool) -> None:
    """Where the decoder is, and where its frames arrive."""
    path = made("h264-one-key")
    for files, memory in (taken(path, backend), kept.submit(path, taken, backend).result()):
        assert files == 0
        assert memory < 20  # MiB, of allocators; a decoder that stays takes about one


# -- Choosing -------------------------------------------------------------------------------------------------------


CHOOSING = """
import sys
from vjvcr_fast.data import open_video
h264, hevc = sys.argv[1:]

def attempt(path, backend="auto"):
    try:
        video = open_video(path, backend)
        video.frames([0])
        print(video.backend, type(video).__name__)
    except Exception as error:
        print(type(error).__name__, error)

sys.modules["decord"] = sys.modules["torchcodec.decoders"] = None
attempt(h264)
attempt(hevc)
attempt(h264, "decord")
attempt(h264, "torchcodec")
del sys.modules["decord"]
del sys.modules["torchcodec.decoders"]
attempt(h264)
attempt(hevc)
"""


def test_auto(made: Callable[[str], Path]) -> None:
    """In a process that has loaded no decoder yet."""
    needs(*CPU)
    command = [sys.executable, "-c", CHOOSING, str(made("h264")), str(made("hevc-open"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    lacks = [
        "is not installed: pip install 'vjvcr_fast[video]'",
        "is not installed: pip install 'vjvcr_fast[torchcodec]'",
    ]
    assert done.stdout.splitlines() == [
        "av AvVideo",
        "av AvVideo",
        f"ImportError decord {lacks[0]}",
        f"ImportError torchcodec {lacks[1]}",
        "decord DecordVideo",
        "torchcodec IsolatedVideo",
    ], done.stderr


def test_av_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(tmp_path, "h264", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"av is not installed: pip install 'vjvcr_fast\[video\]'"):
        open_video(path)


def test_refused_arguments(made: Callable[[str], Path]) -> None:
    path = made("h264")
    with pytest.raises(
        ValueError, match=r"backend must be one of \('auto', 'decord', 'torchcodec', 'av', 'dali'\), got 'opencv'"
    ):
        open_video(path, "opencv")
    for device in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=f"device must be .*'{device}'"):
            open_video(path, device=device)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        open_video(path, threads=0)


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_version", lambda *names: f"{names[0]} 9")
    assert explain() == {
        "decord": "decord2 9: auto on cpu",
        "torchcodec": "torchcodec 9: auto for what decord does not read right",
        "av": "av 9: auto for what the others do not read right",
        "dali": "nvidia-dali-cuda130 9: auto on cuda",
    }
    monkeypatch.setattr(decode, "_version", lambda *names: None if "dali" in names[0] else f"{names[0]} 9")
    assert explain()["dali"] == "not installed: pip install 'vjvcr_fast[dali]'"
    assert explain()["decord"] == "decord2 9: auto on cpu, auto on cuda"
    monkeypatch.setattr(decode, "_version", lambda *names: None)
    assert all(line.startswith("not installed: pip install") for line in explain().values())
    assert tuple(explain()) == BACKENDS


@pytest.mark.parametrize("width", [16, 24, 32, 48, 64, 96, 144, 160])
def test_widths_that_decord_cannot_read_go_to_torchcodec(tmp_path: Path, width: int) -> None:
    """decord2 3.4 fails at some small widths, when a frame is read: found out when the file is opened."""
    needs(*CPU)
    path = make_video(tmp_path, Kind("libx264", "mp4", 32, width), frames=5)
    right = open_video(path, "torchcodec").frames(range(5))
    assert open_video(path).frames(range(5)).equal(right)
    refused = ""
    try:
        assert open_video(path, "decord").frames(range(5)).equal(right)
    except VideoError as error:
        refused = str(error)
    assert not refused or f"decord cannot read frames {width} wide" in refused
