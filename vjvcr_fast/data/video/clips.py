"""Clips of video files: which windows, in which order, and batches of them on the training device.

Every window is a pure function of (seed, stream, index), as every video of MovingMNIST is: video files are visited once
an epoch, in an order of its own, each with a first frame drawn from those that are allowed. Decoder, cache, workers and
batch size change nothing of it, and a stopped run goes on in the middle of an epoch by its step alone.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjvcr_fast.data.hashing import key, splitmix, uniform
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.cache import FrameCache
from vjvcr_fast.data.video.decode import VideoError, resolve


class Source(NamedTuple):
    """A video file. name: its place inside the data set; frames: how many it has, counting every stride-th alone;
    starts: (S,) int64, first frames that windows may have, counted alike; targets: (S, ...), what is asked of each."""

    path: Path
    name: str
    frames: int
    starts: Tensor
    targets: Tensor
    stride: int = 1


class Window(NamedTuple):
    """The number-th window: `source` is a number of a Source, `choice` one of its starts."""

    number: int
    source: int
    choice: int


class Clips(NamedTuple):
    """frames: (N, T, 3, H, W) uint8 on the device. target: (N, ...) of the windows, on the device."""

    frames: Tensor
    target: Tensor

    @property
    def speed(self) -> Tensor:
        return self.target


class WindowSampler:
    """Window i is of video i % len(self) in the order of epoch i // len(self), its start uniform among those allowed.

    seed, stream: any integer, any name; streams have nothing in common. Raises ValueError without sources, or for a
    source without starts.
    """

    def __init__(self, sources: Sequence[Source], seed: int, stream: str) -> None:
        empty = [source.name for source in sources if len(source.starts) == 0]
        if not sources or empty:
            raise ValueError(f"sources: {f'{empty[0]} has no window' if empty else 'none'}; at least one window each")
        self.seed, self.stream = seed, stream
        self._choices = torch.tensor([len(source.starts) for source in sources])
        self._key = torch.tensor([key(seed, "window", stream)])
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Windows in one epoch: the number of videos."""
        return len(self._choices)

    def windows(self, start: int, n: int) -> list[Window]:
        """Windows start .. start + n - 1. Raises ValueError for start < 0 or n < 1."""
        if start < 0 or n < 1:
            raise ValueError(f"start={start}, n={n}: must be at least 0 and 1")
        indices = torch.arange(start, start + n)
        epochs = range(start // len(self), (start + n - 1) // len(self) + 1)
        order = torch.cat([self._order(epoch) for epoch in epochs])
        sources = order[indices - epochs[0] * len(self)]
        choices = (uniform(self._key, indices)[:, 0] * self._choices[sources]).long()
        return [Window(*row) for row in zip(indices.tolist(), sources.tolist(), choices.tolist(), strict=True)]

    def instead(self, window: Window, unusable: set[int]) -> Window:
        """The window that stands in for one whose video cannot be read: of the next good video of its epoch.

        Raises VideoError where no video is good.
        """
        epoch, place = divmod(window.number, len(self))
        order = self._order(epoch).roll(-place).tolist()
        source = next((s for s in order if s not in unusable), None)
        if source is None:
            raise VideoError(f"none of {len(self)} videos can be read")
        u = uniform(self._key, torch.tensor([window.number]))[0, 0]
        return Window(window.number, source, int(u * self._choices[source]))

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:
            # The hash is one-to-one, so nothing ties.
            order = torch.argsort(splitmix(key(self.seed, "order", epoch, self.stream), torch.arange(len(self))))
            self._orders = dict([*self._orders.items()][-1:]) | {epoch: order}
        return order


class VideoClips:
    """Windows of T frames from video files, as batches on a device: `batch` for any, `batches` for one after another.

    sources: the videos. frames: T. size: (height, width) that frames are resized to. backend: of
    `vjvcr_fast.data.video.decode`. cache: serves the videos it has, on the device if it is small; others are decoded.
    pool: the processes that decode for a CPU backend. on_bad: "stop" raises the VideoError of a video that cannot be
    read; "skip" takes the next good video's window in its place and notes it in `bad`, {name: reason}, but where a GPU
    decodes, which stops.

    Raises ValueError for arguments out of range, for sources shorter than T.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        frames: int,
        size: tuple[int, int],
        seed: int,
        stream: str,
        backend: str = "auto",
        device: str | torch.device = "cpu",
        cache: FrameCache | None = None,
        pool: workers.Pool | None = None,
        on_bad: str = "stop",
    ) -> None:
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"on_bad={on_bad!r}: choose stop or skip")
        long = [s for s in sources if len(s.starts) and int(s.starts.max()) + frames > s.frames]
        if len({source.stride for source in sources}) > 1:
            raise ValueError("sources: their strides differ")
        if frames < 1 or long:
            raise ValueError(f"frames={frames}: {long[0].name} ends before its last window" if long else "at least 1")
        self.sources, self.frames, self.size = list(sources), frames, size
        self.device, self.on_bad = torch.device(device), on_bad
        self.backend = resolve(backend, self.device)
        self.sampler = WindowSampler(sources, seed, stream)
        self.pool = pool or workers.Pool(0)
        self.bad: dict[str, str] = {}
        self._unusable: set[int] = set()
        self._cached = cache.serving(sources, self.device) if cache is not None else None

    def __len__(self) -> int:
        """Videos in one epoch."""
        return len(self.sampler)

    def batch(self, start_index: int, n: int) -> Clips:
        """Windows start_index .. start_index + n - 1."""
        return next(iter(self._clips([self.sampler.windows(start_index, n)], prefetch=0)))

    def batches(self, step: int, n: int, rank: int = 0, world: int = 1) -> "ClipLoader":
        """Batches of n, from the step-th on, without end; of `world` processes each has n, one after another."""
        return ClipLoader(self, n, step=step, rank=rank, world=world)

    def in_order(self, n: int) -> Iterator[Clips]:
        """Every window of every video once, in their order, n at a time; the last batch may be smaller."""
        places = [(s, choice) for s, source in enumerate(self.sources) for choice in range(len(source.starts))]
        windows = [Window(number, *place) for number, place in enumerate(places)]
        return self._clips((windows[at : at + n] for at in range(0, len(windows), n)), prefetch=2)

    def _clips(self, requests: Iterable[list[Window]], prefetch: int) -> Iterator[Clips]:
        """The windows of every request, in their order; `prefetch` requests are worked on ahead."""
        if self._on_device():
            yield from self._decoded_by_dali(requests, prefetch)
            return
        ahead: list[tuple[list[Window], list[workers.Task | None]]] = []
        for request in requests:
            ahead.append(self._started(request))
            if len(ahead) > prefetch:
                yield self._finished(*ahead.pop(0))
        for windows, tasks in ahead:
            yield self._finished(windows, tasks)

    def _started(self, windows: list[Window]) -> tuple[list[Window], list[workers.Task | None]]:
        windows = [self.sampler.instead(w, self._unusable) if w.source in self._unusable else w for w in windows]
        return windows, [None if self._is_cached(w) else self._decode(w) for w in windows]

    def _finished(self, windows: list[Window], tasks: list[workers.Task | None]) -> Clips:
        """Waits for the tasks; windows without one come from the cache."""
        if self._cached is not None and not any(tasks):
            return Clips(self._cached.read(self._places(windows), self.frames), self._targets(windows))
        pinned = self.device.type == "cuda"
        out = torch.empty(len(windows), self.frames, 3, *self.size, dtype=torch.uint8, pin_memory=pinned)
        for i, task in enumerate(tasks):
            windows[i], clip = self._result(windows[i], task)
            out[i] = clip
        return Clips(out.to(self.device, non_blocking=True), self._targets(windows))

    def _result(self, window: Window, task: workers.Task | None) -> tuple[Window, Tensor]:
        while True:
            if self._cached is not None and self._is_cached(window):
                return window, self._cached.read(self._places([window]), self.frames)[0]
            source = self.sources[window.source]
            try:
                return window, workers.received((task or self._decode(window)).result())
            except VideoError as error:
                if self.on_bad == "stop":
                    raise
                self.bad[source.name] = str(error)
                self._unusable.add(window.source)
                window, task = self.sampler.instead(window, self._unusable), None

    def _decode(self, window: Window) -> workers.Task:
        source = self.sources[window.source]
        first = int(source.starts[window.choice])
        return self.pool.submit(source.path, workers.decode, self.backend, first, self.frames, source.stride, self.size)

    def _decoded_by_dali(self, requests: Iterable[list[Window]], prefetch: int) -> Iterator[Clips]:
        from vjvcr_fast.data.video.dali import DaliClips

        asked: list[list[Window]] = []

        def places() -> Iterator[list[tuple[Path, int]]]:
            for request in requests:
                asked.append(request)
                sources = [(self.sources[w.source], w.choice) for w in request]
                yield [(source.path, int(source.starts[choice]) * source.stride) for source, choice in sources]

        stride = self.sources[0].stride
        for frames in DaliClips(
            places(), self.frames, self.size, self.device, prefetch=max(prefetch, 1), stride=stride
        ):
            yield Clips(frames, self._targets(asked.pop(0)))

    def _on_device(self) -> bool:
        """Whether the GPU decodes: where DALI is to, and not everything is in the cache."""
        complete = self._cached is not None and self._cached.complete
        return self.backend == "dali" and self.device.type == "cuda" and not complete

    def _is_cached(self, window: Window) -> bool:
        return self._cached is not None and self._cached.has(window.source)

    def _places(self, windows: Sequence[Window]) -> list[tuple[int, int]]:
        return [(w.source, int(self.sources[w.source].starts[w.choice])) for w in windows]

    def _targets(self, windows: Sequence[Window]) -> Tensor:
        targets = torch.stack([self.sources[w.source].targets[w.choice] for w in windows])
        return targets.to(self.device, non_blocking=True)


class ClipLoader:
    """An iterator of `Clips`, batch after batch without end, worked on ahead while the caller trains.

    Batch k of rank r holds the windows k N world + r N .. + N - 1. `step`, the number of the next batch, is all there
    is to resume from: ClipLoader(clips, N, step=step).

    clips: what to load. batch: N. step: the first batch. rank, world: of several processes. prefetch: batches ahead.

    Raises ValueError for arguments out of range; from `next`, VideoError (`on_bad`).
    """

    def __init__(
        self, clips: VideoClips, batch: int, *, step: int = 0, rank: int = 0, world: int = 1, prefetch: int = 2
    ) -> None:
        if batch < 1 or step < 0 or prefetch < 0:
            raise ValueError(f"batch={batch}, step={step}, prefetch={prefetch}: must be at least 1, 0 and 0")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}, world={world}: rank must be from 0 to world - 1")
        self.step = step
        starts = ((k * world + rank) * batch for k in count(step))
        loaded = clips._clips((clips.sampler.windows(start, batch) for start in starts), prefetch)
        self._batches: Any = _Ahead(loaded, prefetch) if prefetch else loaded

    def __iter__(self) -> "ClipLoader":
        return self

    def __next__(self) -> Clips:
        batch = next(self._batches)
        self.step += 1
        return batch

    def close(self) -> None:
        """Stops working ahead."""
        self._batches.close()

    def __del__(self) -> None:
        if hasattr(self, "_batches"):
            self.close()


class _Ahead:
    """Takes items from an iterator in a thread, at most `depth` before they are asked for."""

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._queue: queue.Queue[Callable[[], Any]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), daemon=True)
        self._thread.start()

    def __iter__(self) -> "_Ahead":
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        try:
            return self._queue.get()()
        except BaseException:
            self._closed.set()  # nothing comes after it
            raise

    def close(self) -> None:
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._thread.join()

    def _work(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._put(partial(workers.given, item))
                if self._closed.is_set():
                    return
            self._put(partial(workers.refused, StopIteration()))
        except BaseException as error:
            self._put(partial(workers.refused, error))

    def _put(self, item: Callable[[], Any]) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                pass
