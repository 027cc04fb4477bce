"""A whole training step, data included: ours against the way a paper's code would be written, eager and compiled.

    pytest benchmarks/bench_training.py                        checks and times
    pytest benchmarks/bench_training.py --benchmark-disable    checks alone

`reference` is eager float32: the losses of reference.py, z* through autograd, torch's default Adam, videos one by one
from a DataLoader (MovingMNIST renders them, files are decoded). `compiled reference` has model and losses compiled, and
on a GPU bfloat16 autocast. `ours` is what `vjvcr-fast train` does, eager on a CPU, compiled on a GPU; `ours compiled`
is compiled on a CPU as well. All start from the same weights; their losses on the same batch are compared before
anything is timed. With a sparse latent those weights have been trained for BEGUN steps, since z* of random weights is
another problem than what all but the first steps of a training meet; --full has both. The weight of the L1 term is the
one that training begins with. `energy of z*` is how far ours is above the reference's, relatively: in a training it
must not be.

`parts`: what share of our step each part takes. A part's own time, without that of parts inside it.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from records import Row
from timing import BusyElsewhere, Cuda, Host, Region, peak_bytes, spread, take_turns
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vjvcr_fast import native, reference
from vjvcr_fast.config import Config, Latent, latent, override, preset
from vjvcr_fast.data.video.cache import FrameCache, fill
from vjvcr_fast.data.video.clips import Clips, Source, VideoClips
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.latents import SparseLatent
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.processes import Processes
from vjvcr_fast.training.step import Step, split_frames
from vjvcr_fast.training.telemetry import Telemetry

SECONDS, SECONDS_FULL, ROUNDS, WARM = 3.0, 15.0, (3, 60), 3
SLOW = 2.0  # seconds of a step that needs no warming up
BEGUN = 100
BUDGET = 120.0  # seconds of the GPU that begin nothing new after
SAME = {"fp32": 1e-4, "other z*": 2e-3, "bf16": 0.02}  # losses of the first step
ENERGY = {True: 1e-4, False: 1e-2}  # by how much that of our z* may be higher, in a training and before one
# (preset, latent) -> our goals: against the eager reference on a CPU; against (eager, compiled) on a GPU.
CPU_GOALS = {"moving-mnist": 1.15, "moving-mnist-stochastic sparse-high": 3.0}
GPU_GOALS = {
    "moving-mnist": (3.0, 1.3),
    "moving-mnist-stochastic sparse-high": (10.0, None),
    "clevrer": (3.0, None),
}
NAMES = [*GPU_GOALS, "cater"]

pytest.importorskip("mlxtend", reason="the extra train is not installed")


@pytest.fixture(scope="module")
def device() -> Cuda | Host:
    return Cuda() if torch.cuda.is_available() else Host()


@pytest.fixture(scope="module")
def began() -> float:
    return time.monotonic()


@pytest.fixture
def in_time(began: float, full: bool, report: Any, request: pytest.FixtureRequest) -> None:
    """On a GPU, where compiling takes its time, what does not fit into BUDGET is left out and says so."""
    if torch.cuda.is_available() and not full and time.monotonic() - began > BUDGET:
        note = f"left out: the benchmarks' {BUDGET:.0f} s were over"
        report([{"preset": request.node.name, "provider": "ours", "note": note}])
        pytest.skip(note)


def config_of(name: str, device: Cuda | Host) -> Config:
    """Of a preset, full on a GPU and mini on a CPU, with the latent that is named behind it."""
    base, _, kind = name.partition(" ")
    config = preset(base if isinstance(device, Cuda) else f"{base}-mini")
    return latent(config, kind) if kind else config


# -- Data -----------------------------------------------------------------------------------------------------------


class OneByOne(Dataset[Tensor]):
    """Videos by their number, (T, C, S, S): what a DataLoader asks for."""

    def __init__(self, videos: Any, count: int) -> None:
        self.videos, self.count = videos, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        return self.videos.batch(number, 1).frames[0]


class InMemory:
    """Frames that are there already, for presets whose data set is not: `cater` has no decoder in this measurement."""

    def __init__(self, config: Config, device: torch.device) -> None:
        data, generator = config.data, torch.Generator().manual_seed(0)
        shape = (config.train.batch, data.frames_in + data.frames_out, 3, data.canvas, data.canvas)
        self.frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
        self.actions = torch.rand(shape[0], 14, shape[1], generator=generator).lt(0.2).float().to(device)
        self.device = device

    def batch(self, start: int, n: int) -> Clips:
        at = torch.arange(start, start + n, device=self.device) % len(self.frames)
        return Clips(self.frames[at], self.actions[at])

    def batches(self, step: int, n: int) -> Iterator[Clips]:
        while True:
            yield self.batch(step * n, n)
            step += 1


def sources_of(config: Config, device: torch.device, folder: Path) -> tuple[Any, Any]:
    """(ours, what the reference's DataLoader reads from) of the same videos."""
    if config.data.dataset == "cater":
        return InMemory(config, device), InMemory(config, torch.device("cpu"))
    if config.data.dataset == "moving-mnist":
        digits = build_data(override(config, {"data.root": ""}))[0]
        return tuple(build_videos(config, digits, "train", where) for where in (device, torch.device("cpu")))
    from bench_decode import generate

    paths = [folder / f"video_{i:05d}.mp4" for i in range(4)]
    for i, path in enumerate(paths):
        generate(path, i)
    size, frames = (config.data.canvas,) * 2, config.data.frames_in + config.data.frames_out
    count = -(-128 // config.data.stride)
    starts = torch.arange(count - frames + 1)
    sources = [Source(p, p.name, count, starts, torch.zeros(len(starts)), config.data.stride) for p in paths]
    with Pool(0) as pool:
        fill(sources, folder / "cache", size, "auto", pool)
    options: dict[str, Any] = {"frames": frames, "size": size, "seed": 0, "stream": "train"}
    cached = VideoClips(sources, **options, device=device, cache=FrameCache(folder / "cache", size))
    return cached, VideoClips(sources, **options)


# -- Steps ----------------------------------------------------------------------------------------------------------


Weights = dict[str, Tensor] | None


def begun(config: Config, videos: Any, device: torch.device) -> Weights:
    """Those of a model that has been trained for BEGUN steps."""
    step = Step(override(config, {"train.compile": "off"}), Processes(device))
    batches = videos.batches(1_000, config.train.batch)
    for _ in range(BEGUN):
        step(next(batches))
    return step.model.state_dict()


def ours(config: Config, videos: Any, device: torch.device, compile: str, weights: Weights) -> Callable[[], Tensor]:
    step = Step(override(config, {"train.compile": compile}), Processes(device))
    if weights:
        step.model.load_state_dict(weights)
    batches = videos.batches(0, config.train.batch)
    return lambda: step(next(batches))[0]


def plain(config: Config, videos: Any, device: torch.device, compiled: bool, weights: Weights) -> Callable[[], Tensor]:
    """The reference way, written out."""
    model = build_model(config, device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if weights:
        model.load_state_dict(weights)
    optimizer = torch.optim.Adam(model.parameters(), config.train.lr)
    workers = 4 if device.type == "cuda" else 0
    loader = DataLoader(OneByOne(videos, 1 << 40), config.train.batch, num_workers=workers)
    batches, settings = iter(loader), config.latent
    search = fista(config)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=compiled and device.type == "cuda")
    given = videos.actions.to(device)[:, :, config.data.frames_in :].flatten(1) if settings.kind == "actions" else None

    def energy(x: Tensor, y: Tensor, z: Tensor | None) -> Tensor:
        h_x, h_y = model.encoder(x), model.encoder(y)
        predicted = (model.predictor(h_x) if z is None else model.predictor(h_x, z)).float()
        return reference.energy_vjvcr(h_x.float(), h_y.float(), predicted, model.alpha, model.beta)

    def of_z(h_x: Tensor, h_y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: reference.energy_per_sample(model.predictor(h_x, z), h_y)

    run = torch.compile(energy, dynamic=False) if compiled else energy

    def step() -> Tensor:
        frames = next(batches).to(device)
        frames = frames if frames.is_floating_point() else frames.float() / 255
        x, y = frames[:, : config.data.frames_in], frames[:, config.data.frames_in :]
        z = given
        if settings.kind == "sparse":
            with torch.no_grad():
                h_x, h_y = (encode_frozen(model, part) for part in (x, y))
            with in_torch():
                z = search.infer(of_z(h_x, h_y), len(x), device=device, dtype=torch.float32).z
        optimizer.zero_grad()
        with autocast:
            loss = run(x, y, z)
        loss.backward()
        optimizer.step()
        if settings.kind == "sparse":
            model.predictor.normalize_latent()  # type: ignore[operator]
        return loss.detach()

    return step


def fista(config: Config) -> SparseLatent:
    """The reference's: as many steps as the full preset takes."""
    return SparseLatent(config.latent.dim, config.latent.weight, Latent().iterations, check=False)


@torch.no_grad()
def energy_of_z(config: Config, videos: Any, device: torch.device, weights: Weights) -> float:
    """Mean energy, L1 term included, of our z* over that of the reference's, less 1, for a batch."""
    step = Step(override(config, {"train.compile": "off"}), Processes(device))
    if weights:
        step.model.load_state_dict(weights)
    x, y = split_frames(videos.batch(0, config.train.batch), config)
    h_x, h_y = step.latents.encode(x), step.latents.encode(y, targets=True)
    ours = step.latents.infer_from(h_x, h_y, y).measured[0]
    theirs = fista(config).infer_from(step.model, h_x, h_y).energy.mean()
    return float(ours / theirs) - 1


def encode_frozen(model: Any, frames: Tensor) -> Tensor:
    """In training mode, as the update will see it, the running statistics put back."""
    kept = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
    h = model.encoder(frames)
    for name, buffer in model.encoder.named_buffers():
        buffer.copy_(kept[name])
    return h


@contextlib.contextmanager
def in_torch() -> Iterator[None]:
    """As where the operators are not built."""
    before, native.MISSING = native.MISSING, "not wanted here"
    try:
        yield
    finally:
        native.MISSING = before


def steps_of(
    config: Config, device: torch.device, sources: tuple[Any, Any], compile: bool, weights: Weights
) -> dict[str, Callable[[], Tensor]]:
    cached, read = sources
    found = {
        "reference": plain(config, read, device, compiled=False, weights=weights),
        "ours": ours(config, cached, device, "auto", weights),
    }
    if compile:
        found["compiled reference"] = plain(config, read, device, compiled=True, weights=weights)
        if device.type == "cpu":
            found["ours compiled"] = ours(config, cached, device, "on", weights)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trained" in metafunc.fixturenames:
        latents = [name for name in NAMES if "sparse" in name]
        more = [(name, False) for name in latents] if metafunc.config.getoption("--full") else []
        cases = [*((name, name in latents) for name in NAMES), *more]
        metafunc.parametrize(
            ("name", "trained"), cases, ids=[f"{n}{' trained' * t}".replace(" ", "-") for n, t in cases]
        )


def test_videos_per_second(
    name: str, trained: bool, device: Any, in_time: None, tmp_path: Path, full: bool, benchmark: Any, report: Any
) -> None:
    if name == "clevrer":
        pytest.importorskip("av", reason="the extra video is not installed")
    torch._dynamo.reset()
    config = config_of(name, device)
    with device.stream():
        # On a CPU compiling the networks for video files takes longer than all the rest.
        compile = full or isinstance(device, Cuda) or config.data.dataset == "moving-mnist"
        sources = sources_of(config, device.torch_device, tmp_path)
        weights = begun(config, sources[0], device.torch_device) if trained else None
        steps = steps_of(config, device.torch_device, sources, compile, weights)
        energy = (
            energy_of_z(config, sources[0], device.torch_device, weights) if config.latent.kind == "sparse" else 0.0
        )
        assert energy <= ENERGY[trained], f"z* has {energy:.1e} more energy than the reference's"
        first = {}
        for provider, step in [*steps.items()]:
            started = time.perf_counter()
            try:
                first[provider] = float(step())
            except torch.OutOfMemoryError:  # the reference's activations of cater fit no GPU
                del steps[provider]
                torch.cuda.empty_cache()
                continue
            if "reference" not in first:
                continue
            bf16 = device.torch_device.type == "cuda" and provider != "reference"
            same = SAME["bf16" if bf16 else "other z*" if config.latent.kind == "sparse" else "fp32"]
            assert abs(first[provider] / first["reference"] - 1) <= same, (provider, first)
            first[provider, "seconds"] = time.perf_counter() - started
        if "reference" not in steps:
            report(
                [{"preset": config.preset, "latent": config.latent.kind, "provider": "reference", "note": "too large"}]
            )
            pytest.skip("the reference does not fit this device")
        if benchmark.disabled:
            return
        peaks = {}
        for provider, step in steps.items():
            slow = first[provider, "seconds"] > SLOW and "compiled" not in provider
            for _ in range(0 if slow else WARM - 1):
                step()
            peaks[provider] = peak_bytes(step, device)[1]
        busy = BusyElsewhere()
        regions = {provider: Region(step) for provider, step in steps.items()}
        times = take_turns(device, regions, SECONDS_FULL if full else SECONDS, *ROUNDS)
        elsewhere = busy.share() if isinstance(device, Host) else 0.0
    medians = {provider: spread(of_one).median for provider, of_one in times.items()}
    rows: list[Row] = []
    for provider, of_one in times.items():
        untrained = config.latent.kind == "sparse" and not trained
        row: Row = {"preset": config.preset, "latent": config.latent.kind + ", untrained" * untrained}
        row["provider"] = provider
        row["x reference"] = medians["reference"] / medians[provider]
        if "compiled reference" in medians:
            row["x compiled reference"] = medians["compiled reference"] / medians[provider]
        if provider == "ours" and config.latent.kind == "sparse":
            row["energy of z*"] = energy
        row["peak MB"] = peaks[provider] / 1e6
        row |= {"_median_ms": spread(of_one).median, "_iqr_ms": spread(of_one).iqr, "_rounds": len(of_one)}
        row |= {"_videos_per_second": 1e3 * config.train.batch / medians[provider], "_busy_elsewhere": elsewhere}
        row |= {"_first_loss": first[provider], "_first_seconds": first[provider, "seconds"]}
        rows.append(row | ({} if untrained else judged(name, provider, row, device)))
    report(rows)


def judged(name: str, provider: str, row: Row, device: Any) -> Row:
    """Our goals, and whether they are met."""
    if provider != "ours":
        return {}
    goals = GPU_GOALS.get(name, (None, None)) if isinstance(device, Cuda) else (CPU_GOALS.get(name), None)
    said = [
        f"{what} >= {goal:g}: {'met' if row[what] >= goal else 'missed'}"
        for what, goal in zip(("x reference", "x compiled reference"), goals, strict=True)
        if goal is not None
    ]
    return {"target": "; ".join(said)} if said else {}


def test_telemetry(device: Any, in_time: None, full: bool, benchmark: Any, report: Any) -> None:
    """As many steps as lie between two measurements of collapse, with one and without."""
    every = 100 if full or isinstance(device, Cuda) else 10
    config = config_of("moving-mnist", device)
    with device.stream():
        videos, _ = sources_of(config, device.torch_device, Path())
        step, batches = Step(config, Processes(device.torch_device)), videos.batches(0, config.train.batch)
        with Telemetry() as telemetry:

            def run(measured: bool) -> None:
                clips = next(batches)
                if measured:
                    telemetry.measure(0, step.representations(clips))
                for _ in range(every):
                    step(clips)
                    clips = next(batches)
                telemetry.collect()

            run(True)
            if benchmark.disabled:
                return
            busy = BusyElsewhere()
            regions = {name: Region(partial(run, on)) for name, on in {"without": False, "with": True}.items()}
            times = take_turns(device, regions, SECONDS, 4, 20)
    # The least of each: what else the machine does only adds.
    ratio = spread(times["without"]).least / spread(times["with"]).least
    row: Row = {"preset": config.preset, "provider": f"telemetry every {every} steps", "x without": ratio}
    report([row | {"_busy_elsewhere": busy.share() if isinstance(device, Host) else 0.0}])


# -- What a step consists of ----------------------------------------------------------------------------------------


class Parts:
    """Own times of named parts: `part` is a context manager, and parts may lie inside one another."""

    def __init__(self, device: Any) -> None:
        self.device, self.open, self.times = device, list[tuple[str, list[Any]]](), dict[str, float]()
        self.pieces: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        now = self.device.event()
        if self.open:
            self._close(now)
        self.open.append((name, [now]))
        try:
            yield
        finally:
            end = self.device.event()
            self._close(end)
            self.open.pop()
            if self.open:
                self.open[-1][1].append(end)

    def _close(self, end: Any) -> None:
        name, starts = self.open[-1]
        self.pieces.append((name, starts.pop(), end))

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Every call of owner.method is a part."""
        inner = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return inner(*args, **kwargs)

        object.__setattr__(owner, method, call)

    def shares(self) -> dict[str, float]:
        self.device.synchronize()
        for name, start, end in self.pieces:
            self.times[name] = self.times.get(name, 0.0) + self.device.milliseconds(start, end)
        total = sum(self.times.values())
        return {name: time / total for name, time in self.times.items()}


@pytest.mark.parametrize("name", NAMES)
def test_parts(name: str, device: Any, in_time: None, tmp_path: Path, benchmark: Any, report: Any) -> None:
    """Eager, so that parts are there to be told apart."""
    if name == "clevrer":
        pytest.importorskip("av", reason="the extra video is not installed")
    config = override(config_of(name, device), {"train.compile": "off"})
    with device.stream():
        videos, _ = sources_of(config, device.torch_device, tmp_path)
        step, batches = Step(config, Processes(device.torch_device)), videos.batches(0, config.train.batch)
        for _ in range(BEGUN if config.latent.kind == "sparse" else WARM):
            step(next(batches))
        if benchmark.disabled:
            return
        busy, parts = BusyElsewhere(), Parts(device)
        model = step.model
        for owner, method, part in (
            (model.encoder, "forward", "encoder"),
            *([(model.twin, "forward", "encoder")] if model.twin is not None else []),
            (model.predictor, "forward", "predictor"),
            (model, "vcr", "VCR"),
            (step.latents, "infer_from", "z*"),
            (step.optimizer, "step", "optimizer"),
        ):
            parts.wrap(owner, method, part)
        end = time.perf_counter() + SECONDS / 2
        while time.perf_counter() < end:
            with parts.part("data"):
                clips = next(batches)
            with parts.part("backward and rest"):
                step(clips)
        shares, elsewhere = parts.shares(), busy.share() if isinstance(device, Host) else 0.0
    row: Row = {"preset": config.preset, "latent": config.latent.kind, "provider": "parts"}
    order = ("data", "z*", "encoder", "predictor", "VCR", "backward and rest", "optimizer")
    report([row | {part: shares.get(part, 0.0) for part in order} | {"_busy_elsewhere": elsewhere}])
