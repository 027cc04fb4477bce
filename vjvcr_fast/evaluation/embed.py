"""What a trained run makes of video files: representations, in a safetensors file."""

import json
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.data import files
from vjvcr_fast.data.folder import FolderError, videos_below
from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.scan import probe, scan
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.runs import Trained, load_run
from vjvcr_fast.training import checkpoint


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
