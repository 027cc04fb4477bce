"""The training loop of a run: `_Training.loop`, to be read from top to bottom.

A run is a folder:

    config.json     the settings
    metrics.jsonl   a line of numbers every `train.log_every` steps, and one for every validation
    last.pt         the newest checkpoint; checkpoints/ has the last few (`train.keep`)
    best.pt         the checkpoint with the lowest validation loss
    tensorboard/    curves and example videos, or wandb/ (`train.log`)

Resuming: `train` on a folder with a checkpoint goes on from there. On a CPU the run is then bit for bit the one that
was never stopped.

Ctrl-C and SIGTERM: training stops after the current step, saves last.pt and raises StopRequestedError. (Several
processes stop one step later, so that all stop at the same one.) A second signal stops training at once. The signal
handlers are in `vjvcr_fast.training.stop`.

A loss that is not finite is noticed at the next log line or validation, when the host reads what the steps left on the
device. What then happens is `train.on_nonfinite`: "stop" raises DivergedError, naming the step and the term;
"rollback" goes back to the last checkpoint and on with the batch after the one that failed; "skip" leaves such updates
out, which is decided on the device in every step (`vjvcr_fast.training.nonfinite`).
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vjvcr_fast import __version__
from vjvcr_fast.config import Config, ConfigError, differences, fields, override
from vjvcr_fast.data.files import write_atomic
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import Data, VideoSource, build_data, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.chunked import energy_chunked
from vjvcr_fast.training.log import Log
from vjvcr_fast.training.processes import Processes, joined
from vjvcr_fast.training.step import Step, actions, autocast, split_frames
from vjvcr_fast.training.stop import StopRequestedError, asked_to_stop
from vjvcr_fast.training.telemetry import Telemetry, action_energies

# Fields that change no result. The data are compared by their content (`check_data`), so that their folder may change.
NEUTRAL = (
    *("data.root", "data.download", "data.cache", "data.workers", "data.decode_timeout"),
    *("model.checkpoint", "train.chunk", "train.log", "train.keep", "train.telemetry_every"),
)
# Fields that may change when a run is resumed. None of them affects a training step.
_FREE = {*NEUTRAL, "data.on_bad_video", "train.steps", "train.on_nonfinite"}
_FREE |= {name for name in fields() if name.startswith("evaluate.")}
ROLLBACKS = 3  # to one and the same checkpoint, before training gives up

Probe = Callable[[EnergyModel, Config, Data], dict[str, float]]
Resume = Literal["auto", "never", "must"]


class DivergedError(RuntimeError):
    """The loss is no longer finite. The message names the term, the step and the last good checkpoint."""


class _NotFiniteError(Exception):
    """The terms `names` were not finite at step `step`. batch: the number of the batch after that step's."""

    def __init__(self, names: Sequence[str], step: int, batch: int) -> None:
        super().__init__(f"{', '.join(names)} not finite at step {step}")
        self.step, self.batch = step, batch


def train(config: Config, run: Path, probe: Probe | None = None, resume: Resume = "auto") -> None:
    """Pre-trains the model of `config` in the folder `run`, or goes on with the run that is there.

    In several processes, as torchrun starts them, every process calls this (`vjvcr_fast.training.processes`).

    Args:
        config: the settings. All that affects a step must be as in the run's config.json.
        run: the folder, made if missing.
        probe: measures the model and returns numbers by name, which are logged. Called every `train.probe_every` steps.
        resume: "auto" goes on if there is a checkpoint, "must" raises if there is none, "never" raises if there is one.

    Raises:
        ConfigError: `run` holds a run of another config or of other data, or `resume` forbids to go on or to begin.
        CheckpointError: all checkpoints are damaged, another version made them, or one cannot be written.
        DivergedError, StopRequestedError, LostProcessError: see their docstrings.
        The errors of `build_data`: there are no usable data.
    """
    with joined(config) as processes:
        claim(run, config, resume, writes=False)
        with processes.main_first():
            data = build_data(config, processes.here)
        failed: _NotFiniteError | None = None
        rollbacks: Counter[int] = Counter()  # by the step of the checkpoint
        while True:
            try:
                return _Training(config, run, processes, data).loop(probe, failed)
            except _NotFiniteError as error:
                failed = error.with_traceback(None)  # its frames keep the model in memory
            if not checkpoint.exists(run):
                raise DivergedError(f"{failed}; no checkpoint had been written")
            file, state = checkpoint.load_last(run)
            good = f"{failed}; the last good state is {file}, of step {state['step']}"
            if config.train.on_nonfinite != "rollback":
                raise DivergedError(good)
            rollbacks[state["step"]] += 1
            if rollbacks[state["step"]] > ROLLBACKS:
                raise DivergedError(f"{good}; {ROLLBACKS} rollbacks to it have not helped")


