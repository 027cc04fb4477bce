"""Is the encoder collapsing? Four numbers about the representations of a batch, every `train.telemetry_every` steps.

They are computed from h_x (N, T, d) of the whole batch, as training sees it:

    feature_std          standard deviation over N, averaged over time steps and features
    feature_std_least    the same for the smallest feature: near zero if features have died
    feature_correlation  root mean square of the correlations between different features; by chance alone 1/sqrt(N - 1)
    rank_me              RankMe of at most ROWS rows (n, t): an estimate, at most as large as the number of rows

Training does not wait for them. The first three are a few operations on the device, in the Gram form. The fourth needs
singular values, which a thread computes on the host once the device has made a copy. The results are read at the next
log line.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses.analytic import centred

ROWS = 1_024
NAMES = ("feature_std", "feature_std_least", "feature_correlation")


class Telemetry(ExitStack):
    """A context manager: `measure` starts a measurement, `collect` returns those started since the last call."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "telemetry")
        self.callback(self._thread.shutdown, wait=False, cancel_futures=True)
        self._under_way: list[tuple[int, Future[dict[str, float]]]] = []

    @torch.no_grad()
    def measure(self, step: int, h: Tensor) -> None:
        """h: (N, T, d) float32 on any device, N >= 2. Does not wait for the device."""
        flat = h.flatten(0, 1)
        rows = flat[:: -(-len(flat) // ROWS)]
        # From a GPU these copies go to pinned memory. The host does not wait for them; the thread does, for `ready`.
        values, rows = (t.to("cpu", non_blocking=True, copy=True) for t in (statistics(h), rows))
        ready = torch.cuda.current_stream(h.device).record_event() if h.is_cuda else None
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


def _read(values: Tensor, rows: Tensor, ready: Any) -> dict[str, float]:
    if ready is not None:
        ready.synchronize()
    finite = bool(rows.isfinite().all())  # otherwise computing singular values raises
    rank = reference.rank_me(rows).item() if finite else float("nan")
    return {**dict(zip(NAMES, values.tolist(), strict=True)), "rank_me": rank}
