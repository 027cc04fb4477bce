"""Decoding with NVIDIA DALI: on a GPU with its hardware decoder (NVDEC), so that frames never leave the GPU.

The GPU path has not been verified: that needs a machine with DALI and NVDEC to run its tests
(`pytest -m cuda -k dali`). On a CPU the same pipeline decodes the codecs that DALI knows there.

DALI returns the right frames in slightly different colours: it interpolates the half-resolution colour of 4:2:0 video,
which decord and torchcodec repeat. Pixels differ at coloured edges and hardly elsewhere. DALI's resizing differs from
`resize` by a tenth of a level on average.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import load
from vjvcr_fast.data.video.file import Facts, UnservedError, Video, VideoError

CODECS = {"cpu": ("mjpeg", "vp8", "vp9"), "cuda": ("av1", "h264", "hevc", "mjpeg", "mpeg4", "vp8", "vp9")}
CPU_ONLY = "on a CPU, DALI decodes only VP8, VP9 and Motion-JPEG"
LARGEST_BATCH = 4096  # a high limit costs nothing, because DALI allocates memory for what it gets


class DaliDecoder:
    """A DALI pipeline on a device. With a size it also resizes frames to (height, width)."""

    def __init__(self, device: torch.device, threads: int, size: tuple[int, int] | None = None) -> None:
        load("nvidia.dali", "dali")
        self.device, self.threads, self.size = device, threads, size
        self._pipeline: Any = None

    def read(self, windows: Sequence[tuple[Path, range]], contents: Sequence[Any]) -> Tensor:
        """Decodes windows, (file, frames) pairs with equally many frames each: (N, T, 3, H, W) uint8 on the device.

        On a GPU the tensor comes in stream order, without waiting. Needs a size. contents: the bytes of the files, as
        `encoded` returns them. The files are not checked here, but by `for_dali`.

        Raises VideoError naming the files that cannot be decoded or end before the window; ValueError for too many
        windows.
        """
        if len(windows) > LARGEST_BATCH:
            raise ValueError(f"a batch must have at most {LARGEST_BATCH:,} windows, got {len(windows)}")
        try:
            return self.run(contents, [frames for _, frames in windows])
        except RuntimeError as error:
            raise self._blame(windows, contents, error) from error

    def run(self, contents: Sequence[Any], frames: Sequence[Iterable[int]]) -> Tensor:
        """Decodes the frames of each file: (N, T, 3, H, W) uint8, or (N, T, H, W, 3) without a size.

        Raises RuntimeError with DALI's report.
        """
        pipeline, self._pipeline = self._pipeline or self._build(), None
        # Given a stream, DALI orders its outputs on it, and the host does not wait for them.
        stream: list[Any] = [torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []
        indices = [torch.tensor([*each], dtype=torch.int32, device="cpu").numpy() for each in frames]
        (out,) = pipeline.run(*stream, encoded=list(contents), frames=indices)
        self._pipeline = pipeline  # only now: a pipeline that has failed cannot be used again
        return torch.from_dlpack(out.as_tensor())

    def _build(self) -> Any:
        dali = load("nvidia.dali", "dali")
        fn, types = dali.fn, dali.types
        on_gpu, number = self.device.type == "cuda", self.device.index
        if on_gpu and number is None:
            number = torch.cuda.current_device()
        pipeline = dali.Pipeline(
            batch_size=LARGEST_BATCH,
            num_threads=self.threads,
            device_id=number if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # its outputs stay valid for as long as a tensor holds them
        )
        with pipeline:
            content = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            # pad_mode "none": a frame past the end is an error, not a black picture.
            video = fn.decoders.video(content, frames=frames, device="mixed" if on_gpu else "cpu", pad_mode="none")
            if self.size is not None:
                settings = {"interp_type": types.INTERP_LINEAR, "antialias": True, "dtype": types.UINT8}
                video = fn.transpose(fn.resize(video, size=self.size, **settings), perm=[0, 3, 1, 2])
            pipeline.set_outputs(video)
        pipeline.build()
        return pipeline

    def _blame(self, windows: Sequence[tuple[Path, range]], contents: Sequence[Any], error: RuntimeError) -> VideoError:
        """The error of a batch. It names the files that also fail alone, or all of them if none does."""
        reasons: dict[Path, str] = {}
        for (path, frames), content in zip(windows, contents, strict=True):
            try:
                self.run([content], [frames])
            except RuntimeError as alone:
                reasons[path] = _reason(alone)
        reasons = reasons or {path: _reason(error) for path, _ in windows}
        limits = f"; {CPU_ONLY}" if self.device.type == "cpu" else ""
        return VideoError("; ".join(f"{path}: DALI cannot decode it ({why})" for path, why in reasons.items()) + limits)


class DaliVideo(Video):
    """One video. All of its bytes stay in memory while it is open."""

    backend = "dali"

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        self._decoder = DaliDecoder(device, threads)
        super().__init__(path, facts, device, threads)
        if facts.codec not in CODECS[device.type]:
            why = f": {CPU_ONLY}" if device.type == "cpu" else ""
            raise UnservedError(f"{path}: DALI does not decode {facts.codec}{why}")
        self._encoded = encoded(path)

    def _read(self, indices: list[int]) -> Tensor:
        return self._decoder.run([self._encoded], [indices])[0]


def encoded(path: Path) -> Any:
    """The bytes of a file, as a numpy array (B,) uint8. Raises VideoError."""
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not content:
        raise VideoError(f"{path}: an empty file")
    return torch.frombuffer(content, dtype=torch.uint8).numpy()


def _reason(error: RuntimeError) -> str:
    """The line of DALI's report that says what happened: the one after "encountered:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else []
    return (after or lines or [type(error).__name__])[0]
