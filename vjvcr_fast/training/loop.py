"""The training loop: one file, top to bottom.

A run is a folder: config.json, metrics.jsonl (a line every `log_every` steps, one every validation), last.pt, the few
before it in checkpoints/, best.pt (least self-supervised validation loss), tensorboard/. Starting it again goes on from
last.pt; on a CPU the loss curve is then the same, bit for bit, as that of a run that was never stopped.

A loss that is not finite is found at the next log line, where the host reads what the steps left on the device
(`train.on_nonfinite`): "stop" names step and term; "rollback" goes on from the last checkpoint with the batches after
the one that failed; "skip" leaves the update out, decided on the device, step by step.
"""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError, differences
from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import Data, VideoSource, build_data, build_videos
from vjvcr_fast.training.latents import Latents
from vjvcr_fast.training.log import Log
from vjvcr_fast.training.processes import Processes, joined, launched
from vjvcr_fast.training.step import Step, actions, autocast, split_frames
from vjvcr_fast.training.telemetry import Telemetry

# What may differ between a run's config.json and the config it goes on with: nothing that changes a step. Which data
# there are is checked by what they are, not by where they lie.
_FREE = (
    *("data.root", "data.download", "data.cache", "data.workers", "data.decode_timeout", "data.on_bad_video"),
    *("model.checkpoint", "train.chunk", "train.steps", "train.tensorboard", "train.keep", "evaluate."),
    *("train.on_nonfinite", "train.telemetry_every"),
)
ROLLBACKS = 3  # to one and the same checkpoint
ECHO = 2.0  # seconds in which a launcher repeats a signal

Probe = Callable[[EnergyModel, Config, Data], dict[str, float]]
Resume = Literal["auto", "never", "must"]


class StopRequestedError(RuntimeError):
    """Training was asked to stop (Ctrl-C, SIGTERM) and did, after writing last.pt."""


class DivergedError(RuntimeError):
    """The loss is not finite any more; the message names the term, the step and the last good checkpoint."""


class _NotFiniteError(Exception):
    """Terms `names` were not finite at `step`; `batch` is the number of the batch after that step's."""

    def __init__(self, names: Sequence[str], step: int, batch: int) -> None:
        super().__init__(f"{', '.join(names)} not finite at step {step}")
        self.step, self.batch = step, batch


class _Moved(NamedTuple):
    """After a rollback to `step` the data go on with batch `batch`, the one after the step that failed, `failed`."""

    step: int
    batch: int
    failed: int


def train(config: Config, run: Path, probe: Probe | None = None, resume: Resume = "auto") -> None:
    """Pre-trains config's model in the folder `run`, or goes on with what is there.

    probe: what to measure of the frozen model, by name; called every `config.train.probe_every` steps. resume: "auto"
    goes on where there is something, "must" refuses to begin, "never" to go on. In several processes, as torchrun
    starts them, every one calls this (`vjvcr_fast.training.processes`).

    Raises:
        ConfigError: `run` holds a run of another config or of other data, or resume forbids it.
        CheckpointError: its checkpoints are damaged or of another version, or one cannot be written. As `build_data`:
        no data. DivergedError, StopRequestedError, LostProcessError: see there.
    """
    with joined(config) as processes:
        claim(run, config, resume, writes=processes.main)
        with processes.main_first():
            data = build_data(config, processes.world)
        moved: _Moved | None = None
        times = 0
        while True:
            try:
                return _train(config, run, probe, processes, data, moved)
            except _NotFiniteError as error:
                if not checkpoint.exists(run):
                    raise DivergedError(f"{error}; no checkpoint had been written") from None
                file, state = checkpoint.load_last(run)
                good = f"{error}; the last good state is {file}, of step {state['step']}"
                if config.train.on_nonfinite != "rollback":
                    raise DivergedError(good) from None
                times = times + 1 if moved is not None and moved.step == state["step"] else 1
                if times > ROLLBACKS:
                    raise DivergedError(f"{good}; {ROLLBACKS} rollbacks to it have not helped") from None
                moved = _Moved(state["step"], error.batch, error.step)


