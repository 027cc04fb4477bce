"""A small data set in CATER's format, written by hand."""

import json
from pathlib import Path

import torch

from vjvcr_fast.data import cater
from vjvcr_fast.data.cater import CLASSES

FRAMES = 31

# As CATER writes it, including what this project does not read.
SCENE = {
    "image_filename": "CLEVR_new_000007.avi",
    "split": "new",
    "objects": [
        {"shape": "spl", "size": "small", "material": "metal", "color": "gold", "instance": "Spl_0"},
        {"shape": "cone", "size": "large", "material": "rubber", "color": "red", "instance": "Cone_0"},
        {"shape": "cube", "size": "medium", "material": "metal", "color": "blue", "instance": "Cube_0"},
        {"shape": "sphere", "size": "small", "material": "metal", "color": "cyan", "instance": "Sphere_0"},
    ],
    "movements": {
        "Spl_0": [["_slide", None, 2, 7], ["_rotate", None, 20, 29]],
        "Cone_0": [["_pick_place", None, 0, 5], ["_contain", "Spl_0", 9, 16]],
        "Cube_0": [],
        "Sphere_0": [["_slide", None, 15, 16]],
    },
}
ACTIVE = {
    "spl slide": range(2, 7),
    "spl rotate": range(20, 29),
    "cone pick_place": range(0, 5),
    "cone contain": range(9, 16),
    "sphere slide": range(15, 16),
}


def write_video(path: Path, frames: int = FRAMES) -> None:
    """Motion-JPEG in AVI, 64x48, 24 fps: frame t is grey of level 8 t."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for t in range(frames):
            picture = torch.full((48, 64, 3), 8 * t % 256, dtype=torch.uint8).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def make(root: Path, train: int = 4, validation: int = 2) -> Path:
    """Videos 0 .. train - 1 for training, then those for validation; every third has another scene."""
    (root / "scenes").mkdir()
    lists = {"train.txt": "", "val.txt": ""}
    for number in range(train + validation):
        name = f"CLEVR_new_{number:06d}"
        write_video(root / "videos" / f"{name}.avi")
        scene, classes = json.loads(json.dumps(SCENE)), [*ACTIVE]
        if number % 3 == 2:
            scene["movements"], classes = {"Cube_0": [["_rotate", None, 3, 30]]}, ["cube rotate"]
        (root / "scenes" / f"{name}.json").write_text(json.dumps(scene))
        numbers = ",".join(str(CLASSES.index(c)) for c in classes)
        lists["train.txt" if number < train else "val.txt"] += f"{name}.avi {numbers}\n"
    (root / cater.LIST_FOLDER).mkdir(parents=True)
    for name, text in lists.items():
        (root / cater.LIST_FOLDER / name).write_text(text)
    return root
