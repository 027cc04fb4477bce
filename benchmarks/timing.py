"""How a CUDA GPU is timed: graphs replayed between events, inputs that are not in the cache, regions in turns.

A region is what lies between two events: several passes, each over its own copy of the inputs, replayed as one CUDA
graph, so that the host's launches do not count. Before each region the L2 cache is swept by reading a buffer of twice
its size; the host queues the region meanwhile, so its start does not count either. Regions take turns, there and back.
"""

import contextlib
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16")  # float32 "highest", float32 with TF32 products, bfloat16 input
MOST_COPIES = 64  # of the inputs, however small
COPIED, SIDE = 2 << 30, 8192  # ceilings: bytes of the tensor that is copied, side of the matrices that are multiplied
HOST_COPIED, HOST_SIDE = 256 << 20, 2048  # the same for a CPU


class Region(NamedTuple):
    """What is timed: run() makes `passes` passes."""

    run: Callable[[], object]
    passes: int = 1


class Device(Protocol):
    """What timing needs of a device. `Cuda` is the one that counts; tests put the host in its place."""

    torch_device: torch.device
    cache_bytes: int

    def stream(self) -> AbstractContextManager[object]: ...
    def sweep(self) -> None: ...
    def event(self) -> Any: ...
    def milliseconds(self, start: Any, end: Any) -> float: ...
    def synchronize(self) -> None: ...
    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]: ...


class Cuda:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._swept = torch.ones(2 * self.cache_bytes, dtype=torch.uint8, device=self.torch_device).view(torch.float32)
        self._stream = torch.cuda.Stream()
        torch.cuda.synchronize()

    def stream(self) -> AbstractContextManager[object]:
        """Within it work goes to the stream that is captured. What is captured must have run there alone: autograd
        returns to the stream on which it first met a tensor."""
        return torch.cuda.stream(self._stream)

    def sweep(self) -> None:
        """Evicts the L2 cache. Reads only: what is written would have to leave the cache within the region."""
        self._swept.amax()

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """(replay of all that function launches, what it returned: tensors that every replay writes anew). Both this
        and the replay are called within `stream`.

        Raises RuntimeError for what cannot be captured.
        """
        function()  # what is set up once is not part of the graph
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = function()
        finally:
            torch.cuda.set_stream(self._stream)  # a capture that fails leaves none
        return graph.replay, outputs


class Host:
    """The CPU, whose calls return when they are done."""

    def __init__(self) -> None:
        self.torch_device, self.cache_bytes = torch.device("cpu"), _largest_cache()

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def sweep(self) -> None: ...

    def event(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def synchronize(self) -> None: ...

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        return function, function()


def _largest_cache() -> int:
    """Bytes of the largest cache of a core, shared or not; 0 where Linux does not say."""
    found = [0]
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(size.read_text().strip().removesuffix("K")) << 10)
    return max(found)


class BusyElsewhere:
    """The share of the machine that other processes use, from here on; 0 where there is no /proc/stat."""

    def __init__(self) -> None:
        self.started = self._seconds()

    def share(self) -> float:
        machine, own, wall = (now - then for now, then in zip(self._seconds(), self.started, strict=True))
        return max(0.0, (machine - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Busy seconds of all processors and of this process with its children, and the time."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            fields = [0] * 8
        idle = fields[3] + fields[4]
        own = time.process_time() + _ticks_of_children() / os.sysconf("SC_CLK_TCK")
        return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), own, time.perf_counter()


def _ticks_of_children() -> int:
    """Processor time of the processes that this one has started and that run still."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may have ended since
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[1]) == os.getpid() else 0
    return ticks


def copies(nbytes: int, cache_bytes: int) -> int:
    """Of inputs of nbytes, for one region: together twice the cache, but MOST_COPIES at most."""
    return min(max(1, math.ceil(2 * cache_bytes / nbytes)), MOST_COPIES)


class Rotating:
    """Calls function(inputs) with one set of inputs after the other, from the `first` on: more than the cache holds."""

    def __init__(self, function: Callable[[Any], Any], sets: Sequence[Any], first: int = 0) -> None:
        self.function, self.sets, self.next = function, sets, first

    def __call__(self) -> Any:
        inputs = self.sets[self.next % len(self.sets)]
        self.next += 1
        return self.function(inputs)


def take_turns(
    device: Device, regions: dict[str, Region], seconds: float, fewest: int, most: int
) -> dict[str, list[float]]:
    """Milliseconds of a pass: for every region one number a round. As many rounds as take about `seconds`, but not
    fewer or more than these; one more, the first, does not count."""
    cost = sum(milliseconds * regions[name].passes for name, milliseconds in _round(device, regions).items())
    rounds = round(min(max(1e3 * seconds / max(cost, 1e-6), fewest), most))
    times: dict[str, list[float]] = {name: [] for name in regions}
    for i in range(rounds):
        # There and back: no region always follows the same neighbour, which may leave the chip hot or idle.
        names = list(regions) if i % 2 == 0 else list(reversed(regions))
        for name, milliseconds in _round(device, {name: regions[name] for name in names}).items():
            times[name].append(milliseconds)
    return times


def _round(device: Device, regions: dict[str, Region]) -> dict[str, float]:
    events = {}
    for name, region in regions.items():
        device.sweep()
        start = device.event()
        region.run()
        events[name] = start, device.event()
    device.synchronize()
    return {name: device.milliseconds(*pair) / regions[name].passes for name, pair in events.items()}


class Spread(NamedTuple):
    """Of times, in their unit; iqr is the interquartile range."""

    median: float
    least: float
    iqr: float


def spread(times: list[float]) -> Spread:
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Spread(median, min(times), high - low)


# -- Memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], Any], device: Device) -> tuple[Any, int]:
    """(what function returns, the most bytes it holds at once beyond what was there before)."""
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return outputs, peak


# -- Precision ------------------------------------------------------------------------------------------------------


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype of inputs; within it float32 products are TF32 for "tf32" and full float32 for the others.

    Set by torch.set_float32_matmul_precision: where torch.backends.cuda.matmul.fp32_precision alone is set,
    torch.compile of torch 2.11 refuses ("mix of the legacy and new APIs").
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        if (torch.backends.cuda.matmul.fp32_precision == "tf32") != (name == "tf32"):
            raise RuntimeError(f"torch {torch.__version__} did not take the precision {name!r}")
        yield torch.bfloat16 if name == "bf16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


# -- Ceilings -------------------------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What this machine reaches: bytes/s, read and written together, of a copy within its memory; flop/s of the product
    of two matrices of SIDE x SIDE for each of PRECISIONS."""

    copy: float
    products: dict[str, float]


def ceilings(
    device: Device, copied: int = COPIED, side: int = SIDE, precisions: Sequence[str] = PRECISIONS
) -> Ceilings:
    """Measured on random numbers: zeros are faster. Medians."""
    source = torch.randint(-128, 128, (copied,), dtype=torch.int8, device=device.torch_device)
    target = torch.empty_like(source)
    products = {}
    copy = _rate(device, functools.partial(target.copy_, source), 2 * copied)
    del source, target
    for name in precisions:
        with precision(name) as dtype:
            a, b = (torch.randn(side, side, device=device.torch_device).to(dtype) for _ in range(2))
            products[name] = _rate(device, functools.partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * side**3)
    return Ceilings(copy, products)


def _rate(device: Device, run: Callable[[], Tensor], work: float) -> float:
    """Work a second."""
    times = take_turns(device, {"": Region(run)}, seconds=0.3, fewest=5, most=50)[""]
    return work / (1e-3 * statistics.median(times))
