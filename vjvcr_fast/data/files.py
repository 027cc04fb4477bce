"""Small helpers: atomic writes, printable messages, working ahead, optional imports, progress bars."""

import importlib
import os
import sys
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Item = TypeVar("Item")

MOST = 300  # characters that `one_line` keeps
_BARS: weakref.WeakSet[Any] = weakref.WeakSet()  # the progress bars there are, for `note`


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file so that readers, even after a crash, see either the old content or the new, never a part of it."""
    content = data.encode() if isinstance(data, str) else data
    replace(path, lambda file: file.write(content))


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Like `write_atomic`, but `write` gets the open file and puts the content into it."""
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
    """str(text) as one printable line of limited length. For text that may come from a file."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: MOST + 1])
    return escaped if len(escaped) <= MOST else f"{escaped[:MOST]} ..."


def reason(error: BaseException) -> str:
    """The first line of an error's message that is not blank."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """Yields the items in order, each drawn up to `depth` items before it is needed: tasks, for example, that then run
    while the caller works. If drawing an item fails, the items before it come first."""
    waiting: deque[Item] = deque()
    failure = None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > depth:
                yield waiting.popleft()
    except Exception as error:
        failure = error
    yield from waiting
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # it refers to this frame, and this frame to it


def load(module: str, extra: str) -> Any:
    """Imports an optional module.

    Raises ImportError: it names the extra to install if the module is missing, else the reason why the import fails.
    """
    package = module.removeprefix("nvidia.").split(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"{package} is not installed: pip install 'vjvcr_fast[{extra}]'") from None
        # What it needs itself is missing.
        raise ImportError(f"{package} cannot be imported ({reason(error)})") from error


def say(text: str) -> None:
    """Prints a line on stderr, above the progress bars if there are any."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, file=sys.stderr)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)


def progress(**settings: Any) -> Any:
    """A tqdm progress bar. Raises ImportError, naming the extra, if tqdm is missing."""
    bar = load("tqdm", "train").tqdm(**{"unit": "step", **settings})
    _BARS.add(bar)
    return bar


def note(text: str) -> None:
    """As `say`, to tell why a progress bar waits: prints nothing if there is none."""
    if any(not bar.disable for bar in list(_BARS)):  # a closed bar is disabled
        say(text)
