"""decord and torchcodec never meet in a process, a decoder that hangs is ended, and processes end with their videos."""

import contextlib
import ctypes
import gc
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from videos import make_video, needs, quick_workers, read_numbers

from vjvcr_fast.data import files, open_video
from vjvcr_fast.data.video import decode, workers
from vjvcr_fast.data.video.decode import REFUSED, IsolatedVideo, VideoError
from vjvcr_fast.data.video.workers import Pool

# Not by importorskip: workers import this module, and those that serve torchcodec must not load decord.
missing = [name for name in ("av", "decord", "pebble") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"the extra video is not installed: lacks {missing}")
SPAWNED = workers._Context

SIZE = (32, 48)
KIND = ("h264", "av1", "vp9", "hevc-closed", "h264-open", "mjpeg")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: make_video(folder, kind, 16) for kind in KIND}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_workers():
        yield


def run(script: str, *arguments: object, **settings: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


# -- Two decoders ---------------------------------------------------------------------------------------------------

MIXED = """
import os, sys
from vjvcr_fast.data import open_video
first, *paths = sys.argv[1:]
if first != "auto":
    open_video(paths[0], first).frames([0])
kept = []
for path in [*paths, *paths]:
    for backend in ("auto", "decord", "torchcodec"):
        try:
            video = open_video(path, backend)
        except RuntimeError as error:
            assert "decord does not read this kind of video right" in str(error), error
            continue
        assert backend in ("auto", video.backend)
        kept.append(video)
        print(int(video.frames(range(16), (32, 48)).long().sum()), path)
print("torchcodec" in sys.modules, "decord" in sys.modules)
"""


@pytest.mark.parametrize("first", ["auto", pytest.param("torchcodec", marks=pytest.mark.slow)])
def test_a_process_reads_what_either_decoder_reads_and_lives(made: dict[str, Path], first: str) -> None:
    """AV1 by torchcodec ended it, after H.264 by decord."""
    needs("torchcodec")
    process = run(MIXED, first, *made.values())
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    *sums, loaded = out.splitlines()
    assert len(sums) == 2 * (3 * 3 + 3 * 2)
    assert len(set(sums)) == len(made)  # whoever decodes a file, its frames are the same
    assert loaded == ("True False" if first == "torchcodec" else "False True")


def read(path: Path, backend: str = "auto") -> tuple[list[int], set[str]]:
    """In a task: the numbers that the frames show, and the decoders that the process has loaded."""
    numbers = read_numbers(torch.from_numpy(decode.decode(path, backend, range(16), SIZE)))
    return numbers, {name for name in workers.MODULES if decode._is_loaded(name)}


@pytest.mark.parametrize("count", [2, 0])
def test_a_pool_reads_a_folder_of_all_kinds(made: dict[str, Path], count: int, capsys: pytest.CaptureFixture) -> None:
    """Each of its processes has one decoder; all files go to torchcodec from the first on that needs it."""
    needs("torchcodec")
    with Pool(count, timeout=30) as pool, files.progress(total=1):
        before = [read_of(pool, made[kind]) for kind in ("h264", "vp9")]
        mixed = [pool.submit(path, read) for path in [*made.values()] * 3]
        for numbers, loaded in [*before, *(task.result() for task in mixed)]:
            assert numbers == [*range(16)]
            assert len(loaded) == 1
        after = read_of(pool, made["h264"])[1]
        assert after == ({"torchcodec"} if count else {"decord"})
        assert read_of(pool, made["h264"], "decord")[1] == {"decord"}
        assert read_of(pool, made["h264"], "torchcodec")[1] == {"torchcodec"}
        with pytest.raises(VideoError, match=rf"{made['av1']}: decord does not read this kind of video right \(AV1\)"):
            read_of(pool, made["av1"], "decord")
    assert capsys.readouterr().err.count(workers.LOADING) == 1


def read_of(pool: Pool, path: Path, *backend: str) -> tuple[list[int], set[str]]:
    return pool.submit(path, read, *backend).result()


def test_what_neither_opens_goes_to_av(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker that serves any."""
    needs("torchcodec")
    with quick_workers("fork"), Pool(1, timeout=30) as pool:  # forked, so that they inherit what is replaced here
        monkeypatch.setattr(decode, "_check_count", miscount)
        assert read_of(pool, made["h264"])[0] == [*range(16)]
        for name in workers.MODULES:
            with pytest.raises(VideoError, match=rf"h264.*: {name} miscounts"):
                read_of(pool, made["h264"], name)


def miscount(video: Any, count: int) -> None:
    if "h264" in video.path.name:
        raise decode.UnservedError(f"{video.path}: {video.backend} miscounts")


class Numbers(torch.utils.data.Dataset):
    """Frames of one video that is open, and of others that are opened for each item."""

    def __init__(self, video: Any, paths: list[Path]) -> None:
        self.video, self.paths = video, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> list[int]:
        return read_numbers(self.video.frames([3])) + read_numbers(open_video(self.paths[i]).frames([15]))


@pytest.mark.slow
def test_a_data_loader_may_have_such_processes(made: dict[str, Path]) -> None:
    """Its workers are daemons, and forked: they have none of the caller's threads."""
    needs("torchcodec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_Context", SPAWNED)
        numbers = Numbers(open_video(made["av1"]), [made["h264"], made["av1"], made["hevc-closed"]])
        assert type(numbers.video) is IsolatedVideo
        loader = torch.utils.data.DataLoader(numbers, num_workers=1, batch_size=None, timeout=30)
        assert [*loader] == [[3, 15]] * 3


# -- Nothing but the reason is printed -------------------------------------------------------------------------------

CLOSES = """
from pebble.pool.process import WorkerManager
from vjvcr_fast.data.video.workers import Pool
stop = WorkerManager.force_stop_workers
def late(self):
    for worker in self.workers.values():
        worker.join(30)
    stop(self)
WorkerManager.force_stop_workers = late
with Pool(1) as pool:
    pool.schedule(print)
"""
INTERRUPTED = """
import multiprocessing, os, signal, time
from vjvcr_fast.data.video.workers import Pool
with Pool(1) as pool:
    task = pool.schedule(abs, -1)
    time.sleep(0.3)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    print(task.result())
"""


def test_a_pool_may_be_closed_while_a_worker_starts() -> None:
    """The worker, which is killed late here, still finds the locks."""
    process = run(CLOSES)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_ctrl_c_while_a_worker_starts() -> None:
    """A terminal sends it to workers, too. They leave it to their caller, also while they import torch."""
    process = run(INTERRUPTED)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "1\n", "")


CHILD = """
import multiprocessing, sys
from vjvcr_fast.data import open_video
video = open_video(sys.argv[1], timeout=30)
def reads():
    print(*video.frames([3]).shape, flush=True)
child = multiprocessing.get_context("fork").Process(target=reads)
child.start()
child.join(30)
print(child.exitcode)
"""


def test_a_child_process_that_reads_ends(made: dict[str, Path]) -> None:
    """It waits for its own children, which wait for it to end, unless it ends them first."""
    process = run(CHILD, made["h264"])
    out, err = process.communicate(timeout=90)
    assert (process.returncode, out, err) == (0, "1 3 48 80\n0\n", "")


# -- A time limit ---------------------------------------------------------------------------------------------------

HANGS = """
import ctypes, os, pathlib, sys
def hang(*_, **__):
    pathlib.Path(os.environ["HUNG"]).write_text(str(os.getpid()))
    ctypes.CDLL(None).sleep(600)
class logging:
    QUIET = set_level = staticmethod(lambda *_: None)
class VideoReader:
    def __init__(self, *_, **__):
        if os.environ["WHEN"] == "opened":
            hang()
    def __len__(self):
        return 16
    get_batch = hang
class bridge:
    class use_torch:
        __enter__ = __exit__ = lambda *_: None
"""
READS = """
import sys
from vjvcr_fast.data import open_video
try:
    open_video(sys.argv[1], timeout=float(sys.argv[2])).frames([0])
except RuntimeError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replaces decord, in processes to come, by one that never returns from C. Returns the file where it puts the id
    of its process."""
    (tmp_path / "decord.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("HUNG", str(tmp_path / "hung"))
    monkeypatch.setenv("WHEN", "read")
    return tmp_path / "hung"


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def hung(file: Path) -> int:
    """Waits until a decoder hangs. Its process."""
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(file.read_text())


def ends(process: int) -> bool:
    for _ in range(250):
        if not lives(process):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("when", [pytest.param("opened", marks=pytest.mark.slow), "read"])
def test_a_call_with_a_limit_returns(
    made: dict[str, Path], hanging: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHEN", when)
    process = run(READS, made["h264"], 0.3)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == f"VideoError {made['h264']}: reading it took longer than 0.3 s\n"
    assert not lives(hung(hanging))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_decoder_that_hangs_ends_with_its_caller(made: dict[str, Path], hanging: Path, number: int) -> None:
    process = run(READS, made["h264"], 600)
    worker = hung(hanging)
    assert lives(worker)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    assert ends(worker)


def children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with_name = stat.read_text() if stat.exists() else ""
        if with_name and int(with_name.rpartition(")")[2].split()[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def test_a_limit_changes_no_frame_and_its_process_ends_with_the_videos(made: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_Context", SPAWNED)
        before = children()
        limited = [open_video(made[kind], timeout=30) for kind in ("h264", "mjpeg")]
        processes = {child for child in children() - before if "resource_tracker" not in command_of(child)}
        assert len(processes) == 1
        for video in limited:
            here = open_video(video.path)
            facts = [(v.frame_count, v.fps, v.height, v.width, v.backend, v.path, v.device) for v in (video, here)]
            assert facts[0] == facts[1]
            for indices, size in (([3], None), ([5, 1, 1], 16), (range(16), (20, 30))):
                a, b = (v.frames(indices, size) for v in (video, here))
                assert a.equal(b)
                assert a.stride() == b.stride()
            with pytest.raises(ValueError, match="whole numbers in"):
                video.frames([16])
            with pytest.raises(ValueError, match="size must be"):
                video.frames([0], 0)
        video.frames([0]).add_(1)  # may be written to
        os.kill(processes.pop(), signal.SIGKILL)
        assert read_numbers(limited_again(limited[0])) == [7]
        del video, limited
        gc.collect()  # errors that were raised refer to the videos in circles
        assert all(map(ends, children() - before - {c for c in children() if "resource_tracker" in command_of(c)}))


def limited_again(video: Any) -> torch.Tensor:
    """A frame, from the process that took the place of one that was killed."""
    with contextlib.suppress(RuntimeError):  # it was noticed during this call
        return video.frames([7])
    return video.frames([7])


def command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_wrong_limits(made: dict[str, Path], timeout: float) -> None:
    with pytest.raises(ValueError, match=rf"timeout={timeout}: must be above 0 seconds"):
        open_video(made["h264"], timeout=timeout)


def test_a_fault_under_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nonsense" * 100)
    with pytest.raises(VideoError, match=r"a\.mp4: not a video that can be read"):
        open_video(tmp_path / "a.mp4", timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["h264", "av1"])
def test_memory_stays_flat(made: dict[str, Path], kind: str) -> None:
    """Two thousand clips, from videos that are opened one after another: this process and the one that reads. A leak
    of the frames would be 100 MB or more, of a decoder much more."""
    kept = open_video(made[kind], timeout=30)
    used = []
    for clips in (500, 1500):
        for i in range(clips):
            video = open_video(made[kind], timeout=30)
            assert read_numbers(video.frames(range(8)))[i % 8] == i % 8
        used.append([resident(made[kind]), kept._pool.submit(made[kind], resident).result()])
    for before, after in zip(*used, strict=True):
        assert after - before < 1e7, used


def resident(path: Path) -> int:
    """Bytes in use. malloc keeps up to 70 MB that dav1d has freed, until it is asked to give them back."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- What decord does not get ---------------------------------------------------------------------------------------


def test_the_page_lists_what_decord_does_not_get() -> None:
    page = Path(__file__).parents[3] / "docs" / "videos.md"
    table = re.search(r"<!-- decord -->\n\n(.*?)\n\n<!-- /decord -->", page.read_text(), re.DOTALL)
    rows = [f"| {about.kind} | {about.why} |" for about in REFUSED]
    assert table is not None
    assert table[1].splitlines() == ["| kind of video | why decord does not get it |", "| --- | --- |", *rows]
