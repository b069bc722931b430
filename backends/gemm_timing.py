"""Whether packed weights are read faster here than those of a checkpoint, by measurement.

How much packing gains depends on processor and shape. Timings of a machine that does something else
say nothing: whoever waits for the other threads of a GEMM waits for the scheduler. So the share of
the processors that this process got is watched, and where it is small, nothing counts as measured.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nanoflow_compiler.backends.packing import pack, packed_mm

__all__ = ["GemmShape", "GemmTiming", "time_packed"]

_LOG = logging.getLogger(__name__)
_COLD_BYTES = 64 << 20
"""Weights that a measurement walks through: more than the caches hold, as in a model."""
_MEASURED_COLUMNS = 8192
_MEASURED_ROWS = (1, 4, 16, 32)
_FEWEST_CALLS = 6
_MOST_CALLS = 40
_SECONDS = 0.05
"""Of calls for one number of rows."""
_ATTEMPTS = 3
_FEWEST_CPU_SECONDS = 0.9
"""Per second and thread. Threads that wait for each other spin, so on an idle machine it is 1."""
_WORTH = 0.95
"""Share of ATen's time below which packing is worth a copy of the weight."""


@dataclass(frozen=True, slots=True)
class GemmShape:
    """Of a weight ``[depth, columns]``."""

    depth: int
    columns: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "GemmShape":
        """``weight`` may be fake."""
        depth, columns = map(int, weight.shape)
        return cls(depth, columns, weight.dtype)


@dataclass(frozen=True, slots=True)
class GemmTiming:
    """What was measured for one shape."""

    share: float
    """Packed time as a share of ATen's, the mean over several numbers of rows."""
    is_steady: bool
    """Whether this process had the processors for itself."""

    @property
    def is_worth_it(self) -> bool:
        """Without a measurement to rely on, what is faster on most processors."""
        return self.share < _WORTH or not self.is_steady


@cache
def time_packed(shape: GemmShape) -> GemmTiming:
    """Measures once per process; where others keep the processors busy it soon gives up."""
    columns = min(shape.columns, _MEASURED_COLUMNS)
    count = max(1, _COLD_BYTES // (shape.depth * columns * shape.dtype.itemsize))
    with unset_fake_temporarily(), torch.inference_mode():
        plain = [torch.ones(columns, shape.depth, dtype=shape.dtype).t() for _ in range(count)]
        pairs = [(weight, pack(weight)) for weight in plain]
        for _ in range(_ATTEMPTS):
            timing = _time(shape, pairs)
            if timing.is_steady:
                break
    if not timing.is_steady:
        _LOG.info("GEMMs of %s were not measured: the processors were busy", shape)
    return timing


def _time(shape: GemmShape, pairs: list[tuple[Tensor, Tensor]]) -> GemmTiming:
    shares = []
    for rows in _MEASURED_ROWS:
        x = torch.ones(rows, shape.depth, dtype=shape.dtype)
        wall, cpu = time.perf_counter(), time.process_time()
        aten, packed = np.quantile(list(_calls(x, pairs)), 0.25, axis=0)
        shares.append(float(packed / aten))
        used = (time.process_time() - cpu) / (time.perf_counter() - wall)
        if used < _FEWEST_CPU_SECONDS * torch.get_num_threads():
            return GemmTiming(float(np.mean(shares)), is_steady=False)
    return GemmTiming(float(np.mean(shares)), is_steady=True)


def _calls(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[float, float]]:
    """Seconds of ATen's and of the packed GEMM, by turns and each on the next weight."""
    start = time.perf_counter()
    for at in range(_MOST_CALLS):
        weight, packed = pairs[at % len(pairs)]
        before = time.perf_counter()
        torch.mm(x, weight)
        between = time.perf_counter()
        packed_mm(x, packed)
        after = time.perf_counter()
        yield between - before, after - between
        if at + 1 >= _FEWEST_CALLS and after - start > _SECONDS:
            return
