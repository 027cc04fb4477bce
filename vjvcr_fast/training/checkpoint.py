"""Checkpoints: written atomically, read without running pickled code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast.data.files import replace


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run; the message names the file."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values in dicts and lists), atomically."""
    replace(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what `save` wrote; anything but tensors and plain values is refused.

    Raises CheckpointError naming the file: missing, damaged, or holding objects that are not plain data.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # what a damaged file makes torch raise has no end: IndexError, AssertionError, ...
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of plain tensors: {_line(error)}") from None
    if not isinstance(state, dict) or not {"model", "step"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this project: it has no 'model' and 'step'")
    return state


def restore(path: Path, state: dict[str, Any], **parts: Any) -> None:
    """Loads state[name] into every part (a module or an optimizer). `path`, where state comes from, is for the error.

    Raises CheckpointError naming the file where a part is missing or does not fit.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its {name} is not this run's: {_line(error)}") from None


def digest(path: Path) -> str:
    """A short hash of a file's content: results remember what they were made from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, those of steps <= up_to; a last line cut off by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if up_to is None or row["step"] <= up_to:
            rows.append(row)
    return rows


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
