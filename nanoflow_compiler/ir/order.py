"""Happens-before between instructions of a program: one vector clock per lane."""

from dataclasses import dataclass

from nanoflow_compiler.errors import InvalidProgramError

__all__ = ["HappensBefore", "Stamp"]


@dataclass(frozen=True, slots=True)
class Stamp:
    """The ``index``-th instruction issued on ``lane``."""

    lane: int
    index: int


class HappensBefore:
    """Follows instructions as they are issued and says what each lane is certain of."""

    def __init__(self, num_lanes: int, *, where: str) -> None:
        self._where = where
        self._clocks = [[0] * num_lanes for _ in range(num_lanes)]
        self._events: dict[int, list[int]] = {}

    def issue(self, lane: int) -> Stamp:
        """Note one more instruction on ``lane``."""
        self._clocks[lane][lane] += 1
        return Stamp(lane, self._clocks[lane][lane])

    def record(self, event: int, lane: int) -> None:
        """The event stands for all that ``lane`` is certain of now."""
        if event in self._events:
            raise InvalidProgramError(f"event {event} is recorded twice", where=self._where)
        self._events[event] = list(self._clocks[lane])

    def wait(self, event: int, lane: int) -> None:
        """``lane`` learns what the event stands for."""
        if event not in self._events:
            raise InvalidProgramError(
                f"lane {lane} waits for event {event} before it is recorded", where=self._where
            )
        own = self._clocks[lane]
        self._clocks[lane] = [max(a, b) for a, b in zip(own, self._events[event], strict=True)]

    def sees(self, lane: int, stamp: Stamp) -> bool:
        """Whether what ``lane`` issues next is certain to run after ``stamp``."""
        return self._clocks[lane][stamp.lane] >= stamp.index

    def unseen_lanes(self, lane: int) -> list[int]:
        """Lanes whose last instruction ``lane`` is not certain of."""
        return [
            other
            for other, clock in enumerate(self._clocks)
            if self._clocks[lane][other] < clock[other]
        ]
