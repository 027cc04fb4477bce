"""Latent variables in training and after it: z* of a batch, the calibration of the L1 weight, the heads in use.

A step infers z* = argmin_z E(x, y, z), equation (6), with every weight fixed, then updates the weights with z* fixed;
no gradient flows through it. While training z* comes from the representations that the update sees, normalised by the
batch's own statistics: z* from running statistics explains their difference too, and is worth less.

Calibration of the L1 weight w [ours]. The paper chooses w for a fraction of zeros; which w that is depends on the scale
of the representations and on how strongly the predictor answers to z, and both move while training. So w follows them:
at every log line, where the host reads the sums of the steps anyway,

    log w <- log w + GAIN (latent.zeros - fraction of zeros since the last line).

The fraction answers to log w at once and by less than 1 / GAIN per unit, hence no oscillation. w is logged and kept in
the checkpoint, and is what evaluation infers with. `latent.calibrate false` keeps `latent.weight`.

The predictor decays [ours]. Unit columns alone do not hold z: z* is shrunk by the penalty, the layers behind learn to
make up for it, z* shrinks further, and w runs after it (500-fold in 1,000 steps of the mini preset, direction then read
from z* with 64% instead of 91%). A weight decay of the predictor alone, `latent.decay`, ends that; the encoder's
weights, which carry what z is to say, do not decay.

Heads out of use [ours]. A head that is never the best is never trained. At a log line, every head that fewer than DEAD
of its share of the videos since the last line chose becomes a copy of the most used one, each weight perturbed by NOISE
of the layer's standard deviation; Adam's moments are copied as they are. `latent.revive false` is the paper's.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vjvcr_fast.config import Config, Latent
from vjvcr_fast.latents import ContinuousLatent, DiscreteLatent, SparseLatent, newton
from vjvcr_fast.models.convnet import MLPPredictor
from vjvcr_fast.models.energy import EnergyModel

GAIN = 3.0
LEAST, MOST = 1e-12, 1e12  # of w, where no w gives the fraction
DEAD = 0.05
NOISE = 0.05


class Inferred(NamedTuple):
    """z: (N, dim) or (N, heads) float32, or None without a latent. measured: (len(Latents.names),), means over N."""

    z: Tensor | None
    measured: Tensor


class DuringForward:
    """What an EnergyModel's forward calls for z*, with the representations that the update sees: they are made once.
    measured: of the last call."""

    def __init__(self, latents: "Latents") -> None:
        self.latents = latents
        self.measured = torch.empty(0)

    @torch._disable_dynamo  # a loop, of operators that the compiler does not see into
    def __call__(self, h_x: Tensor, h_y: Tensor | None, y: Tensor) -> Tensor:
        found = self.latents.infer_from(h_x, h_y, y)
        self.measured = found.measured
        return cast(Tensor, found.z)


class Latents:
    """The latent variable of one run: `config.latent`, with what of it changes while training.

    names: of what `infer` measures: "latent_energy", the energy that z* minimises with the L1 term in it, and
    "zeros" or "head_0", "head_1", ..., the fraction of the videos that chose it. weight: of the L1 term, now.
    """

    def __init__(self, config: Config, model: EnergyModel) -> None:
        self.settings, self.seed, self.model = config.latent, config.train.seed, model
        self.predictor = cast(MLPPredictor, model.predictor)
        self.weight = config.latent.weight
        heads = [f"head_{i}" for i in range(config.latent.heads)]
        names = {"discrete": ["latent_energy", *heads], "sparse": ["latent_energy", "zeros"]}
        self.names = names.get(config.latent.kind, [])
        self.dim, self.compile = config.latent_dim, config.train.compile

    @torch.no_grad()
    def infer(self, x: Tensor, y: Tensor, given: Tensor | None = None) -> Inferred:
        """z* of videos x (N, T_x, C, S, S), y (N, T_y, C, S, S); the model is afterwards as it was. given: z itself,
        where it is known, as actions are in pre-training; it is returned as (N, m), and nothing is inferred.

        Never waits for the device: where energies are not finite z* is 0, and the loss says so.
        """
        if self.settings.kind == "none":
            return Inferred(None, x.new_empty(0))
        if given is not None:
            return Inferred(given.flatten(1), x.new_empty(0))
        h_y = self.encode(y, targets=True) if self.model.terms.hidden else None
        return self.infer_from(self.encode(x), h_y, y)

    @torch.no_grad()
    def infer_from(self, h_x: Tensor, h_y: Tensor | None, y: Tensor) -> Inferred:
        """`infer` of representations h_x (N, T_x, d), h_y (N, T_y, d), that have been made already."""
        settings = self.settings
        latent: DiscreteLatent | SparseLatent | ContinuousLatent = DiscreteLatent(settings.heads, check=False)
        if settings.kind == "actions":
            latent = ContinuousLatent(
                (self.dim,),
                settings.iterations,
                settings.step_size,
                momentum=settings.momentum,
                clamp=(0.0, 1.0),
                step_rule=settings.step_rule,
                tolerance=settings.tolerance,
                compile=self.compile == "on" or (self.compile == "auto" and h_x.is_cuda),
                check=False,
            )
        if settings.kind == "sparse":
            if settings.method == "newton" and not newton.serves(h_x):
                usual = Latent()
                settings = replace(settings, method="fista", iterations=usual.iterations, tolerance=usual.tolerance)
            latent = SparseLatent(
                settings.dim,
                self.weight,
                settings.iterations,
                method=settings.method,
                nonnegative=settings.nonnegative,
                step_rule=settings.step_rule,
                lr=settings.step_size,
                tolerance=settings.tolerance,
                check=False,
            )
        found = latent.infer_from(self.model, h_x, h_y, y)
        shares = found.z.mean(dim=0) if settings.kind == "discrete" else found.zeros.mean()[None]
        measured = torch.cat([found.energy.mean()[None], shares])
        return Inferred(found.z, measured if self.names else h_x.new_empty(0))

    def parameters(self) -> list[Any]:
        """Of the model, for an optimizer: with a sparse latent the predictor's apart, for their own weight decay."""
        if self.settings.kind != "sparse":
            return list(self.model.parameters())
        predictor = list(self.predictor.parameters())
        others = [p for p in self.model.parameters() if all(p is not q for q in predictor)]
        return [{"params": others}, {"params": predictor, "weight_decay": self.settings.decay}]

    def predict(self, x: Tensor, y: Tensor, given: Tensor | None = None) -> Tensor:
        """Predicted representations of the target frames at z*, or at the one given, (N, T_y, d)."""
        return self.model.predict(x, self.infer(x, y, given).z)

    def project(self) -> None:
        """After every update of the weights: the columns that an inferred z enters by are unit vectors again."""
        if self.settings.kind == "sparse":
            self.predictor.normalize_latent()

    def adapt(self, step: int, means: dict[str, float], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """At a log line: calibrates or revives. means: of `names`, since the last line. Returns what to log besides."""
        settings = self.settings
        if settings.kind == "sparse":
            used = self.weight
            if settings.calibrate:
                changed = used * math.exp(GAIN * (settings.zeros - means["zeros"]))
                self.weight = min(max(changed, LEAST), MOST)
            return {"latent_weight": used}
        if settings.kind == "discrete" and settings.revive:
            usage = [means[f"head_{i}"] for i in range(settings.heads)]
            return {"revived": float(self._revive(usage, step, optimizer))}
        return {}

    def encode(self, frames: Tensor, targets: bool = False) -> Tensor:
        """As the model's encoder, of x or of targets, in its mode, but the running statistics stay as they are."""
        twin = self.model.twin
        encoder = twin if targets and twin is not None else self.model.encoder
        buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        return torch.func.functional_call(encoder, buffers, (frames,))

    @torch.no_grad()
    def _revive(self, usage: list[float], step: int, optimizer: torch.optim.Optimizer) -> int:
        """Copies the most used head into those out of use; returns how many those are."""
        heads = self.predictor.last
        dead = [i for i, share in enumerate(usage) if share < DEAD / len(usage)]
        source = list(heads[max(range(len(usage)), key=usage.__getitem__)].parameters())
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + step)
        for i in dead:
            for theirs, ours in zip(source, heads[i].parameters(), strict=True):
                noise = torch.randn(theirs.shape, generator=generator).to(theirs)
                ours.copy_(theirs + NOISE * theirs.std() * noise)
                for name, moment in optimizer.state[theirs].items():
                    optimizer.state[ours][name].copy_(moment)
        return len(dead)
