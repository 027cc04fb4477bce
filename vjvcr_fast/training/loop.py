"""The training loop: one file, top to bottom.

A run is a folder: config.json, metrics.jsonl (a line every `log_every` steps, one every validation), last.pt, best.pt
(least self-supervised validation loss), tensorboard/. Starting it again goes on from last.pt; on a CPU the loss curve
is then the same, bit for bit, as that of a run that was never stopped.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError, differences, resolve_device
from vjvcr_fast.data.clips import Clips
from vjvcr_fast.data.files import progress, write_atomic
from vjvcr_fast.models.energy import Energy, EnergyModel
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import Batch, Data, VideoSource, build_data, build_model, build_videos
from vjvcr_fast.training.chunked import backward_chunked, check_no_mixing
from vjvcr_fast.training.latents import Latents

# What may differ between a run's config.json and the config it goes on with: nothing that changes a step. Which data
# there are is checked by what they are, not by where they lie.
_FREE = (
    *("data.root", "data.download", "data.cache", "data.workers", "data.decode_timeout", "data.on_bad_video"),
    *("model.checkpoint", "train.chunk", "train.steps", "train.tensorboard", "evaluate."),
)

Probe = Callable[[EnergyModel, Config, Data], dict[str, float]]


class StopRequestedError(RuntimeError):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did, after writing last.pt."""


class DivergedError(RuntimeError):
    """The loss is not finite any more; the message names the term, the step and the last good checkpoint."""


def train(config: Config, run: Path, probe: Probe | None = None) -> None:
    """Pre-trains config's model in the folder `run`, or goes on with what is there.

    probe: what to measure of the frozen model, by name; called every `config.train.probe_every` steps.

    Raises:
        ConfigError: `run` holds a run of another config or of other data.
        CheckpointError: its last.pt is damaged. As `build_data`: no data. DivergedError, StopRequestedError: see there.
    """
    settings = config.train
    device = resolve_device(settings.device)
    claim(run, config)
    training_data, validation_data = build_data(config)
    videos = build_videos(config, training_data, "train", device)
    held_out = build_videos(config, validation_data, "validation", device)

    model = build_model(config, device)
    weight_decay = settings.weight_decay if model.terms.hidden else settings.weight_decay_generative
    latents = Latents(config, model)
    optimizer = torch.optim.Adam(latents.parameters(), settings.lr, weight_decay=weight_decay, fused=True)
    energy = compiled(model, settings.compile, device)
    chunked = partial(backward_chunked, chunk=settings.chunk)
    if settings.chunk:
        try:
            check_no_mixing(model)
        except ValueError as error:
            raise ConfigError(f"train.chunk={settings.chunk}: {error}") from None
    torch.manual_seed(settings.seed)

    step, best, started = 0, float("inf"), time.perf_counter()
    names = (*Energy._fields, *latents.names)
    sums, counted = torch.zeros(len(names), device=device), 0
    if (run / "last.pt").exists():
        state = checkpoint.load(run / "last.pt", device)
        checkpoint.restore(run / "last.pt", state, model=model, optimizer=optimizer)
        check_data(run, state, training_data)
        step, best, sums, counted = state["step"], state["best"], state["sums"], state["counted"]
        latents.weight = state.get("latent_weight", latents.weight)
        started -= state["seconds"]
        _set_rng(state["rng"])

    def save(name: str) -> None:
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": _rng(),
            "data": training_data.source,
            "data_hash": training_data.fingerprint(),
            "seconds": time.perf_counter() - started,
            "version": __version__,
        }
        state |= {"step": step, "best": best, "sums": sums, "counted": counted, "config": config.to_json()}
        state["latent_weight"] = latents.weight
        checkpoint.save(run / name, state)

    log = _Log(run, step, settings.steps, settings.tensorboard, f"{config.model.row} ({device.type})")
    batches = videos.batches(step, settings.batch)
    with log, _asked_to_stop() as stop:
        while step < settings.steps:
            with log.waiting():
                batch = next(batches)
            x, y = split_frames(batch, config)
            with autocast(config, device):
                z, measured = latents.infer(x, y, actions(batch, config))
                terms = chunked(model, x, y, z) if settings.chunk else energy(x, y, z)
            if not settings.chunk:
                terms.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            latents.project()
            sums += torch.cat([torch.stack(terms).detach(), measured])  # on the device: no step waits for it
            counted, step = counted + 1, step + 1

            if step % settings.log_every == 0 or step == settings.steps:
                means = _means(names, sums, counted)
                _check_finite(means, step, counted, run)
                log.training(step, means | latents.adapt(step, means, optimizer), settings.batch)
                sums, counted = torch.zeros_like(sums), 0
            if settings.probe_every and probe is not None and step % settings.probe_every == 0:
                with log.paused():
                    log.write(step, probe(model, config, training_data))
            if step % settings.validate_every == 0 or step == settings.steps:
                with log.paused():
                    loss = validate(model, held_out, config, latents)
                    _check_finite({"validation_loss": loss}, step, 1, run)  # before it reaches last.pt
                    log.write(step, {"validation_loss": loss})
                    log.images(step, model, held_out, config, latents)
                    if loss < best:
                        best = loss
                        save("best.pt")
                    save("last.pt")
            if stop():
                _check_finite(_means(names, sums, counted), step, counted, run)
                save("last.pt")
                raise StopRequestedError(
                    f"stopped at step {step} of {settings.steps}; the same command goes on from there"
                )


