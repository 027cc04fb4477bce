"""Videos decoded by NVIDIA DALI: on a GPU by its own decoder (NVDEC), batch after batch, without leaving it.

The GPU path is unverified until a machine with DALI and NVDEC has run its tests (`pytest -m cuda -k dali`);
on a CPU the same pipeline runs for the codecs that DALI decodes there. Frames are exact, colours nearly: DALI
interpolates the half-resolution colour of 4:2:0 video where decord and torchcodec repeat it, so that pixels differ at
coloured edges and hardly elsewhere. Its resizing differs from `resize` by a tenth of a level on average.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.video.file import Facts, UnservedError, Video, VideoError, load

CODECS = {"cpu": ("mjpeg", "vp8", "vp9"), "cuda": ("av1", "h264", "hevc", "mjpeg", "mpeg4", "vp8", "vp9")}
CPU_ONLY = "on a CPU, DALI decodes only VP8, VP9 and Motion-JPEG"
LARGEST_BATCH = 4096  # costs nothing, since DALI allocates for what comes

Request = Sequence[tuple[Path, int]]


class DaliVideo(Video):
    """One video, whole in memory while it is open."""

    backend = "dali"

    def __init__(self, path: Path, facts: Facts, device: torch.device, threads: int) -> None:
        load("nvidia.dali", "dali")
        super().__init__(path, facts, device, threads)
        if facts.codec not in CODECS[device.type]:
            why = f": {CPU_ONLY}" if device.type == "cpu" else ""
            raise UnservedError(f"{path}: DALI does not decode {facts.codec}{why}")
        self._encoded = _encoded(path)
        self._pipeline: Any = None

    def _read(self, indices: list[int]) -> Tensor:
        pipeline, self._pipeline = self._pipeline or _pipeline(None, self.device, self.threads), None
        (out,) = _run(pipeline, self.device, encoded=[self._encoded], frames=[_numpy(indices)])
        self._pipeline = pipeline  # one that failed is of no more use
        return torch.from_dlpack(out.as_tensor())[0]


class DaliClips:
    """An iterator of (N, T, 3, H, W) uint8 batches on the device, decoded and resized there, some of them ahead.

    requests: one batch each: N (file, first frame) pairs; N may vary, up to 4,096. frames: T, every `stride`-th from
    the first. size: (height, width).
    device: "cuda" decodes and resizes on the GPU and hands its tensors over in stream order, without waiting; "cpu"
    does the same for VP8, VP9 and Motion-JPEG. threads: DALI's, and as many that read files. prefetch: batches ahead.

    Files are not examined: look at a data set once with `open_video`, which notices those that are cut off.

    Raises ImportError, naming the extra, without DALI; ValueError for arguments out of range; while iterating,
    VideoError naming the files of a batch that cannot be decoded, or that end before the window.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        frames: int,
        size: tuple[int, int],
        device: str | torch.device,
        threads: int = 2,
        prefetch: int = 2,
        stride: int = 1,
    ) -> None:
        sides = {"height": size[0], "width": size[1]}
        for name, value in {"frames": frames, "threads": threads, "stride": stride, **sides}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        self.device = torch.device(device)
        if self.device.type not in CODECS:
            raise ValueError(f"device must be 'cpu' or a CUDA device, got {device!r}")
        load("nvidia.dali", "dali")
        self.requests, self.frames, self.size = requests, frames, size
        self.threads, self.prefetch, self.stride = threads, prefetch, stride

    def __iter__(self) -> Iterator[Tensor]:
        asked: deque[Request] = deque()
        stopped: list[BaseException] = []  # what ended the requests; batches before it come first
        with ThreadPoolExecutor(self.threads) as readers:
            inputs = self._inputs(asked, stopped, readers)
            pipeline = _pipeline(inputs, self.device, self.threads, self.prefetch, self.size)
            while True:
                try:
                    (out,) = _run(pipeline, self.device)
                except StopIteration:
                    break
                except RuntimeError as error:
                    raise self._blame(asked[0], error) from error
                asked.popleft()
                yield torch.from_dlpack(out.as_tensor())
        if stopped:
            raise stopped[0]

    def _inputs(
        self, asked: deque[Request], stopped: list[BaseException], readers: ThreadPoolExecutor
    ) -> Iterator[Any]:
        """([encoded files], [frame indices]) of every request, which is noted in `asked`."""
        try:
            for request in self.requests:
                if not 1 <= len(request) <= LARGEST_BATCH:
                    raise ValueError(f"a request must have 1 to {LARGEST_BATCH:,} windows, got {len(request)}")
                negative = next((pair for pair in request if pair[1] < 0), None)
                if negative:
                    raise ValueError(f"first frames must be at least 0, got {negative[1]} of {negative[0]}")
                encoded = list(readers.map(_encoded, [path for path, _ in request]))
                asked.append(request)
                yield encoded, [self._indices(first) for _, first in request]
        except Exception as error:
            stopped.append(error)

    def _indices(self, first: int) -> Any:
        return _numpy(range(first, first + self.frames * self.stride, self.stride))

    def _blame(self, request: Request, error: RuntimeError) -> VideoError:
        """The error of a batch, about those of its files that fail alone too, or about all of them."""
        reasons: dict[Path, str] = {}
        for path, first in request:
            inputs = {"encoded": [_encoded(path)], "frames": [self._indices(first)]}
            try:
                _run(_pipeline(None, self.device, 1), self.device, **inputs)
            except RuntimeError as alone:
                reasons[path] = _reason(alone)
        reasons = reasons or {path: _reason(error) for path, _ in request}
        limits = f"; {CPU_ONLY}" if self.device.type == "cpu" else ""
        return VideoError("; ".join(f"{path}: DALI cannot decode it ({why})" for path, why in reasons.items()) + limits)


