"""The probes of z*, the inferred latent: to direction and digit (Table 2), and to CATER's actions (figure 2).

Every probe is a linear map. `evaluate_latents` and `evaluate_actions` measure one run and write latents.json and
actions.json. The probes of speed in Table 1 are in evaluation/probes.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.data.cater import CLASSES
from vjvcr_fast.data.files import progress
from vjvcr_fast.data.moving_mnist import DIRECTIONS
from vjvcr_fast.evaluation.evaluate import Subject, measured_once
from vjvcr_fast.evaluation.metrics import mean_average_precision
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.loop import DivergedError
from vjvcr_fast.training.step import actions, split_frames

DIGITS = 10


def evaluate_latents(run: Path, config: Config | None = None) -> dict[str, Any]:
    """Probes the z* of a MovingMNIST run for direction and digit; writes latents.json (see `measured_once`).

    Without a latent there is nothing to probe, and the accuracies are those of chance.

    Raises ConfigError if the videos are not stochastic, since others have no directions to tell; DivergedError if z* is
    not finite; else as `measured_once`.
    """
    data = (config or Config.load(run / "config.json")).data
    if not data.stochastic:
        what = f"data.dataset={data.dataset}, data.stochastic=False"
        raise ConfigError(f"{run}: {what}: z* can be probed on stochastic moving-mnist only")
    return measured_once(run, config, "latents.json", _measure_latents)


def evaluate_actions(run: Path, config: Config | None = None) -> dict[str, Any]:
    """Probes the z* of a CATER run for actions, and measures spectra; writes actions.json (see `measured_once`).

    Raises ConfigError if the run's latent is no actions; DivergedError if z* is not finite; else as `measured_once`.
    """
    asked = config or Config.load(run / "config.json")
    if asked.latent.kind != "actions":
        raise ConfigError(f"{run}: latent.kind={asked.latent.kind}: only actions can be probed for actions")
    return measured_once(run, config, "actions.json", _measure_actions)


# -- Probes ---------------------------------------------------------------------------------------------------------


def adam_classifier(
    train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int, config: Config
) -> list[float]:
    """Table 2's probe: a linear map from z*, unscaled, to the classes; cross-entropy, Adam, batches of 256.

    train, validation: (z (n, dim), labels (n,)). Returns the validation accuracy after every epoch, in 0..1.
    """
    e = config.evaluate
    epochs = _epochs(train, classes, F.cross_entropy, e.probe_lr, e.probe_batch, e.probe_epochs, config.train.seed)
    return [_accuracy(probe, *validation) for probe in epochs]


def actions_probe(z: Tensor, label: Tensor, z_validation: Tensor, config: Config) -> Tensor:
    """Figure 2's probe: a linear map from z*, unscaled, to the actions; binary cross-entropy with logits, Adam.

    z: (n, dim). label: (n, 14) bool. Returns the scores of z_validation (m, dim), (m, 14).
    """
    e, train, loss = config.evaluate, (z, label.float()), F.binary_cross_entropy_with_logits
    epochs = _epochs(train, label.shape[1], loss, e.actions_lr, e.actions_batch, e.actions_epochs, config.train.seed)
    *_, probe = epochs
    with torch.no_grad():
        return probe(z_validation)


def _epochs(
    train: tuple[Tensor, Tensor], outputs: int, loss: Any, lr: float, batch: int, epochs: int, seed: int
) -> Iterator[nn.Linear]:
    """Trains a linear probe with Adam and yields it after every epoch.

    train: (z (n, dim), targets (n, ...)). loss: (outputs of the probe, targets) -> scalar. The initial weights and the
    batches depend on the seed alone.
    """
    z, targets = train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = nn.Linear(z.shape[1], outputs).to(z.device)
        orders = [torch.randperm(len(z)) for _ in range(epochs)]
    optimizer = torch.optim.Adam(probe.parameters(), lr, fused=True)
    for order in orders:
        for index in order.to(z.device).split(batch):
            loss(probe(z[index]), targets[index]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield probe


def converged_classifier(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int) -> float:
    """The same map as `adam_classifier`, trained to the end: logistic regression on standardised z*, L-BFGS, float64.

    It depends neither on z's scale nor on the length of the training. A weight decay of 1e-4 bounds the weights if the
    classes can be separated. Arguments as for `adam_classifier`. Returns the validation accuracy, in 0..1.
    """
    z, z_validation = train[0].double(), validation[0].double()
    mean, std = z.mean(dim=0), z.std(dim=0)
    inverse = torch.where(std > 0, 1 / std, 0)  # leaves out components that are constant
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
    return _accuracy(probe, z_validation, validation[1])


@torch.no_grad()
def _accuracy(probe: nn.Linear, z: Tensor, labels: Tensor) -> float:
    return (probe(z).argmax(dim=1) == labels).float().mean().item()


def chance(train: Tensor, validation: Tensor) -> float:
    """The validation accuracy of a classifier that always answers with the most frequent training label."""
    return (validation == train.mode().values).float().mean().item()


# -- Inferring z* of all videos -------------------------------------------------------------------------------------


def _inferred(model: EnergyModel, videos: Any, count: int, config: Config) -> Iterator[tuple[Any, Tensor, Tensor, Any]]:
    """Batches of videos 0 .. count - 1, each with its input frames x, its target frames y, and z* (None without one).

    Meanwhile the model is in evaluation mode. Everything is computed in full precision.
    """
    latents, size, training = Latents(config, model), config.evaluate.probe_batch, model.training
    model.eval()
    with progress(total=count, desc="z*", unit="video") as bar:
        for at in range(0, count, size):
            batch = videos.batch(at, min(size, count - at))
            x, y = split_frames(batch, config)
            yield batch, x, y, latents.infer(x, y).z
            bar.update(len(x))
    model.train(training)


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Joins the columns of all batches. Raises DivergedError if anything is not finite."""
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    if not all(column.isfinite().all() for column in columns):
        raise DivergedError("the model's representations are not finite: there is nothing to probe")
    return columns


