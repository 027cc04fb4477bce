"""One `open_video` for every decoder: decord, torchcodec and PyAV on the CPU, DALI on the GPU.

Frame i is the i-th displayed frame, turned as it is shown. The CPU decoders return the same frames, bit for bit (the
exceptions are in docs/guides/own-videos.md), because a video is only given to a decoder that reads it correctly:
- decord does not get what `REFUSED` lists; torchcodec reads these;
- PyAV, "av", reads what both would read wrong (`Facts.alone`), from the first frame on.

file.py reads what a file says about itself, such as sizes, edit lists and rotations. That comes first: no process loads
both decord and torchcodec, which would end it at some videos (see `workers`). What the other one must read is read in
another process (`IsolatedVideo`).

"auto" on a CPU means decord, torchcodec for what decord does not get, and PyAV for the rest; where torchcodec is loaded
already, it reads all that it can. With one thread, on CLEVRER's files (480x320 H.264 with one keyframe), opening one
and reading 16 frames from a random place took decord and torchcodec 73 and 77 ms, and all 128 frames 137 and 161 ms. If
decord cannot decode frames, "auto" asks torchcodec for them. "auto" on a CUDA device means DALI if it is installed,
else a CPU decoder.
"""

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast.data.files import load, reason
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.dali import DaliVideo, encoded
from vjvcr_fast.data.video.ffmpeg import AvVideo
from vjvcr_fast.data.video.file import UPRIGHT, Facts, UnservedError, Video, VideoError, examine, resize

__all__ = ["BACKENDS", "Video", "VideoError", "explain", "open_video", "resize"]

