"""What all simulated data sets share: claiming a folder, making videos in parallel, writing them, drawing them.

Video i only depends on (seed, i) and, in CLEVRER's format, its split. So the number of processes, an interruption and
the videos that are already there change nothing. A video's annotation is written last and atomically: a video with an
annotation is finished, and all others are made again.
"""

import contextlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from vjvcr_fast.data.files import ahead, cores, load, progress, replace, write_atomic
from vjvcr_fast.data.hashing import key
from vjvcr_fast.data.video.scan import SIMULATED
from vjvcr_fast.data.video.workers import Pool, died

Item = TypeVar("Item")


class SimulationError(RuntimeError):
    """Nothing can draw here, or a process that made a video died."""


class Format(NamedTuple):
    """A data set in whose format videos are made.

    title: its name. generator: a number that changes whenever the same seed would give other videos. most: videos.
    fewest: frames of a video. foreign: patterns of videos that are not ours without SIMULATED. leftovers: patterns of
    the files that a killed run may leave. bytes_per_pixel: of a video, twice what was measured. bytes_per_frame: of an
    annotation.
    """

    title: str
    generator: int
    most: int
    fewest: int
    foreign: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes_per_pixel: float
    bytes_per_frame: float


class Settings(NamedTuple):
    """What videos depend on. size: (width, height) in pixels. frames: of a scene. shadows: pictures without them are
    drawn faster. stride: a video has every so many frames of its scene."""

    seed: int
    size: tuple[int, int]
    frames: int
    shadows: bool
    stride: int = 1

    def drawn(self, *video: str | int) -> range:
        """The frames of a video's scene that are drawn. Their number is the same for all videos, the first one is not:
        it is drawn from the seed, so that many videos together show all phases of the stride."""
        first = key(self.seed, "phase", *video) % self.stride
        return range(first, first + self.frames // self.stride * self.stride, self.stride)


def check(form: Format, videos: int, processes: int, settings: Settings) -> None:
    """Raises ValueError for arguments that are out of range."""
    size = settings.size
    if not 1 <= videos <= form.most:
        raise ValueError(f"videos must be between 1 and {form.most}, got {videos}")
    if processes < 0:
        raise ValueError(f"processes must be at least 0 (0: one a core), got {processes}")
    if len(size) != 2 or not all(side >= 16 and side % 2 == 0 for side in size):
        raise ValueError(f"size must be (width, height), both even and at least 16, got {size}")
    if settings.frames < form.fewest:
        raise ValueError(f"frames must be at least {form.fewest}, got {settings.frames}")
    if not 1 <= settings.stride <= settings.frames:
        raise ValueError(f"stride must be between 1 and the {settings.frames} frames of a scene, got {settings.stride}")


def prepare(
    form: Format, out: Path, settings: Settings, items: Iterable[Item], is_made: Callable[[Item], bool]
) -> list[Item]:
    """Claims the folder `out`, removes what a killed run has left, and returns the items that are still to be made.

    Raises ValueError if `out` holds other videos, OSError if its disk is too small, ImportError if av, pebble or mujoco
    is missing.
    """
    load("av", "simulate")
    load("pebble", "simulate")
    if importlib.util.find_spec("mujoco") is None:  # not imported here, because that needs MUJOCO_GL
        raise ImportError("mujoco is not installed: pip install 'vjvcr_fast[simulate]'")
    _claim(form, out, settings)
    for pattern in (*form.leftovers, f".{SIMULATED}.*"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)
    missing = [item for item in items if not is_made(item)]
    pixels = settings.size[0] * settings.size[1]
    frames = len(missing) * (settings.frames // settings.stride)
    needed = frames * (pixels * form.bytes_per_pixel + form.bytes_per_frame)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise OSError(f"{out}: not enough space, about {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free")
    return missing


def run(task: Callable[[Item], None], missing: Sequence[Item], total: int, processes: int) -> None:
    """Makes the missing ones of `total` videos with task(item), in `processes` processes (0: one for each core)."""
    if not missing:
        return
    environment = {"MUJOCO_GL": gl_backend(), "LP_NUM_THREADS": "0"}  # OSMesa's own threads would share our cores
    done, processes = total - len(missing), min(processes or cores(), len(missing))
    with (
        progress(total=total, initial=done, desc="simulate", unit="video", disable=None) as bar,
        contextlib.closing(in_parallel(task, missing, processes, environment)) as finished,
    ):
        for _ in finished:
            bar.update()


def _claim(form: Format, out: Path, settings: Settings) -> None:
    """Marks a folder as simulated with these settings. Raises ValueError if it holds other videos."""
    about = out / SIMULATED
    wanted = settings._asdict() | {"size": list(settings.size), "generator": form.generator}
    if not about.exists():
        for path in (path for pattern in form.foreign for path in out.glob(pattern)):
            raise ValueError(f"{out} holds {path.name} but no {SIMULATED}: not simulated here, choose another folder")
        note = f"Simulated scenes made by vjvcr_fast in {form.title}'s format."
        note += f" They are not {form.title}, and not part of it."
        write_atomic(about, json.dumps({"note": note, **wanted}, indent=1) + "\n")
        return
    try:
        found = {"stride": 1, **json.loads(about.read_text())}  # earlier versions drew all frames
    except (ValueError, TypeError) as error:  # TypeError: it is no JSON object
        raise ValueError(f"{about} cannot be read ({error}): choose another folder") from error
    other = [name for name, value in wanted.items() if found.get(name) != value]
    if other:
        differing = "; ".join(f"{name} {found.get(name)}, not {wanted[name]}" for name in other)
        raise ValueError(f"{out} holds simulated videos of {differing}: choose another folder or the same settings")


class Encoding(NamedTuple):
    """How videos are stored, in the words of FFmpeg."""

    container: str
    codec: str
    fps: int | Fraction
    pixels: str
    options: dict[str, str]

    def every(self, stride: int) -> "Encoding":
        """The same for videos that have every so many frames only. Played, they last as long."""
        return self._replace(fps=Fraction(self.fps) / stride)


def write_video(path: Path, pictures: Iterable[Any], size: tuple[int, int], encoding: Encoding) -> None:
    """Writes pictures, (H, W, 3) uint8, as a video of (width, height) `size`. The file appears once it is complete."""
    av = load("av", "simulate")

    def write(file: BinaryIO) -> None:
        with av.open(file, "w", format=encoding.container) as container:
            stream = container.add_stream(encoding.codec, rate=encoding.fps, options=encoding.options)
            stream.width, stream.height, stream.pix_fmt = *size, encoding.pixels
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))

    replace(path, write)


def gl_backend() -> str:
    """The value of MUJOCO_GL to draw with: the caller's if set, else EGL if there is a GPU, else OSMesa.

    Tries each in a process of its own. Raises SimulationError if none can draw.
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
    raise SimulationError(f"MuJoCo cannot draw here: install Debian's libosmesa6 ({'; '.join(reasons)})")


def in_parallel(
    task: Callable[[Item], None], items: Iterable[Item], processes: int, environment: dict[str, str]
) -> Generator[Item, None, None]:
    """Runs task(item) for every item in `processes` new processes, and yields each item when it is done, in order.

    task, items: must be picklable. environment: variables to set in each process before it does anything.

    Raises the error of a task; SimulationError if a process dies. When the iterator is closed or fails, the processes
    are killed. If this process is killed, each of them ends after its item.
    """
    with Pool(processes, math.inf, environment) as pool:
        for item, future in ahead(((item, pool.schedule(task, item)) for item in items), 2 * processes):
            try:
                future.result()
            except Exception as error:
                if died(error):
                    status = error.exitcode  # type: ignore[attr-defined]
                    raise SimulationError(f"the process that made {item} died (exit status {status})") from None
                raise error from RuntimeError(f"while making {item}:\n{error.__cause__}")
            yield item
