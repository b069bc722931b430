"""Random numbers by counter: one for each token of each row, whatever else is drawn beside it.

A hash, not a generator: nothing has to be advanced in order, so that a row's numbers are the same in
any batch, on any device. Its rounds are those of MurmurHash3's finalizer, with a key of 64 bits.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["log_arrivals", "row_keys"]

Unsigned = npt.NDArray[np.uint64]

# 0x9E3779B1, 0x85EBCA6B and 0xC2B2AE35 as signed integers.
_SPREAD, _FIRST, _SECOND = -1640531535, -2048144789, -1028477387
_SCALE = float(np.float32(1 - 2**-23) * np.float32(2**-31))
"""From 31 bits to (0, 1): the largest stays below 1, where its logarithm would be infinite."""


def row_keys(seeds: Unsigned, counters: Unsigned) -> tuple[npt.NDArray[np.int32], ...]:
    """Two halves of a key for each (seed, counter): two rounds of splitmix64."""
    mixed = _splitmix(_splitmix(seeds) ^ counters)
    low, high = (mixed & np.uint64(2**32 - 1)), mixed >> np.uint64(32)
    return low.astype(np.uint32).view(np.int32), high.astype(np.uint32).view(np.int32)


def log_arrivals(low: Tensor, high: Tensor, *, num_tokens: int) -> Tensor:
    """Logarithms ``[rows, V]`` of exponentially distributed times, for keys ``[rows, 1]`` of int32."""
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=low.device)
    x = (tokens * _SPREAD) ^ low
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x += high
    x *= _SECOND
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    # Small numbers are exact in float32, and decide: they are the earliest arrivals.
    uniform = x.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(_SCALE)
    return uniform.neg_().log1p_().neg_().log_()


def _splitmix(x: Unsigned) -> Unsigned:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
