"""Worker processes with a time limit for each task. A video that hangs or crashes its decoder does not end training.

decord and torchcodec must not be in one process: decord shows its libraries to the whole process, and the FFmpeg that
torchcodec uses then calls decord's libdav1d, of another version, instead of its own. The process dies at the first AV1
video. So each worker serves one of them. A task that needs the other raises `Elsewhere`, and the pool runs it again in
a worker that serves that one.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future, InvalidStateError, TimeoutError
from contextvars import ContextVar
from functools import partial
from multiprocessing import util
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vjvcr_fast.data.files import cores, load, note, one_line
from vjvcr_fast.data.video.file import VideoError

MODULES = {"decord": "decord", "torchcodec": "torchcodec.decoders"}  # of the decoders that workers serve
LOADING = "loading torchcodec: some seconds in each process, once"
_STARTING = threading.Lock()  # processes start one after the other
_tried: ContextVar[dict[str, Exception] | None] = ContextVar("_tried", default=None)
_serves: str | None = None  # set once, when a worker starts


class Elsewhere(Exception):  # noqa: N818 - not an error, but a request
    """A task must run again in a worker that serves `decoder`. tried: the decoders that have refused its file before,
    with their errors."""

    def __init__(self, decoder: str, tried: dict[str, Exception]) -> None:
        super().__init__(decoder, tried)
        self.decoder, self.tried = decoder, tried


def serves() -> str | None:
    """The decoder that this worker process serves; None in a process that is no worker."""
    return _serves


def tried() -> dict[str, Exception] | None:
    """In a task: the decoders that have refused its file, with their errors. None outside of tasks, where nobody would
    catch `Elsewhere`."""
    return _tried.get()


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
        finally:
            del self  # the future holds the error, which holds this frame: the pool would not end with the task


class Pool:
    """Worker processes. They start with the first task, and a worker that is lost is replaced. A context manager.

    workers: the number of processes; -1: one for each core; 0: none, tasks run in the caller, without a time limit.
    timeout: seconds that a task may take before its process is killed. environment: variables to set in each worker.
    backend: of most files. Workers serve torchcodec if it is "torchcodec", else decord. From the first file on that
    only torchcodec reads, new workers take their place, which serve it and read all files with it. A file that the
    workers' decoder cannot read goes to one more group of workers, which serves the other; with workers=0, to a
    process of its own.

    Raises ValueError for other values; ImportError, naming the extra, if pebble is missing.
    """

    def __init__(
        self,
        workers: int = -1,
        timeout: float = 60.0,
        environment: Mapping[str, str] | None = None,
        backend: str = "auto",
    ) -> None:
        if workers < -1:
            raise ValueError(f"workers={workers}: must be -1 (one a core), 0 (none) or more")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: must be above 0 seconds")
        self.workers = cores() if workers == -1 else workers
        self.timeout, self._environment = timeout, environment or {}
        self._decoder = "torchcodec" if backend == "torchcodec" else "decord"
        self._groups: _Groups | None = None
        self._lock = threading.Lock()  # several loaders may share the pool, each from its own thread

    def submit(self, path: Path, function: Callable[..., Any], *arguments: Any) -> Task:
        """Runs function(path, *arguments) in a worker. The function must be a module's, so that it can be pickled."""
        return Task(path, self.schedule(function, path, *arguments), self)

    def schedule(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Runs function(*arguments) in a worker, for work that is not about a file."""
        future: Future[Any] = Future()
        if self.workers:
            self._started().run(future, self.timeout, None, {}, function, arguments)
            return future
        try:
            future.set_result(_call({}, function, *arguments))
        except Elsewhere as request:
            self._started().run(future, self.timeout, request.decoder, request.tried, function, arguments)
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Ends the workers at once; tasks that are not done raise RuntimeError. A later task starts new workers."""
        with self._lock:
            end = self._end if self._groups is not None else None
            self._groups = None
        if end is not None:
            end()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> "_Groups":
        with self._lock:
            if self._groups is None:
                self._groups = _Groups(max(self.workers, 1), self._environment, self._decoder)
                # Not weakref's: a child of multiprocessing only calls these when it ends, before it waits for workers.
                self._end = util.Finalize(self, self._groups.end, exitpriority=1)
            return self._groups


class _Groups:
    """The workers of a pool, one group of processes for each decoder that was needed."""

    def __init__(self, workers: int, environment: Mapping[str, str], decoder: str) -> None:
        self._pebble = load("pebble", "video")
        self._workers, self._environment, self._first = workers, environment, decoder
        self._running: dict[str, Any] = {}
        self._closed: list[tuple[Any, threading.Thread]] = []  # that finish the tasks they have
        self._unfinished: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._lock, self._ended = threading.RLock(), False  # garbage collection, inside of `run`, may call `end`
        self._process = os.getpid()

    def run(
        self,
        future: "Future[Any]",
        timeout: float,
        decoder: str | None,
        tried: dict[str, Exception],
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
    ) -> None:
        """Runs function(*arguments) in a worker that serves `decoder`, None: any. `future` gets the result."""
        with self._lock:
            if self._ended:
                return future.set_exception(CancelledError("the pool was closed"))
            self._unfinished.add(future)
            group = self._group(decoder)
            inner = group.schedule(_call, args=(tried, function, *arguments), timeout=timeout)
        inner.add_done_callback(partial(self._done, future, timeout, function, arguments))

    def _done(
        self,
        future: "Future[Any]",
        timeout: float,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        inner: "Future[Any]",
    ) -> None:
        """Passes a result on. Called from a thread of pebble's."""
        error = CancelledError("the pool was closed") if inner.cancelled() else inner.exception()
        try:
            if isinstance(error, Elsewhere):
                return self.run(future, timeout, error.decoder, error.tried, function, arguments)
        except BaseException as failure:  # would go unnoticed here, and somebody waits
            error = failure
        with contextlib.suppress(InvalidStateError):  # the pool was closed meanwhile
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(inner.result())

    def _group(self, decoder: str | None) -> Any:
        decoder = decoder or self._first
        group = self._running.get(decoder)
        if group is not None and not group.active:  # a process was killed that had no task, and pebble gave up
            self._retire(decoder)
        if decoder not in self._running:
            if (self._first, decoder) == ("decord", "torchcodec"):
                self._first = "torchcodec"
                self._retire("decord")
            if decoder == "torchcodec":
                note(LOADING)
            settings = {"initializer": _prepare, "initargs": (self._environment, decoder), "context": _Context()}
            self._running[decoder] = self._pebble.ProcessPool(self._workers, **settings)
        return self._running[decoder]

    def _retire(self, decoder: str) -> None:
        """Lets the workers that serve it finish what they have, and then end."""
        group = self._running.pop(decoder, None)
        if group is not None:
            group.close()
            self._closed.append((group, threading.Thread(target=group.join, daemon=True)))
            self._closed[-1][1].start()

    def end(self) -> None:
        """Ends all workers at once. What waits for a result gets an error."""
        if self._process != os.getpid():  # a fork ends; the workers are its parent's
            return
        with self._lock:
            self._ended = True
        for group in [*self._running.values(), *(group for group, _ in self._closed)]:
            group.stop()
        for group in self._running.values():
            with contextlib.suppress(RuntimeError):  # garbage collection in a thread of pebble's
                group.join()
        for _, thread in self._closed:
            thread.join()
        for future in list(self._unfinished):  # pebble leaves them pending
            with contextlib.suppress(InvalidStateError):
                future.set_exception(CancelledError("the pool was closed"))


def died(error: Exception) -> bool:
    """Whether a task's error says that its process died. pebble, whose class this is, may not be installed."""
    return type(error).__name__ == "ProcessExpired"


def _call(refused: dict[str, Exception], function: Callable[..., Any], *arguments: Any) -> Any:
    token = _tried.set(refused)
    try:
        return function(*arguments)
    finally:
        _tried.reset(token)


class _Process(SpawnProcess):
    """A spawned process, because a forked one may hang if its parent has threads or uses CUDA. It does not import the
    caller's main module again, so that scripts need no `if __name__ == "__main__"`."""

    def start(self) -> None:
        """Also in a daemon, such as a worker of a DataLoader. Python lets those have no children, which might outlive
        them; ours do not (`_end_with_parent`)."""
        settings: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
        daemon = settings.pop("daemon", None)
        try:
            super().start()
        finally:
            if daemon is not None:
                settings["daemon"] = daemon

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        """Inherits that Ctrl-C is blocked. pebble makes workers ignore it, but only once they have imported torch."""
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Context(SpawnContext):
    """Keeps the locks of a pool. pebble drops them before it ends the workers, and one that is still starting would
    print a traceback because it does not find them."""

    Process = _Process

    def __init__(self) -> None:
        self._locks: list[Any] = []

    def RLock(self) -> Any:  # noqa: N802
        self._locks.append(super().RLock())
        return self._locks[-1]


def _prepare(environment: Mapping[str, str], decoder: str) -> None:
    """Runs first in each worker. pebble already makes workers ignore Ctrl-C, so that the parent ends them."""
    global _serves
    _serves = decoder
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends a worker that hangs in a library, where Python cannot act
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Importing torchcodec takes a second, 3 s if Python has to compile it first, several times that on a busy machine.
    # Nine tenths are torch._dynamo, which it imports. So not in a task, whose time is limited.
    if decoder == "torchcodec":
        with contextlib.suppress(ImportError):  # the task says it
            load(MODULES[decoder], decoder)


def _end_with_parent() -> None:
    """Also if the parent is killed while this process hangs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
