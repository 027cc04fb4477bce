"""Randomness by counting: a random number is a hash of what it is for, so order, worker and device change none."""

import hashlib

from torch import Tensor


def key(*purpose: str | int) -> int:
    """A 64-bit signed key for one use of randomness."""
    digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def splitmix(key: int | Tensor, counter: Tensor) -> Tensor:
    """Element `counter` of SplitMix64's sequence that starts at `key` (Steele, Lea, Flood 2014), as int64.

    Wrapping int64 arithmetic stands in for uint64; the constants are the published ones, as signed numbers. For
    one key, different counters never give the same value.
    """
    z = key + counter * -0x61C8864680B583EB
    z = (z ^ _shift_right(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift_right(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shift_right(z, 31)


def uniform(keys: Tensor, indices: Tensor) -> Tensor:
    """(N, K) float64 in [0, 1), 53 random bits each, from keys (K,) and indices (N,)."""
    return _shift_right(splitmix(keys, indices[:, None]), 11).double() * 2.0**-53


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign of an int64 into the vacated bits."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