class _Training:
    """A run in memory: its data, the model with its optimizer, and how far it has come.

    step: updates so far. batch: the number of the next batch, which is `step` until a rollback passes some over. best:
    the lowest validation loss. history: what the steps since the last log line measured, on the device.
    """

    def __init__(self, config: Config, run: Path, processes: Processes, data: tuple[Data, Data]) -> None:
        self.config, self.run, self.processes, self.data = config, run, processes, data[0]
        self.part = processes.part(config.train.batch)
        processes.part(min(config.train.batch, config.train.validation_videos), "train.validation_videos")
        self.videos = build_videos(config, data[0], "train", processes.device)
        self.held_out = build_videos(config, data[1], "validation", processes.device)
        self.update = Step(config, processes)
        torch.manual_seed(config.train.seed)
        self.step, self.batch, self.best, self.started = 0, 0, float("inf"), time.perf_counter()
        self.history: list[Tensor] = []
        if checkpoint.exists(run):
            self._resume()
            if self.step > config.train.steps:
                raise ConfigError(
                    f"{run} has {self.step} steps, train.steps={config.train.steps}; choose another --out"
                )
        if processes.main:
            claim(run, config)
        many = f", {processes.world} processes" if processes.world > 1 else ""
        title = f"{config.model.row} ({processes.device.type}{many})"
        self.log = Log(run, self.step, config, title, quiet=not processes.main)
        self.telemetry = Telemetry()

    def loop(self, probe: Probe | None, failed: _NotFiniteError | None = None) -> None:
        """Trains until `train.steps`. failed: the step from which a rollback led here; its batch is passed over."""
        settings, processes, update, log = self.config.train, self.processes, self.update, self.log
        with log, self.telemetry, asked_to_stop() as stop:
            if failed:
                self.batch = failed.batch
                log.write(self.step, {"rolled_back_from": failed.step})
            batches = self.videos.batches(self.batch, self.part, processes.rank, processes.world)
            while self.step < settings.steps:
                asked = time.perf_counter()
                clips = next(batches)
                log.waited += time.perf_counter() - asked
                update.warm_up(self.step)
                self.history.append(update(clips))  # the host does not wait for the device
                self.batch += 1
                self.step += 1
                step, end = self.step, self.step == settings.steps

                if step % settings.log_every == 0 or end:
                    means = self._means()
                    due = step % settings.log_every == 0  # not at `end` alone: a run that is extended would differ
                    log.training(step, means | update.latents.adapt(step, means, update.optimizer, due))
                    self.history = [] if due else self.history
                    self._log_telemetry()
                if settings.telemetry_every and step % settings.telemetry_every == 0:
                    h_x = update.representations(clips)
                    if processes.main:
                        self.telemetry.measure(step, h_x)
                if probe and settings.probe_every and step % settings.probe_every == 0 and processes.main:
                    with log.paused():
                        found = override(self.config, {"latent.weight": update.latents.weight})  # z* as in training
                        log.write(step, probe(update.model, found, self.data))
                if step % settings.validate_every == 0 or end:
                    with log.paused():
                        self._validate()
                if processes.agree(stop()):
                    self._means()
                    self._save()
                    raise StopRequestedError(
                        f"stopped at step {step} of {settings.steps}; run the same command again to continue"
                    )

    def _validate(self) -> None:
        """Logs the validation loss and saves the model. Raises _NotFiniteError before anything is saved."""
        self._means()
        model, latents = self.update.model, self.update.latents
        loss = validate(model, self.held_out, self.config, latents, self.processes)
        if not math.isfinite(loss):
            raise _NotFiniteError(["validation_loss"], self.step, self.batch)
        self.log.write(self.step, {"validation_loss": loss, **self._energies()})
        if self.log.board is not None:
            self.log.videos(self.step, examples(model, self.held_out, self.config, latents))
        better, self.best = loss < self.best, min(loss, self.best)
        self._save(better)

    def _energies(self) -> dict[str, float]:
        """If actions are the latent: what the model makes of the true ones and of others, by `action_energies`."""
        if self.config.latent.kind != "actions" or not self.processes.main:
            return {}
        model, both = self.update.model, {"train": self.videos, "validation": self.held_out}
        return {k: v for name, of in both.items() for k, v in action_energies(model, of, self.config, name).items()}

    def _means(self) -> dict[str, float]:
        """The mean of every term since the last log line, over all processes; here the host waits for the device.

        With `train.on_nonfinite` "skip", skipped steps are left out and counted as "skipped". Raises _NotFiniteError,
        naming the first such step, if a step was not finite; with "skip" only if all were.
        """
        if not self.history:
            return {}
        names, skips = self.update.names, self.config.train.on_nonfinite == "skip"
        rows = self.processes.mean(torch.stack(self.history)).tolist()  # the last column: whether a step was skipped
        bad = [i for i, row in enumerate(rows) if row[-1] or not all(map(math.isfinite, row))]
        good = [row for i, row in enumerate(rows) if i not in bad]
        if bad and not (skips and good):
            since = len(rows) - 1 - bad[0]
            terms = [n for n, value in zip(names, rows[bad[0]], strict=False) if not math.isfinite(value)]
            raise _NotFiniteError(terms or ["the gradient"], self.step - since, self.batch - since)
        means = {n: sum(column) / len(good) for n, column in zip(names, zip(*good, strict=True), strict=False)}
        return means | ({"skipped": float(len(bad))} if skips else {})

    def _log_telemetry(self) -> None:
        for step, numbers in self.telemetry.collect():
            self.log.write(step, numbers)

    def _save(self, best: bool = False) -> None:
        """Writes last.pt, and best.pt too if `best`. Raises _NotFiniteError instead if a weight is not finite."""
        self._log_telemetry()
        model = self.update.model
        if not nn.utils.get_total_norm(model.parameters()).isfinite():
            raise _NotFiniteError(["the weights"], self.step, self.batch)
        # Of all processes: the one that resumes has this file alone.
        history: Tensor | list[Tensor] = self.processes.mean(torch.stack(self.history)) if self.history else []
        self.history = [*history]
        if not self.processes.main:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "latent_weight": self.update.latents.weight,
            "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
            "step": self.step,
            "batch": self.batch,
            "best": self.best,
            "history": history,
            "config": self.config.to_json(),
            "data": self.data.source,
            "data_hash": self.data.fingerprint(),
            "seconds": time.perf_counter() - self.started,
            "version": __version__,
        }
        if best:
            checkpoint.save(self.run / "best.pt", state)
        checkpoint.save_last(self.run, state, self.config.train.keep)

    def _resume(self) -> None:
        """Takes up what `_save` wrote."""
        file, state = checkpoint.load_last(self.run)
        checkpoint.check_generation(file, state)
        checkpoint.restore(file, state, model=self.update.model, optimizer=self.update.optimizer)
        check_data(self.run, state, self.data)
        self.step, self.batch, self.best = state["step"], state["batch"], state["best"]
        # A run of an earlier version may have logged fewer terms: then the next log line is of the steps from here on.
        columns = len(self.update.names) + 1
        self.history = [row.to(self.processes.device) for row in state["history"] if len(row) == columns]
        self.update.latents.weight = state.get("latent_weight", self.update.latents.weight)
        self.started -= state["seconds"]
        torch.set_rng_state(state["rng"]["cpu"])
        if len(state["rng"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])


