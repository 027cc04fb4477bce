"""Every public function that takes tensors takes any strides: results and gradients are those of the same numbers laid
out contiguously, and no input changes.

`public` finds these functions in the package. Each has an `Entry` in ENTRIES, or is an exception with its reason. So a
new one fails `test_every_function_has_an_entry` until it has an entry, too.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import pytest
import tolerances
import torch
import torch.distributed as dist
from conftest import TINY, TINY_SIMVP
from fuzz import fuzz, layouts
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vjvcr_fast
from vjvcr_fast import native, reference
from vjvcr_fast.config import Config, override
from vjvcr_fast.data import Digits, MovingMNIST, hashing, split_digits
from vjvcr_fast.data.cater import sampled
from vjvcr_fast.data.clevrer import windows
from vjvcr_fast.data.digits import development_digits
from vjvcr_fast.data.video.file import Video, resize
from vjvcr_fast.evaluation import evaluate, latent_probes, metrics
from vjvcr_fast.evaluation.probes import Features, adam_probe, least_squares_probe, mean_predictor, standardised
from vjvcr_fast.latents import ContinuousLatent, DiscreteLatent, HeadEnergy, Latent, MLPEnergy, SparseLatent
from vjvcr_fast.losses import (
    SIGRegLoss,
    VCRLoss,
    VICRegLoss,
    analytic,
    covariance_penalty,
    sigreg,
    variance_hinge,
    vcr_loss,
)
from vjvcr_fast.losses.vcr import as_slices
from vjvcr_fast.models.convnet import ConvDecoder, ConvEncoder, MLPPredictor
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.models.simvp import SimVPDecoder, SimVPEncoder, run
from vjvcr_fast.models.swin import SwinPredictor, WindowAttention
from vjvcr_fast.runs import Trained
from vjvcr_fast.training.build import build_model
from vjvcr_fast.training.chunked import backward_chunked, energy_chunked
from vjvcr_fast.training.telemetry import collapse_measures, statistics

FACTS: Any = SimpleNamespace(frames=9, fps=1.0, height=2, width=2, mirrored=False)

# Modules, classes and functions without an entry, and why.
EXCEPTIONS = {
    "kernels": "vcr_loss(backend='triton') calls them, see tests/kernels",
    "losses.analytic": "vcr_loss calls it",
    "losses.cpu": "vcr_loss calls it",
    "losses.ops": "vcr_loss(backend='triton') calls it, see tests/kernels",
    "losses.distributed": "vcr_loss(group=...) calls it",
    "losses.projections": "sigreg calls it",
    "losses.vcr.guarded": "vcr_loss and sigreg call it",
    "losses.backends.resolve": "looks at device and dtype alone",
    "latents.descent": "Latent.infer calls it",
    "latents.kinds.LatentModel": "a protocol",
    "models.convnet.LatentPredictor.check_latent": "looks at the shape alone",
    "native": "looks at device, dtype and shape alone",
    "bench": "measures, on tensors that it makes",
    "data.video.cache": "reads the numbers of a Source one by one",
    "data.video.decode.IsolatedVideo": "has another process read",
    "data.video.clips": "reads the numbers of a Source one by one",
    "evaluation.ceiling": "trains, or fits a linear map to features that the encoder made",
    "evaluation.evaluate.frozen_decoder": "trains",
    "evaluation.probes.training_probe": "makes its tensors itself",
    "paper": "draws",
    "training.build": "makes data sets and models",
    "training.calibration": "Trained.predict calls it",
    "training.log": "draws",
    "training.loop": "trains",
    "training.nonfinite": "takes a scalar",
    "training.processes": "needs several processes",
    "training.step": "trains",
    "training.telemetry.Telemetry": "calls statistics in a thread",
}
BOUNDS = {
    torch.float64: tolerances.FLOAT64,
    torch.float32: tolerances.FLOAT32,
    torch.bfloat16: tolerances.BFLOAT16,
    torch.float16: tolerances.FLOAT16,
}
SINGLE, DOUBLE, BOTH, ANY = (torch.float32,), (torch.float64,), (torch.float32, torch.float64), tuple(BOUNDS)


class Entry(NamedTuple):
    """names: the functions that `call` calls, with spaces between.

    inputs: the tensors that `call` takes, with commas between: the sizes, numbers or letters that stand for one, and
    before them the kind if it is not normal: `unit` (in [0, 1]), `bool`, `byte` or `below:K` (int64).
    dtypes: of floating point inputs. alike: numbers of an input may be equal.
    """

    names: str
    call: Callable[..., Any]
    inputs: str
    dtypes: tuple[torch.dtype, ...] = DOUBLE
    alike: bool = True


# -- What the entries call ------------------------------------------------------------------------------------------


@functools.cache
def made(make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> Any:
    """A module in float64 and evaluation mode, always the same."""
    torch.manual_seed(0)
    return make(*arguments, **options).double().eval()


ENCODER, WEIGHTS, TERMS = (1, (2, 2, 2), 8, 1), {"alpha": 0.7, "beta": 0.3}, {"threshold": 0.8, "eps": 1e-3}
SIMVP, GRID = (1, 8, (2, 2), 3), ((4, 4), 6, 2, (2, 2), 1)


def energy_model(row: str, **latent: int) -> EnergyModel:
    decoder = ConvDecoder(*ENCODER) if row == "vj-vcr-decoder" else None
    return EnergyModel(ConvEncoder(*ENCODER), MLPPredictor(2, 2, 3, 5, **latent), decoder, row, **WEIGHTS, gamma=0.5)


@functools.cache
def trained(*changes: tuple[str, Any]) -> Trained:
    config = override(Config(preset="tiny"), {**TINY, **dict(changes)})
    torch.manual_seed(0)
    return Trained(config, build_model(config, torch.device("cpu")).eval())


LATENT = ("latent.kind", "sparse"), ("latent.dim", 3), ("latent.iterations", 3)
IN_COLOUR = (*TINY_SIMVP.items(), ("model.kind", "simvp"), ("data.dataset", "folder"), ("data.frames_in", 2))
PROBES = override(Config(preset="tiny"), {**TINY, "evaluate.actions_epochs": 2, "evaluate.actions_batch": 4})


def infer(latent: Latent, plain: bool = False) -> Callable[..., Any]:
    """Inference from z0 with an energy that depends on b, of z0's shape. Its gradient is not contiguous.

    plain: without the operators.
    """

    def call(z0: Tensor, b: Tensor) -> Any:
        def energy(z: Tensor) -> Tensor:
            columns = (z - b).flatten(1).mT.contiguous()
            return (columns.square() + columns.sin()).mean(dim=0)

        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(native, "MISSING", "not wanted")
            return latent.infer(energy, len(z0), device="cpu", dtype=z0.dtype, z0=z0)

    return call


def infer_mlp(**options: Any) -> Callable[..., Any]:
    """The same with an MLPEnergy, of its tensors."""

    def call(z0: Tensor, *tensors: Tensor) -> Any:
        latent = SparseLatent(3, 1e-2, 4, check=False, **options)
        return latent.infer(MLPEnergy(*tensors), len(z0), device="cpu", dtype=z0.dtype, z0=z0)[:2]

    return call


def infer_from(latent: Latent, row: str, **options: int) -> Callable[..., Any]:
    def call(*h_y_z0: Tensor) -> Any:
        return latent.infer_from(made(energy_model, row, **options), *h_y_z0)[:2]

    return call


def of_mlp(z: Tensor, *tensors: Tensor) -> list[Any]:
    energy = MLPEnergy(*tensors)
    expanded = energy.expand(z)
    hidden = energy.activations(z)
    return [energy(z), hidden, energy.residual(hidden[1]), expanded.value_and_gradient(2 * z), expanded.operands(z)]


def of_heads(z: Tensor, h_x: Tensor, h_y: Tensor) -> list[Tensor]:
    energy = made(energy_model, "vj-vcr", heads=3).latent_energy(h_x, h_y)
    assert isinstance(energy, HeadEnergy)
    return [energy(z), energy.all()]


def in_blocks(h: Tensor, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analytic, "_BLOCK", 20)
        return vcr_loss(h, backend="torch", **WEIGHTS, **options)


def sliced(h: Tensor, directions: Tensor, *, group: bool, **options: Any) -> Tensor:
    return sigreg(h, directions=directions.detach(), group=dist.group.WORLD if group else None, **options)


def in_chunks(x: Tensor, y: Tensor, backward: bool) -> list[Tensor | None]:
    of = EnergyModel(made(SimVPEncoder, *SIMVP), made(nn.Identity), None, "vj-vcr", **WEIGHTS, gamma=0.0)
    if not backward:
        return [*energy_chunked(of, x, y, chunk=2)]
    of.zero_grad()
    with torch.enable_grad():
        return [*backward_chunked(of, x, y, chunk=2), *(p.grad for p in of.parameters())]


def frozen(call: Callable[..., Any]) -> Callable[..., Any]:
    """For functions whose tensors never require gradients."""
    return lambda *tensors: call(*(t.detach() for t in tensors))


def probed(call: Callable[..., Any]) -> Callable[..., Any]:
    """Calls call(train, validation), which are Features."""
    return frozen(lambda *t: call(Features(*t[:2], t[0]), Features(*t[2:], t[2])))


class Fake(Video):
    def _read(self, indices: list[int]) -> Tensor:
        return torch.tensor(indices).view(-1, 1, 1, 1).expand(-1, 2, 2, 3).byte()


def videos(images: Tensor, labels: Tensor, indices: Tensor) -> list[Any]:
    digits = Digits(images, labels, "")
    parts = [(part.images, part.labels) for part in (*split_digits(digits), *development_digits(digits))]
    options: Any = {"frames": 2, "canvas": 16, "digit_size": 9, "speed": (1, 2), "seed": 0, "stream": ""}
    return [parts, digits.fingerprint(), MovingMNIST(digits, **options).batch_at(indices)]


def as_group(call: Callable[..., Any]) -> Callable[..., Any]:
    """With a group of this process alone."""
    return lambda *h: call(*h, group=dist.group.WORLD)


# -- The entries ----------------------------------------------------------------------------------------------------

MLP = "n 8, 8 3, 8 8, 8, 6 8, 6, n 6"
H_X, H_Y, X, Y = "n 2 2", "n 3 2", "unit n 2 1 8 8", "unit n 3 1 8 8"
ROUTES = ("time", "features", "covariance", "gather")
ENTRIES = [
    # reference.py
    Entry("reference.variance_hinge", lambda h: reference.variance_hinge(h, **TERMS), "n t d", BOTH),
    Entry("reference.covariance", reference.covariance, "n t d", BOTH),
    Entry("reference.covariance_penalty", reference.covariance_penalty, "n t d", BOTH),
    Entry("reference.vcr", lambda h: reference.vcr(h, 0.7, 0.3), "n t d", BOTH),
    Entry("reference.vcr", lambda h: reference.vcr(h, 0.7, 0.3, over="both"), "n t d", BOTH),
    Entry("reference.distance", reference.distance, "n t d, n t d"),
    Entry(
        "reference.energy_vjvcr",
        lambda *t: reference.energy_vjvcr(*t[:3], 0.7, 0.3, 0.5, *t[3:]),
        "n s d, n t d, n t d, n t c 3 3, n t c 3 3",
    ),
    Entry("reference.energy_per_sample", reference.energy_per_sample, "n t d, n t d"),
    Entry(
        "reference.energy_generative",
        lambda *t: reference.energy_generative(*t, 0.7, 0.3),
        "n t c 3 3, n t c 3 3, n t d",
    ),
    Entry("reference.singular_values", reference.singular_values, "n d", alike=False),
    Entry("reference.sigreg", lambda h, a: reference.sigreg(h, a), "n t d, d k"),
    Entry("reference.cumulative_spectrum", reference.cumulative_spectrum, "unit n d"),
    Entry("reference.rank_me", reference.rank_me, "n d", alike=False),
    Entry("reference.soft_threshold", lambda z, s: reference.soft_threshold(z, s.abs()), "n m, n m"),
    Entry(
        "reference.fista",
        lambda z, b: reference.fista(lambda z: (z - b).square().sum(dim=1), z, 0.1, 0.3, 4),
        "n m, n m",
    ),
    Entry(
        "reference.monotone_fista",
        lambda z, b: reference.monotone_fista(lambda z: (z - b).square().sum(), z, 0.1, 0.3, 4),
        "m, m",
    ),
    Entry(
        "reference.proximal_newton",
        lambda z, b, B: reference.proximal_newton(lambda z: (B.T @ (z - b)).square().sum(), z, 0.1, B @ B.T, 3),
        "m, m, m m",
    ),
    Entry("reference.with_ridge", reference.with_ridge, "m m"),
    Entry(
        "reference.model_minimum",
        frozen(lambda z, g, B: reference.model_minimum(z, g, reference.with_ridge(B @ B.T), 0.1)),
        "m, m, m m",
    ),
    # losses
    Entry("losses.vcr.variance_hinge", lambda h: variance_hinge(h, **TERMS), "n t d", ANY),
    Entry("losses.vcr.covariance_penalty", covariance_penalty, "n d", ANY),
    Entry("losses.vcr.covariance_penalty", covariance_penalty, "n t s d", ANY),
    *(
        Entry("losses.vcr.vcr_loss", functools.partial(call, form=form, **options), "n t s d", ANY)
        for form in ("gram", "covariance")
        for call, options in (
            (in_blocks, {}),
            (vcr_loss, WEIGHTS),
            (vcr_loss, {"gradient": "backward", **WEIGHTS}),
            (vcr_loss, {"backend": "reference", **WEIGHTS}),
        )
    ),
    *(
        Entry("losses.vcr.vcr_loss", as_group(functools.partial(vcr_loss, route=route, **WEIGHTS)), "n t d", ANY)
        for route in (ROUTES if dist.is_available() else ())
    ),
    *(
        Entry(
            "losses.vcr.vcr_loss",
            functools.partial(vcr_loss, over=over, covariance_divisor="d(d-1)", **WEIGHTS),
            "n 2 t d",
            ANY,
        )
        for over in ("samples", "time", "both")
    ),
    Entry("losses.vcr.VCRLoss.forward", lambda *h: VCRLoss(0.7, 0.3)(h), "n t d, n d", ANY),
    Entry("losses.vcr.VCRLoss.forward", lambda *h: VCRLoss(0.7, 0.3, over="both")(h), "n t d, n d", ANY),
    Entry("losses.vcr.as_slices", as_slices, "n t s d"),
    Entry("losses.vicreg.VICRegLoss.forward", VICRegLoss(), "n t d, n t d", ANY),
    Entry("losses.vicreg.VICRegLoss.forward", VICRegLoss(return_terms=True), "n t d, n t d", ANY),
    Entry("losses.vicreg.VICRegLoss.forward", VICRegLoss(gather_distributed=dist.is_available()), "n t d, n t d", BOTH),
    *(
        Entry("losses.lejepa.sigreg", functools.partial(sliced, group=group, **options), "n t d, d k", ANY)
        for group in ((False, True) if dist.is_available() else (False,))
        for options in ({}, {"backend": "torch"}, {"backend": "reference"})
        if not (group and options.get("backend") == "reference")
    ),
    Entry("losses.lejepa.SIGRegLoss.forward", lambda *h: SIGRegLoss(directions=9)(h), "n t d, n d", ANY),
    # latents
    *(
        Entry("latents.kinds.Latent.infer", infer(latent, plain), inputs, BOTH)
        for plain in (False, True)
        for latent, inputs in (
            (SparseLatent(3, 0.1, 4), "n 3, n 3"),
            (SparseLatent(1, 0.1, 4, method="ista", nonnegative=True), "n 1, n 1"),
            (ContinuousLatent((2, 3), 4, 0.1, clamp=(-1, 1)), "n 2 3, n 2 3"),
        )
    ),
    Entry("latents.kinds.Latent.infer", infer(DiscreteLatent(3)), "n 3, n 3", BOTH),
    Entry("latents.kinds.Latent.infer latents.energies.MLPEnergy.__init__", infer_mlp(), f"n 3, {MLP}"),
    Entry("latents.kinds.Latent.infer_from", infer_from(DiscreteLatent(3), "vj-vcr", heads=3), f"{H_X}, {H_Y}"),
    Entry(
        "latents.kinds.Latent.infer_from",
        lambda h_x, h_y, z0: infer_from(SparseLatent(3, 0.1, 4), "vj-vcr", latent_dim=3)(h_x, h_y, None, z0),
        f"{H_X}, {H_Y}, n 3",
    ),
    Entry(
        "latents.kinds.Latent.infer_from",
        infer_from(ContinuousLatent((3,), 4, 0.1), "vj-vcr-decoder", latent_dim=3),
        f"{H_X}, {H_Y}, {Y}, n 3",
    ),
    Entry(
        " ".join(f"latents.energies.MLPEnergy.{name}" for name in ("__call__", "activations", "residual", "expand"))
        + " latents.energies.ExpandedMLPEnergy.value_and_gradient latents.energies.ExpandedMLPEnergy.operands",
        of_mlp,
        f"n 3, {MLP}",
    ),
    Entry("latents.energies.HeadEnergy.__call__", of_heads, f"n 3, {H_X}, {H_Y}"),
    # models
    Entry("models.convnet.ConvEncoder.forward", lambda x: made(ConvEncoder, *ENCODER)(x), X),
    Entry(
        "models.convnet.ConvEncoder.forward", lambda x: made(ConvEncoder, 3, (2, 2, 4), 16, 2)(x), "unit n t 3 16 16"
    ),
    Entry("models.convnet.ConvDecoder.forward", lambda h: made(ConvDecoder, 1, (2, 2, 4), 16, 2)(h), "n t 16"),
    Entry("models.convnet.MLPPredictor.forward", lambda h: made(MLPPredictor, 2, 2, 3, 5)(h), H_X),
    Entry("models.convnet.MLPPredictor.forward", lambda *t: made(MLPPredictor, 2, 2, 3, 5, 3)(*t), f"{H_X}, n 3"),
    Entry("models.convnet.MLPPredictor.forward", lambda *t: made(MLPPredictor, 2, 2, 3, 5, 0, 3)(*t), f"{H_X}, n 3"),
    Entry("models.convnet.MLPPredictor.hidden", lambda *t: made(MLPPredictor, 2, 2, 3, 5, 3).hidden(*t), f"{H_X}, n 3"),
    Entry("models.convnet.MLPPredictor.head", lambda u: made(MLPPredictor, 2, 2, 3, 5, 0, 3).head(1, u), "n 5"),
    Entry(
        "models.convnet.MLPPredictor.closed_form",
        lambda h_x, h_y, z: made(MLPPredictor, 2, 2, 3, 5, 3).closed_form(h_x, h_y)(z),
        f"{H_X}, {H_Y}, n 3",
    ),
    Entry(
        "models.energy.EnergyModel.forward",
        lambda *t: made(energy_model, "vj-vcr-decoder", latent_dim=3)(*t),
        f"{X}, {Y}, n 3",
    ),
    Entry(
        "models.energy.EnergyModel.terms_of",
        lambda *t: made(energy_model, "vj-vcr-decoder").terms_of(*t),
        f"{H_X}, {H_Y}, {H_Y}, {Y}, {Y}",
    ),
    Entry("models.energy.EnergyModel.encode_targets", lambda y: made(energy_model, "vj-vcr").encode_targets(y), Y),
    Entry("models.energy.EnergyModel.distance", lambda *t: made(energy_model, "vj-vcr").distance(*t), "n t d, n t d"),
    Entry(
        "models.energy.EnergyModel.regularise", lambda *h: made(energy_model, "vj-vcr").regularise(h), "n s d, n t d"
    ),
    Entry("models.energy.EnergyModel.predict", lambda x: made(energy_model, "vj-vcr").predict(x), X),
    Entry(
        "models.energy.EnergyModel.latent_energy",
        lambda z, *t: made(energy_model, "vj-vcr-decoder", latent_dim=3).latent_energy(*t)(z),
        f"n 3, {H_X}, {H_Y}, {Y}",
    ),
    Entry("models.simvp.SimVPEncoder.forward", lambda x: made(SimVPEncoder, *SIMVP)(x), "unit n t 1 8 8"),
    Entry("models.simvp.SimVPDecoder.forward", lambda h: made(SimVPDecoder, *SIMVP)(h), "n t 12"),
    Entry("models.simvp.run", lambda x: [run([made(nn.Linear, 4, 4)], x, c) for c in (False, True)], "n 4"),
    Entry(
        "models.swin.SwinPredictor.forward",
        lambda *t: made(SwinPredictor, (2, 2, 2), 2, 3, 4, 2, 2, 1, 3)(*t),
        "n 2 8, n 3",
    ),
    Entry("models.swin.WindowAttention.forward", lambda x: made(WindowAttention, *GRID)(x), "n 4 4 6"),
    # evaluation
    Entry("evaluation.metrics.psnr", metrics.psnr, "unit n t 1 3 3, unit n t 1 3 3"),
    Entry(
        "evaluation.metrics.grain",
        lambda p, y: metrics.grain(p, torch.where(y > 0.995, y, 0))[0],
        "n 2 1 24 24, unit n 2 1 24 24",
    ),
    Entry("evaluation.metrics.average_precision", metrics.average_precision, "n, bool n"),
    Entry("evaluation.metrics.mean_average_precision", metrics.mean_average_precision, "n c, bool n c"),
    Entry("evaluation.probes.standardised", probed(standardised), "9 d, 9, n d, n"),
    Entry("evaluation.probes.least_squares_probe", probed(least_squares_probe), "9 d, 9, n d, n", BOTH, alike=False),
    Entry("evaluation.probes.mean_predictor", probed(mean_predictor), "9 d, 9, n d, n", BOTH),
    Entry("evaluation.probes.adam_probe", probed(lambda *f: adam_probe(*f, PROBES, 0)), "9 d, 9, n d, n", SINGLE),
    Entry(
        "evaluation.latent_probes.adam_classifier",
        frozen(lambda a, b, c, d: latent_probes.adam_classifier((a, b), (c, d), 3, PROBES)),
        "9 d, below:3 9, n d, below:3 n",
        SINGLE,
    ),
    Entry(
        "evaluation.latent_probes.converged_classifier",
        frozen(lambda a, b, c, d: latent_probes.converged_classifier((a, b), (c, d), 3)),
        "9 d, below:3 9, n d, below:3 n",
        alike=False,
    ),
    Entry(
        "evaluation.latent_probes.actions_probe",
        frozen(lambda *t: latent_probes.actions_probe(*t, PROBES)),
        "9 d, bool 9 14, n d",
        SINGLE,
    ),
    Entry("evaluation.latent_probes.chance", latent_probes.chance, "below:3 n, below:3 m"),
    Entry(
        "evaluation.evaluate.decode",
        lambda x, y: evaluate.decode(trained(*LATENT)._latents, nn.Flatten(2), x, y),
        "unit n 2 1 16 16, unit n 3 1 16 16",
        SINGLE,
    ),
    # a trained run
    Entry("runs.Trained.encode runs.Trained.prepare", lambda x: trained().encode(x), "byte n t 1 9 11"),
    Entry("runs.Trained.encode", lambda x: trained(*IN_COLOUR).encode(x), "unit n t 3 16 16", BOTH),
    Entry("runs.Trained.predict", lambda *t: trained(*LATENT).predict(*t), "unit n 2 3 16 16, unit n 3 1 9 9", SINGLE),
    # data
    Entry(
        "data.moving_mnist.MovingMNIST.__init__ data.moving_mnist.MovingMNIST.batch_at data.digits.Digits.__init__ "
        "data.digits.split_digits data.digits.development_digits",
        videos,
        "byte 6 28 28, below:9 6, below:40 m",
    ),
    Entry("data.hashing.splitmix", hashing.splitmix, "below:9 n, below:9 n"),
    Entry("data.hashing.uniform", hashing.uniform, "below:9 m, below:9 n"),
    Entry("data.cater.sampled", lambda active: sampled(active, 3), "bool 14 n"),
    Entry("data.clevrer.windows", lambda visible: windows(visible, 1, 1), "bool n m"),
    Entry(
        "data.video.file.Video.frames",
        lambda indices: Fake(Path(), FACTS, torch.device("cpu"), 1).frames(indices),
        "below:9 n",
    ),
    Entry("data.video.file.resize", lambda frames: resize(frames, (5, 7)), "byte n 3 6 9"),
    # training
    Entry("training.telemetry.statistics", statistics, "n t d", BOTH),
    Entry(
        "training.telemetry.collapse_measures", lambda h: torch.tensor([*collapse_measures(h).values()]), "n t d", ANY
    ),
    *(
        Entry(f"training.chunked.{name}", functools.partial(in_chunks, backward=backward), f"{X}, {X}")
        for name, backward in (("backward_chunked", True), ("energy_chunked", False))
    ),
]
if native.MISSING is None:
    ENTRIES.append(Entry("latents.kinds.Latent.infer", infer_mlp(method="newton"), f"n 3, {MLP}"))


# -- Which functions there are --------------------------------------------------------------------------------------


def has_tensors(hint: Any) -> bool:
    """True for Tensor, and for what is made of tensors: sequences, named tuples, dataclasses."""
    if get_origin(hint) is not None:
        return get_origin(hint) is not Callable and any(map(has_tensors, get_args(hint)))
    if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
        return any(map(has_tensors, get_type_hints(hint).values()))
    return hint is Tensor


def takes_tensors(function: Any) -> bool:
    hints = get_type_hints(function) if inspect.isfunction(function) else {}
    return any(has_tensors(hint) for name, hint in hints.items() if name != "return")


def public() -> Iterator[str]:
    """The names, within the package, of all public functions and methods that take tensors, but for EXCEPTIONS."""
    for module in pkgutil.walk_packages(vjvcr_fast.__path__, "vjvcr_fast."):
        if module.name.startswith(("vjvcr_fast._", "vjvcr_fast.kernels")):
            continue
        for name, found in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(found, "__module__", None) != module.name:
                continue
            members = {f"{name}.{key}": value for key, value in vars(found).items()} if inspect.isclass(found) else {}
            for full, function in {name: found, **members}.items():
                hidden = full.split(".")[-1].startswith("_") and not full.endswith((".__call__", ".__init__"))
                if takes_tensors(getattr(function, "__func__", function)) and not hidden:
                    yield f"{module.name}.{full}".removeprefix("vjvcr_fast.")


def is_exception(name: str, of: str) -> bool:
    return f"{name}.".startswith(f"{of}.")


def test_every_function_has_an_entry() -> None:
    found = set(public())
    named = {name for entry in ENTRIES for name in entry.names.split()}
    assert named <= found
    assert sorted(name for name in found - named if not any(is_exception(name, of) for of in EXCEPTIONS)) == []
    assert [of for of in EXCEPTIONS if of != "kernels" and not any(is_exception(name, of) for name in found)] == []


# -- The property ---------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn, entry: Entry) -> list[Tensor]:
    """The inputs of an entry, with any strides."""
    dtype, sizes = draw(st.sampled_from(entry.dtypes)), {"n": draw(st.integers(2, 5))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    found = []
    for text in entry.inputs.split(","):
        kind, *rest = text.split()
        words = [kind, *rest] if kind.isdigit() or len(kind) == 1 else rest
        for word in words:
            sizes.setdefault(word, int(word) if word.isdigit() else draw(st.integers(1, 4)))
        shape = [sizes[word] for word in words]
        if kind == "unit":
            tensor = torch.rand(shape, generator=generator, dtype=dtype)
        elif kind in ("bool", "byte") or kind.startswith("below:"):
            below = {"bool": 2, "byte": 256}.get(kind) or int(kind.split(":")[1])
            tensor = torch.randint(below, shape, generator=generator)
            tensor = tensor.to({"bool": torch.bool, "byte": torch.uint8}.get(kind, torch.int64))
        else:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        found.append(draw(layouts(tensor, alike=entry.alike)))
    return found


def has_gradient(result: Any) -> bool:
    return isinstance(result, Tensor) and result.requires_grad


def evaluated(entry: Entry, inputs: list[Tensor]) -> list[Any]:
    """What the entry returns, and the gradients of a sum of it."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    kept, versions = [t.detach().clone() for t in leaves], [t._version for t in leaves]
    found = tree_leaves(entry.call(*leaves))
    sums = [(t * torch.linspace(1, 2, t.numel()).view(t.shape)).sum().double() for t in found if has_gradient(t)]
    of = [t for t in leaves if t.requires_grad]
    gradients = torch.autograd.grad(sum(sums), of, allow_unused=True) if sums and of else ()
    assert all(a.equal(b) for a, b in zip(leaves, kept, strict=True))
    assert [t._version for t in leaves] == versions
    return [*found, *gradients]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    if not dist.is_available():
        yield
        return
    init = f"file://{tmp_path_factory.mktemp('group') / 'init'}"
    dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.names.split()[0] for entry in ENTRIES])
@fuzz(12, 100, data=st.data())
def test_any_strides(one_thread: None, one_process: None, entry: Entry, data: st.DataObject) -> None:
    inputs = data.draw(tensors(entry))
    bound = max([BOUNDS[t.dtype] for t in inputs if t.is_floating_point()], default=0.0)
    ours, theirs = evaluated(entry, inputs), evaluated(entry, [t.contiguous() for t in inputs])
    for found, right in zip(ours, theirs, strict=True):
        if isinstance(right, Tensor | float) and torch.as_tensor(right).is_floating_point():
            found, right = torch.as_tensor(found), torch.as_tensor(right)
            torch.testing.assert_close(found, right, rtol=bound, atol=bound, equal_nan=True)
        else:
            assert found.equal(right) if isinstance(right, Tensor) else found == right
