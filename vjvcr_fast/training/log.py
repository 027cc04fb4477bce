"""What a run tells while it trains: metrics.jsonl, TensorBoard and the progress bar."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjvcr_fast.data.files import progress, write_atomic
from vjvcr_fast.training import checkpoint


class Log:
    """A context manager. quiet: writes and shows nothing, for all processes but one."""

    def __init__(self, run: Path, step: int, steps: int, tensorboard: bool, title: str, quiet: bool = False) -> None:
        self.board = _summary_writer(run, step) if tensorboard and not quiet else None
        self.file: Any = None
        if not quiet:
            rows = checkpoint.read_metrics(run / "metrics.jsonl", up_to=step)
            write_atomic(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            self.file = (run / "metrics.jsonl").open("a")
        shown = {"total": steps, "initial": step, "desc": title, "dynamic_ncols": True, "mininterval": 1.0}
        self.bar = progress(**shown, disable=quiet)
        self.clock, self.step, self.waited = time.perf_counter(), step, 0.0

    def training(self, step: int, means: dict[str, float], batch: int) -> None:
        now = time.perf_counter()
        rate, share = (step - self.step) * batch / (now - self.clock), self.waited / (now - self.clock)
        self.clock, self.step, self.waited = now, step, 0.0
        self.bar.update(step - self.bar.n)
        shown = {name: f"{value:.4f}" if value > 1e-3 else f"{value:.1e}" for name, value in means.items() if value}
        self.bar.set_postfix({**shown, "videos/s": f"{rate:.0f}"}, refresh=False)
        self.write(step, {**means, "videos_per_second": rate, "data_wait": share})

    def write(self, step: int, values: dict[str, float]) -> None:
        """A line, and a point of every curve."""
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens in here is the wait for data, a share of the time between two log lines."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is not part of the training rate."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def videos(self, step: int, lines: list[Tensor]) -> None:
        """An image of a few videos, lines of (n, T, C, S, S) in [0, 1], one below the other for each."""
        if self.board is not None:
            grid = torch.stack(lines, dim=1).permute(3, 0, 1, 4, 2, 5)  # (C, video, line, S, T, S)
            self.board.add_image("videos", grid.flatten(1, 3).flatten(2), step)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def _summary_writer(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "TensorBoard is not installed: pip install 'vjvcr_fast[train]', or --train.tensorboard false"
        ) from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
