"""Random numbers by hashing: each is a hash of what it is for. So order, workers and device change nothing."""

import hashlib

import torch
from torch import Tensor


def key(*purpose: str | int) -> int:
    """A signed 64-bit key for one purpose, such as (seed, "speed", stream)."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def splitmix(key: int | Tensor, counter: Tensor) -> Tensor:
    """Element number `counter` of the SplitMix64 sequence that starts at `key` (Steele, Lea, Flood 2014), as int64.

    int64 arithmetic wraps around like that of uint64; the constants are the published ones as signed numbers. For one
    key, different counters never give the same value.
    """
    z = key + counter * -0x61C8864680B583EB
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shift_right(z, 31)


def uniform(keys: Tensor, indices: Tensor) -> Tensor:
    """Uniform random numbers, (N, K) float64 in [0, 1) with 53 random bits, from (K,) keys and (N,) int64 indices."""
    return _shift_right(splitmix(keys, indices[:, None]), 11).double() * 2.0**-53


class Orders:
    """For each epoch the numbers 0, ..., n - 1 in a random order: (n,) int64. Keeps the last two orders."""

    def __init__(self, n: int, seed: int, stream: str, device: str | torch.device = "cpu") -> None:
        self.n, self.seed, self.stream, self.device = n, seed, stream, device
        self.kept: dict[int, Tensor] = {}

    def of(self, epoch: int) -> Tensor:
        """The order of an epoch, (n,) int64 on `device`: the same for the same seed, stream and epoch."""
        order = self.kept.get(epoch)
        if order is None:
            # The hash is one-to-one, so there are no ties, and all devices sort alike.
            first = key(self.seed, "order", epoch, self.stream)
            order = torch.argsort(splitmix(first, torch.arange(self.n, device=self.device)))
            self.kept = dict([*self.kept.items()][-1:]) | {epoch: order}
        return order


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift. torch's own shift would fill the vacated bits with the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
