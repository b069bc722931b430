"""Times that only the device knows: how long steps took on a GPU, and how long nothing ran in between."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = ["DeviceTimes", "StepTimes"]

_MOST_STEPS = 1 << 14
"""That are kept for who asks."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Microseconds of steps that followed each other."""

    durations_us: Sequence[float]
    gaps_us: Sequence[float]
    """Between each step and the next: one less. After a time without requests, that time too."""


class DeviceTimes:
    """Two events in the stream for each step; the host waits for none until somebody asks."""

    def __init__(self) -> None:
        self.capture_s = 0.0
        """Seconds that capturing graphs took."""
        self._steps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=_MOST_STEPS)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around what launches a step."""
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        yield
        ended.record()
        self._steps.append((begun, ended))

    def take(self) -> StepTimes:
        """Of the steps since the last call; waits until the last has ended."""
        # Another thread may append meanwhile: what it appends is for the next call.
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        for _, ended in steps[-1:]:
            ended.synchronize()
        return StepTimes(
            durations_us=[begun.elapsed_time(ended) * 1e3 for begun, ended in steps],
            gaps_us=[ended.elapsed_time(begun) * 1e3 for (_, ended), (begun, _) in pairwise(steps)],
        )
