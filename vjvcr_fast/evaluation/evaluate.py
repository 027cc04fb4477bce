"""Everything the paper measures on one finished run. `evaluate_run` writes it to the run's evaluation.json."""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast import reference
from vjvcr_fast.config import INFERENCE, Config
from vjvcr_fast.data.files import progress, write_atomic
from vjvcr_fast.evaluation import probes
from vjvcr_fast.evaluation.metrics import grain, psnr
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.runs import load_run
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.build import Data, VideoSource, build_data, build_decoder, build_videos
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.loop import check_data
from vjvcr_fast.training.step import autocast, split_frames

MEASURES = 3  # version of the measurements; results of an earlier version are measured again


class Subject(NamedTuple):
    """The model of a run and its data. fitted: the videos that probes are fitted to. held_out: validation videos."""

    config: Config
    model: EnergyModel
    training_data: Data
    fitted: VideoSource
    held_out: VideoSource


def measured_once(
    run: Path, config: Config | None, name: str, measure: Callable[[Subject], dict[str, Any]]
) -> dict[str, Any]:
    """Measures a run unless it has been done: returns the content of the file `name` in the run's folder.

    The file holds what `measure` returns, the checkpoint and settings it is from, and the time it took. It is kept if
    it is from the same checkpoint and settings, else made again. config: as in `load_run`.

    Raises: as `load_run` and `build_data`; ConfigError if the run was trained on other data.
    """
    config, model = load_run(run, config)
    if (before := kept(run, config, name)) is not None:
        return before
    best, last = checkpoint.load(run / "best.pt"), checkpoint.load(run / "last.pt")
    started = time.perf_counter()
    training_data, validation_data = build_data(config)
    check_data(run, best, training_data)
    device = next(model.parameters()).device
    fitted = build_videos(config, training_data, "probe", device)
    held_out = build_videos(config, validation_data, "validation", device)
    result = {
        **_made_from(run, config, best, last),
        "seed": config.train.seed,
        "data": training_data.source,
        "validation_data": validation_data.source,
        **measure(Subject(config, model, training_data, fitted, held_out)),
        "train_seconds": last["seconds"],
        "evaluate_seconds": time.perf_counter() - started,
    }
    write_atomic(run / name, json.dumps(result, indent=1) + "\n")
    return result


def kept(run: Path, config: Config, name: str) -> dict[str, Any] | None:
    """The content of the file `name` in a run's folder, or None if it is not from the run's checkpoints and config."""
    if not (run / name).exists():
        return None
    before = json.loads((run / name).read_text())
    wanted = _made_from(run, config, checkpoint.load(run / "best.pt"), checkpoint.load(run / "last.pt"))
    return before if all(before.get(key) == value for key, value in wanted.items()) else None


