"""Simulated videos in CLEVRER's own layout and format, so that what runs on CLEVRER runs on data anyone can make.

Video i of a split is a pure function of (seed, split, i), so the number of processes, an interrupted run and the
videos already there change nothing. Each is one H.264 file with one keyframe; its annotation is written after it, and
whole or not at all: a video with an annotation is a finished one, and all others are made again.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, TypeVar

from vjvcr_fast.data.files import cores, progress, replace, write_atomic
from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.simulated.scenes import FRAME_SECONDS, Film, World, annotate, sample_clevrer

Item = TypeVar("Item")

GENERATOR = 1  # changes whenever the same seed would give other videos
NOTE = "Simulated scenes made by vjvcr_fast in CLEVRER's format. They are not CLEVRER, and not part of it."
ABOUT = "simulated.json"
FILES = ("video_*", "annotation_*")
FPS = 25
VALIDATION_START = 10_000
MAX_VIDEOS = 15_000  # CLEVRER's train and validation videos; beyond, train would run into validation's numbers
FOLDER = 1000  # videos a folder
BYTES_PER_PIXEL = 0.01  # of a video, twice what was measured
BYTES_PER_FRAME = 1500  # of an annotation


def simulate_clevrer(
    out: Path,
    videos: int,
    *,
    seed: int = 0,
    processes: int = 0,
    size: tuple[int, int] = (480, 320),
    frames: int = 128,
    shadows: bool = True,
) -> None:
    """Writes `videos` simulated videos with annotations under `out`, in CLEVRER's layout; those there are kept.

    videos: 1 to 15,000 in all, a third of them (at least 1 of 2) for validation, which CLEVRER counts from 10000.
    Asking for more later only adds files. processes: 0 is one a core. size: (width, height) in pixels, both even,
    the width 1.2 to 2 times the height. shadows: without them pictures are drawn about three times as fast.

    Raises ValueError for arguments out of range, and where `out` holds other videos (another seed, size, number of
    frames, or real ones); ImportError where mujoco, av or tqdm are missing; RuntimeError where nothing can draw without
    a screen; OSError where the disk is too small.
    """
    _check(videos, processes, size, frames)
    import_av()
    if importlib.util.find_spec("mujoco") is None:
        raise ImportError("mujoco is not installed: pip install 'vjvcr_fast[simulate]'")
    out = Path(out)
    settings = {"seed": seed, "size": list(size), "frames": frames, "shadows": shadows, "generator": GENERATOR}
    claim(out, settings)
    for pattern in ("video_*/*/.video_*", "annotation_*/*/.annotation_*", f".{ABOUT}.*"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)
    missing = [item for item in split(videos) if not annotation_path(out, *item).is_file()]
    if not missing:
        return
    require_space(out, len(missing) * frames * (size[0] * size[1] * BYTES_PER_PIXEL + BYTES_PER_FRAME))
    task = functools.partial(_make_video, out, seed, size, frames, shadows)
    environment = {"MUJOCO_GL": gl_backend(), "LP_NUM_THREADS": "0"}  # OSMesa's own threads would share our cores
    with (
        progress(total=videos, initial=videos - len(missing), desc="simulate", unit="video", disable=None) as bar,
        contextlib.closing(in_parallel(task, missing, processes or cores(), environment)) as finished,
    ):
        for _ in finished:
            bar.update()


def _check(videos: int, processes: int, size: tuple[int, int], frames: int) -> None:
    if not 1 <= videos <= MAX_VIDEOS:
        raise ValueError(f"videos must be between 1 and {MAX_VIDEOS}, got {videos}")
    if processes < 0:
        raise ValueError(f"processes must be at least 0 (0: one a core), got {processes}")
    if len(size) != 2 or not all(side >= 16 and side % 2 == 0 for side in size):
        raise ValueError(f"size must be (width, height), both even and at least 16, got {size}")
    if not 1.2 <= size[0] / size[1] <= 2:  # else the camera sees the horizon, or hardly the scene
        raise ValueError(f"size must be (width, height) with width / height between 1.2 and 2, got {size}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")


def split(videos: int) -> list[tuple[str, int]]:
    """(split, number) of each of `videos` videos, those of fewer being among those of more."""
    validation = max(1, round(videos / 3)) if videos >= 2 else 0
    train = [("train", i) for i in range(videos - validation)]
    return train + [("validation", VALIDATION_START + i) for i in range(validation)]


def video_path(out: Path, name: str, number: int) -> Path:
    return _path(out, "video", name, number, "mp4")


def annotation_path(out: Path, name: str, number: int) -> Path:
    return _path(out, "annotation", name, number, "json")


def _path(out: Path, kind: str, name: str, number: int, suffix: str) -> Path:
    first = number // FOLDER * FOLDER
    return out / f"{kind}_{name}" / f"{kind}_{first:05d}-{first + FOLDER:05d}" / f"{kind}_{number:05d}.{suffix}"


def _make_video(out: Path, seed: int, size: tuple[int, int], frames: int, shadows: bool, item: tuple[str, int]) -> None:
    name, number = item
    aspect = size[0] / size[1]
    random = Random(key(seed, "clevrer", name, number) % 2**64)
    world = World(sample_clevrer(random, aspect=aspect, seconds=frames * FRAME_SECONDS), size=size)
    trajectory: list[dict[str, Any]] = []

    def pictures() -> Iterator[Any]:
        with Film(world, size, shadows=shadows) as film:
            for entry, picture in annotate(world, frames, film=film):
                trajectory.append(entry)
                yield picture

    video = video_path(out, name, number)
    write_mp4(video, pictures(), size)
    annotation = {
        "scene_index": number,
        "video_filename": video.name,
        "object_property": world.properties(),
        "motion_trajectory": trajectory,
        "collision": world.collisions,
    }
    write_atomic(annotation_path(out, name, number), json.dumps(annotation))


# -- The folder -----------------------------------------------------------------------------------------------------


def claim(out: Path, settings: dict[str, Any], *, note: str = NOTE, files: Sequence[str] = FILES) -> None:
    """Marks a folder as simulated with these settings, or raises ValueError where it holds anything else: other
    settings, or `files` (patterns) of another origin."""
    about = out / ABOUT
    if not about.exists():
        foreign = [path for pattern in files for path in out.glob(pattern)]
        if foreign:
            raise ValueError(f"{out} holds {foreign[0].name} but no {ABOUT}: not simulated here, choose another folder")
        write_atomic(about, json.dumps({"note": note, **settings}, indent=1) + "\n")
        return
    try:
        found = json.loads(about.read_text())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{about} cannot be read ({error}): choose another folder") from error
    other = [name for name, value in settings.items() if found.get(name) != value]
    if other:
        differing = "; ".join(f"{name} {found.get(name)}, not {settings[name]}" for name in other)
        raise ValueError(f"{out} holds simulated videos of {differing}: choose another folder or the same settings")


def require_space(out: Path, needed: float) -> None:
    """Raises OSError unless `needed` bytes are free."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(f"{out}: not enough space, about {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")


# -- Video files ----------------------------------------------------------------------------------------------------


def write_mp4(path: Path, pictures: Iterable[Any], size: tuple[int, int], *, fps: int = FPS) -> None:
    """Pictures (H, W, 3) uint8 as an H.264 video with one keyframe; the file appears when it is whole."""
    av = import_av()

    def write(file: BinaryIO) -> None:
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            # One thread, since the bits depend on their number. No B-frames, as in CLEVRER.
            single = "keyint=infinite:scenecut=0:bframes=0:threads=1"
            stream.options = {"preset": "veryfast", "crf": "14", "x264-params": single}
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))

    replace(path, write)