# -- MovingMNIST: direction and digit -------------------------------------------------------------------------------


class Codes(NamedTuple):
    """z* of n videos, with what it is probed for.

    z: (n, dim) or (n, heads), float32; (n, 0) without a latent. direction, digit: (n,) int64. hidden: (n,), each
    video's D(Pred(h_x, z*), h_y). total: scalar, the variance of h_y, averaged over features and frames as `hidden` is.
    """

    z: Tensor
    direction: Tensor
    digit: Tensor
    hidden: Tensor
    total: Tensor


@torch.no_grad()
def extract_codes(model: EnergyModel, videos: Any, count: int, config: Config) -> Codes:
    """Codes of videos 0 .. count - 1 of a MovingMNIST. Raises DivergedError if anything is not finite."""
    parts = []
    for batch, x, y, z in _inferred(model, videos, count, config):
        predicted, h_y = model.predict(x, z).flatten(1), model.encode_targets(y).flatten(1)
        hidden = (predicted - h_y).square().mean(dim=1)
        parts.append((x.new_empty(len(x), 0) if z is None else z, batch.direction, batch.digit, hidden, h_y))
    z, direction, digit, hidden, h_y = _joined(parts)
    return Codes(z, direction, digit, hidden, total=h_y.var(dim=0, correction=0).mean())


def _measure_latents(subject: Subject) -> dict[str, Any]:
    config, model = subject.config, subject.model
    train = extract_codes(model, subject.fitted, config.evaluate.probe_videos, config)
    validation = extract_codes(model, subject.held_out, config.evaluate.validation_videos, config)
    result = {"kind": config.latent.kind}
    for name, classes in (("direction", DIRECTIONS), ("digit", DIGITS)):
        result |= _classified(name, classes, train, validation, config)
    explained = 1 - (validation.hidden.mean() / validation.total).item()
    return result | {"hidden": validation.hidden.mean().item(), "explained": explained} | _usage(validation, config)


def _classified(name: str, classes: int, train: Codes, validation: Codes, config: Config) -> dict[str, Any]:
    """Accuracies of both classifiers for one label; both are those of chance without a latent."""
    labels, held_out = getattr(train, name), getattr(validation, name)
    by_chance = chance(labels, held_out)
    curve, converged = [by_chance], by_chance
    if train.z.shape[1]:
        sets = (train.z, labels), (validation.z, held_out)
        curve, converged = adam_classifier(*sets, classes, config), converged_classifier(*sets, classes)
    found = {"chance": by_chance, "accuracy": curve[-1], "accuracy_converged": converged, "accuracy_by_epoch": curve}
    return {f"{name}_{what}": value for what, value in found.items()}


