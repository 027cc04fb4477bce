"""Windows, batches, the decode-once cache, and the worker processes."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import clevrer_files
import pytest
import torch
from videos import needs

from vjvcr_fast.data.clevrer import load_split
from vjvcr_fast.data.video import cache as cache_module
from vjvcr_fast.data.video import clips
from vjvcr_fast.data.video import decode as decode_module
from vjvcr_fast.data.video.cache import CacheError, FrameCache, fill
from vjvcr_fast.data.video.clips import ClipLoader, Source, VideoClips, WindowSampler
from vjvcr_fast.data.video.decode import VideoError, open_video
from vjvcr_fast.data.video.workers import Pool

pytest.importorskip("av", reason="the extra video is not installed: no videos to test with")
pytest.importorskip("decord", reason="the extra video is not installed: no decoder")

T, SIZE = 6, (16, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clevrer_files.make(tmp_path_factory.mktemp("clevrer"))


@pytest.fixture(scope="module")
def sources(made: Path) -> list[Source]:
    return load_split(made, "train", 2, 4).sources


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> list[Source]:
    """Videos to damage, scanned while they were whole."""
    root = shutil.copytree(made, tmp_path / "data")
    return load_split(root, "train", 2, 4).sources


@pytest.fixture(scope="module")
def pool():
    """Two processes for all tests that want some: each takes seconds to start."""
    with Pool(2, timeout=30) as shared:
        yield shared


def videos(sources: list[Source], **options) -> VideoClips:
    return VideoClips(sources, **{"frames": T, "size": SIZE, "seed": 1, "stream": "train", **options})


def fake(count: int, starts: int = 7) -> list[Source]:
    """Sources without files, for what never opens one."""
    return [Source(Path(f"{i}"), f"{i}", 20, torch.arange(starts + i), torch.zeros(starts + i)) for i in range(count)]


# -- Which windows --------------------------------------------------------------------------------------------------


def test_an_epoch_is_every_video_once_in_an_order_of_its_own() -> None:
    sampler = WindowSampler(fake(50), 0, "train")
    epochs = [[w.source for w in sampler.windows(50 * e, 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_do_not_depend_on_how_they_are_asked_for() -> None:
    sampler = WindowSampler(fake(7), 3, "train")
    one_by_one = [sampler.windows(i, 1)[0] for i in range(40)]
    assert sampler.windows(0, 40) == one_by_one
    assert WindowSampler(fake(7), 3, "train").windows(13, 9) == one_by_one[13:22]
    assert WindowSampler(fake(7), 4, "train").windows(0, 40) != one_by_one
    assert WindowSampler(fake(7), 3, "validation").windows(0, 40) != one_by_one


def test_starts_are_uniform_over_those_allowed() -> None:
    sampler = WindowSampler(fake(3), 0, "train")
    counts = [torch.zeros(7 + i) for i in range(3)]
    for window in sampler.windows(0, 6_000):
        counts[window.source][window.choice] += 1
    for count in counts:
        expected = 2_000 / len(count)
        chi_square = ((count - expected) ** 2 / expected).sum()
        assert chi_square < len(count) - 1 + 5 * (2 * (len(count) - 1)) ** 0.5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WindowSampler([], 0, "a"), "none"),
        (lambda: WindowSampler(fake(2, starts=0), 0, "a"), "0 has no window"),
        (lambda: WindowSampler(fake(2), 0, "a").windows(-1, 3), "start=-1"),
        (lambda: WindowSampler(fake(2), 0, "a").windows(0, 0), "n=0"),
        (lambda: videos(fake(2), frames=15), "0 ends before its last window"),
        (lambda: videos(fake(2), on_bad="ignore"), "on_bad='ignore'"),
        (lambda: ClipLoader(videos(fake(2)), 0), "batch=0"),
        (lambda: ClipLoader(videos(fake(2)), 1, rank=2, world=2), "rank=2"),
        (lambda: Pool(-2), "workers=-2"),
        (lambda: Pool(1, timeout=0), "timeout=0"),
    ],
)
def test_wrong_arguments(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


# -- Batches --------------------------------------------------------------------------------------------------------


def expected(sources: list[Source], windows: list[clips.Window], backend: str = "auto") -> torch.Tensor:
    frames = []
    for window in windows:
        source = sources[window.source]
        first = int(source.starts[window.choice])
        frames.append(open_video(source.path, backend).frames(range(first, first + T), SIZE))
    return torch.stack(frames)


def test_half_of_the_windows_are_mirrored(sources: list[Source]) -> None:
    """Which, depends on the window's number alone. Labels stay as they are."""
    plain, mirrored = videos(sources), videos(sources, mirror=True)
    before, after = plain.batch(0, 40), mirrored.batch(0, 40)
    turned = [a.equal(b.flip(-1)) and not a.equal(b) for a, b in zip(after.frames, before.frames, strict=True)]
    assert [a.equal(b) for a, b in zip(after.frames, before.frames, strict=True)] == [not t for t in turned]
    assert 10 < sum(turned) < 30
    assert after.target.equal(before.target)
    assert mirrored.batch(13, 5).frames.equal(after.frames[13:18])


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_a_batch_holds_the_windows_frames_and_targets(sources: list[Source], backend: str) -> None:
    needs(backend)
    loaded = videos(sources, backend=backend)
    batch = loaded.batch(3, 8)
    windows = loaded.sampler.windows(3, 8)
    assert batch.frames.shape == (8, T, 3, *SIZE)
    assert batch.frames.dtype == torch.uint8
    assert batch.frames.equal(expected(sources, windows, backend))
    assert batch.speed.equal(torch.stack([sources[w.source].targets[w.choice] for w in windows]))