def _train(
    config: Config, run: Path, probe: Probe | None, processes: Processes, data: tuple[Data, Data], moved: _Moved | None
) -> None:
    settings, device = config.train, processes.device
    part = processes.part(settings.batch)
    videos = build_videos(config, data[0], "train", device)
    held_out = build_videos(config, data[1], "validation", device)

    update = Step(config, processes)
    model, latents, optimizer = update.model, update.latents, update.optimizer
    torch.manual_seed(settings.seed)

    # A step of the optimizer takes the batch of its number, until a rollback passes some over.
    step, batch, best, started = 0, 0, float("inf"), time.perf_counter()
    history, counted = torch.zeros(settings.log_every, len(update.names) + 1, device=device), 0
    if checkpoint.exists(run):
        file, state = checkpoint.load_last(run, device)
        checkpoint.check_generation(file, state)
        checkpoint.restore(file, state, model=model, optimizer=optimizer)
        check_data(run, state, data[0])
        step, batch, best, counted = state["step"], state["batch"], state["best"], len(state["history"])
        history[:counted] = state["history"]
        latents.weight = state.get("latent_weight", latents.weight)
        started -= state["seconds"]
        _set_rng(state["rng"])
    batch = moved.batch if moved else batch

    def save(best_too: bool = False) -> None:
        for at, numbers in telemetry.collect():
            log.write(at, numbers)
        if not nn.utils.get_total_norm(model.parameters()).isfinite():
            raise _NotFiniteError(["the weights"], step, batch)
        if not processes.main:
            return
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": _rng(),
            "data": data[0].source,
            "data_hash": data[0].fingerprint(),
            "seconds": time.perf_counter() - started,
            "version": __version__,
        }
        state |= {"step": step, "batch": batch, "best": best, "config": config.to_json()}
        state |= {"history": history[:counted].clone(), "latent_weight": latents.weight}
        if best_too:
            checkpoint.save(run / "best.pt", state)
        checkpoint.save_last(run, state, settings.keep)

    def checked() -> dict[str, float]:
        """The means since the last log line. Raises _NotFiniteError: nothing is kept that is not finite."""
        rows = processes.mean(history[:counted].clone())
        return _means(update.names, rows, step, batch, settings.on_nonfinite == "skip")

    many = f", {processes.world} processes" if processes.world > 1 else ""
    title = f"{config.model.row} ({device.type}{many})"
    log = Log(run, step, settings.steps, settings.tensorboard, title, quiet=not processes.main)
    telemetry = Telemetry()
    batches = videos.batches(batch, part, processes.rank, processes.world)
    with log, telemetry, asked_to_stop() as stop:
        if moved:
            log.write(step, {"rolled_back_from": moved.failed})
        while step < settings.steps:
            with log.waiting():
                clips = next(batches)
            update.warm_up(step)
            history[counted] = update(clips)  # on the device: no step waits for it
            counted, step, batch = counted + 1, step + 1, batch + 1

            if step % settings.log_every == 0 or step == settings.steps:
                means = checked()
                log.training(step, means | latents.adapt(step, means, optimizer), settings.batch)
                counted = 0
                for at, numbers in telemetry.collect():
                    log.write(at, numbers)
            if settings.telemetry_every and step % settings.telemetry_every == 0:
                h_x = update.representations(clips)
                if processes.main:
                    telemetry.measure(step, h_x)
            if settings.probe_every and probe is not None and step % settings.probe_every == 0 and processes.main:
                with log.paused():
                    log.write(step, probe(model, config, data[0]))
            if step % settings.validate_every == 0 or step == settings.steps:
                with log.paused():
                    checked()
                    loss = validate(model, held_out, config, latents, processes)
                    if not abs(loss) < float("inf"):  # before it reaches last.pt
                        raise _NotFiniteError(["validation_loss"], step, batch)
                    log.write(step, {"validation_loss": loss})
                    if log.board is not None:
                        log.videos(step, examples(model, held_out, config, latents))
                    better, best = loss < best, min(loss, best)
                    save(better)
            if processes.agree(stop()):
                checked()
                save()
                raise StopRequestedError(
                    f"stopped at step {step} of {settings.steps}; the same command goes on from there"
                )


