"""One `open_video` for every decoder: decord and torchcodec on the CPU, DALI on the GPU.

Frame i is the i-th displayed frame. Both CPU decoders return the same frames, bit for bit, unless the file asks for a
rotation (see `file`), because a video is only given to a decoder that reads it correctly:
- decord does not get HEVC and AV1 (it stops on many files) or open groups of pictures (after a seek it returns other
  frames); torchcodec reads these;
- H.264 with gradual refresh, and edit lists that start between keyframes, are refused (see `file`), because both
  decoders would return other frames without saying so.

file.py reads what a file says about itself, such as sizes, edit lists and (one day) a rotation.

"auto" on a CPU means decord, and torchcodec for what decord does not get. With one thread, on CLEVRER's files (480x320
H.264 with one keyframe), opening one and reading 16 frames from a random place took 73 and 77 ms, and all 128 frames
137 and 161 ms. If decord cannot decode frames, "auto" asks torchcodec for them. "auto" on a CUDA device means DALI if
it is installed, else a CPU decoder.
"""

import contextlib
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import load, reason
from vjvcr_fast.data.video.dali import DaliVideo
from vjvcr_fast.data.video.file import Facts, UnservedError, Video, VideoError, examine, resize

__all__ = ["BACKENDS", "Video", "VideoError", "explain", "open_video", "resize"]

BACKENDS = ("decord", "torchcodec", "dali")
AUTO = {"cpu": ("decord", "torchcodec"), "cuda": ("dali", "decord", "torchcodec")}
DECORD_CODECS = ("h264", "mjpeg", "mpeg4", "vp8", "vp9")
NARROW = 256  # decord2 3.4 fails at some widths: of the multiples of 4 from 16 to 796, at 16, 24, 32, 48, 96 and 144
DISTRIBUTIONS = {
    "decord": ("decord2", "decord"),
    "torchcodec": ("torchcodec",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"),
}
EXTRAS = {"decord": "video", "torchcodec": "torchcodec", "dali": "dali"}


class DecordVideo(Video):
    """decord2, or the older decord: whichever is installed."""

    backend = "decord"

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self._decord = load("decord", "video")
        super().__init__(path, facts, device, threads)
        if facts.codec not in DECORD_CODECS or facts.open_gops:
            kind = "open groups of pictures" if facts.open_gops else facts.codec
            raise UnservedError(f"{path}: decord does not read this kind of video right ({kind}); torchcodec does")
        self._decord.logging.set_level(self._decord.logging.QUIET)
        try:
            # fault_tol: decord must not replace any frame that it cannot decode by another one.
            self._reader = self._decord.VideoReader(str(path), num_threads=threads, fault_tol=1e-9)
        except Exception as error:  # decord's own among them
            raise UnservedError(f"{path}: decord cannot open it ({reason(error)})") from error
        _check_count(self, len(self._reader))
        if facts.width < NARROW:
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
        self._decoders = load("torchcodec.decoders", "torchcodec")
        super().__init__(path, facts, device, threads)
        self._facts, self._decoder = facts, self._opened()
        self.height, self.width = self._decoder.metadata.height, self._decoder.metadata.width  # after its rotation
        _check_count(self, len(self._decoder))

    def _opened(self) -> Any:
        settings = {"dimension_order": "NHWC", "device": "cpu", "seek_mode": "exact"}
        try:
            return self._decoders.VideoDecoder(str(self.path), num_ffmpeg_threads=self.threads, **settings)
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
        except RuntimeError:
            if not self._facts.open_gops:
                raise
            # Starting at the last keyframe, torchcodec may miss the end of the video; from frame 0 it does not.
            return self._opened().get_frames_in_range(0, end).data[indices]


def _check_count(video: Video, count: int) -> None:
    if count != video.frame_count:
        found = f"{video.backend} finds {count} frames, the file has {video.frame_count}"
        raise UnservedError(f"{video.path}: {found}")


OPENERS: dict[str, Any] = {"decord": DecordVideo, "torchcodec": TorchcodecVideo, "dali": DaliVideo}


def open_video(path: str | Path, backend: str = "auto", device: str | torch.device = "cpu", threads: int = 1) -> Video:
    """Opens a video file. `Video.frames` then reads its frames.

    backend: "decord", "torchcodec", "dali" or "auto". device: "cpu" or a CUDA device, where frames are delivered; the
    CPU decoders decode on the CPU and copy them there. threads: of the decoder.

    Raises VideoError, naming the file and the reason, if the file is not a complete video or the backend cannot decode
    it; ImportError, naming the extra, if the backend (for "auto": every backend) or av is missing; ValueError for other
    backends, devices or threads.
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    place, refusals = _device(device), list[Exception]()
    facts = examine(Path(path))
    for name in (backend,) if backend != "auto" else AUTO[place.type]:
        try:
            video: Video = OPENERS[name](Path(path), facts, place, threads)
            if backend == "auto" and name == "decord":
                # decord decodes ahead, and may fail at damage that lies behind the frames asked for.
                video.otherwise = partial(TorchcodecVideo, Path(path), facts, place, threads)
            return video
        except (ImportError, UnservedError) as error:
            if backend != "auto":
                raise
            refusals.append(error)
    unserved = next((error for error in refusals if isinstance(error, UnservedError)), None)
    if unserved is None:
        raise ImportError(f"no decoder: {'; '.join(map(str, refusals))}")
    others = [str(error).removeprefix(f"{path}: ") for error in refusals if error is not unserved]
    raise VideoError("; ".join([str(unserved), *others]))


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
            if name == "torchcodec" and not roles:
                roles = ["auto for what decord does not read right"]
            lines[name] = ": ".join([version, ", ".join(roles) or "where asked for"])
    return lines


def _version(*distributions: str) -> str | None:
    """The name and version of the first distribution that is installed."""
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return None
