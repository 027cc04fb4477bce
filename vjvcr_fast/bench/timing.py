"""How `vjvcr-fast bench` and the benchmarks measure time and memory.

The functions that are compared take turns, there and back, so that a slow spell of the machine meets all of them.
On a GPU a function is captured in a CUDA graph and replayed between two events, which leaves out the time that the host
needs to launch it. Before each replay we read a buffer twice as large as the L2 cache, so that inputs are not in it;
while the GPU does that, the host queues the replay.
"""

import contextlib
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16")  # float32 "highest", float32 with TF32 products, bfloat16 input
MOST_COPIES = 64  # of the inputs, however small they are

# -- Devices --------------------------------------------------------------------------------------------------------


class Cuda:
    """The current CUDA device."""

    precisions = PRECISIONS
    copied, side = 2 << 30, 8192  # for `ceilings`: bytes of the copied tensor, side of the multiplied matrices

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.torch_device).L2_cache_size
        self._swept = torch.ones(2 * self.cache_bytes, dtype=torch.uint8, device=self.torch_device).view(torch.float32)
        self._stream = torch.cuda.Stream()
        torch.cuda.synchronize()

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """Sends work to the stream that is captured. Run whatever you capture in it from the start: autograd goes back
        to the stream on which it first met a tensor."""
        return torch.cuda.stream(self._stream)

    def sweep(self) -> None:
        """Evicts the L2 cache. It only reads, since written data would leave the cache during what is timed."""
        self._swept.amax()

    def event(self) -> torch.cuda.Event:
        """Now, in the order of the GPU's work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two events, which have passed."""
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        torch.cuda.synchronize()

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """(replays everything that function launches, what it returned: every replay writes these tensors anew).

        Call both this and the replay inside `stream`. Raises RuntimeError if the function cannot be captured.
        """
        function()  # what it sets up once is not part of the graph
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outputs = function()
        finally:
            torch.cuda.set_stream(self._stream)  # a capture that fails leaves no stream set
        return graph.replay, outputs


class Host:
    """The CPU: its calls return when they are done."""

    precisions = ("fp32",)
    copied, side = 256 << 20, 2048

    def __init__(self) -> None:
        sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        kilobytes = [int(size.read_text().strip().removesuffix("K")) for size in sizes]
        self.torch_device, self.cache_bytes = torch.device("cpu"), max(kilobytes, default=0) << 10

    def stream(self) -> contextlib.AbstractContextManager[object]:
        """There is none."""
        return contextlib.nullcontext()

    def sweep(self) -> None:
        """Nothing: rotating inputs are not in the cache."""

    def event(self) -> float:
        """Now, in seconds."""
        return time.perf_counter()

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two events."""
        return 1e3 * (end - start)

    def synchronize(self) -> None:
        """Nothing: calls return when they are done."""

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """(the function itself, what it returned)."""
        return function, function()


Device = Cuda | Host


def current() -> Device:
    """The current GPU if there is one, else the host."""
    return Cuda() if torch.cuda.is_available() else Host()


class BusyElsewhere:
    """The share of the machine that other processes have used since this was made. Our children count as ours."""

    def __init__(self) -> None:
        self.started = self._seconds()

    def share(self) -> float:
        """From 0 to 1."""
        machine, own, wall = (now - then for now, then in zip(self._seconds(), self.started, strict=True))
        return max(0.0, (machine - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Busy seconds of all cores, busy seconds of this process and its running children, and the time."""
        cores = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        children = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process may have ended
                fields = stat.read_text().rpartition(")")[2].split()
                children += int(fields[11]) + int(fields[12]) if int(fields[1]) == os.getpid() else 0
        ticks = os.sysconf("SC_CLK_TCK")
        busy = (sum(cores) - cores[3] - cores[4]) / ticks  # without idle and iowait
        return busy, time.process_time() + children / ticks, time.perf_counter()


# -- Time -----------------------------------------------------------------------------------------------------------


class Region(NamedTuple):
    """What lies between two events: run() makes `passes` passes."""

    run: Callable[[], object]
    passes: int = 1


def copies(nbytes: int, cache_bytes: int) -> int:
    """How many copies of inputs of nbytes are twice as large as the cache; at most MOST_COPIES."""
    return min(max(1, math.ceil(2 * cache_bytes / nbytes)), MOST_COPIES)


class Rotating:
    """Calls function(inputs) with the next of `sets` each time, from number `first` on: more than the cache holds."""

    def __init__(self, function: Callable[[Any], Any], sets: Sequence[Any], first: int = 0) -> None:
        self.function, self.inputs = function, itertools.cycle([*sets[first:], *sets[:first]])

    def __call__(self) -> Any:
        """What the function returns for the next inputs."""
        return self.function(next(self.inputs))