def _usage(codes: Codes, config: Config) -> dict[str, Any]:
    """How often each head of a discrete latent is chosen, or each component of a sparse one is not zero."""
    if config.latent.kind == "discrete":
        by_direction = [codes.z[codes.direction == k].mean(dim=0).tolist() for k in range(DIRECTIONS)]
        return {"usage": codes.z.mean(dim=0).tolist(), "usage_by_direction": by_direction}
    if config.latent.kind == "sparse":
        nonzero = (codes.z != 0).float().mean(dim=0)
        return {"zeros": 1 - nonzero.mean().item(), "nonzero": nonzero.tolist(), "weight": config.latent.weight}
    return {}


# -- CATER: actions -------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_actions(model: EnergyModel, videos: Any, config: Config) -> list[Tensor]:
    """z* of all n videos, and what it is compared with: [z, given, label, energy, energy_given].

    z: (n, 14 T_y) float32; it minimises the hidden term of the energy, or the pixel term if there is none. given: the
    true actions, of the same shape. label: (n, 14) bool, the actions that occur in the target frames. energy,
    energy_given: (n,), of z* and of the true actions. Raises DivergedError if anything is not finite.
    """
    parts = []
    for batch, x, y, z in _inferred(model, videos, len(videos), config):
        truth = actions(batch, config)
        assert truth is not None
        h_y = model.encode_targets(y) if model.terms.hidden else None
        energy, given = model.latent_energy(model.encoder(x), h_y, y), truth.flatten(1)
        parts.append((z, given, truth.any(dim=2), energy(z), energy(given)))
    return _joined(parts)


def _measure_actions(subject: Subject) -> dict[str, Any]:
    config, model = subject.config, subject.model
    z_fitted, given_fitted, label_fitted, *_ = extract_actions(model, subject.fitted, config)
    z, given, label, energy, energy_given = extract_actions(model, subject.held_out, config)
    generator = torch.Generator().manual_seed(config.train.seed)
    random = [torch.rand(of.shape, generator=generator).to(z) for of in (z_fitted, z)]
    pairs = {"z": (z_fitted, z), "random": random, "given": (given_fitted, given)}
    scores = {name: actions_probe(fitted, label_fitted, held_out, config) for name, (fitted, held_out) in pairs.items()}
    maps = {name: mean_average_precision(found, label) for name, found in scores.items()}
    models = {"start": build_model(config, z.device).eval(), "end": model}
    spectra = {name: spectrum(of, subject.held_out, config).tolist() for name, of in models.items()}
    return {
        "row": config.model.row,
        "map": maps["z"][0],
        "map_by_class": dict(zip(CLASSES, maps["z"][1], strict=True)),
        "map_scikit_learn": mean_average_precision(scores["z"], label, interpolated=False)[0],
        "map_random": maps["random"][0],
        "map_of_the_ground_truth": maps["given"][0],
        "share_of_positives": label.float().mean().item(),
        "energy": energy.mean().item(),
        "energy_given": energy_given.mean().item(),
        "videos": [len(z_fitted), len(z)],
        **{f"singular_values_{name}": [round(s, 4) for s in values] for name, values in spectra.items()},
        "spectrum_rows": len(z) * (config.data.frames_in + config.data.frames_out),
    }


@torch.no_grad()
def spectrum(model: EnergyModel, videos: Any, config: Config) -> Tensor:
    """Singular values of the encoder's outputs for all frames of all videos, (d,) float64, largest first.

    They are square roots of the eigenvalues of the outputs' d x d products, so that the outputs need not be kept.
    """
    product, size = torch.zeros(config.d, config.d, dtype=torch.float64), config.evaluate.probe_batch
    for at in range(0, len(videos), size):
        x, y = split_frames(videos.batch(at, min(size, len(videos) - at)), config)
        for h in (model.encoder(x), model.encode_targets(y)):
            rows = h.flatten(0, 1).double()
            product = product.to(rows.device) + rows.mT @ rows
    return torch.linalg.eigvalsh(product).clamp_min(0).sqrt().flip(0)