def import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ImportError("av is not installed: pip install 'vjvcr_fast[simulate]'") from None
    return av


# -- Processes ------------------------------------------------------------------------------------------------------


def gl_backend() -> str:
    """The value of MUJOCO_GL to draw with: the caller's if set, else EGL if there is a GPU, else OSMesa.

    Each is tried in a process of its own. Raises RuntimeError where none draws.
    """
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) or any(Path("/dev").glob("dri/renderD*"))
    given = os.environ.get("MUJOCO_GL")
    candidates = [given] if given else ["egl", "osmesa"] if gpu else ["osmesa"]
    probe = "import mujoco; mujoco.GLContext(16, 16).make_current()"
    reasons = []
    for name in candidates:
        done = subprocess.run(
            [sys.executable, "-c", probe], env={**os.environ, "MUJOCO_GL": name}, capture_output=True, text=True
        )
        if done.returncode == 0:
            return name
        reasons.append(f"MUJOCO_GL={name}: {(done.stderr.strip().splitlines() or ['it died'])[-1]}")
    raise RuntimeError(f"MuJoCo cannot draw here: install Debian's libosmesa6 ({'; '.join(reasons)})")


def in_parallel(
    task: Callable[[Item], None], items: Iterable[Item], processes: int, environment: dict[str, str] | None = None
) -> Generator[Item, None, None]:
    """Runs task(item) for every item in `processes` fresh processes; yields the items in the order they finish.

    task, items: picklable. environment: set in each process before it does anything. An error of a task is raised here,
    RuntimeError where a process dies. When the iterator is closed, or fails, the processes are killed; when this
    process is, each of them ends after its item.
    """
    todo = list(reversed(list(items)))
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, Item] = {}
    try:
        for _ in range(min(processes, len(todo))):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, task, environment or {}), daemon=True)
            worker.start()
            theirs.close()
            workers[ours] = worker
            busy[ours] = todo.pop()
            ours.send(busy[ours])
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                item = busy.pop(connection)
                _receive(connection, workers[connection], item)
                if todo:
                    busy[connection] = todo.pop()
                    connection.send(busy[connection])
                yield item
    finally:
        for worker in workers.values():
            worker.kill()
        for connection, worker in workers.items():
            worker.join()
            connection.close()


def _receive(connection: Connection, worker: Any, item: object) -> None:
    try:
        failure = connection.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        raise RuntimeError(f"the process that made {item} died (exit status {worker.exitcode})") from None
    if failure:
        error, trace = failure
        raise error from RuntimeError(f"while making {item}:\n{trace}")


def _work(connection: Connection, task: Callable[[Any], None], environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    os.environ.update(environment)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            item = connection.recv()
            try:
                task(item)
                connection.send(None)
            except Exception as error:
                connection.send((error, traceback.format_exc()))