@torch.no_grad()
def validate(
    model: EnergyModel, videos: VideoSource, config: Config, latents: Latents, processes: Processes | None = None
) -> float:
    """Mean energy at z* over `train.validation_videos` held-out videos, in whole batches, in evaluation mode."""
    processes = processes or Processes(videos.device)
    batch = min(config.train.batch, config.train.validation_videos)
    part = processes.part(batch, "train.validation_videos")
    losses = []
    model.eval()
    for start in range(0, config.train.validation_videos - batch + 1, batch):
        with autocast(config, videos.device):
            clips = videos.batch(start + processes.rank * part, part)
            x, y = split_frames(clips, config)
            z = latents.infer(x, y, actions(clips, config)).z
            losses.append(model(x, y, z).loss)
    model.train()
    return processes.mean(torch.stack(losses).mean()).item()


@torch.no_grad()
def examples(model: EnergyModel, videos: VideoSource, config: Config, latents: Latents) -> list[Tensor]:
    """Input and target frames of eight held-out videos, and of each its prediction where there is a decoder: lines of
    (8, T, C, S, S)."""
    clips = videos.batch(0, 8)
    x, y = split_frames(clips, config)
    lines = [torch.cat([x, y], dim=1)]
    if model.decoder is not None:
        model.eval()
        decoded = model.decoder(latents.predict(x, y, actions(clips, config)))
        lines.append(torch.cat([torch.zeros_like(x), decoded.clamp(0, 1)], dim=1))
        model.train()
    return lines


def claim(run: Path, config: Config, resume: str = "auto", writes: bool = True) -> None:
    """Writes config.json into a new run; raises ConfigError if `run` holds a run of another config, or if `resume`
    ("auto", "never", "must") forbids to go on, or to begin.

    Before its first checkpoint a run has nothing to go on with, and any config may have its folder.
    """
    file, begun = run / "config.json", checkpoint.exists(run)
    if resume not in get_args(Resume):
        raise ConfigError(f"resume={resume}: must be one of {', '.join(get_args(Resume))}")
    if resume == "never" and begun:
        raise ConfigError(f"{run} holds a run, and resume=never: choose another --out, or --resume auto to go on")
    if resume == "must" and not begun:
        raise ConfigError(f"{run} holds no checkpoint, and resume=must: is it the right --out?")
    if file.exists() and begun:
        changed = differences(Config.load(file), config)
        different = {k: values for k, values in changed.items() if not k.startswith(_FREE)}
        if different:
            changes = ", ".join(f"{k} {theirs} -> {ours}" for k, (theirs, ours) in different.items())
            raise ConfigError(f"{run} holds a run of another config ({changes}); choose another --out")
    if writes:
        write_atomic(file, config.to_json())


def check_data(run: Path, state: dict[str, Any], data: Data) -> None:
    """Raises ConfigError where a run's checkpoint was made from other data than are here now."""
    if state["data_hash"] != data.fingerprint():
        raise ConfigError(
            f"{run} was trained on {state['data']}; here are {data.source}: set --data.root or VJVCR_DATA, "
            "or choose another --out"
        )


def _means(names: Sequence[str], history: Tensor, step: int, batch: int, may_skip: bool) -> dict[str, float]:
    """Of `names` over the steps up to `step`, whose rows history (counted, names and whether skipped) holds; `batch` is
    the number of the next batch. Skipped steps count for nothing but "skipped".

    Raises _NotFiniteError, of the first step that it is true of; where steps may be skipped, if all were.
    """
    rows = history.tolist()
    if not rows:
        return {}
    good = [row for row in rows if not row[-1] and all(abs(value) < float("inf") for value in row)]
    if len(good) < len(rows) and not (may_skip and good):
        first = next(i for i, row in enumerate(rows) if row not in good)
        bad = [n for n, value in zip(names, rows[first], strict=False) if not abs(value) < float("inf")]
        left = len(rows) - 1 - first  # steps since
        raise _NotFiniteError(bad or ["the gradient"], step - left, batch - left)
    means = {n: sum(column) / len(good) for n, column in zip(names, zip(*good, strict=True), strict=False)}
    return means | ({"skipped": float(len(rows) - len(good))} if may_skip else {})


def _rng() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM become a question asked between steps; a second one interrupts at once. Of several processes
    each may hear of the first twice, from the terminal and from the launcher: that counts as one."""
    received: list[float] = []

    def receive(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and (launched() == 1 or now > received[0] + ECHO):
            raise KeyboardInterrupt
        received.append(now)

    try:
        before = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours to handle
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
