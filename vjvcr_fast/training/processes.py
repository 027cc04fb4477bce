"""The processes of one training run: one, or those that torchrun (or any launcher that sets its variables) started.

    torchrun --nproc-per-node 4 -m vjvcr_fast train ...

Every process trains on its part of every batch, on a GPU of its own (NCCL) or on the CPU (gloo); the process of rank 0
alone writes files and shows progress. One that ends or does not answer ends the others, by a heartbeat: a thread that
every two seconds adds up a number with the others', in a group of its own, fails within moments where a process has
gone and within SILENCE seconds where one is stuck.
"""

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjvcr_fast.config import Config, ConfigError, resolve_device
from vjvcr_fast.models.syncnorm import synchronised

BEAT, SILENCE, GRACE = 2.0, 30.0, 5.0  # seconds: between heartbeats, without one, for a process to end by itself


class LostProcessError(RuntimeError):
    """Another process of this run has ended, or does not answer."""


class Processes:
    """rank, world: of this process and how many there are. device: of this one. group: of torch.distributed, None where
    a process is alone."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.group: Any = dist.group.WORLD if world > 1 else None
        # Looking at a data set may take long; the heartbeat is what ends a wait for a process that has gone.
        patient = timedelta(days=1)
        self._control: Any = dist.new_group(backend="gloo", timeout=patient) if world > 1 else None
        self._asked: tuple[Any, Tensor] | None = None

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def part(self, batch: int, name: str = "train.batch") -> int:
        """How many of a batch each process has. Raises ConfigError where they would not have as many."""
        if batch % self.world:
            raise ConfigError(f"{name}={batch}: must be a multiple of the {self.world} processes")
        return batch // self.world

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, or DDP around it, with its batch norm over the whole batch; its parameters become the same."""
        if self.world == 1:
            return model
        synchronised(model, self.group, self.device)
        gpus = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Statistics are the same everywhere. torch 2.13 renames the option, torch 2.11 does not know the new name.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model, device_ids=gpus, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes, in place; the tensor itself where there is one."""
        if self.world > 1:
            dist.all_reduce(tensor.div_(self.world))
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """(n, ...) of every process, (W n, ...) on each, by rank."""
        if self.world == 1:
            return tensor
        everyone = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(everyone, tensor.contiguous())
        return torch.cat(everyone)

    def mean_gradients(self, model: nn.Module) -> None:
        """What DDP does, for gradients that were not made by one backward pass through it."""
        if self.world > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def agree(self, wish: bool) -> bool:
        """Whether any process wished, when this was called the time before; at once where there is one. So all know it
        at the same step, and neither the host nor the device has waited for an answer."""
        if self.world == 1:
            return wish
        answer = self._answer()
        asked = torch.tensor([wish], dtype=torch.int32)
        self._asked = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._control, async_op=True), asked
        return answer

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        work, asked = self._asked
        work.wait()
        return bool(asked.item())

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes first, the others when it is done: it leaves them what it found or made on the disk."""
        if not self.main:
            dist.barrier(self._control)
        yield
        if self.main and self.world > 1:
            dist.barrier(self._control)


def launched() -> int:
    """How many processes a launcher started, by its WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this process is the one that tells what all know."""
    return os.environ.get("RANK", "0") == "0" or launched() == 1


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """This run's processes, from the first collective operation to the last.

    Raises ConfigError where `train.device` does not fit them; LostProcessError where another has ended.
    """
    if launched() == 1:
        yield Processes(resolve_device(config.train.device))
        return
    device = _device(config)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        processes = Processes(device, dist.get_rank(), dist.get_world_size())
        heartbeat = _Heartbeat()
        with heartbeat:
            yield processes
            processes._answer()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise LostProcessError(_lost(str(error))) from None
        raise
    finally:
        if own and not heartbeat.thread.is_alive():
            dist.destroy_process_group()


def _device(config: Config) -> torch.device:
    """Of this process: a GPU of its own, by its place on this machine, or the CPU."""
    device = resolve_device(config.train.device)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise ConfigError(f"train.device={config.train.device}: {launched()} processes take cuda, each its own, or cpu")
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= here:
        wanted = f"train.device={config.train.device}"
        raise ConfigError(f"{wanted}: process {local + 1} of this machine has no CUDA device, there are {here}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _lost(reason: str) -> str:
    what = "timed out" if "imed out" in reason or "imeout" in reason else "has ended"
    return (
        f"rank {dist.get_rank()}: another process of this run {what}; the same command goes on from the last checkpoint"
    )


class _Heartbeat:
    """A context manager: while it is entered this process and the others watch one another."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE))
        self.leaving, self.left = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.leaving.set()
        # Together with the others; after an error that is not theirs they are to notice.
        self.thread.join(None if error is None else 2 * BEAT)
        self.left.set()

    def _beat(self) -> None:
        while True:
            self.leaving.wait(BEAT)
            done = torch.tensor([self.leaving.is_set()], dtype=torch.int32)
            try:
                dist.all_reduce(done, dist.ReduceOp.MIN, group=self.group)
            except RuntimeError as error:
                if not self.left.wait(GRACE):  # the training thread may wait for the lost one for ever
                    print(f"vjvcr-fast: {_lost(str(error))}", file=sys.stderr, flush=True)
                    os._exit(1)
                return
            if done.item():
                return
