"""A trained run at work: representations of any frames in Python, of video files in a safetensors file.

model = vjvcr_fast.load("runs/my-run")
h = model.encode(frames)                    # (N, T, C, H, W) -> (N, T, d)
"""

import json
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError, override
from vjvcr_fast.data import files
from vjvcr_fast.data.clips import Source, VideoClips
from vjvcr_fast.data.folder import FolderError, videos_below
from vjvcr_fast.data.scan import probe, scan
from vjvcr_fast.data.video import resize
from vjvcr_fast.data.workers import Pool
from vjvcr_fast.evaluation.evaluate import load_run
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.latents import Latents

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Trained:
    """The model of least validation loss of a run, in evaluation mode. Gradients flow as through any module: for
    features alone call it under torch.no_grad().

    config: of the run. model: its EnergyModel, whose parts (encoder, predictor, decoder) are modules. d: features of a
    frame's representation.
    """

    def __init__(self, config: Config, model: EnergyModel) -> None:
        self.config, self.model, self.d = config, model, config.d
        self._latents = Latents(config, model)

    def encode(self, frames: Tensor) -> Tensor:
        """frames: (N, T, C, H, W) of any size and device, uint8, or floating point in [0, 1]; C is 3, or that of the
        run. They are resized to its canvas. Returns h (N, T, d) float32. Raises ValueError for other frames."""
        return self.model.encoder(self.prepare(frames))

    def predict(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicted representations of the frames that follow: x (N, T_x, C, H, W) -> (N, T_y, d). Of a run with a
        latent at z*, which is inferred from y (N, T_y, C, H, W). Frames as of `encode`.

        Raises ValueError for another number of frames, and where y is missing.
        """
        data = self.config.data
        for name, given, wanted in (("x", x, data.frames_in), ("y", y, data.frames_out)):
            if given is not None and given.ndim == 5 and given.shape[1] != wanted:
                raise ValueError(f"{name} has {given.shape[1]} frames: the run's {wanted} are needed")
        if self.config.latent.kind == "none":
            return self.model.predict(self.prepare(x))
        if y is None:
            raise ValueError(f"the run has a latent ({self.config.latent.kind}): y is needed to infer it")
        return self._latents.predict(self.prepare(x), self.prepare(y))

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames as the model takes them: (N, T, C, S, S) float32 in [0, 1] on its device."""
        data = self.config.data
        if frames.ndim != 5 or frames.shape[2] not in (3, data.channels):
            kinds = f"(N, T, C, H, W) with C = {' or '.join(map(str, sorted({3, data.channels})))}"
            raise ValueError(f"frames have shape {tuple(frames.shape)}: {kinds} is needed")
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise ValueError(f"frames are {frames.dtype}: uint8, or floating point in [0, 1], is needed")
        frames = frames.to(next(self.model.parameters()).device)
        flat, size = frames.flatten(0, 1), (data.canvas, data.canvas)
        if frames.dtype == torch.uint8:
            flat = resize(flat, size).float().div_(255)
        elif flat.shape[-2:] != size:
            flat = F.interpolate(flat.float(), size=size, mode="bilinear", antialias=True)
        if data.channels == 1 and flat.shape[1] == 3:
            flat = (flat * flat.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
        return flat.float().unflatten(0, frames.shape[:2])


def load(run: str | Path, device: str = "auto") -> Trained:
    """The trained model in the folder of a run. device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:N".

    Raises ConfigError or CheckpointError, naming the file, where the folder does not hold a run.
    """
    folder = Path(run)
    config, model = load_run(folder, override(Config.load(folder / "config.json"), {"train.device": device}))
    return Trained(config, model)


class Embedded(NamedTuple):
    """windows: written. videos: their files. bad: {file: reason}, left out."""

    windows: int
    videos: list[str]
    bad: dict[str, str]


def embed(run: Path, videos: Sequence[Path], out: Path, config: Config, batch: int = 32, every: int = 0) -> Embedded:
    """Writes what a run's model makes of video files to the safetensors file `out`, in batches, whatever their length:

        h_x (M, T_x, d), h_y (M, T_y, d), predicted (M, T_y, d) float32, of M windows of T_x + T_y frames;
        video (M,) int64, the number of the video in the metadata's list; start (M,) int64, the first frame's number

    Frames are read and counted as in training (`data.stride`). predicted is at z* in a run with a latent. Videos too
    short for a window have none.

    videos: files, or folders with files in them. config: the run's, where its device or decoder differ. every: frames
    from one window to the next, counted with the stride; 0: one after another.

    Raises ConfigError where `out` is a folder or one of the videos; FolderError where there are no videos or windows;
    VideoError for one that cannot be read, unless `data.on_bad_video` is "skip" and it is found before the first is
    embedded; as `load_run`.
    """
    for name, value, least in (("batch", batch, 1), ("every", every, 0)):
        if value < least:
            raise ConfigError(f"--{name}={value}: must be at least {least}")
    if out.is_dir():
        raise ConfigError(f"--out={out}: a folder; the name of a file is needed")
    config, model = load_run(run, config)
    data, trained = config.data, Trained(config, model)
    length = data.frames_in + data.frames_out
    with Pool(data.workers, data.decode_timeout) as pool:
        sources, bad = _sources(videos, data.stride, length, every or length, pool, config)
        clips = VideoClips(
            sources,
            frames=length,
            size=(data.canvas, data.canvas),
            seed=0,
            stream="embed",
            backend=data.decoder,
            device=next(model.parameters()).device,
            pool=pool,
        )
        counts = torch.tensor([len(source.starts) for source in sources])
        video = torch.arange(len(sources)).repeat_interleave(counts)
        start = torch.cat([source.starts for source in sources]) * data.stride
        windows = len(start)
        names = [str(source.path) for source in sources]
        if out.exists() and any(source.path.samefile(out) for source in sources):
            raise ConfigError(f"--out={out}: is one of the videos, which would be overwritten")
        about = {
            "videos": json.dumps(names),
            "run": str(run),
            "checkpoint": checkpoint.digest(run / "best.pt"),
            "stride": str(data.stride),
            "latent": config.latent.kind,
            "vjvcr_fast": __version__,
        }
        shapes = {
            "h_x": (windows, data.frames_in, trained.d),
            "h_y": (windows, data.frames_out, trained.d),
            "predicted": (windows, data.frames_out, trained.d),
            "video": (windows,),
            "start": (windows,),
        }

        def write(file: BinaryIO) -> None:
            table = _Table(file, shapes, about)
            done = 0
            with files.progress(total=windows, desc="embed", unit="window") as bar:
                for part in clips.in_order(batch):
                    rows = slice(done, done + len(part.frames))
                    done += len(part.frames)
                    table.append({**_features(trained, part.frames), "video": video[rows], "start": start[rows]})
                    bar.update(len(part.frames))

        files.replace(out, write)
    return Embedded(windows, names, bad)


@torch.no_grad()
def _features(trained: Trained, frames: Tensor) -> dict[str, Tensor]:
    prepared = trained.prepare(frames)
    x, y = prepared[:, : trained.config.data.frames_in], prepared[:, trained.config.data.frames_in :]
    return {
        "h_x": trained.encode(x),
        "h_y": trained.model.encode_targets(trained.prepare(y)),
        "predicted": trained.predict(x, y),
    }


def _sources(
    videos: Sequence[Path], stride: int, length: int, every: int, pool: Pool, config: Config
) -> tuple[list[Source], dict[str, str]]:
    """The videos that have a window, with their starts, and what is wrong with others."""
    found: dict[str, tuple[Path, ...]] = {}
    for path in videos:
        for file in videos_below(path) if path.is_dir() else [path]:
            found[str(file)] = (file,)
    if not found:
        raise FolderError(f"{', '.join(map(str, videos)) or 'nothing'}: no videos")
    examine = partial(probe, backend=config.data.decoder)
    scanned = scan(found, examine, pool, on_bad=config.data.on_bad_video, any_size=True, desc="look")
    sources = []
    for name, facts in scanned.found.items():
        count = -(-facts["frames"] // stride)
        starts = torch.arange(0, max(count - length + 1, 0), every)
        if len(starts):
            sources.append(Source(Path(name), name, count, starts, torch.zeros(len(starts)), stride))
    if not sources:
        raise FolderError(f"{len(found)} videos, but none with {length} times {stride} frames")
    return sources, scanned.bad


class _Table:
    """A safetensors file whose tensors grow together, row by row: 8 bytes of the header's length, the header in JSON,
    then each tensor's bytes at their place."""

    NAMES = {torch.float32: "F32", torch.int64: "I64"}  # noqa: RUF012

    def __init__(self, file: BinaryIO, shapes: dict[str, tuple[int, ...]], about: dict[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": about}
        end = 0
        self.file, self.places = file, dict[str, int]()
        for name, shape in shapes.items():
            dtype = torch.float32 if len(shape) > 1 else torch.int64
            start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            self.places[name] = start
            header[name] = {"dtype": self.NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        first = file.tell()
        self.places = {name: first + start for name, start in self.places.items()}

    def append(self, rows: dict[str, Tensor]) -> None:
        """rows: the next (n, ...) of every tensor."""
        for name, values in rows.items():
            content = values.detach().cpu().contiguous().numpy().tobytes()
            self.file.seek(self.places[name])
            self.file.write(content)
            self.places[name] += len(content)
