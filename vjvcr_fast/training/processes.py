"""The processes of one training run: a single one, or those that torchrun (or another launcher) started.

    torchrun --nproc-per-node 4 -m vjvcr_fast train ...

Every process trains on its part of every batch, on a GPU of its own (NCCL) or on the CPU (gloo). Only the process of
rank 0 writes files and shows progress.

If one process ends or hangs, the others end too. They notice by a heartbeat: a thread in each process that takes part
in a sum over all processes every two seconds. The sum fails at once if a process has gone, and after SILENCE seconds if
one hangs.
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

# Seconds between heartbeats; without an answer; that a process has to end by itself after another was lost.
BEAT, SILENCE, GRACE = 2.0, 30.0, 5.0


class LostProcessError(RuntimeError):
    """Another process of this run has ended, or does not answer."""


class Processes:
    """rank: of this process. world: how many processes there are. device: of this process. group: of torch.distributed,
    None if there is one process only."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.group: Any = dist.group.WORLD if world > 1 else None
        # To look at a data set may take long. If a process is lost meanwhile, the heartbeat ends the wait.
        patient = timedelta(days=1)
        self._control: Any = dist.new_group(backend="gloo", timeout=patient) if world > 1 else None
        self._asked: tuple[Any, Tensor] | None = None

    @property
    def main(self) -> bool:
        """True for the process that writes files."""
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of the processes are on this machine: all, unless the launcher says otherwise."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world)) if self.world > 1 else 1

    def part(self, batch: int, name: str = "train.batch") -> int:
        """How many samples of a batch each process has. Raises ConfigError if the batch cannot be split evenly."""
        if batch % self.world:
            raise ConfigError(f"{name}={batch}: must be a multiple of the {self.world} processes")
        return batch // self.world

    def parallel(self, model: nn.Module) -> nn.Module:
        """DDP around the model, with batch norm over the batches of all processes and rank 0's parameters on each; with
        one process the model itself."""
        if self.world == 1:
            return model
        synchronised(model, self.group, self.device)
        gpus = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # broadcast_buffers is renamed in torch 2.13, but 2.11 does not know the new name. It is off because the
            # statistics of batch norm are the same on all processes anyway.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                model, device_ids=gpus, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over processes, computed in place."""
        if self.world > 1:
            dist.all_reduce(tensor.div_(self.world))
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors (n, ...) of all processes as one, (world * n, ...), by rank; the same on each process."""
        if self.world == 1:
            return tensor
        everyone = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(everyone, tensor.contiguous())
        return torch.cat(everyone)

    def mean_gradients(self, model: nn.Module) -> None:
        """What DDP does in backward, for gradients that were computed without DDP."""
        if self.world > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def agree(self, wish: bool) -> bool:
        """True if any process wished for it in the previous call; with one process, in this call.

        All processes get the same answer at the same step, and neither the host nor the GPU waits for it.
        """
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
        """Rank 0 runs the block first and the others afterwards, so that they find on the disk what it wrote."""
        if not self.main:
            dist.barrier(self._control)
        yield
        if self.main and self.world > 1:
            dist.barrier(self._control)


def launched() -> int:
    """How many processes a launcher started, from its variable WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """True for the process that prints what all of them know."""
    return os.environ.get("RANK", "0") == "0" or launched() == 1


@contextmanager
def joined(config: Config) -> Iterator[Processes]:
    """The processes of this run. Collective operations are possible inside the block.

    Raises ConfigError if `train.device` does not suit several processes, LostProcessError if another process has ended.
    """
    if launched() == 1:
        yield Processes(resolve_device(config.train.device))
        return
    device = _device(config)
    own, heartbeat = not dist.is_initialized(), None
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
        if own and not (heartbeat and heartbeat.thread.is_alive()):
            dist.destroy_process_group()


def _device(config: Config) -> torch.device:
    """The CPU, or the GPU whose number is the rank of this process on its machine."""
    device = resolve_device(config.train.device)
    if device.type == "cpu":
        return device
    wanted = f"train.device={config.train.device}"
    if device.index is not None:
        raise ConfigError(f"{wanted}: {launched()} processes need cuda, which gives each its own GPU, or cpu")
    local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= here:
        raise ConfigError(f"{wanted}: process {local + 1} of this machine has no CUDA device, there are {here}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def _lost(reason: str) -> str:
    what = "timed out" if "imed out" in reason or "imeout" in reason else "has ended"
    return f"rank {dist.get_rank()}: another process of this run {what}; run the same command again to continue"


class _Heartbeat:
    """A context manager. Inside it, this process and the others watch one another."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE))
        self.leaving, self.left = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.leaving.set()
        # Leave together with the others. After an error of this process alone, let the others notice.
        self.thread.join(None if error is None else 2 * BEAT)
        self.left.set()

    def _beat(self) -> None:
        while True:
            self.leaving.wait(BEAT)
            done = torch.tensor([self.leaving.is_set()], dtype=torch.int32)
            try:
                dist.all_reduce(done, dist.ReduceOp.MIN, group=self.group)
            except RuntimeError as error:
                if not self.left.wait(GRACE):  # the main thread may wait for the lost process for ever
                    print(f"vjvcr-fast: {_lost(str(error))}", file=sys.stderr, flush=True)
                    os._exit(1)
                return
            if done.item():
                return
