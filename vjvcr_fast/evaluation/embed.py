"""`vjvcr-fast embed`: representations of video files by a trained run, in a safetensors file."""

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError, resolve_device
from vjvcr_fast.data import files
from vjvcr_fast.data.folder import FolderError, videos_below
from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.scan import probe, scan
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.runs import Trained, load_run, weights_of
from vjvcr_fast.settings import need
from vjvcr_fast.training import checkpoint


class Embedded(NamedTuple):
    """windows: how many were written. videos: the files they are from. bad: {file: reason} of files left out."""

    windows: int
    videos: list[str]
    bad: dict[str, str]


def embed(run: Path, videos: Sequence[Path], out: Path, config: Config, batch: int = 32, every: int = 0) -> Embedded:
    """Writes representations of video files to the safetensors file `out`. Memory does not grow with the videos.

    The file holds M windows of T_x + T_y frames:

        h_x (M, T_x, d), h_y (M, T_y, d), predicted (M, T_y, d) float32;
        video (M,) int64, the video's index in the metadata's list; start (M,) int64, the index of the first frame

    Frames are read as in training, every `data.stride`-th. In a run with a latent, predicted is at z*. A video that is
    too short for a window has none.

    run: its folder, or that of a saved model. videos: files, or folders that are searched for files. config: the run's;
    its device and decoder may differ. batch: windows at a time. every: frames from one window to the next, counted with
    the stride; 0: windows do not overlap.

    Raises ConfigError if `out` is a folder or one of the videos; FolderError if there are no videos or no windows;
    VideoError if a video cannot be read; and as `load_run`. With `data.on_bad_video` "skip" bad videos are left out: to
    know them all before the first window is embedded, every frame is then decoded once more.
    """
    need(batch >= 1, "--batch", batch, "at least 1")
    need(every >= 0, "--every", every, "at least 0")
    if out.is_dir():
        raise ConfigError(f"--out={out}: a folder; the name of a file is needed")
    config, model = load_run(run, config)
    data, trained = config.data, Trained(config, model)
    length = data.frames_in + data.frames_out
    with Pool(data.workers, data.decode_timeout, backend=data.decoder) as pool:
        clips, bad = _clips(videos, length, every or length, pool, config, out)
        sources = clips.sources
        start = torch.cat([source.starts for source in sources]) * data.stride
        video = torch.cat([torch.full_like(source.starts, i) for i, source in enumerate(sources)])
        windows, names = len(start), [str(source.path) for source in sources]
        about = {
            "videos": json.dumps(names),
            "run": str(run),
            "checkpoint": checkpoint.digest(weights_of(run)),
            "stride": str(data.stride),
            "latent": config.latent.kind,
            "vjvcr_fast": __version__,
        }
        lengths = {"h_x": data.frames_in, "h_y": data.frames_out, "predicted": data.frames_out}

        def write(file: BinaryIO) -> None:
            shapes = {"video": (windows,), "start": (windows,)}
            table = _table(file, shapes | {name: (windows, n, trained.d) for name, n in lengths.items()}, about)
            table["video"].copy_(video)
            table["start"].copy_(start)
            done = 0
            with files.progress(total=windows, desc="embed", unit="window") as bar:
                for part in clips.in_order(batch):
                    for name, values in _features(trained, part.frames).items():
                        table[name][done : done + len(values)] = values
                    done += len(part.frames)
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


def _clips(
    videos: Sequence[Path], length: int, every: int, pool: Pool, config: Config, out: Path
) -> tuple[VideoClips, dict[str, str]]:
    """All windows of the videos that have one, and {file: reason} of bad videos. Raises ConfigError if `out` is one."""
    found = {str(file): (file,) for path in videos for file in (videos_below(path) if path.is_dir() else [path])}
    if not found:
        raise FolderError(f"{', '.join(map(str, videos)) or 'nothing'}: no videos")
    if out.exists() and any(Path(name).exists() and out.samefile(name) for name in found):
        raise ConfigError(f"--out={out}: is one of the videos, which would be overwritten")
    data, stride, device = config.data, config.data.stride, resolve_device(config.train.device)
    how, whole = {"backend": data.decoder, "on_bad": data.on_bad_video}, data.on_bad_video == "skip"
    scanned = scan(found, probe, pool, None, any_size=True, every_frame=whole, desc="look", **how)
    sources = []
    for name, facts in scanned.found.items():
        count = -(-facts["frames"] // stride)
        starts = torch.arange(0, max(count - length + 1, 0), every)
        if len(starts):
            sources.append(Source(Path(name), name, count, starts, torch.zeros(len(starts)), stride))
    if not sources:
        raise FolderError(f"{len(found)} videos, but none has {length} frames at stride {stride}")
    size, backend = (data.canvas, data.canvas), data.decoder
    clips = VideoClips(
        sources, frames=length, size=size, seed=0, stream="embed", backend=backend, device=device, pool=pool
    )
    return clips, scanned.bad


def _table(file: BinaryIO, shapes: dict[str, tuple[int, ...]], about: dict[str, str]) -> dict[str, Tensor]:
    """Tensors mapped into a new safetensors file: what is written into them is in the file. Vectors are int64 and come
    first, so that they are aligned; all others are float32. about: the file's metadata."""
    # The format: 8 bytes with the length of the header, the header in JSON, the bytes of each tensor.
    header: dict[str, Any] = {"__metadata__": about}
    dtypes = {name: torch.float32 if len(shape) > 1 else torch.int64 for name, shape in shapes.items()}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtypes[name].itemsize * math.prod(shape)
        kind = "F32" if dtypes[name] == torch.float32 else "I64"
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    file.flush()
    first = file.tell()
    os.posix_fallocate(file.fileno(), 0, first + end)  # a full disk raises OSError here, a mapping would crash later
    content = torch.from_file(file.name, shared=True, size=first + end, dtype=torch.uint8)[first:]
    places = {name: content[slice(*header[name]["data_offsets"])] for name in shapes}
    return {name: place.view(dtypes[name]).view(shapes[name]) for name, place in places.items()}
