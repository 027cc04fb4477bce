"""Where a run's curves and videos can be looked at while it trains: TensorBoard or Weights & Biases (`train.log`)."""

import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from vjvcr_fast.config import Config, ConfigError
from vjvcr_fast.data import files

# Takes a step and, by name, numbers and images (C, H, W) in [0, 1].
Board: TypeAlias = Callable[[int, Mapping[str, float | Tensor]], None]


def open_board(config: Config, run: Path, step: int, stack: ExitStack) -> Board | None:
    """The board that `train.log` asks for, or None. `stack` closes it.

    run: the run's folder, which the board writes to. step: how many steps are trained already; what it shows of later
    ones will be trained again.

    Raises ImportError, naming the extra to install, if its package is missing; ConfigError if wandb cannot start.
    """
    boards = {"tensorboard": _tensorboard, "wandb": _wandb}
    return boards[config.train.log](config, run, step, stack) if config.train.log in boards else None


def _tensorboard(config: Config, run: Path, step: int, stack: ExitStack) -> Board:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoard is not installed: pip install 'vjvcr_fast[train]', or --log none") from None
    writer = stack.enter_context(SummaryWriter(str(run / "tensorboard"), purge_step=step + 1))

    def show(step: int, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            (writer.add_image if isinstance(value, Tensor) else writer.add_scalar)(name, value, step)

    return show


def _wandb(config: Config, run: Path, step: int, stack: ExitStack) -> Board:
    """Project, account and mode are wandb's own variables: WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE and so on."""
    wandb = files.load("wandb", "wandb")
    file = run / "wandb-id"
    again = step > 0 and file.exists()
    name = file.read_text().strip() if again else secrets.token_hex(4)
    try:
        logged = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vjvcr_fast"),
            name=run.name,
            id=name,
            resume="allow" if again else None,
            dir=run,
            config=config.to_dict(),
            settings=wandb.Settings(console="off"),  # it would take the progress bar apart
        )
    except wandb.Error as error:
        why = files.one_line(files.reason(error))
        raise ConfigError(f"train.log=wandb: {why}; WANDB_MODE=offline needs no account") from None
    files.write_atomic(file, f"{name}\n")
    # wandb's own counter of steps only grows; telemetry is logged later than its step, and a resumed run goes back.
    logged.define_metric("step", hidden=True)
    logged.define_metric("*", step_metric="step")
    stack.enter_context(logged)

    def show(step: int, values: Mapping[str, float | Tensor]) -> None:
        shown = {k: _image(wandb, v) if isinstance(v, Tensor) else v for k, v in values.items()}
        logged.log({"step": step, **shown})

    return show


def _image(wandb: object, image: Tensor) -> object:
    """From an array: of a tensor wandb would ask for torchvision."""
    pixels = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return wandb.Image(pixels)  # type: ignore[attr-defined]
