"""Worker processes with a time limit for each task. A video that hangs or crashes its decoder does not end training."""

import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future, TimeoutError
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vjvcr_fast.data.files import cores, load, one_line
from vjvcr_fast.data.video.decode import VideoError, open_video

_STARTING = threading.Lock()  # processes start one after the other


class Task:
    """Work on one file, and its result once it is done."""

    def __init__(self, path: Path, future: "Future[Any]", pool: "Pool") -> None:
        self.path, self._future, self._pool = path, future, pool  # keeps the pool alive: it ends when nobody holds it

    def result(self) -> Any:
        """Waits for the result. Raises VideoError, naming the file, if the file cannot be read, takes too long or
        crashes the decoder."""
        try:
            return self._future.result()
        except TimeoutError:
            raise VideoError(f"{self.path}: reading it took longer than {self._pool.timeout:g} s") from None
        except (VideoError, ImportError, ValueError):
            raise
        except (BrokenExecutor, CancelledError) as error:  # not the file's fault
            raise RuntimeError(f"the processes that read videos have ended ({error})") from None
        except Exception as error:
            if died(error):
                raise VideoError(f"{self.path}: the process that read it ended ({error})") from None
            raise VideoError(f"{self.path}: {type(error).__name__}: {one_line(error)}") from None


class Pool:
    """Worker processes. They start with the first task, and a worker that is lost is replaced. A context manager.

    workers: the number of processes; -1: one for each core; 0: none, tasks run in the caller, without a time limit.
    timeout: seconds that a task may take before its process is killed. environment: variables to set in each worker.

    Raises ValueError for other values; ImportError, naming the extra, if pebble is missing.
    """

    def __init__(self, workers: int = -1, timeout: float = 60.0, environment: Mapping[str, str] | None = None) -> None:
        if workers < -1:
            raise ValueError(f"workers={workers}: must be -1 (one a core), 0 (none) or more")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: must be above 0 seconds")
        self.workers = cores() if workers == -1 else workers
        self.timeout, self._environment = timeout, environment or {}
        self._pool: Any = None
        self._unfinished: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()  # several loaders may share the pool, each from its own thread

    def submit(self, path: Path, function: Callable[..., Any], *arguments: Any) -> Task:
        """Runs function(path, *arguments) in a worker. The function must be a module's, so that it can be pickled."""
        return Task(path, self.schedule(function, path, *arguments), self)

    def schedule(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Runs function(*arguments) in a worker, for work that is not about a file."""
        if self.workers:
            future = self._started().schedule(function, args=arguments, timeout=self.timeout)
            with self._lock:
                self._unfinished.add(future)
            return future
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Ends the workers at once; tasks that are not done raise RuntimeError. A later task starts new workers."""
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
                pebble = load("pebble", "video")
                settings = {"initializer": _prepare, "initargs": (self._environment,), "context": _Context()}
                self._pool = pebble.ProcessPool(self.workers, **settings)
                self._end = weakref.finalize(self, _stop, self._pool, self._unfinished, self._lock)
            return self._pool


def died(error: Exception) -> bool:
    """Whether a task's error says that its process died. pebble, whose class this is, may not be installed."""
    return type(error).__name__ == "ProcessExpired"


def decode(path: Path, backend: str, frames: range, size: tuple[int, int]) -> Any:
    """Decodes frames of a file, resized to (height, width) `size`.

    Returns a numpy array (T, 3, H, W) uint8, which is cheaper to send between processes than a tensor.
    """
    return open_video(path, backend).frames(frames, size).contiguous().numpy()


class _Process(SpawnProcess):
    """A spawned process, because a forked one may hang if its parent has threads or uses CUDA. It does not import the
    caller's main module again, so that scripts need no `if __name__ == "__main__"`."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process


def _prepare(environment: Mapping[str, str]) -> None:
    """Runs first in each worker. pebble already makes workers ignore Ctrl-C, so that the parent ends them."""
    os.environ.update(environment)
    torch.set_num_threads(1)


def _stop(pool: Any, unfinished: "weakref.WeakSet[Future[Any]]", lock: threading.Lock) -> None:
    pool.stop()
    pool.join()
    with lock:
        futures = list(unfinished)
    for future in futures:  # pebble leaves them pending, and somebody may wait for them
        if not future.done():
            future.set_exception(CancelledError("the pool was closed"))
