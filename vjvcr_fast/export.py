"""`vjvcr-fast export`: a trained model as a folder to share, with a model card, and its encoder as a program of torch.

The encoder as a program needs torch alone:

program = torch.export.load("encoder.pt2").module()
h = program(frames)                         # (N, T, C, S, S), float32 in [0, 1] -> (N, T, d)
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast.config import PRESETS, Config, differences, shown
from vjvcr_fast.data import files
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.runs import CONFIG, PLACES, WEIGHTS, Trained, load
from vjvcr_fast.training import checkpoint

CARD = "README.md"
# What a card shows of evaluation.json, and what it calls it.
MEASURED = {
    "psnr": "PSNR of decoded predictions, dB",
    "psnr_of_last_frame": "PSNR of the last context frame, dB",
    "rank_me": "RankMe",
    "speed_mse": "MSE of the speed probe",
    "speed_mse_of_the_mean": "MSE of the mean speed",
}


def export(run: Path, folder: Path, encoder: Path | None = None) -> list[Path]:
    """Writes a run's trained model into a folder: config.json, model.safetensors, and README.md unless there is one.

    encoder: also the encoder, as a file of torch.export (`export_encoder`). Returns the files that were written.

    Raises: as `vjvcr_fast.load` and `Trained.save_pretrained`.
    """
    trained, written = load(run, "cpu"), [folder / WEIGHTS, folder / CONFIG]
    trained.save_pretrained(folder)
    if not (folder / CARD).exists():
        files.write_atomic(folder / CARD, card(trained.config, folder.resolve().name, _evaluation(run)))
        written.append(folder / CARD)
    if encoder is not None:
        export_encoder(trained, encoder)
        written.append(encoder)
    return written


def export_encoder(trained: Trained, file: Path) -> None:
    """Writes the encoder as a program for `torch.export.load`: frames (N, T, C, S, S), float32 in [0, 1] -> h (N, T, d)
    float32, for any N and T. S is the run's canvas and C its number of channels; `Trained.prepare` makes such frames.

    Batch norms use the running statistics of context frames, as `Trained.encode` does. The program runs on the CPU;
    torch.export.passes.move_to_device_pass moves it.
    """
    data, encoder = trained.config.data, copy.deepcopy(trained.model.encoder).cpu().requires_grad_(False).eval()
    frames = torch.zeros(2, 3, data.channels, data.canvas, data.canvas)
    sizes = {0: torch.export.Dim("N"), 1: torch.export.Dim("T")}
    program = torch.export.export(encoder, (frames,), dynamic_shapes=(sizes,))
    with warnings.catch_warnings():
        # Of weights in channels_last, which are saved right: the tests compare.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        files.replace(file, lambda opened: torch.export.save(program, opened))


def card(config: Config, name: str, measured: dict[str, Any] | None) -> str:
    """A model card in Markdown. measured: the run's evaluation.json, if it has one."""
    data, model, train = config.data, config.model, config.train
    facts = {
        "data": f"{data.dataset}, {data.frames_in} context and {data.frames_out} target frames, "
        f"{data.canvas}x{data.canvas}, stride {data.stride}",
        "model": f"{ROWS[model.row].title} ({model.kind}), d = {config.d} features a frame",
        "latent": config.latent.kind,
        "training": f"{train.steps:,} steps of {train.batch} videos, learning rate {train.lr:g}, seed {train.seed}",
    }
    changed = differences(config, PRESETS[config.preset]) if config.preset in PRESETS else {}
    other = [f"{field} {shown(ours)}" for field, (ours, _) in changed.items() if field not in PLACES]
    facts["preset"] = ", ".join([config.preset, *other])
    lines = [
        "---",
        "library_name: vjvcr_fast",
        "tags: [video, self-supervised-learning, jepa]",
        "---",
        "",
        f"# {name}",
        "",
        "A video model trained with VJ-VCR ([arXiv 2412.10925](https://arxiv.org/abs/2412.10925)) in vjvcr_fast.",
        "",
        "```python",
        "import vjvcr_fast",
        "",
        f'model = vjvcr_fast.load("{name}")  # this folder, or "user/{name}" on the Hugging Face Hub',
        f"h = model.encode(frames)  # (N, T, C, H, W), uint8 or in [0, 1] -> (N, T, {config.d})",
        "```",
        "",
        *_table(("", "setting; config.json has all"), facts),
    ]
    if measured:
        values = {title: f"{measured[key]:.4g}" for key, title in MEASURED.items() if key in measured}
        lines += ["", f"Measured on {measured['validation_data']}:", "", *_table(("", "value"), values)]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, str], rows: dict[str, str]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]


def _evaluation(run: Path) -> dict[str, Any] | None:
    """The run's evaluation.json, or None if there is none or it is of another checkpoint."""
    try:
        measured: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
        return measured if measured["best"] == checkpoint.digest(run / "best.pt") else None
    except (FileNotFoundError, ValueError, KeyError):
        return None
