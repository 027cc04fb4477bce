"""Decoding in processes of their own, each with a time limit: one that hangs or crashes does not end training."""

import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future, TimeoutError
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import cores, one_line
from vjvcr_fast.data.video.decode import VideoError, open_video

_STARTING = threading.Lock()  # processes start one after the other


class Task:
    """A result to come, about one file."""

    def __init__(self, path: Path, future: "Future[Any]", pool: "Pool") -> None:
        self.path, self._future, self._pool = path, future, pool  # a pool that nobody holds ends

    def result(self) -> Any:
        """Waits. Raises VideoError, naming the file, where it cannot be read, takes too long or crashes the decoder."""
        try:
            return self._future.result()
        except TimeoutError:
            raise VideoError(f"{self.path}: reading it took longer than {self._pool.timeout:g} s") from None
        except (VideoError, ImportError, ValueError):
            raise
        except (BrokenExecutor, CancelledError) as error:  # no fault of the file's
            raise RuntimeError(f"the processes that read videos have ended ({error})") from None
        except Exception as error:
            if type(error).__name__ == "ProcessExpired":
                raise VideoError(f"{self.path}: the process that read it ended ({error})") from None
            raise VideoError(f"{self.path}: {type(error).__name__}: {one_line(error)}") from None


class Pool:
    """Worker processes, started with the first task and again where one was lost; a context manager.

    workers: how many; -1: one a core; 0: none, tasks run at once in the caller, without a time limit. timeout: seconds
    that one task may take before its process is ended.

    Raises ValueError for other values; ImportError, naming the extra, where pebble is missing.
    """

    def __init__(self, workers: int = -1, timeout: float = 60.0) -> None:
        if workers < -1:
            raise ValueError(f"workers={workers}: must be -1 (one a core), 0 (none) or more")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: must be above 0 seconds")
        self.workers = cores() if workers == -1 else workers
        self.timeout = timeout
        self._pool: Any = None
        self._lock = threading.Lock()  # several loaders may share it, each with a thread of its own

    def submit(self, path: Path, function: Callable[..., Any], *arguments: Any) -> Task:
        """Runs function(path, *arguments), a function of a module, in a worker."""
        if self.workers == 0:
            future: Future[Any] = Future()
            try:
                future.set_result(function(path, *arguments))
            except Exception as error:
                future.set_exception(error)
        else:
            future = self._started().schedule(function, args=(path, *arguments), timeout=self.timeout)
        return Task(path, future, self)

    def close(self) -> None:
        """Ends the workers at once; a later task starts new ones."""
        if self._pool is not None:
            self._end()
            self._pool = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> Any:
        with self._lock:
            if self._pool is None:
                try:
                    from pebble import ProcessPool
                except ImportError:
                    raise ImportError("pebble is not installed: pip install 'vjvcr_fast[video]'") from None
                self._pool = ProcessPool(self.workers, initializer=_quiet, context=_Context())
                self._end = weakref.finalize(self, _stop, self._pool)
            return self._pool


class _Process(SpawnProcess):
    """Spawned, since a copy of a process with threads, or with CUDA, may hang; without the caller's main module, which
    a spawned process otherwise imports: scripts need no `if __name__ == "__main__"` on account of it."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        with _no_main():
            return SpawnProcess._Popen(process_obj)


class _Context(SpawnContext):
    Process = _Process


@contextmanager
def _no_main() -> Iterator[None]:
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def decode(path: Path, backend: str, first: int, count: int, stride: int, size: tuple[int, int]) -> Any:
    """Frames first .. first + count - 1 of every stride-th, as a numpy array (count, 3, H, W) uint8: what travels
    between processes."""
    indices = range(first * stride, (first + count) * stride, stride)
    return open_video(path, backend).frames(indices, size).contiguous().numpy()


def received(array: Any) -> Tensor:
    """What `decode` returned, as a tensor."""
    return torch.from_numpy(array)


def given(item: Any) -> Any:
    """A result that is there already, for those who call for one."""
    return item


def refused(error: BaseException) -> Any:
    """An error in the place of a result."""
    raise error


def _stop(pool: Any) -> None:
    pool.stop()
    pool.join()


def _quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    torch.set_num_threads(1)
