"""A hook: what a runner may report of its device. ``ModelRunner`` does not measure it.

A runner that does has these two names; ``LLM.device_times``, the seconds by stage and ``nanoflow bench
throughput`` then report them, and say nothing otherwise.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["DeviceTimes", "device_times"]


@runtime_checkable
class DeviceTimes(Protocol):
    """Times that only the device knows, or that only its runner takes."""

    @property
    def capture_s(self) -> float:
        """Seconds that capturing graphs took until now."""

    def take_step_gaps_us(self) -> Sequence[float]:
        """Microseconds in which the device had nothing to run between two steps that followed each other.

        One for each pair of steps since the last call, by events on the device; not between a step and
        one that was submitted only after a time without requests.
        """


def device_times(runner: object) -> DeviceTimes | None:
    """The runner itself, if it measures."""
    return runner if isinstance(runner, DeviceTimes) else None
