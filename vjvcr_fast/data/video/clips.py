"""Clips of video files: which windows, in which order, and batches of them on the training device.

A window only depends on (seed, stream, index), like a video of MovingMNIST. Each epoch visits every video once, in an
order of its own, and draws a first frame from those allowed. Decoder, cache, workers and batch size change nothing. So
a step number is enough to resume in the middle of an epoch.
"""

import concurrent.futures.thread
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vjvcr_fast.data.files import ahead, say
from vjvcr_fast.data.hashing import Orders, key, uniform
from vjvcr_fast.data.video import workers
from vjvcr_fast.data.video.cache import FrameCache
from vjvcr_fast.data.video.decode import VideoError, decode, for_dali, resolve
from vjvcr_fast.data.video.file import DamagedError, Source

THREADS = 2  # that read files for DALI, and that DALI uses itself


class Window(NamedTuple):
    """The window of index `number`. source: the index of its Source. choice: which of the Source's starts it has."""

    number: int
    source: int
    choice: int


class Clips(NamedTuple):
    """A batch. frames: (N, T, 3, H, W) uint8 on the device. target: (N, ...) of the windows, on the device."""

    frames: Tensor
    target: Tensor

    @property
    def speed(self) -> Tensor:
        """The target, under the name that it has in batches of MovingMNIST."""
        return self.target


