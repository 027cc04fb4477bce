"""What z* knows: linear classifiers from the inferred latent to the direction and to the digit (Table 2)."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.data.moving_mnist import DIRECTIONS, MovingMNIST
from vjvcr_fast.evaluation.evaluate import Subject, measured_once
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training.latents import Latents
from vjvcr_fast.training.loop import DivergedError
from vjvcr_fast.training.step import split_frames

DIGITS = 10


class Codes(NamedTuple):
    """z: (n, dim) or (n, heads), float32, z* of n videos; (n, 0) without a latent. direction, digit: (n,) int64.
    hidden: (n,) D(Pred(h_x, z*), h_y) of every video. total: variance of h_y, summed and averaged as `hidden` is."""

    z: Tensor
    direction: Tensor
    digit: Tensor
    hidden: Tensor
    total: Tensor


@torch.no_grad()
def extract_codes(model: EnergyModel, videos: MovingMNIST, count: int, config: Config) -> Codes:
    """z* of videos 0 .. count - 1, the model in evaluation mode and full precision, `evaluate.probe_batch` at a time.

    Raises DivergedError where the representations are not finite.
    """
    latents = Latents(config, model)
    columns: tuple[list[Tensor], ...] = ([], [], [], [], [])
    training = model.training
    model.eval()
    for at in range(0, count, config.evaluate.probe_batch):
        batch = videos.batch(at, min(config.evaluate.probe_batch, count - at))
        x, y = split_frames(batch, config)
        z = latents.infer(x, y).z
        predicted, h_y = model.predict(x, z).flatten(1), model.encode_targets(y).flatten(1)
        hidden = (predicted - h_y).square().mean(dim=1)
        found = (x.new_empty(len(x), 0) if z is None else z, batch.direction, batch.digit, hidden, h_y)
        for column, part in zip(columns, found, strict=True):
            column.append(part)
    model.train(training)
    z_all, direction, digit, hidden, h_y = map(torch.cat, columns)
    codes = Codes(z_all, direction, digit, hidden, total=h_y.var(dim=0, correction=0).mean())
    if not (codes.hidden.isfinite().all() and codes.z.isfinite().all()):
        raise DivergedError("the model's representations are not finite: there is nothing to classify")
    return codes


def adam_classifier(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int, config: Config
) -> list[float]:
    """The paper's probe: a linear map from z* as it is to the classes, cross-entropy, Adam, batches of 256.

    train, validation: (z (n, dim), labels (n,)). Returns the validation accuracy after every epoch, in 0..1.
    """
    settings, (z, labels) = config.evaluate, train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        probe = nn.Linear(z.shape[1], classes).to(z.device)
        orders = [torch.randperm(len(z)) for _ in range(settings.probe_epochs)]
    optimizer = torch.optim.Adam(probe.parameters(), settings.probe_lr, fused=True)
    curve = []
    for order in orders:
        for index in order.to(z.device).split(settings.probe_batch):
            F.cross_entropy(probe(z[index]), labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        curve.append(_accuracy(probe, *validation))
    return torch.stack(curve).tolist()


def converged_classifier(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int) -> float:
    """The same linear map trained to the end: logistic regression on standardised z*, L-BFGS in float64.

    Independent of z's scale and of the probe's length; a weight decay of 1e-4 bounds it where classes separate.
    Arguments as `adam_classifier`'s. Returns the validation accuracy, in 0..1.
    """
    z, z_validation = train[0].double(), validation[0].double()
    mean, std = z.mean(dim=0), z.std(dim=0)
    inverse = torch.where(std > 0, 1 / std, 0)  # a component that never moves says nothing
    z, z_validation = (z - mean) * inverse, (z_validation - mean) * inverse
    probe = nn.Linear(z.shape[1], classes, device=z.device, dtype=z.dtype)
    for parameter in probe.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(z), train[1]) + 1e-4 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return _accuracy(probe, z_validation, validation[1]).item()


def chance(train: Tensor, validation: Tensor) -> float:
    """Validation accuracy of always answering the most frequent training label: what no information reaches."""
    return (validation == train.mode().values).float().mean().item()


def evaluate_latents(run: Path, config: Config | None = None) -> dict[str, Any]:
    """Classifies the z* of the run in the folder `run`, once: `evaluate.measured_once`. Writes its latents.json.

    Without a latent there is nothing to classify: accuracies are those of chance. Raises: as that; DivergedError;
    ConfigError for videos of files, which have neither directions nor digits.
    """
    asked = config or Config.load(run / "config.json")
    if asked.data.dataset != "moving-mnist":
        raise ConfigError(f"{run}: data.dataset={asked.data.dataset}: z* is classified for moving-mnist alone")
    return measured_once(run, config, "latents.json", _measure)


def _measure(subject: Subject) -> dict[str, Any]:
    config, model = subject.config, subject.model
    fitted, held_out = (cast(MovingMNIST, videos) for videos in (subject.fitted, subject.held_out))
    train = extract_codes(model, fitted, config.evaluate.probe_videos, config)
    validation = extract_codes(model, held_out, config.evaluate.validation_videos, config)
    return {
        "kind": config.latent.kind,
        **_classified(train, validation, config),
        "hidden": validation.hidden.mean().item(),
        "explained": 1 - (validation.hidden.mean() / validation.total).item(),
        **_described(validation, config),
    }


def _classified(train: Codes, validation: Codes, config: Config) -> dict[str, Any]:
    """Accuracies of both classifiers for both labels."""
    result: dict[str, Any] = {}
    for name, classes in (("direction", DIRECTIONS), ("digit", DIGITS)):
        labels, held_out = getattr(train, name), getattr(validation, name)
        result[f"{name}_chance"] = chance(labels, held_out)
        curve = [result[f"{name}_chance"]]
        converged = curve[-1]
        if train.z.shape[1]:
            sets = (train.z, labels), (validation.z, held_out)
            curve, converged = adam_classifier(*sets, classes, config), converged_classifier(*sets, classes)
        result |= {
            f"{name}_accuracy": curve[-1],
            f"{name}_accuracy_converged": converged,
            f"{name}_accuracy_by_epoch": curve,
        }
    return result


def _described(codes: Codes, config: Config) -> dict[str, Any]:
    """How the latent is used, on the validation videos."""
    z, kind = codes.z, config.latent.kind
    if kind == "discrete":
        by_direction = [z[codes.direction == k].mean(dim=0).tolist() for k in range(DIRECTIONS)]
        return {"usage": z.mean(dim=0).tolist(), "usage_by_direction": by_direction}
    if kind == "sparse":
        nonzero = (z != 0).float().mean(dim=0)
        return {"zeros": 1 - nonzero.mean().item(), "nonzero": nonzero.tolist(), "weight": config.latent.weight}
    return {}


def _accuracy(probe: nn.Linear, z: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return (probe(z).argmax(dim=1) == labels).float().mean()
