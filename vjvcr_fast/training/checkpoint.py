"""Checkpoints: written atomically with a checksum, read without running pickled code; the last few are kept.

A checkpoint is a torch.save of tensors and plain values, so that torch.load(weights_only=True) reads it anywhere. It
also holds a checksum over all its content, which finds damage that the sums of the zip format do not cover.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vjvcr_fast.data.files import one_line, replace, write_atomic

# Raised by every change after which a resumed run would no longer compute what the run that began would have computed.
# 2: holds the losses of single steps instead of their sum, and the number of the next batch apart from the step.
# 3: holds separate running statistics of x and y.
GENERATION = 3

LAST = "last.pt"
EARLIER = "checkpoints"  # the folder with the last few
SAVED = "model.safetensors"  # in the folder of a saved model (vjvcr_fast.runs), which is no run


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another run, or could not be written. The message names the file."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values in dicts and lists) atomically, with its checksum.

    Raises CheckpointError naming the file if it cannot be written, as on a full disk; an older file stays as it was.
    """
    whole = {**state, "generation": GENERATION}
    whole["checksum"] = checksum(whole)
    try:
        replace(path, lambda file: torch.save(whole, file))
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for an OSError
        kept = "the one that was there is whole" if path.exists() else "there is none yet"
        raise CheckpointError(f"{path}: cannot be written ({one_line(error)}); {kept}") from error


def save_last(run: Path, state: dict[str, Any], keep: int) -> None:
    """Saves `state` as the run's last.pt, and keeps the last `keep` of these as checkpoints/step-N.pt.

    last.pt and the newest of those are one file with two names.
    """
    save(run / LAST, state)
    folder = run / EARLIER
    folder.mkdir(exist_ok=True)
    kept = folder / f"step-{state['step']:08d}.pt"
    try:
        kept.unlink(missing_ok=True)
        os.link(run / LAST, kept)
    except OSError:  # a file system without links, or without room: then we try a copy, and do without if that fails
        with contextlib.suppress(OSError):
            write_atomic(kept, (run / LAST).read_bytes())
    for file in _earlier(run)[keep:]:
        file.unlink()


def load_last(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run that is not damaged, and its file. Says on stderr which newer ones are damaged.

    Raises CheckpointError if there is none.
    """
    reasons = []
    for file in [run / LAST, *_earlier(run)]:
        try:
            state = load(file)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print(f"{reason}; going on from {file}", file=sys.stderr)
        return file, state
    raise CheckpointError("; ".join(dict.fromkeys(reasons)))


def exists(run: Path) -> bool:
    """Whether a run has a checkpoint, damaged or not."""
    return (run / LAST).exists() or bool(_earlier(run))


def _earlier(run: Path) -> list[Path]:
    """The kept checkpoints, newest first."""
    return sorted((run / EARLIER).glob("step-*.pt"), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU. Refuses anything but tensors and plain values.

    Raises CheckpointError naming the file if it is missing, damaged, or holds other objects.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # a damaged file can make torch raise anything: IndexError, AssertionError, ...
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of plain tensors: {_line(error)}") from None
    if not isinstance(state, dict) or not {"model", "step"} <= state.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this project: it has no 'model' and 'step'")
    found = state.pop("checksum", None)
    if found is None:
        raise CheckpointError(f"{path}: has no checksum: it was made by version {state.get('version')} or another")
    if found != checksum(state):
        raise CheckpointError(f"{path}: damaged: its content is not what was written, by its checksum")
    return state


def check_generation(path: Path, state: dict[str, Any]) -> None:
    """Raises CheckpointError if another version, whose training steps differ, made the checkpoint."""
    if state["generation"] != GENERATION:
        raise CheckpointError(
            f"{path}: made by version {state.get('version')}, whose steps are not those of this one (generation "
            f"{state['generation']}, here {GENERATION}); go on with that version, or choose another --out"
        )


def checksum(state: dict[str, Any]) -> str:
    """sha256 of the names, types, shapes and bytes of everything in `state`."""
    total = hashlib.sha256()
    for path, value in _leaves("", state):
        total.update(path.encode())
        if isinstance(value, torch.Tensor):
            held = value.detach().cpu().contiguous()
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update((ctypes.c_ubyte * held.nbytes).from_address(held.data_ptr()) if held.numel() else b"")
        else:
            total.update(f"{type(value).__name__}{value!r}".encode())
    return total.hexdigest()


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}/{key!r}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(f"{path}/{i}", inner)
    else:
        yield path, value


def restore(path: Path, state: dict[str, Any], **parts: Any) -> None:
    """Loads state[name] into every part, a module or an optimizer. path: where state comes from, for the error.

    Raises CheckpointError naming the file if a part is missing or does not fit.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: its {name} is not this run's: {_line(error)}") from None


def digest(path: Path) -> str:
    """A short hash of a file's content, by which results remember what they were made from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, if up_to is given only those with step <= up_to.

    A line that is not one of ours, such as one that was cut off, ends the reading. A missing file has no lines.

    Raises CheckpointError naming the file if it cannot be read.
    """
    try:
        text = path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    with contextlib.suppress(ValueError, RecursionError):
        for line in text.split("\n"):
            row = json.loads(line)
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                break
            if up_to is None or row["step"] <= up_to:
                rows.append(row)
    return rows


def _line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}".strip().splitlines()[0])