def take_turns(
    device: Device, regions: dict[str, Region], seconds: float, fewest: int, most: int
) -> dict[str, list[float]]:
    """Milliseconds per pass, for every region one number a round. The rounds take about `seconds`; there are at least
    `fewest` and at most `most`, and one more in front, which does not count."""
    costs = {name: milliseconds * regions[name].passes for name, milliseconds in _round(device, regions).items()}
    # What one region gives back, a virtual machine's host may take away. To get it again takes 3 us a page: twice our
    # loss's own time after a reference of 7 GB. So what takes less than a second runs twice; the second run counts.
    twice = {name for name, cost in costs.items() if cost < 1e3} if isinstance(device, Host) else set()
    cost = sum(cost * (2 if name in twice else 1) for name, cost in costs.items())
    rounds = round(min(max(1e3 * seconds / max(cost, 1e-6), fewest), most))
    times: dict[str, list[float]] = {name: [] for name in regions}
    for i in range(rounds):
        # There and back, so that no region always follows the same neighbour, which may leave the chip hot or idle.
        names = list(regions) if i % 2 == 0 else list(reversed(regions))
        for name, milliseconds in _round(device, {name: regions[name] for name in names}, twice).items():
            times[name].append(milliseconds)
    return times


def _round(device: Device, regions: dict[str, Region], twice: Container[str] = ()) -> dict[str, float]:
    events = {}
    for name, region in regions.items():
        if name in twice:
            region.run()
        device.sweep()
        start = device.event()
        region.run()
        events[name] = start, device.event()
    device.synchronize()
    return {name: device.milliseconds(*pair) / regions[name].passes for name, pair in events.items()}


class Spread(NamedTuple):
    """Of times, in their unit. iqr: the interquartile range."""

    median: float
    least: float
    iqr: float


def spread(times: list[float]) -> Spread:
    """Of at least one time."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Spread(median, min(times), high - low)


def timed(
    device: Device, functions: dict[str, Callable[[], object]], seconds: float, fewest: int, most: int
) -> dict[str, dict[str, float]]:
    """What `take_turns` says of the functions, as the part of each one's row that goes to the file alone."""
    busy = BusyElsewhere()
    regions = {name: Region(function) for name, function in functions.items()}
    times = take_turns(device, regions, seconds, fewest, most)
    elsewhere = busy.share() if isinstance(device, Host) else 0.0
    found = {name: spread(of_one) for name, of_one in times.items()}
    return {
        name: {"_median_ms": x.median, "_iqr_ms": x.iqr, "_rounds": len(times[name]), "_busy_elsewhere": elsewhere}
        for name, x in found.items()
    }


# -- Memory, precision, ceilings ------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Gives the dtype for inputs. Inside, float32 products are TF32 for "tf32" and full float32 otherwise.

    It calls torch.set_float32_matmul_precision: if only torch.backends.cuda.matmul.fp32_precision is set, torch.compile
    of torch 2.11 refuses ("mix of the legacy and new APIs"). Raises RuntimeError if torch ignores the setting.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        if (torch.backends.cuda.matmul.fp32_precision == "tf32") != (name == "tf32"):
            raise RuntimeError(f"torch {torch.__version__} did not take the precision {name!r}")
        yield torch.bfloat16 if name == "bf16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


class Ceilings(NamedTuple):
    """What this machine reaches. copy: bytes/s of a copy in its memory, read and written together. products: flop/s of
    the product of two square matrices, by precision. On a CPU "fp32" is the faster of two libraries, which are there by
    name, too: torch.mm's, and oneDNN with weights in an order of its own. On an AMD EPYC torch.mm, which is
    MKL's, reaches less than half of oneDNN's rate."""

    copy: float
    products: dict[str, float]


def ceilings(device: Device) -> Ceilings:
    """Measured on random numbers, since zeros are faster."""
    source = torch.randint(-128, 128, (device.copied,), dtype=torch.int8, device=device.torch_device)
    target = torch.empty_like(source)
    copy = _rate(device, functools.partial(target.copy_, source), 2 * device.copied)
    del source, target
    products, side = {}, device.side
    for name in device.precisions:
        with precision(name) as dtype:
            a, b = (torch.randn(side, side, device=device.torch_device).to(dtype) for _ in range(2))
            products[name] = _rate(device, functools.partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * side**3)
    if isinstance(device, Host) and torch.backends.mkldnn.is_available():
        from torch.utils import mkldnn  # which compiles something when it is imported

        layer = mkldnn.to_mkldnn(torch.nn.Linear(side, side, bias=False).eval())
        with torch.no_grad():
            ordered = _rate(device, functools.partial(layer, torch.randn(side, side).to_mkldnn()), 2 * side**3)
        products |= {"torch.mm": products["fp32"], "oneDNN": ordered, "fp32": max(products["fp32"], ordered)}
    return Ceilings(copy, products)


def _rate(device: Device, run: Callable[[], Tensor], work: float) -> float:
    """Work per second."""
    times = take_turns(device, {"": Region(run)}, seconds=0.3, fewest=5, most=50)[""]
    return work / (1e-3 * statistics.median(times))
