"""Times of GPU work that runs long enough to reach the clock and the power it would have in service."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nanoflow_compiler.bench.gpu_meter import GpuMeter

__all__ = ["Sustained", "measure_replays", "measure_sustained"]

_CHUNKS = 8
"""The clock is read in each of them."""


@dataclass(frozen=True, slots=True)
class Sustained:
    """What one call takes."""

    us: float
    joules: float
    """Of the whole card, by NVML's counter of energy."""
    watts: float
    sm_mhz: float
    """Clock of the multiprocessors, the median of several readings."""
    num_calls: int


def measure_sustained(
    calls: Sequence[Callable[[], None]], *, seconds: float = 1.5, warmup_seconds: float = 0.5
) -> Sustained:
    """The mean of ``calls``, one after the other in a captured graph that is replayed for ``seconds``.

    Bursts run 10 to 15 % faster than what a card can sustain at its power limit. Give several calls
    on different memory where the memory of one would stay in the cache.
    """
    graph = _capture(calls)
    return measure_replays(
        graph.replay, num_calls=len(calls), seconds=seconds, warmup_seconds=warmup_seconds
    )


def measure_replays(
    replay: Callable[[], object],
    *,
    num_calls: int = 1,
    seconds: float = 1.5,
    warmup_seconds: float = 0.5,
) -> Sustained:
    """The same for what launches a captured graph of ``num_calls`` calls."""
    meter = GpuMeter()
    one_s = _replay(replay, 1)
    one_s = _replay(replay, max(1, round(warmup_seconds / one_s)))
    chunk = max(1, round(seconds / one_s / _CHUNKS))
    clocks: list[float] = []
    joules, start = meter.energy_j(), time.perf_counter()
    for _ in range(_CHUNKS):
        _replay(replay, chunk, meanwhile=lambda: clocks.append(meter.sm_mhz()))
    total_s, joules = time.perf_counter() - start, meter.energy_j() - joules
    count = _CHUNKS * chunk * num_calls
    return Sustained(
        us=total_s / count * 1e6,
        joules=joules / count,
        watts=joules / total_s,
        sm_mhz=statistics.median(clocks),
        num_calls=count,
    )


def _capture(calls: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay(
    replay: Callable[[], object], num_replays: int, *, meanwhile: Callable[[], None] | None = None
) -> float:
    """Seconds of one replay; ``meanwhile`` is called when they have been launched."""
    start = time.perf_counter()
    for _ in range(num_replays):
        replay()
    if meanwhile:
        meanwhile()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / num_replays