@torch.no_grad()
def validate(model: EnergyModel, videos: VideoSource, config: Config, latents: Latents) -> float:
    """Mean energy at z* over `train.validation_videos` held-out videos, in whole batches, in evaluation mode.

    In stochastic videos x and y differ, in place and spread: one set of running statistics fits neither, and by it the
    variance hinge of a model that improves gets worse. There the batch's own statistics are used, as in training.
    """
    batch = min(config.train.batch, config.train.validation_videos)
    losses = []
    model.train(config.data.stochastic)
    for start in range(0, config.train.validation_videos - batch + 1, batch):
        with autocast(config, videos.device):
            clips = videos.batch(start, batch)
            x, y = split_frames(clips, config)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            z = latents.infer(x, y, actions(clips, config)).z
            losses.append(torch.func.functional_call(model, buffers, (x, y, z)).loss)
    model.train()
    return torch.stack(losses).mean().item()


def split_frames(videos: Batch, config: Config) -> tuple[Tensor, Tensor]:
    """x (N, T_x, C, S, S) and y (N, T_y, C, S, S), float32 in [0, 1]."""
    frames = videos.frames if videos.frames.is_floating_point() else videos.frames.float().div_(255)
    return frames[:, : config.data.frames_in], frames[:, config.data.frames_in :]


def actions(videos: Batch, config: Config) -> Tensor | None:
    """The actions in the target frames, (N, 14, T_y) float32, where they are the latent of pre-training; else None."""
    if config.latent.kind != "actions":
        return None
    return cast(Clips, videos).target[:, :, config.data.frames_in :]


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """bfloat16 autocast where `train.precision` asks for it."""
    asked = config.train.precision
    on = asked == "bf16" or (asked == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def compiled(module: torch.nn.Module, choice: str, device: torch.device) -> Callable[..., Any]:
    """torch.compile, or the module itself; "auto" compiles on CUDA."""
    return torch.compile(module) if choice == "on" or (choice == "auto" and device.type == "cuda") else module


class _Log:
    """metrics.jsonl, TensorBoard and the progress bar of one run; a context manager."""

    def __init__(self, run: Path, step: int, steps: int, tensorboard: bool, title: str) -> None:
        self.board = _summary_writer(run, step) if tensorboard else None
        rows = checkpoint.read_metrics(run / "metrics.jsonl", up_to=step)
        write_atomic(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        self.file = (run / "metrics.jsonl").open("a")
        self.bar = progress(total=steps, initial=step, desc=title, dynamic_ncols=True, mininterval=1.0)
        self.clock, self.step, self.waited = time.perf_counter(), step, 0.0

    def training(self, step: int, means: dict[str, float], batch: int) -> None:
        now = time.perf_counter()
        rate, share = (step - self.step) * batch / (now - self.clock), self.waited / (now - self.clock)
        self.clock, self.step, self.waited = now, step, 0.0
        self.bar.update(step - self.bar.n)
        shown = {name: f"{value:.4f}" if value > 1e-3 else f"{value:.1e}" for name, value in means.items() if value}
        self.bar.set_postfix({**shown, "videos/s": f"{rate:.0f}"}, refresh=False)
        self.write(step, {**means, "videos_per_second": rate, "data_wait": share})

    def write(self, step: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in here is the wait for data, a share of the time between two log lines."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is not part of the training rate."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    @torch.no_grad()
    def images(self, step: int, model: EnergyModel, videos: VideoSource, config: Config, latents: Latents) -> None:
        """Input and target frames of eight held-out videos, and below each its prediction where there is a decoder."""
        if self.board is not None:
            clips = videos.batch(0, 8)
            x, y = split_frames(clips, config)
            lines = [torch.cat([x, y], dim=1)]
            if model.decoder is not None:
                model.eval()
                decoded = model.decoder(latents.predict(x, y, actions(clips, config)))
                lines.append(torch.cat([torch.zeros_like(x), decoded.clamp(0, 1)], dim=1))
                model.train()
            grid = torch.stack(lines, dim=1).permute(3, 0, 1, 4, 2, 5)  # (C, video, line, S, T, S)
            self.board.add_image("videos", grid.flatten(1, 3).flatten(2), step)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()


def _summary_writer(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "TensorBoard is not installed: pip install 'vjvcr_fast[train]', or --train.tensorboard false"
        ) from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def claim(run: Path, config: Config) -> None:
    """Writes config.json into a new run; raises ConfigError if `run` holds a run of another config.

    Before its first checkpoint a run has nothing to go on with, and any config may have its folder.
    """
    file = run / "config.json"
    if file.exists() and (run / "last.pt").exists():
        changed = differences(Config.load(file), config)
        different = {k: values for k, values in changed.items() if not k.startswith(_FREE)}
        if different:
            changes = ", ".join(f"{k} {theirs} -> {ours}" for k, (theirs, ours) in different.items())
            raise ConfigError(f"{run} holds a run of another config ({changes}); choose another --out")
    write_atomic(file, config.to_json())


def check_data(run: Path, state: dict[str, Any], data: Data) -> None:
    """Raises ConfigError where a run's checkpoint was made from other data than are here now."""
    if state["data_hash"] != data.fingerprint():
        raise ConfigError(
            f"{run} was trained on {state['data']}; here are {data.source}: set --data.root or VJVCR_DATA, "
            "or choose another --out"
        )


def _means(names: Sequence[str], sums: Tensor, counted: int) -> dict[str, float]:
    return dict(zip(names, (sums / max(counted, 1)).tolist(), strict=True))


def _check_finite(values: dict[str, float], step: int, counted: int, run: Path) -> None:
    bad = [name for name, value in values.items() if not abs(value) < float("inf")]
    if bad:
        last = run / "last.pt"
        kept = f"the last good state is {last}" if last.exists() else "no checkpoint had been written"
        when = f"at step {step}" if counted == 1 else f"between steps {step - counted + 1} and {step}"
        raise DivergedError(f"{', '.join(bad)} not finite {when}; {kept}")


def _rng() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM become a question asked between steps; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours to handle
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
