"""Is the encoder collapsing? Four numbers about the representations of a batch, every `train.telemetry_every` steps.

Of h_x (N, T, d), as training sees it, of the whole batch:

    feature_std          mean over time steps and features of the standard deviation over N
    feature_std_least    the least feature's, mean over time steps: near zero where features have died
    feature_correlation  root mean square of the correlations of different features; 1/sqrt(N - 1) by chance alone
    rank_me              RankMe of at most ROWS rows (n, t): an estimate, bounded by how many there are

The steps do not wait: the first three are a few operations on the device, in the Gram form; the singular values of the
fourth are taken on the host by a thread of its own, of a copy that the device makes when it gets there. All are read at
the next log line.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast import reference
from vjvcr_fast.losses.analytic import centred

ROWS = 1_024
NAMES = ("feature_std", "feature_std_least", "feature_correlation")


class Telemetry:
    """A context manager; `measure` starts, `collect` gives what is done since."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "telemetry")
        self._under_way: list[tuple[int, Future[dict[str, float]]]] = []

    @torch.no_grad()
    def measure(self, step: int, h: Tensor) -> None:
        """h: (N, T, d) float32, N >= 2, on any device. Never waits for it."""
        flat = h.flatten(0, 1)
        rows = flat[:: -(-len(flat) // ROWS)]
        # From a GPU such a copy goes to pinned memory: the host does not wait for it, the thread waits for `ready`.
        values, rows = (t.to("cpu", non_blocking=True, copy=True) for t in (statistics(h), rows))
        ready = torch.cuda.current_stream(h.device).record_event() if h.is_cuda else None
        self._under_way.append((step, self._thread.submit(_read, values, rows, ready)))

    def collect(self) -> list[tuple[int, dict[str, float]]]:
        """(step, numbers) of all that was measured; waits for the last."""
        done = [(step, future.result()) for step, future in self._under_way]
        self._under_way = []
        return done

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def statistics(h: Tensor) -> Tensor:
    """NAMES of h (N, T, d), (3,). The squared correlations of all pairs, ||R||^2, come from Z Z' of columns of unit
    norm: no d x d matrix."""
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
    finite = bool(rows.isfinite().all())  # singular values of anything else raise
    rank = reference.rank_me(rows).item() if finite else float("nan")
    return {**dict(zip(NAMES, values.tolist(), strict=True)), "rank_me": rank}