def test_every_backend_delivers_the_same(sources: list[Source]) -> None:
    needs("torchcodec")
    one, two = (videos(sources, backend=name).batch(0, 6) for name in ("decord", "torchcodec"))
    assert one.frames.equal(two.frames)
    assert one.target.equal(two.target)


def test_processes_deliver_what_the_caller_would_decode(sources: list[Source], pool: Pool) -> None:
    assert videos(sources, pool=pool).batch(0, 9).frames.equal(videos(sources).batch(0, 9).frames)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_loader_goes_on_from_any_step(sources: list[Source], prefetch: int) -> None:
    loaded = videos(sources)
    loader = ClipLoader(loaded, 4, step=2, prefetch=prefetch)
    for step in (2, 3, 4):
        assert loader.step == step
        assert next(loader).frames.equal(loaded.batch(4 * step, 4).frames)
    loader.close()


def test_ranks_share_the_batch_without_overlap(sources: list[Source]) -> None:
    loaded = videos(sources)
    whole = loaded.batch(6 * 5, 6)
    parts = [next(ClipLoader(loaded, 2, step=5, rank=r, world=3)) for r in range(3)]
    assert torch.cat([part.frames for part in parts]).equal(whole.frames)
    assert torch.cat([part.target for part in parts]).equal(whole.target)


def test_a_closed_loader_has_no_more_batches(sources: list[Source]) -> None:
    loader = videos(sources).batches(step=0, n=4)
    next(loader)
    loader.close()
    assert list(loader) == []


def test_closing_a_pool_ends_what_waits_for_it(sources: list[Source]) -> None:
    with Pool(1, timeout=30) as own:
        loader = videos(sources, pool=own).batches(step=0, n=200)
        tasks = [own.submit(sources[0].path, decode_module.decode, "auto", range(2), SIZE) for _ in range(20)]
    with pytest.raises(RuntimeError, match="the processes that read videos have ended"):
        tasks[-1].result()
    loader.close()
    for thread in loader._thread._threads:
        thread.join(timeout=30)
        assert not thread.is_alive()