def _made_from(run: Path, config: Config, best: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    trained = Config.load(run / "config.json").latent
    return {
        "measures": MEASURES,
        "evaluate": dataclasses.asdict(config.evaluate),
        "best": checkpoint.digest(run / "best.pt"),
        "step": best["step"],
        "trained_steps": last["step"],
        # How z* is found, where not as in training; None, as in older files, if it is.
        **{key: None if (now := getattr(config.latent, key)) == getattr(trained, key) else now for key in INFERENCE},
    }


def evaluate_run(run: Path, config: Config | None = None) -> dict[str, Any]:
    """Evaluates the run in the folder `run` unless it has been done (`measured_once`): its evaluation.json."""
    return measured_once(run, config, "evaluation.json", functools.partial(_measure, run))


def _measure(run: Path, subject: Subject) -> dict[str, Any]:
    config, model, training_data, fitted, held_out = subject
    settings = config.evaluate
    validation = probes.extract(model, held_out, settings.validation_videos, config, encoded=True)
    probed: dict[str, Any] = {}
    if config.data.has_speed:
        train = probes.extract(model, fitted, settings.probe_videos, config)
        curve = probes.adam_probe(train, validation, config, config.train.seed)
        scaled = probes.adam_probe(*probes.standardised(train, validation), config, config.train.seed)
        probed = {
            "speed_mse": curve[-1],
            "speed_mse_by_epoch": curve,
            "speed_mse_standardised": scaled[-1],
            "speed_mse_standardised_by_epoch": scaled,
            "feature_std": train.values.std(dim=0).mean().item(),
            "speed_mse_least_squares": probes.least_squares_probe(train, validation),
            "speed_mse_of_the_mean": probes.mean_predictor(train, validation),
        }
    singular = reference.singular_values(validation.encoded)
    decoder, latents = frozen_decoder(run, config, model, training_data), Latents(config, model)
    return {
        "row": config.model.row,
        "latent": config.latent.kind,  # with one, predictions are at z*, inferred from the target frames
        **probed,
        **frame_errors(held_out, config, lambda x, y: decode(latents, decoder, x, y)),
        "decoder": "joint" if model.decoder is not None else "post hoc",
        "rank_me": reference.rank_me(validation.encoded).item(),
        "rank_me_rows": "encoder outputs of the validation videos' target frames, one row a video and time step",
        "singular_values": [round(s, 4) for s in singular.tolist()],
    }


def frozen_decoder(run: Path, config: Config, model: EnergyModel, data: Data) -> nn.Module:
    """The model's own decoder, or one trained on its frozen predictions, for rows without a pixel term.

    The latter is kept in decoder.pt of the run's folder. Training it resumes if best.pt is still the same.
    """
    if model.decoder is not None:
        return model.decoder
    device = next(model.parameters()).device
    videos, latents = build_videos(config, data, "decoder", device), Latents(config, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        decoder = build_decoder(config)
    decoder.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(decoder.parameters(), config.train.lr, fused=True)
    steps, batch, file, done = config.evaluate.decoder_steps, config.train.batch, run / "decoder.pt", 0
    decodes = checkpoint.digest(run / "best.pt")
    if file.exists():
        state = checkpoint.load(file)
        if state["step"] <= steps and state.get("decodes") == decodes:
            checkpoint.restore(file, state, model=decoder, optimizer=optimizer)
            done = state["step"]
    with progress(total=steps, initial=done, desc="post-hoc decoder", disable=done == steps) as bar:
        for step, clips in zip(range(done + 1, steps + 1), videos.batches(done + 1, batch), strict=False):
            x, y = split_frames(clips, config)
            with autocast(config, device):
                with torch.no_grad():
                    predicted = latents.predict(x, y)
                decoded = decoder(predicted)
            F.mse_loss(decoded.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % config.train.validate_every == 0 or step == steps:
                state = {"model": decoder.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(file, {**state, "step": step, "decodes": decodes})
            bar.update()
    return decoder.eval()


def kept_decoder(run: Path, config: Config, model: EnergyModel) -> nn.Module | None:
    """The model's own decoder, or what `frozen_decoder` has trained for these weights so far, if there is either."""
    file = run / "decoder.pt"
    if model.decoder is not None or not file.exists():
        return model.decoder
    state = checkpoint.load(file)
    if state.get("decodes") != checkpoint.digest(run / "best.pt"):
        return None
    decoder = build_decoder(config).to(next(model.parameters()).device)
    checkpoint.restore(file, state, model=decoder)
    return decoder.eval()


@torch.no_grad()
def decode(latents: Latents, decoder: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Decoded predictions (N, T_y, C, S, S) in [0, 1] from x (N, T_x, C, S, S). y (N, T_y, C, S, S) only infers z*."""
    return decoder(latents.predict(x, y)).clamp(0, 1)


def frame_errors(
    videos: VideoSource, config: Config, predict: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, float | list[float] | None]:
    """Compares predict(x, y) with the target frames y of the validation videos, which are read once.

    Returns the mean PSNR in dB (`metrics.psnr`) over frames and videos: "psnr", and for comparison "psnr_of_black" and
    "psnr_of_last_frame", of the last input frame; and `metrics.grain`: "grain_by_step", for each target frame, or [] if
    no video has black ground, and its mean "grain", or None.
    """
    count, size = config.evaluate.validation_videos, config.evaluate.probe_batch
    db: dict[str, list[Tensor]] = {"psnr": [], "psnr_of_black": [], "psnr_of_last_frame": []}
    grains = []
    for start in range(0, count, size):
        x, y = split_frames(videos.batch(start, min(size, count - start)), config)
        predicted = predict(x, y)
        for found, frames in zip(db.values(), (predicted, x.new_zeros(()), x[:, -1:]), strict=True):
            found.append(psnr(frames, y).flatten())
        grains.append(grain(predicted, y))
    totals, counts = zip(*grains, strict=True)
    rough = (torch.stack(totals).sum(dim=0) / sum(counts)).tolist() if any(counts) else []
    means = {name: torch.cat(found).mean().item() for name, found in db.items()}
    return {**means, "grain": statistics.mean(rough) if rough else None, "grain_by_step": rough}