BACKENDS = ("decord", "torchcodec", "av", "dali")
AUTO = {"cpu": ("decord", "torchcodec", "av"), "cuda": ("dali", "decord", "torchcodec", "av")}
NARROW = 256  # decord2 3.4 fails at some widths: of the multiples of 4 from 16 to 796, at 16, 24, 32, 48, 96 and 144
DISTRIBUTIONS = {
    "decord": ("decord2", "decord"),
    "torchcodec": ("torchcodec",),
    "av": ("av",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
}
EXTRAS = {"decord": "video", "torchcodec": "torchcodec", "av": "video", "dali": "dali"}
TIMEOUT = 60.0  # seconds for a call to a stand-in
KEPT = 4  # videos that such a process keeps open
_LOADING = threading.Lock()  # held while it is decided which decoder this process loads
_LIMITED: weakref.WeakValueDictionary[Any, workers.Pool] = weakref.WeakValueDictionary()  # end with their videos
_STAND_INS: dict[Any, workers.Pool] = {}  # for a decoder that this process must not load; stay, as a loaded one does
_NUMBERS = itertools.count()


class Refused(NamedTuple):
    """What decord does not get. kind: of videos. why: what decord does with them. shows: whether a file says that it is
    of this kind; None: it shows when decord opens the file."""

    kind: str
    why: str
    shows: Callable[[Facts], bool] | None


REFUSED = (
    Refused("HEVC", "stops at some files after a seek, returns other frames of others", lambda f: f.codec == "hevc"),
    Refused("AV1", "decord 0.6 cannot decode it", lambda f: f.codec == "av1"),
    Refused(
        "codecs other than H.264, Motion-JPEG, MPEG-4, VP8 and VP9",
        "nothing has shown that decord's frames are right",
        lambda f: f.codec not in ("h264", "mjpeg", "mpeg4", "vp8", "vp9"),
    ),
    Refused("open groups of pictures", "after a seek, returns other frames or stops", lambda f: f.open_gops),
    Refused(
        f"some widths below {NARROW} pixels",
        "decord2 3.4 cannot convert frames that are 16, 24, 32, 48, 96 or 144 wide",
        None,
    ),
    Refused("files of which it counts more or fewer frames", "frame i would be another one", None),
    Refused("files that it cannot open", "torchcodec may", None),
)


class DecordVideo(Video):
    """decord2, or the older decord: whichever is installed."""

    backend = "decord"

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self._decord = load(workers.MODULES["decord"], EXTRAS["decord"])
        super().__init__(path, facts, device, threads)
        self._decord.logging.set_level(self._decord.logging.QUIET)
        try:
            # fault_tol: decord must not replace any frame that it cannot decode by another one.
            self._reader = self._decord.VideoReader(str(path), num_threads=threads, fault_tol=1e-9)
        except Exception as error:  # decord's own among them
            raise UnservedError(f"{path}: decord cannot open it ({reason(error)})") from error
        _check_count(self, len(self._reader))
        if min(facts.height, facts.width) < NARROW:
            try:
                self._read([0])
            except Exception as error:  # other errors are reported when frames are read
                if "from_size == to_size" in str(error):
                    raise UnservedError(f"{path}: decord cannot read frames {facts.width} wide") from error

    def _read(self, indices: list[int]) -> Tensor:
        with self._decord.bridge.use_torch():  # tensors that share decord's memory
            return self._reader.get_batch(indices)


class TorchcodecVideo(Video):
    """torchcodec, which uses the system's FFmpeg."""

    backend = "torchcodec"

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self._decoders = load(workers.MODULES["torchcodec"], EXTRAS["torchcodec"])
        super().__init__(path, facts, device, threads)
        self._decoder = self._opened()
        _check_count(self, len(self._decoder))

    def _opened(self) -> Any:
        settings = {"dimension_order": "NHWC", "device": "cpu", "seek_mode": "exact"}
        try:
            number, threads = self._facts.stream, self.threads
            return self._decoders.VideoDecoder(
                str(self.path), stream_index=number, num_ffmpeg_threads=threads, **settings
            )
        except (RuntimeError, ValueError) as error:
            raise UnservedError(f"{self.path}: torchcodec cannot open it ({reason(error)})") from error

    def _read(self, indices: list[int]) -> Tensor:
        if self._facts.codec == "hevc":
            # Opened again: after the last frame, some versions return an old one (meta-pytorch/torchcodec issue 1339).
            self._decoder = self._opened()
        first, end = indices[0], indices[-1] + 1
        try:
            if end - first == len(indices):
                return self._decoder.get_frames_in_range(first, end).data
            return self._decoder.get_frames_at(indices).data
        except RuntimeError as error:
            if "pre-allocated tensor of shape" in str(error) and not self._facts.mirrored:  # frames have several sizes
                return AvVideo(self.path, self._facts, self.device, self.threads)._read(indices)
            if not self._facts.open_gops:
                raise
            # Starting at the last keyframe, torchcodec may miss the end of the video; from frame 0 it does not.
            return self._opened().get_frames_in_range(0, end).data[indices]


def _check_count(video: Video, count: int) -> None:
    if count != video.frame_count:
        found = f"{video.backend} finds {count} frames, the file has {video.frame_count}"
        raise UnservedError(f"{video.path}: {found}")


class IsolatedVideo(Video):
    """A video that another process reads, within a time limit for each call; None: that of a stand-in."""

    def __init__(
        self,
        path: Path,
        backend: str,
        device: torch.device,
        threads: int,
        stream: int | None,
        timeout: float | None,
    ) -> None:
        self.path, self._timeout, self._options = path, timeout, (backend, device, threads, stream, next(_NUMBERS))
        self._pool, self._process = _pool(timeout, backend), os.getpid()
        vars(self).update(self._ask(_about))
        self.device = device

    def frames(self, indices: Iterable[int] | Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        wanted = self._checked(indices)
        return torch.from_numpy(self._ask(_frames, wanted, size)).permute(0, 3, 1, 2).to(self.device)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._process != os.getpid():  # forked, and the pool's threads were not
            self._pool, self._process = _pool(self._timeout, self._options[0]), os.getpid()
        return self._pool.submit(self.path, function, self._options, *arguments).result()


def _pool(timeout: float | None, backend: str) -> workers.Pool:
    """One process, for all videos of this process with that limit."""
    name, pools = (os.getpid(), timeout, backend == "torchcodec"), _STAND_INS if timeout is None else _LIMITED
    with _LOADING:
        pool = pools.get(name)
        if pool is None:
            pools[name] = pool = workers.Pool(1, TIMEOUT if timeout is None else timeout, backend=backend)
    return pool


@functools.lru_cache(KEPT)
def _kept(path: Path, backend: str, device: torch.device, threads: int, stream: int | None, number: int) -> Video:
    """In a process that reads for others: a video, opened. number: of the IsolatedVideo that asks for it."""
    video = open_video(path, backend, device, threads, stream=stream)
    if video.backend != "dali":
        video.device = torch.device("cpu")  # from where the frames are sent
    return video


def _about(path: Path, options: tuple[Any, ...]) -> dict[str, Any]:
    video = _kept(path, *options)
    public = {name: value for name, value in vars(video).items() if not name.startswith("_") and name != "otherwise"}
    return {**public, "backend": video.backend}


def _frames(path: Path, options: tuple[Any, ...], indices: list[int], size: Any) -> Any:
    return _kept(path, *options).frames(indices, size).permute(0, 2, 3, 1).cpu().contiguous().numpy()


OPENERS: dict[str, Any] = {"decord": DecordVideo, "torchcodec": TorchcodecVideo, "av": AvVideo, "dali": DaliVideo}


def open_video(
    path: str | Path,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    threads: int = 1,
    timeout: float | None = None,
    stream: int | None = None,
) -> Video:
    """Opens a video file. `Video.frames` then reads its frames.

    backend: "decord", "torchcodec", "av", "dali" or "auto". device: "cpu" or a CUDA device, where frames are delivered;
    the CPU decoders decode on the CPU and copy them there. threads: of the decoder. stream: which of the file's video
    streams, counted from 0; None: the one that FFmpeg takes, usually the default one or the largest.

    timeout: None reads the file in this process, and a decoder may take as long as it likes, also for ever. Seconds:
    another process reads it, and is killed if opening or one call of `frames` takes longer. It takes about a second to
    start, and ends when no video is left that it reads: keep one open while you open the next. A call then takes about
    2 ms more, and 3 to 6 ms for each MB of frames.

    decord and torchcodec in one process may end it. Where this process has loaded one of them, a video that the other
    must read is read in a process that stands in for it. That one takes two seconds to start, ends with this process,
    and has a limit of 60 s. So do not import decord yourself where torchcodec is loaded.

    Raises VideoError, naming the file and the reason, if the file is not a complete video, the backend cannot decode it
    or the time is over; ImportError, naming the extra, if the backend or av is missing, or pebble where another process
    is needed; ValueError for other backends, devices, threads or times.
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    path, place = Path(path), _device(device)
    if timeout is not None:
        return IsolatedVideo(path, backend, place, threads, stream, timeout)
    facts, refusals = examine(path, stream), dict(workers.tried() or {})
    *others, last = (backend,) if backend != "auto" else _order(place)
    for name in others:
        if name in refusals:
            continue
        try:
            video = _opened(name, path, facts, place, threads, refusals)
            if name == "decord" and "torchcodec" not in refusals:
                # decord decodes ahead, and may fail at damage that lies behind the frames asked for.
                video.otherwise = partial(_opened, "torchcodec", path, facts, place, threads, refusals)
            return video
        except (ImportError, UnservedError) as error:
            refusals[name] = error
    return _opened(last, path, facts, place, threads, refusals)


def _order(place: torch.device) -> list[str]:
    """The decoders that "auto" tries, one after the other."""
    served = workers.serves() or ("torchcodec" if _is_loaded("torchcodec") and not _is_loaded("decord") else "decord")
    return sorted(AUTO[place.type], key=lambda name: (name != "dali", name != served))


def _opened(
    name: str, path: Path, facts: Facts, place: torch.device, threads: int, refusals: dict[str, Exception]
) -> Video:
    """Opens a video with a decoder, here or, if this process must not load it, in another one."""
    _check_facts(path, name, facts)
    if name in workers.MODULES:
        with _LOADING:
            here = _may_load(name)
            if here:
                _load(name)
        if not here:
            if importlib.util.find_spec(name) is None:
                load(name, EXTRAS[name])  # says what to install
            if workers.tried() is not None:
                raise workers.Elsewhere(name, refusals)
            return IsolatedVideo(path, name, place, threads, facts.asked, None)
    return OPENERS[name](path, facts, place, threads)


def _check_facts(path: Path, backend: str, facts: Facts) -> None:
    """Raises UnservedError if the backend would not read a video right, because of what its file says about it."""
    wrong, others = "", "torchcodec and av do"
    if facts.alone and backend != "av":
        wrong, others = facts.alone, "av does"
    elif facts.asked is not None and backend in ("decord", "dali"):
        wrong = "one of several video streams"
    elif backend == "decord":
        wrong = next((about.kind for about in REFUSED if about.shows and about.shows(facts)), "")
    elif backend == "dali" and facts.matrix != UPRIGHT:
        wrong, others = "turned to be shown", "decord, torchcodec and av do"
    if wrong:
        raise UnservedError(f"{path}: {backend} does not read this kind of video right ({wrong}); {others}")


def for_dali(path: Path) -> Any:
    """The bytes of a file, for `DaliDecoder.read`. Raises VideoError if it is no video that DALI reads right."""
    _check_facts(path, "dali", examine(path))
    return encoded(path)


def _load(name: str) -> None:
    """Loads a decoder. decord asks for its libraries to be shown to the whole process, where PyAV's and torchcodec's
    FFmpeg would call decord's libdav1d, of another version, instead of their own. So that is not done."""
    asked = ctypes.RTLD_GLOBAL
    try:
        ctypes.RTLD_GLOBAL = ctypes.RTLD_LOCAL  # type: ignore[misc]
        load(workers.MODULES[name], EXTRAS[name])
    finally:
        ctypes.RTLD_GLOBAL = asked  # type: ignore[misc]


def _may_load(name: str) -> bool:
    """Whether a decoder is safe in this process. decord does torchcodec harm, not the other way round."""
    if workers.serves() is not None:
        return workers.serves() == name
    return not _is_loaded("decord") if name == "torchcodec" else _is_loaded("decord") or not _is_loaded("torchcodec")


def _is_loaded(name: str) -> bool:
    return sys.modules.get(name) is not None


def decode(path: Path, backend: str, frames: range, size: tuple[int, int]) -> Any:
    """Decodes frames of a file, resized to (height, width) `size`.

    Returns a numpy array (T, 3, H, W) uint8, which is cheaper to send between processes than a tensor.
    """
    return open_video(path, backend).frames(frames, size).contiguous().numpy()


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in AUTO:
        raise ValueError(f"device must be 'cpu' or a CUDA device, got {device!r}")
    if place.type == "cuda" and not (place.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} CUDA devices here, got {device!r}")
    return place


def resolve(backend: str, device: torch.device) -> str:
    """The backend for batches on `device`: "auto" becomes "dali" on a CUDA device if DALI is installed."""
    return "dali" if backend == "auto" and device.type == "cuda" and _version(*DISTRIBUTIONS["dali"]) else backend


def explain() -> dict[str, str]:
    """One line for each backend: its version and when "auto" chooses it, or what to install. Imports none of them."""
    versions = {name: _version(*distributions) for name, distributions in DISTRIBUTIONS.items()}
    first = {device: next((name for name in names if versions[name]), None) for device, names in AUTO.items()}
    lines = {}
    for name, version in versions.items():
        if version is None:
            lines[name] = f"not installed: pip install 'vjvcr_fast[{EXTRAS[name]}]'"
        elif _version("av") is None:
            lines[name] = f"{version}, but av is not installed: pip install 'vjvcr_fast[video]'"
        else:
            roles = [f"auto on {device}" for device in AUTO if first[device] == name]
            if not roles and name != "dali":
                roles = [f"auto for what {'decord does' if name == 'torchcodec' else 'the others do'} not read right"]
            lines[name] = ": ".join([version, ", ".join(roles) or "where asked for"])
    return lines


def _version(*distributions: str) -> str | None:
    """The name and version of the first distribution that is installed."""
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return None
