"""When a tensor may be let go of: as soon as its memory can be used again without anyone noticing.

The memory of a tensor goes back to the stream that it was allocated on, and what that stream allocates
next may get it. So a name is deleted where, by happens-before over records and waits, the lane that
allocated the memory runs after everything that any lane does with it. That is known when the program
is written: nothing is recorded or asked for while it runs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nanoflow_compiler.ir import Record, Wait
from nanoflow_compiler.ir.order import HappensBefore, Stamp

__all__ = ["Line", "find_deletions"]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a generated function: what it does with which names, and on which lane."""

    text: str
    makes: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    lane: int = 0
    is_fresh: bool = False
    """What it makes is in memory of its own; else it may lie in that of anything that it uses."""
    event: Record | Wait | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.makes, *self.uses)


@dataclass(slots=True)
class _Name:
    owners: frozenset[int]
    """Lanes on which the memory may have been allocated."""
    touched: dict[int, Stamp] = field(default_factory=dict)
    """By lane, when it was last read or written there."""


def find_deletions(
    lines: Sequence[Line], *, inputs: Iterable[str], kept: Iterable[str], num_lanes: int
) -> dict[int, list[str]]:
    """The names to delete behind each line, by its number.

    ``inputs`` are held by whoever calls, and ``kept`` are returned. A name that no lane is known to be
    done with is left to the end of the function, where the first lane runs after all others and no
    other allocates anything before it has waited for the first.
    """
    walk = _Walk(num_lanes)
    walk.names = {name: _Name(frozenset()) for name in inputs}
    last = {name: at for at, line in enumerate(lines) for name in line.names}
    ends: dict[int, list[str]] = {}
    for name, at in last.items():
        if name not in set(kept):
            ends.setdefault(at, []).append(name)
    found: dict[int, list[str]] = {}
    for at, line in enumerate(lines):
        walk.step(line)
        walk.waiting += ends.get(at, [])
        if gone := walk.release():
            found[at] = sorted(gone)
    return found


class _Walk:
    """What each lane is certain of, line after line."""

    def __init__(self, num_lanes: int) -> None:
        self.order = HappensBefore(num_lanes, where="lifetimes")
        self.names: dict[str, _Name] = {}
        self.waiting: list[str] = []

    def step(self, line: Line) -> None:
        match line.event:
            case Record():
                self.order.record(line.event.event, line.event.lane)
            case Wait():
                self.order.wait(line.event.event, line.event.lane)
            case None if line.names:
                self.run(line)

    def run(self, line: Line) -> None:
        stamp = self.order.issue(line.lane)
        shared = [] if line.is_fresh else [self.names[name].owners for name in line.uses]
        for name in line.makes:
            self.names[name] = _Name(frozenset({line.lane}).union(*shared))
        for name in line.names:
            self.names[name].touched[line.lane] = stamp

    def release(self) -> list[str]:
        gone = [name for name in self.waiting if self.is_free(self.names[name])]
        self.waiting = [name for name in self.waiting if name not in gone]
        return gone

    def is_free(self, name: _Name) -> bool:
        stamps = name.touched.values()
        return all(self.order.sees(lane, stamp) for lane in name.owners for stamp in stamps)
