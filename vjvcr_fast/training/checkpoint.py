"""Checkpoints: written atomically, with a checksum, the last few kept; read without running pickled code.

A checkpoint is what torch.save makes of tensors and plain values, so that torch.load(weights_only=True) reads it
anywhere. Beside what it holds it has a checksum over all of that, by content: what a zip's own sums do not cover, and
what no other copy of the file can repair, is found when it is read.
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

# Of what a step computes from a checkpoint: raised by every change after which a run that goes on would no longer be
# the run that began. 2: losses of single steps instead of their sum, the place in the data apart from the step.
# 3: running statistics of x and of y apart.
GENERATION = 3

LAST = "last.pt"
EARLIER = "checkpoints"  # the folder of those before it


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run; the message names the file."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values in dicts and lists) with its checksum, atomically.

    Raises CheckpointError naming the file where it cannot be written, as on a full disk; what was there stays.
    """
    whole = {**state, "generation": GENERATION}
    whole["checksum"] = checksum(whole)
    try:
        replace(path, lambda file: torch.save(whole, file))
    except (OSError, RuntimeError) as error:  # torch's own writer turns the first into the second
        kept = "the one that was there is whole" if path.exists() else "there is none yet"
        raise CheckpointError(f"{path}: cannot be written ({one_line(error)}); {kept}") from error


def save_last(run: Path, state: dict[str, Any], keep: int) -> None:
    """`save` as the run's last.pt; it and the keep - 1 before it stay as checkpoints/step-N.pt, the same files."""
    save(run / LAST, state)
    folder = run / EARLIER
    folder.mkdir(exist_ok=True)
    kept = folder / f"step-{state['step']:08d}.pt"
    kept.unlink(missing_ok=True)
    try:
        os.link(run / LAST, kept)
    except OSError:  # a file system without links, or one that has no place left: then a copy, or none
        with contextlib.suppress(OSError):
            write_atomic(kept, (run / LAST).read_bytes())
    for file in _earlier(run)[keep:]:
        file.unlink()


def load_last(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run that is whole, and its file; on stderr why newer ones were passed over.

    Raises CheckpointError where there is none.
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
    """Whether a run has a checkpoint to go on from."""
    return (run / LAST).exists() or bool(_earlier(run))


def _earlier(run: Path) -> list[Path]:
    """The kept checkpoints, newest first."""
    return sorted((run / EARLIER).glob("step-*.pt"), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote; anything but tensors and plain values is refused.

    Raises CheckpointError naming the file: missing, damaged, or holding objects that are not plain data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # what a damaged file makes torch raise has no end: IndexError, AssertionError, ...
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
    """Raises CheckpointError where training cannot go on from here as it began: another version made it."""
    if state["generation"] != GENERATION:
        raise CheckpointError(
            f"{path}: made by version {state.get('version')}, whose steps are not those of this one (generation "
            f"{state['generation']}, here {GENERATION}); go on with that version, or choose another --out"
        )


def checksum(state: dict[str, Any]) -> str:
    """sha256 over names, types, shapes and bytes of everything in `state`."""
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
    """The lines of a metrics.jsonl, those of steps <= up_to. What is no line of ours ends it, as one that was cut off.

    Raises CheckpointError naming a file that cannot be read; one that is not there has no lines.
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