@torch.no_grad()
def validate(
    model: EnergyModel, videos: VideoSource, config: Config, latents: Latents, processes: Processes | None = None
) -> float:
    """The mean energy at z* over `train.validation_videos` held-out videos, with the model in eval mode.

    Only whole batches count: with 20 videos and batches of 8, 16 are used.
    """
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
            chunk = config.train.chunk
            energy = energy_chunked(model, x, y, z, chunk=chunk) if chunk else model(x, y, z)
            losses.append(energy.loss)
    model.train()
    return processes.mean(torch.stack(losses).mean()).item()


@torch.no_grad()
def examples(
    model: EnergyModel,
    videos: VideoSource,
    config: Config,
    latents: Latents,
    decoder: nn.Module | None = None,
    count: int = 8,
) -> list[Tensor]:
    """`count` held-out videos to look at: their frames and, if there is a decoder, the predicted target frames.

    decoder: by default the model's own. The model is left in the mode it was in. Returns one or two tensors
    (count, T, C, S, S) in [0, 1]; in the second the input frames are black.
    """
    clips, training, decoder = videos.batch(0, count), model.training, decoder or model.decoder
    x, y = split_frames(clips, config)
    lines = [torch.cat([x, y], dim=1)]
    if decoder is not None:
        model.eval()
        decoded = decoder(latents.predict(x, y, actions(clips, config)))
        lines.append(torch.cat([torch.zeros_like(x), decoded.clamp(0, 1)], dim=1))
        model.train(training)
    return lines