def test_the_interpreter_ends_without_the_batches_that_are_queued(made: Path) -> None:
    """A loader that nobody closed, of which one batch is being prepared."""
    script = f"""
import atexit, time
from pathlib import Path
from vjvcr_fast.data.clevrer import load_split
from vjvcr_fast.data.video.clips import ClipLoader, VideoClips
sources = load_split(Path({str(made)!r}), "train", 2, 4).sources
clips = VideoClips(sources, frames=6, size=(16, 16), seed=1, stream="train")
prepared, load = [], clips.load
clips.load = lambda *options: (prepared.append(time.sleep(0.2)) or batch for batch in load(*options))
atexit.register(lambda: print(len(prepared)))
loader = ClipLoader(clips, 2, prefetch=40)
next(loader)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 5


def test_a_loader_that_is_dropped_ends_its_thread(sources: list[Source]) -> None:
    gc.collect()
    before = threading.active_count()
    for _ in range(3):
        loader = ClipLoader(videos(sources), 2)
        next(loader)
        del loader
        gc.collect()
    assert threading.active_count() == before


# -- Videos that cannot be read -------------------------------------------------------------------------------------


def test_a_bad_video_stops_and_is_named(copied: list[Source]) -> None:
    copied[2].path.write_bytes(b"nonsense" * 100)
    loader = ClipLoader(videos(copied), 3)
    with pytest.raises(VideoError, match="video_00002"):
        [next(loader) for _ in range(3)]
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_video_is_replaced_the_same_way_every_time(copied: list[Source], prefetch: int) -> None:
    clean = [videos(copied).batch(6 * k, 6) for k in range(3)]
    copied[2].path.write_bytes(b"nonsense" * 100)
    loaded = videos(copied, on_bad="skip")
    loader = ClipLoader(loaded, 6, prefetch=prefetch)
    found = [next(loader) for _ in range(3)]
    again = [videos(copied, on_bad="skip").batch(6 * k, 6) for k in range(3)]
    assert list(loaded.bad) == [copied[2].name]
    assert "video_00002" in loaded.bad[copied[2].name]
    for k in range(3):
        assert found[k].frames.equal(again[k].frames)
        assert found[k].target.equal(again[k].target)
        for i, window in enumerate(loaded.sampler.windows(6 * k, 6)):
            assert found[k].frames[i].equal(clean[k].frames[i]) == (window.source != 2)


def test_where_no_video_is_good_there_is_an_error(copied: list[Source]) -> None:
    for source in copied:
        source.path.unlink()
    with pytest.raises(VideoError, match="none of 6 videos"):
        videos(copied, on_bad="skip").batch(0, 2)


def sleep(path: Path, seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def crash(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_decoder_that_hangs_or_crashes_is_ended_and_named(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both workers are lost; one that took their place does the rest."""
    monkeypatch.setattr(pool, "timeout", 1.0)
    hung = pool.submit(Path("hung.mp4"), sleep, 60.0)
    crashed = pool.submit(Path("crashed.mp4"), crash)
    fine = pool.submit(Path("fine.mp4"), sleep, 0.0)
    with pytest.raises(VideoError, match=r"hung\.mp4: reading it took longer than 1 s"):
        hung.result()
    with pytest.raises(VideoError, match=r"crashed\.mp4: the process that read it ended"):
        crashed.result()
    assert fine.result() == "done"


def test_a_worker_does_not_run_the_callers_main_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a spawned process does, which would start a pool of its own, and so on."""
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "script.py")
    Path(main.__file__).write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with monkeypatch.context() as patch, Pool(1) as one:
        patch.setitem(sys.modules, "__main__", main)
        assert one.submit(Path("here"), Path.with_suffix, ".mp4").result() == Path("here.mp4")
        assert sys.modules["__main__"] is main
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    """As people write them, and notebooks: the workers do not run it once more."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from vjvcr_fast.data.video.workers import Pool\n"
        "print('started')\n"
        "print(Pool(1).submit(Path('here'), Path.with_suffix, '.mp4').result())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["started", "here.mp4"], done.stderr
    assert done.stderr == ""


