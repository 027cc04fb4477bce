"""What a run reports while it trains: metrics.jsonl, a progress bar, and TensorBoard or wandb."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from vjvcr_fast.config import Config
from vjvcr_fast.data.files import progress, write_atomic
from vjvcr_fast.losses.attainable import attainable_std, batch_for
from vjvcr_fast.models.energy import ROWS
from vjvcr_fast.training import checkpoint
from vjvcr_fast.training.boards import open_board


def reach(config: Config) -> str:
    """How far VCR can lift the features of this config, in one line (`attainable_std`); empty if it lifts nothing."""
    model, n = config.model, config.train.batch
    if model.regulariser != "vcr" or not ROWS[model.row].vcr or model.alpha == 0 or model.threshold <= 0:
        return ""
    std = min(attainable_std(model.alpha, model.beta, n, config.d, model.threshold), model.threshold)
    text = f"VCR with N = {n:,}, d = {config.d:,} can lift features to a standard deviation of about {std:.2f}"
    goal = 0.9 * model.threshold
    if std >= goal:
        return text
    enough = batch_for(goal, model.alpha, model.beta, config.d, model.threshold)
    return f"{text} (hinge {model.threshold - std:.2f}); N = {enough:,} would allow {goal:.2g}"


class Log(ExitStack):
    """Writes the numbers of a run to all three places; a context manager that closes them.

    step: how many steps are trained already. Lines of later steps, which a run that was killed may have left in
    metrics.jsonl, are dropped, since these steps will be trained again. title: shown beside the progress bar.
    quiet: write and show nothing, as on every process but one.

    Raises ImportError, naming the extra to install, if tqdm or the board (`open_board`) is missing.
    """

    def __init__(self, run: Path, step: int, config: Config, title: str, quiet: bool = False) -> None:
        super().__init__()
        settings = config.train
        self.board = None if quiet else open_board(config, run, step, self)
        path = Path(os.devnull) if quiet else run / "metrics.jsonl"
        if not quiet:
            rows = checkpoint.read_metrics(path, up_to=step)
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = self.enter_context(path.open("a"))
        shown = {"total": settings.steps, "initial": step, "desc": title, "dynamic_ncols": True, "mininterval": 1.0}
        self.bar = self.enter_context(progress(**shown, disable=quiet))
        self.batch = settings.batch
        self.clock, self.step, self.waited = time.perf_counter(), step, 0.0

    def training(self, step: int, means: dict[str, float]) -> None:
        """Writes a log line: `means` since the last one, with the videos/s and the share of the time spent waiting."""
        now = time.perf_counter()
        rate, share = (step - self.step) * self.batch / (now - self.clock), self.waited / (now - self.clock)
        self.clock, self.step, self.waited = now, step, 0.0
        self.bar.update(step - self.bar.n)
        shown = {name: f"{value:.4f}" if value > 1e-3 else f"{value:.1e}" for name, value in means.items() if value}
        self.bar.set_postfix({**shown, "videos/s": f"{rate:.0f}"}, refresh=False)
        self.write(step, {**means, "videos_per_second": rate, "data_wait": share})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of metrics.jsonl, and a point of each value's curve on the board."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            self.board(step, values)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the training rate."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def videos(self, step: int, lines: list[Tensor]) -> None:
        """Shows videos on the board, if there is one (`board`): one image with all frames side by side.

        lines: each (n, T, C, S, S) in [0, 1]. Video by video, its lines lie one below the other.
        """
        grid = torch.stack(lines, dim=1).permute(3, 0, 1, 4, 2, 5)  # (C, video, line, S, T, S)
        if self.board is not None:
            self.board(step, {"videos": grid.flatten(1, 3).flatten(2)})