def claim(run: Path, config: Config, resume: str = "auto", writes: bool = True) -> None:
    """Writes config.json into the folder of a run, once it is clear that the run may begin or go on there.

    A run without a checkpoint has nothing to go on with, so any config may take its folder. writes: False only checks.

    Raises ConfigError if `run` holds a run of another config or a saved model, whose config would be lost, or if
    `resume` (see `train`) forbids to begin or go on.
    """
    file, begun = run / "config.json", checkpoint.exists(run)
    if resume not in get_args(Resume):
        raise ConfigError(f"resume={resume}: must be one of {', '.join(get_args(Resume))}")
    if resume == "never" and begun:
        raise ConfigError(f"{run} holds a run, and resume=never: choose another --out, or --resume auto to go on")
    if resume == "must" and not begun:
        raise ConfigError(f"{run} holds no checkpoint, and resume=must: is it the right --out?")
    if (run / checkpoint.SAVED).exists() and not begun:
        raise ConfigError(f"{run} holds a saved model: choose another --out")
    if file.exists() and begun:
        pairs = differences(Config.load(file), config).items()
        changes = [f"{k} {theirs} -> {ours}" for k, (theirs, ours) in pairs if k not in _FREE]
        if changes:
            raise ConfigError(f"{run} holds a run of another config ({', '.join(changes)}); choose another --out")
    if writes:
        write_atomic(file, config.to_json())


def check_data(run: Path, state: dict[str, Any], data: Data) -> None:
    """Raises ConfigError if the checkpoint `state` of a run was trained on other data than these."""
    if state["data_hash"] != data.fingerprint():
        raise ConfigError(
            f"{run} was trained on {state['data']}; here are {data.source}: set --data.root or VJVCR_DATA, "
            "or choose another --out"
        )