class WindowSampler:
    """Chooses windows. Window i is from video i % len(self) in the order of epoch i // len(self). Its start is drawn
    uniformly from those that the video allows.

    seed: any integer. stream: any name; different streams have nothing in common. Raises ValueError if there are no
    sources, or for a source without starts.
    """

    def __init__(self, sources: Sequence[Source], seed: int, stream: str) -> None:
        empty = [source.name for source in sources if len(source.starts) == 0]
        if not sources or empty:
            raise ValueError(f"sources: {f'{empty[0]} has no window' if empty else 'none'}; at least one window each")
        self._choices = torch.tensor([len(source.starts) for source in sources])
        self._key = torch.tensor([key(seed, "window", stream)])
        self._orders = Orders(len(sources), seed, stream)

    def __len__(self) -> int:
        """The number of windows in an epoch, which is the number of videos."""
        return len(self._choices)

    def windows(self, start: int, n: int) -> list[Window]:
        """Windows start, ..., start + n - 1. Raises ValueError for start < 0 or n < 1."""
        if start < 0 or n < 1:
            raise ValueError(f"start={start}, n={n}: must be at least 0 and 1")
        indices = torch.arange(start, start + n)
        epochs = range(start // len(self), (start + n - 1) // len(self) + 1)
        order = torch.cat([self._orders.of(epoch) for epoch in epochs])
        sources = order[indices - epochs[0] * len(self)]
        choices = (uniform(self._key, indices)[:, 0] * self._choices[sources]).long()
        return [Window(*row) for row in zip(indices.tolist(), sources.tolist(), choices.tolist(), strict=True)]

    def instead(self, window: Window, unusable: set[int]) -> Window:
        """The window that replaces one whose video cannot be read: it is from the next good video of the epoch.

        Raises VideoError if no video is good.
        """
        epoch, place = divmod(window.number, len(self))
        order = self._orders.of(epoch).roll(-place).tolist()
        source = next((s for s in order if s not in unusable), None)
        if source is None:
            raise VideoError(f"none of {len(self)} videos can be read")
        u = uniform(self._key, torch.tensor([window.number]))[0, 0]
        return Window(window.number, source, int(u * self._choices[source]))


class VideoClips:
    """Windows of T frames from video files, as batches on a device: `batch` gives any of them, `batches` one after
    another, `in_order` every window once.

    sources: the videos. frames: T. size: (height, width) that frames are resized to. seed, stream: as in
    `WindowSampler`. backend: a decoder of `open_video`. cache: serves the videos it has; others are decoded. pool: the
    processes that decode for a CPU backend. on_bad: if a video cannot be read, "stop" raises its VideoError; "skip"
    takes the next good video's window instead, says so on stderr and notes the reason in `bad`, {name: reason}; other
    windows of the same video are used if they can be decoded. Decoding on a GPU always stops. mirror: a random
    half of the windows is mirrored, left to right.

    Raises ValueError for arguments out of range, for sources shorter than T or with different strides.
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
        mirror: bool = False,
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
        self._mirror = torch.tensor([key(seed, "mirror", stream)]) if mirror else None
        self.pool = pool or workers.Pool(0)
        self.bad: dict[str, str] = {}
        self._unusable: set[int] = set()
        self._cache = cache
        self._lines = [cache and cache.find(source) for source in sources]  # None: not cached
        self._on_gpu = self.backend == "dali" and self.device.type == "cuda" and not all(self._lines)

    def __len__(self) -> int:
        """The number of videos in an epoch."""
        return len(self.sampler)

    def batch(self, start_index: int, n: int) -> Clips:
        """Windows start_index, ..., start_index + n - 1."""
        return next(self.load([self.sampler.windows(start_index, n)], prefetch=0))

    def batches(self, step: int, n: int, rank: int = 0, world: int = 1) -> "ClipLoader":
        """Batches of n windows without end, from batch number `step` on. See `ClipLoader`."""
        return ClipLoader(self, n, step=step, rank=rank, world=world)

    def in_order(self, n: int) -> Iterator[Clips]:
        """Every window of every video once, in order, n at a time. The last batch may be smaller."""
        places = [(s, choice) for s, source in enumerate(self.sources) for choice in range(len(source.starts))]
        windows = [Window(number, *place) for number, place in enumerate(places)]
        return self.load((windows[at : at + n] for at in range(0, len(windows), n)), prefetch=2)

    def load(self, requests: Iterable[list[Window]], prefetch: int) -> Iterator[Clips]:
        """A batch for each list of windows, in order. `prefetch`: how many of them are started ahead."""
        if self._on_gpu:
            yield from self._decoded_on_gpu(requests, prefetch)
            return
        for windows, tasks in ahead(map(self._started, requests), prefetch):
            yield self._finished(windows, tasks)

    def _started(self, windows: list[Window]) -> tuple[list[Window], list[workers.Task | None]]:
        """The windows, and tasks that decode those that are not cached."""
        windows = [self.sampler.instead(w, self._unusable) if w.source in self._unusable else w for w in windows]
        return windows, [None if self._lines[w.source] else self._decode(w) for w in windows]

    def _finished(self, windows: list[Window], tasks: list[workers.Task | None]) -> Clips:
        if not any(tasks):
            return self._clips(windows, self._cached(windows))
        pinned = self.device.type == "cuda"
        out = torch.empty(len(windows), self.frames, 3, *self.size, dtype=torch.uint8, pin_memory=pinned)
        for i, task in enumerate(tasks):
            windows[i], out[i] = self._result(windows[i], task)
        return self._clips(windows, out)

    def _clips(self, windows: Sequence[Window], frames: Tensor) -> Clips:
        """The batch of these windows, given their frames as they are stored, on any device."""
        frames = frames.to(self.device, non_blocking=True)
        if self._mirror is not None:
            mirrored = uniform(self._mirror, torch.tensor([w.number for w in windows])) < 0.5
            mirrored = mirrored.view(-1, 1, 1, 1, 1).to(self.device, non_blocking=True)
            frames = torch.where(mirrored, frames.flip(-1), frames)
        targets = torch.stack([self.sources[w.source].targets[w.choice] for w in windows])
        return Clips(frames, targets.to(self.device, non_blocking=True))

    def _result(self, window: Window, task: workers.Task | None) -> tuple[Window, Tensor]:
        """The frames of a window, or of the window that replaces it."""
        tried: set[int] = set()
        while not self._lines[window.source]:
            try:
                return window, torch.from_numpy((task or self._decode(window)).result())
            except VideoError as error:
                if self.on_bad == "stop":
                    raise
                name = self.sources[window.source].name
                if name not in self.bad:
                    say(f"left out: {error}")
                    self.bad[name] = str(error)
                tried.add(window.source)
                if not isinstance(error, DamagedError):  # then other windows may be whole, and are used
                    self._unusable.add(window.source)
                window, task = self.sampler.instead(window, tried | self._unusable), None
        return window, self._cached([window])[0]

    def _decode(self, window: Window) -> workers.Task:
        path, frames = self._place(window)
        return self.pool.submit(path, decode, self.backend, frames, self.size)

    def _cached(self, windows: Sequence[Window]) -> Tensor:
        assert self._cache is not None
        lines = [(line, self._first(w)) for w in windows if (line := self._lines[w.source])]
        return self._cache.read(lines, self.frames)

    def _decoded_on_gpu(self, requests: Iterable[list[Window]], prefetch: int) -> Iterator[Clips]:
        """By DALI. Files are read ahead, decoded batch by batch."""
        from vjvcr_fast.data.video.dali import DaliDecoder

        decoder = DaliDecoder(self.device, THREADS, self.size)
        with ThreadPoolExecutor(THREADS) as readers:
            places = ((windows, [self._place(w) for w in windows]) for windows in requests)
            reading = ((windows, at, readers.map(for_dali, [path for path, _ in at])) for windows, at in places)
            for windows, at, contents in ahead(reading, max(prefetch, 1)):
                yield self._clips(windows, decoder.read(at, [*contents]))

    def _place(self, window: Window) -> tuple[Path, range]:
        """The file of a window and its frames in it."""
        source = self.sources[window.source]
        first = self._first(window) * source.stride
        return source.path, range(first, first + self.frames * source.stride, source.stride)

    def _first(self, window: Window) -> int:
        return int(self.sources[window.source].starts[window.choice])


class ClipLoader(Iterator[Clips]):
    """Iterates over batches (`Clips`) without end. A thread prepares batches while the caller trains.

    Of `world` processes, the one of this rank gets the windows k N world + rank N, ..., + N - 1 as batch k. To resume,
    only `step`, the number of the next batch, is needed: ClipLoader(clips, N, step=step).

    clips: what to load. batch: N. step: the first batch. prefetch: how many batches are prepared ahead.

    Raises ValueError for arguments out of range; `next` raises VideoError (see on_bad of `VideoClips`).
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
        self._batches = clips.load((clips.sampler.windows(start, batch) for start in starts), prefetch)
        self._thread = ThreadPoolExecutor(1)
        self._ahead = deque(self._thread.submit(_next, self._batches) for _ in range(prefetch))
        self.close = weakref.finalize(self, self._thread.shutdown, cancel_futures=True)

    def __next__(self) -> Clips:
        if not self.close.alive:
            raise StopIteration
        self._ahead.append(self._thread.submit(_next, self._batches))
        batch = self._ahead.popleft().result()
        self.step += 1
        return batch


def _next(batches: Iterator[Clips]) -> Clips:
    """The next batch; none if the interpreter is ending, which waits for all that was submitted."""
    if getattr(concurrent.futures.thread, "_shutdown", False):
        raise StopIteration
    return next(batches)