# -- Pipelines ------------------------------------------------------------------------------------------------------


def _pipeline(
    source: Iterator[Any] | None,
    device: torch.device,
    threads: int,
    prefetch: int = 1,
    size: tuple[int, int] | None = None,
) -> Any:
    """encoded, frames -> (T, H, W, 3), or (T, 3, height, width) with a size; taken from `source` or fed by name."""
    dali = load("nvidia.dali", "dali")
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size=LARGEST_BATCH,
        num_threads=threads,
        device_id=_index(device) if on_gpu else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,  # its outputs stay valid for as long as a tensor holds them
    )
    with pipeline:
        if source is None:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
        else:
            kinds = {"dtype": [types.UINT8, types.INT32], "ndim": [1, 1]}
            encoded, frames = fn.external_source(source=source, num_outputs=2, batch=True, **kinds)
        # "none": a frame past the end is an error, not a black picture.
        video = fn.decoders.video(encoded, frames=frames, device="mixed" if on_gpu else "cpu", pad_mode="none")
        if size is not None:
            video = fn.resize(video, size=size, interp_type=types.INTERP_LINEAR, antialias=True, dtype=types.UINT8)
            video = fn.transpose(video, perm=[0, 3, 1, 2])
        pipeline.set_outputs(video)
    pipeline.build()
    return pipeline


def _run(pipeline: Any, device: torch.device, **inputs: Any) -> Any:
    if device.type == "cpu":
        return pipeline.run(**inputs)
    # With a stream the outputs are ordered on it, and the host does not wait for them.
    return pipeline.run(torch.cuda.current_stream(device), **inputs)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _encoded(path: Path) -> Any:
    """The bytes of a file, (B,) uint8. Raises VideoError."""
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not content:
        raise VideoError(f"{path}: an empty file")
    return torch.frombuffer(content, dtype=torch.uint8).numpy()


def _numpy(indices: Iterable[int]) -> Any:
    return torch.tensor([*indices], dtype=torch.int32, device="cpu").numpy()


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's report that says what happened: the one after "encountered:"."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else []
    return (after or lines or [type(error).__name__])[0]
