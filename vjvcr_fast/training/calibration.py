"""Latent variables in training and evaluation: z* of a batch, the L1 weight, and the heads in use.

A training step first infers z* = argmin_z E(x, y, z), equation (6), with all weights fixed. Then it updates the weights
with z* fixed; no gradient flows through z*. In training z* is inferred from the representations that the update sees,
normalised by the batch's own statistics. With running statistics z* would also explain the difference between the two.

Calibration of the L1 weight w [ours]. The paper chooses w for a given fraction of zeros. The right w depends on the
scale of the representations and on how strongly the predictor reacts to z, and both change in training. So we adapt w
at every log line, where the host reads the sums of the steps anyway:

    log w <- log w + GAIN (latent.zeros - fraction of zeros since the last line).

The fraction reacts to log w at once, by less than 1 / GAIN per unit, so there is no oscillation. w is logged, stored in
the checkpoint, and used in evaluation. `latent.weight` is its first value; with `latent.calibrate false` it stays.

Weight decay of the predictor [ours]. The columns by which z enters the predictor are kept unit vectors (`project`).
That alone does not keep the scale of z: the penalty shrinks z*, the layers
behind learn to compensate, z* shrinks further, and w has to follow (500-fold in 1,000 steps of the mini preset; the
direction was then read from z* with 64% instead of 91%). A weight decay of the predictor alone, `latent.decay`, stops
this. The encoder's weights, which determine what z has to explain, do not decay.

Revival of unused heads [ours]. A head that is never the best is never trained. At a log line we look at the videos
since the last one. A head chosen for less than DEAD times its equal share becomes a copy of the most used head, with
noise of NOISE times the layer's standard deviation on every weight. Adam's moments are copied without noise.
`latent.revive false` is what the paper does.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.latents import ContinuousLatent, DiscreteLatent, SparseLatent
from vjvcr_fast.latents.descent import newton_refusal
from vjvcr_fast.models.convnet import MLPPredictor
from vjvcr_fast.models.energy import EnergyModel

GAIN = 3.0
LEAST, MOST = 1e-12, 1e12  # bounds of w, for when no w gives the fraction
DEAD = 0.05
NOISE = 0.05


class Inferred(NamedTuple):
    """z: (N, dim) or (N, heads) float32; None without a latent. measured: (len(Latents.names),), means over the N
    videos."""

    z: Tensor | None
    measured: Tensor


class DuringForward:
    """Infers z* within an EnergyModel's forward, so that the representations are computed only once.

    measured: that of the last call.
    """

    def __init__(self, latents: "Latents") -> None:
        self.latents = latents
        self.measured = torch.empty(0)

    @torch._disable_dynamo  # the compiler cannot look into the operators, and would unroll the loop
    def __call__(self, h_x: Tensor, h_y: Tensor | None, y: Tensor) -> Tensor:
        """z* of the batch, for EnergyModel's forward. Keeps what was measured."""
        found = self.latents.infer_from(h_x, h_y, y)
        self.measured = found.measured
        return cast(Tensor, found.z)


class Latents:
    """The latent variable of one run: `config.latent` and its state in training.

    names: what `infer` measures. "latent_energy" is the energy at z*, L1 term included; "zeros" the fraction of zeros
    in z*; "head_0", "head_1", ... the fraction of the videos that chose this head. weight: the current L1 weight.
    """

    def __init__(self, config: Config, model: EnergyModel) -> None:
        self.settings, self.seed, self.model = config.latent, config.train.seed, model
        self.predictor = cast(MLPPredictor, model.predictor)
        self.weight = config.latent.weight
        heads = [f"head_{i}" for i in range(config.latent.heads)]
        names = {"discrete": ["latent_energy", *heads], "sparse": ["latent_energy", "zeros"]}
        self.names = names.get(config.latent.kind, [])
        self.dim, self.compile = config.latent_dim, config.train.compile

    def check_method(self) -> None:
        """Raises ConfigError if `latent.method` is newton and that cannot serve this model where it is."""
        if self.settings.kind != "sparse" or self.settings.method != "newton":
            return
        model = self.model
        closed_form = type(model.predictor) is MLPPredictor and (model.decoder is None or model.gamma == 0)
        why = newton_refusal(closed_form, next(model.parameters()).device)
        if why is not None:
            raise ConfigError(f"latent.method=newton: {why}; choose --latent.method fista")

    @torch.no_grad()
    def infer(self, x: Tensor, y: Tensor, given: Tensor | None = None) -> Inferred:
        """z* of videos x (N, T_x, C, S, S) and y (N, T_y, C, S, S). Does not change the model.

        given: z itself, if it is known, as actions are in pre-training. It is returned as (N, m); nothing is inferred.

        Never waits for the device: for energies that are not finite z* is 0, and the loss shows it. Raises ConfigError
        as `check_method`.
        """
        if self.settings.kind == "none":
            return Inferred(None, x.new_empty(0))
        if given is not None:
            return Inferred(given.flatten(1), x.new_empty(0))
        h_y = self.encode(y, targets=True) if self.model.terms.hidden else None
        return self.infer_from(self.encode(x), h_y, y)

    @torch.no_grad()
    def infer_from(self, h_x: Tensor, h_y: Tensor | None, y: Tensor) -> Inferred:
        """`infer` from representations h_x (N, T_x, d), h_y (N, T_y, d). y: (N, T_y, C, S, S)."""
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
            self.check_method()
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
        """The model's parameters for an optimizer. With a sparse latent the predictor's are a group with its own weight
        decay."""
        if self.settings.kind != "sparse":
            return list(self.model.parameters())
        predictor = list(self.predictor.parameters())
        others = [p for p in self.model.parameters() if all(p is not q for q in predictor)]
        return [{"params": others}, {"params": predictor, "weight_decay": self.settings.decay}]

    def predict(self, x: Tensor, y: Tensor, given: Tensor | None = None) -> Tensor:
        """Predicted representations of the target frames, (N, T_y, d), at z* or at the given z."""
        return self.model.predict(x, self.infer(x, y, given).z)

    def project(self) -> None:
        """To be called after every update: makes the columns by which an inferred z enters unit vectors again."""
        if self.settings.kind == "sparse":
            self.predictor.normalize_latent()

    def adapt(
        self, step: int, means: dict[str, float], optimizer: torch.optim.Optimizer, due: bool = True
    ) -> dict[str, float]:
        """To be called at a log line: adapts the L1 weight or revives heads, if that is `due`.

        means: the means of `names` since the last line. Returns what to log in addition.
        """
        settings = self.settings
        if settings.kind == "sparse":
            used = self.weight
            if settings.calibrate and due:
                changed = used * math.exp(GAIN * (settings.zeros - means["zeros"]))
                self.weight = min(max(changed, LEAST), MOST)
            return {"latent_weight": used}
        if settings.kind == "discrete" and settings.revive:
            usage = [means[f"head_{i}"] for i in range(settings.heads)]
            return {"revived": float(self._revive(usage, step, optimizer)) if due else 0.0}
        return {}

    def encode(self, frames: Tensor, targets: bool = False) -> Tensor:
        """h (N, T, d) of frames (N, T, C, S, S): the encoder of x or of targets, in its current mode, without updating
        its running statistics."""
        twin = self.model.twin
        encoder = twin if targets and twin is not None else self.model.encoder
        buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        return torch.func.functional_call(encoder, buffers, (frames,))

    @torch.no_grad()
    def _revive(self, usage: list[float], step: int, optimizer: torch.optim.Optimizer) -> int:
        """Replaces unused heads by copies of the most used one. usage: the share of the videos that chose each head.
        Returns how many were replaced."""
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
