"""Is the encoder collapsing? Four numbers about the representations of a batch, for any training loop.

`collapse_measures` says which. In a run of `vjvcr-fast train` they are of h_x (N, T, d) of the whole batch, as training
sees it, every `train.telemetry_every` steps.

With `Telemetry` training does not wait for them. The first three are a few operations on the device, in the Gram form.
The fourth needs singular values, which a thread computes on the host once the device has made a copy. The results are
read at the next log line.

Does the predictor use z? Where z is the actions in pre-training, `action_energies` is logged with every validation.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.config import Config, override
from vjvcr_fast.losses.analytic import centred, compute_dtype, full_precision
from vjvcr_fast.losses.vcr import Representations, as_slices
from vjvcr_fast.models.energy import EnergyModel
from vjvcr_fast.training.build import VideoSource
from vjvcr_fast.training.calibration import Latents
from vjvcr_fast.training.step import actions, split_frames

ROWS = 1_024
COMPARED = 16  # videos that `action_energies` are of; of generative rows each step to z* decodes them
DESCENT = 10  # steps of gradient descent to its z*; evaluation makes `latent.iterations`
NAMES = ("feature_std", "feature_std_least", "feature_correlation")


@torch.no_grad()
def collapse_measures(h: Representations) -> dict[str, float]:
    """Is the encoder collapsing? Four numbers about the representations of a batch. Waits for the device.

    h: as for `vcr_loss`, (N, d), (N, ..., d) or a sequence of such tensors, N >= 2. Of several processes: gather the
    samples first.

    Returns a dict of

    - "feature_std": the standard deviation over N, averaged over time steps and features; near 0 after a collapse;
    - "feature_std_least": the same for the smallest feature; near 0 if features have died;
    - "feature_correlation": the root mean square of the correlations between different features; by chance alone
      1/sqrt(N - 1);
    - "rank_me": RankMe, the effective number of dimensions whatever their scale, of at most 1,024 rows of h; NaN if
      one of them is not finite.

    Raises the errors of `vcr_loss` for h.
    """
    return _read(*_numbers(h), ready=None)


class Telemetry(ExitStack):
    """The numbers of `collapse_measures` for a loop that should not wait for the device. A context manager.

    `measure` starts a measurement, and `collect` returns those started since the last call, for example at a log line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "telemetry")
        self.callback(self._thread.shutdown, wait=False, cancel_futures=True)
        self._under_way: list[tuple[int, Future[dict[str, float]]]] = []

    @torch.no_grad()
    def measure(self, step: int, h: Representations) -> None:
        """Starts a measurement. step: whatever `collect` should name it by. h: as for `collapse_measures`."""
        numbers = _numbers(h)
        # From a GPU these copies go to pinned memory. The host does not wait for them; the thread does, for `ready`.
        values, rows = (t.to("cpu", non_blocking=True, copy=True) for t in numbers)
        on_gpu = numbers[0].is_cuda
        ready = torch.cuda.current_stream(numbers[0].device).record_event() if on_gpu else None
        self._under_way.append((step, self._thread.submit(_read, values, rows, ready)))

    def collect(self) -> list[tuple[int, dict[str, float]]]:
        """(step, numbers) of every measurement, waiting for those that are not finished."""
        done = [(step, future.result()) for step, future in self._under_way]
        self._under_way = []
        return done


def statistics(h: Tensor) -> Tensor:
    """The numbers NAMES of h (N, T, d), as a tensor (3,).

    With columns Z of unit norm, the sum of the squared correlations of all pairs of features is ||Z Z'||^2: no d x d
    matrix is needed.
    """
    n, _, d = h.shape
    z = centred(h.transpose(0, 1))
    norms = z.square().sum(dim=1).sqrt()  # (T, d)
    std = norms / (n - 1) ** 0.5
    unit = z / norms.clamp_min(1e-12).unsqueeze(1)
    pairs = (unit @ unit.mT).square().sum(dim=(1, 2)) - unit.square().sum(dim=1).square().sum(dim=1)
    correlation = (pairs.clamp_min(0) / max(d * (d - 1), 1)).sqrt()
    return torch.stack([std.mean(), std.mean(dim=0).min(), correlation.mean()])


def _numbers(h: Representations) -> tuple[Tensor, Tensor]:
    """`statistics` of h, and at most ROWS rows of it for RankMe."""
    slices = as_slices(h)
    whole = slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)
    flat = whole.flatten(0, 1)
    with full_precision(whole):
        return statistics(whole), flat[:: -(-len(flat) // ROWS)].to(compute_dtype(whole))


def _read(values: Tensor, rows: Tensor, ready: Any) -> dict[str, float]:
    if ready is not None:
        ready.synchronize()
    finite = bool(rows.isfinite().all())  # otherwise computing singular values raises
    rank = reference.rank_me(rows).item() if finite else float("nan")
    return {**dict(zip(NAMES, values.tolist(), strict=True)), "rank_me": rank}


@torch.no_grad()
def action_energies(model: EnergyModel, videos: VideoSource, config: Config, name: str) -> dict[str, float]:
    """{"NAME_energy_true": ...}: the energy at the true actions, and at others that should have a higher one.

    true: the actions in the video's target frames; other: those of another video; mean: their mean over a batch; zero:
    no action; inferred: z* after DESCENT steps, which should come near to true. The energy is what z* minimises: the
    hidden error, plus gamma times the pixel error of rows with a pixel term. Its mean over the first COMPARED videos,
    with the model in evaluation mode and in full precision; the model is left in the mode it was in.
    """
    few = {"latent.iterations": min(DESCENT, config.latent.iterations)}
    latents, size = Latents(override(config, few), model), min(max(config.evaluate.probe_batch, 2), COMPARED)
    training, found = model.training, []
    model.eval()
    for at in range(0, COMPARED - size + 1, size):
        clips = videos.batch(at, size)
        x, y = split_frames(clips, config)
        h_x, h_y = model.encoder(x), model.encode_targets(y) if model.terms.hidden else None
        true, energy = cast(Tensor, actions(clips, config)).flatten(1), model.latent_energy(h_x, h_y, y)
        inferred = cast(Tensor, latents.infer_from(h_x, h_y, y).z)
        others = true.roll(1, dims=0), true.mean(dim=0).expand_as(true), torch.zeros_like(true)
        found.append(torch.stack([energy(z).mean() for z in (true, *others, inferred)]))
    model.train(training)
    names = (f"{name}_energy_{of}" for of in ("true", "other", "mean", "zero", "inferred"))
    return dict(zip(names, torch.stack(found).mean(dim=0).tolist(), strict=True))
