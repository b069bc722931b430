"""When steps began and ended on a GPU: how long they took, and how long nothing ran in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

__all__ = ["StepClock"]


class StepClock:
    """Two events in the stream for each step; the host waits for none until it asks."""

    def __init__(self) -> None:
        self._begun: list[torch.cuda.Event] = []
        self._ended: list[torch.cuda.Event] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around what launches a step."""
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        ended.record()
        self._begun.append(begun)
        self._ended.append(ended)

    def durations_ms(self) -> list[float]:
        """Of each step."""
        torch.cuda.synchronize()
        pairs = zip(self._begun, self._ended, strict=True)
        return [begun.elapsed_time(ended) for begun, ended in pairs]

    def gaps_ms(self) -> list[float]:
        """Between each step and the next: one less."""
        torch.cuda.synchronize()
        steps = pairwise(zip(self._begun, self._ended, strict=True))
        return [ended.elapsed_time(begun) for (_, ended), (begun, _) in steps]
