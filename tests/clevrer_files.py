"""Small data sets in CLEVRER's format, written by hand: a square that moves at a known speed, annotated."""

import json
from pathlib import Path

import torch
from torch import Tensor

from vjvcr_fast.data.clevrer import SPLITS

FRAMES, WIDTH, HEIGHT = 20, 64, 32


def paths(root: Path, split: str, number: int) -> tuple[Path, Path]:
    """Where the video and the annotation of a number lie."""
    block = f"{number // 1000 * 1000:05d}-{number // 1000 * 1000 + 1000:05d}"
    return (
        root / f"video_{split}" / f"video_{block}" / f"video_{number:05d}.mp4",
        root / f"annotation_{split}" / f"annotation_{block}" / f"annotation_{number:05d}.json",
    )


def annotation(visible: Tensor, velocity: Tensor, number: int = 0) -> dict:
    """CLEVRER's JSON from visible (F, objects) bool and velocity (F, objects, 3)."""
    frames, objects = visible.shape
    return {
        "scene_index": number,
        "video_filename": f"video_{number:05d}.mp4",
        "object_property": [
            {"object_id": i, "color": "red", "material": "metal", "shape": "cube"} for i in range(objects)
        ],
        "motion_trajectory": [
            {
                "frame_id": t,
                "objects": [
                    {
                        "object_id": i,
                        "location": [0.0, 0.0, 0.2],
                        "orientation": [0.0, 0.0, 0.0],
                        "velocity": velocity[t, i].tolist(),
                        "angular_velocity": [0.0, 0.0, 0.0],
                        "inside_camera_view": bool(visible[t, i]),
                    }
                    for i in range(objects)
                ],
            }
            for t in range(frames)
        ],
        "collision": [],
    }


def write(root: Path, split: str, number: int, frames: int = FRAMES, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """One video and its annotation: a square that crosses the picture at speed 1 + number % 4, always visible."""
    import av

    video, notes = paths(root, split, number)
    video.parent.mkdir(parents=True, exist_ok=True)
    notes.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    speed = 1 + number % 4
    generator = torch.Generator().manual_seed(number)
    colour = torch.randint(64, 256, (3,), generator=generator).byte()
    background = torch.randint(0, 128, (3,), generator=generator).byte()
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "18", "g": "999", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.thread_count = 1
        for t in range(frames):
            picture = background.expand(height, width, 3).clone()
            left = t * speed % (width - 8)
            picture[height // 4 : height // 2, left : left + 8] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
        container.mux(stream.encode(None))
    velocity = torch.zeros(frames, 1, 3)
    velocity[..., 0] = speed
    notes.write_text(json.dumps(annotation(torch.ones(frames, 1, dtype=torch.bool), velocity, number)))


def make(root: Path, train: int = 6, validation: int = 3) -> Path:
    """A whole small data set; returns its root."""
    for split, count in (("train", train), ("validation", validation)):
        for number in list(SPLITS[split])[:count]:
            write(root, split, number)
    return root
