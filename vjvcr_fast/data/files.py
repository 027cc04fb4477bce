"""Files that are written whole or not at all, words for what is wrong with one, bars that say how far long work is."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MOST = 300  # characters of `one_line`


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    content = data.encode() if isinstance(data, str) else data
    replace(path, lambda file: file.write(content))


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`write_atomic` for content that `write` puts into the open file itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def one_line(text: object) -> str:
    """str(text), of which a file may have a say, as one line of reasonable length that can be printed."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: MOST + 1])
    return escaped if len(escaped) <= MOST else f"{escaped[:MOST]} ..."


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(**settings: Any) -> Any:
    """A tqdm bar. Raises ImportError, naming the extra, where tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("tqdm is not installed: pip install 'vjvcr_fast[train]'") from None
    return tqdm(**{"unit": "step", **settings})