# -- The cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["decord", pytest.param("torchcodec", marks=pytest.mark.slow)])
def test_the_cache_is_bit_identical_to_the_decoder(sources: list[Source], tmp_path: Path, backend: str) -> None:
    needs(backend)
    done = fill(sources, tmp_path, SIZE, backend, Pool(0))
    assert done == (6, 0, {})
    cached = videos(sources, cache=FrameCache(tmp_path, SIZE, backend))
    assert cached.batch(5, 20).frames.equal(videos(sources, backend=backend).batch(5, 20).frames)


def test_a_full_cache_needs_no_video(copied: list[Source], tmp_path: Path, monkeypatch) -> None:
    fill(copied, tmp_path / "cache", SIZE, "auto", Pool(0))
    monkeypatch.setattr(decode_module, "open_video", None)
    assert len(videos(copied, cache=FrameCache(tmp_path / "cache", SIZE)).batch(0, 6).frames) == 6


def test_a_partial_cache_is_completed_by_decoding(sources: list[Source], tmp_path: Path) -> None:
    fill(sources[:3], tmp_path, SIZE, "auto", Pool(0))
    partly = videos(sources, cache=FrameCache(tmp_path, SIZE))
    assert partly.batch(0, 12).frames.equal(videos(sources).batch(0, 12).frames)
    assert fill(sources, tmp_path, SIZE, "auto", Pool(0)) == (3, 3, {})
    assert all(map(FrameCache(tmp_path, SIZE).find, sources))


def test_processes_fill_the_same_cache(
    sources: list[Source], tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SYNC_SECONDS", 0.0)
    for name, with_pool in (("a", pool), ("b", Pool(0))):
        fill(sources, tmp_path / name, SIZE, "auto", with_pool)
    assert (tmp_path / "a" / "frames.u8").read_bytes() == (tmp_path / "b" / "frames.u8").read_bytes()


KILLED = """
import json, sys, os, signal
from pathlib import Path
from vjvcr_fast.data.video import cache
from vjvcr_fast.data.clevrer import load_split
from vjvcr_fast.data.video.workers import Pool
root, out, moments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
cache.SYNC_SECONDS = 0.0
sources = load_split(root, "train", 2, 4).sources
def fill(at, what):
    written, real = 0, getattr(cache, what)
    def counted(*arguments):
        nonlocal written
        written += 1
        if written == at:
            if what == "_to_disk" and written % 2 == 0:  # a line half on the disk
                arguments[0].flush()
                os.truncate(arguments[0].name, os.path.getsize(arguments[0].name) - 7)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(cache, what, counted)
    cache.fill(sources, out / f"{at}{what}", (16, 16), "auto", Pool(0))
for moment in moments:
    child = os.fork()
    if child == 0:
        fill(*moment)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment
"""
MOMENTS = [(1, "_sum"), (4, "_sum"), (3, "_to_disk"), (6, "_to_disk")]


@pytest.fixture(scope="module")
def killed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in a folder each whose process was killed at one of MOMENTS; all forked from one, which imports once."""
    out = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, str(made), str(out), json.dumps(MOMENTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("at", "what"), MOMENTS)
def test_a_killed_cache_gives_right_frames_and_is_completed(
    killed: Path, sources: list[Source], tmp_path: Path, at: int, what: str
) -> None:
    shutil.copytree(killed / f"{at}{what}", tmp_path, dirs_exist_ok=True)
    right = videos(sources).batch(0, 12).frames
    assert videos(sources, cache=FrameCache(tmp_path, SIZE)).batch(0, 12).frames.equal(right)
    result = fill(sources, tmp_path, SIZE, "auto", Pool(0))
    assert result.written + result.kept == 6
    assert result.written > 0
    assert videos(sources, cache=FrameCache(tmp_path, SIZE)).batch(0, 12).frames.equal(right)
    assert len((tmp_path / "frames.u8").read_bytes()) == 6 * clevrer_files.FRAMES * 3 * 16 * 16


def test_a_damaged_cache_is_noticed_and_repaired(sources: list[Source], tmp_path: Path) -> None:
    fill(sources, tmp_path, SIZE, "auto", Pool(0))
    before = (tmp_path / "frames.u8").read_bytes()
    with (tmp_path / "frames.u8").open("r+b") as file:
        file.seek(len(before) // 2)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(CacheError, match=r"damaged at .*--verify"):
        videos(sources, cache=FrameCache(tmp_path, SIZE)).batch(0, 6)
    assert fill(sources, tmp_path, SIZE, "auto", Pool(0)) == (0, 6, {})
    assert fill(sources, tmp_path, SIZE, "auto", Pool(0), verify=True) == (1, 5, {})
    assert (tmp_path / "frames.u8").read_bytes() == before


def test_a_shortened_cache_serves_what_is_left(sources: list[Source], tmp_path: Path) -> None:
    fill(sources, tmp_path, SIZE, "auto", Pool(0))
    os.truncate(tmp_path / "frames.u8", os.path.getsize(tmp_path / "frames.u8") - 1)
    assert not all(map(FrameCache(tmp_path, SIZE).find, sources))
    assert fill(sources, tmp_path, SIZE, "auto", Pool(0)) == (1, 5, {})


@pytest.mark.parametrize("change", [-6, 6])
def test_a_changed_video_is_decoded_again(copied: list[Source], tmp_path: Path, change: int) -> None:
    """Also where it has become longer: it does not take the place of the next one."""
    folder = tmp_path / "cache"
    fill(copied, folder, SIZE, "auto", Pool(0))
    root = copied[0].path.parents[2]
    clevrer_files.write(root, "train", 0, frames=clevrer_files.FRAMES + change)
    now = load_split(root, "train", 2, 4).sources
    assert videos(now, cache=FrameCache(folder, SIZE)).batch(0, 12).frames.equal(videos(now).batch(0, 12).frames)
    assert fill(now, folder, SIZE, "auto", Pool(0)) == (1, 5, {})
    assert videos(now, cache=FrameCache(folder, SIZE)).batch(0, 12).frames.equal(videos(now).batch(0, 12).frames)


def test_what_does_not_fit_a_cache_is_refused(sources: list[Source], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="there is no cache"):
        FrameCache(tmp_path, SIZE)
    fill(sources, tmp_path, SIZE, "decord", Pool(0))
    with pytest.raises(CacheError, match="frames of 16x16, asked for are 8x8"):
        FrameCache(tmp_path, (8, 8))
    with pytest.raises(CacheError, match="frames of 16x16, asked for are 8x8"):
        fill(sources, tmp_path, (8, 8), "decord", Pool(0))
    with pytest.raises(CacheError, match="filled by ffmpeg"):
        FrameCache(tmp_path, SIZE, "dali")
    FrameCache(tmp_path, SIZE, "torchcodec")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(CacheError, match=r"meta\.json: cannot be read"):
        FrameCache(tmp_path, SIZE)


def test_a_full_disk_is_told_before_anything_is_decoded(sources: list[Source], tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    monkeypatch.setattr(decode_module, "open_video", None)
    with pytest.raises(CacheError, match=r"are needed, 0\.00 GB are free"):
        fill(sources, tmp_path, SIZE, "auto", Pool(0))


def test_two_processes_do_not_fill_one_cache(sources: list[Source], tmp_path: Path) -> None:
    fill(sources[:1], tmp_path, SIZE, "auto", Pool(0))
    with cache_module._locked(tmp_path), pytest.raises(CacheError, match="another process"):
        fill(sources, tmp_path, SIZE, "auto", Pool(0))


def test_bad_videos_of_a_cache_stop_or_are_listed(copied: list[Source], tmp_path: Path) -> None:
    copied[3].path.write_bytes(b"nonsense" * 100)
    folder = tmp_path / "cache"
    with pytest.raises(VideoError, match="video_00003"):
        fill(copied, folder, SIZE, "auto", Pool(0))
    done = fill(copied, folder, SIZE, "auto", Pool(0), on_bad="skip")
    assert (done.written, done.kept, list(done.bad)) == (2, 3, [copied[3].name])
    lines = (folder / "index.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["video"] for line in lines}) == 5


@pytest.mark.parametrize(
    ("size", "batch"),
    # A leak of one clip each would be 25 MB; then of clips of 4.6 kB, 9 MB.
    [pytest.param((96, 96), 4, id="few"), pytest.param(SIZE, 50, id="many", marks=pytest.mark.slow)],
)
def test_memory_stays_flat_over_many_clips(
    sources: list[Source], tmp_path: Path, size: tuple[int, int], batch: int
) -> None:
    """Clips that are decoded, and as many from a cache; the first batches may take what they like."""
    fill(sources, tmp_path, size, "auto", Pool(0))
    for loaded in (videos(sources, size=size), videos(sources, size=size, cache=FrameCache(tmp_path, size))):
        loader = ClipLoader(loaded, batch)
        used = []
        for batches in (11, 39):
            for _ in range(batches):
                next(loader)
            used.append(resident())  # seldom: it collects garbage among all that torch and pytest hold
        loader.close()
        assert used[1] - used[0] < 6e6, used


@pytest.mark.slow
def test_memory_of_the_processes_stays_flat(sources: list[Source], pool: Pool) -> None:
    """Two thousand clips through two processes: theirs and this one's."""
    loader = ClipLoader(videos(sources, pool=pool), 50)
    used = []
    for batches in (11, 39):
        for _ in range(batches):
            next(loader)
        used.append([resident(), *map(resident, children())])
    loader.close()
    for before, after in zip(*used, strict=True):
        assert after - before < 6e6, used


def children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()
        if int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return sorted(found)


def resident(process: int | str = "self") -> int:
    gc.collect()
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.cuda
def test_batches_arrive_on_the_gpu(sources: list[Source], tmp_path: Path, monkeypatch) -> None:
    """Decoded on the CPU, from a cache that has moved to the GPU, from one too large for that: the same frames."""
    right = videos(sources).batch(0, 12)
    fill(sources, tmp_path, SIZE, "decord", Pool(0))
    resident = videos(sources, device="cuda", backend="decord", cache=FrameCache(tmp_path, SIZE, device="cuda"))
    assert resident._cache._data.is_cuda
    monkeypatch.setattr(cache_module, "ON_DEVICE", 0.0)
    mapped = videos(sources, device="cuda", backend="decord", cache=FrameCache(tmp_path, SIZE, device="cuda"))
    assert not mapped._cache._data.is_cuda
    for loaded in (videos(sources, device="cuda", backend="decord"), resident, mapped):
        batch = loaded.batch(0, 12)
        assert batch.frames.is_cuda
        assert batch.frames.cpu().equal(right.frames)
        assert batch.target.cpu().equal(right.target)
        assert next(loaded.batches(1, 12)).frames.cpu().equal(videos(sources).batch(12, 12).frames)


@pytest.mark.cuda
def test_a_dali_cache_is_bit_identical_to_dali_batches(sources: list[Source], tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    streaming = videos(sources, device="cuda", backend="dali")
    fill(sources, tmp_path, SIZE, "dali", Pool(0), device="cuda")
    cached = videos(sources, device="cuda", backend="dali", cache=FrameCache(tmp_path, SIZE, "dali", "cuda"))
    assert all(cached._lines)
    assert cached.batch(0, 12).frames.equal(streaming.batch(0, 12).frames)
