"""Lanes as streams: what ``use``, ``record`` and ``wait`` of a generated program do.

Lane 0 begins and ends on the stream that is current, the others have streams of their own, which the
programs of a thread share. A lane may go from one stream to another (from the whole device to its side
of a division, and back): then the new one waits for the one before, so that a lane stays a sequence.
Nothing here waits for the device, and in a CUDA graph that is being captured all of it becomes edges.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch

from nanoflow_compiler.backends.green_contexts import Side, divide
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.sm_budget import beside_others, budget, set_budget, sm_budget

__all__ = ["BudgetKind", "Budgets", "LaneStreams", "Lanes", "lane_streams", "running_lanes"]

BudgetKind = Literal["green", "ctas", "none"]
COMPUTE_LANE, MEMORY_LANE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What a launch on fewer than ``num_sms`` means."""

    kind: BudgetKind
    num_sms: int
    """Of the device that was planned for: a launch on so many runs alone."""
    memory_sms: int
    """Of the memory lane beside others, the group of the division."""


class Streams(Protocol):
    """Of a device; tests have others."""

    def current(self) -> Any:
        """The stream on which the caller launches."""

    def make_current(self, stream: Any) -> None:
        """Launches go there from now on."""

    def new_event(self) -> Any:
        """With ``record(stream)``; a stream has ``wait_event(event)``."""

    def is_capturing(self) -> bool:
        """Whether what is launched becomes a graph, which waits for nothing outside of it."""


class CudaStreams:
    """Those of torch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def make_current(self, stream: torch.cuda.Stream) -> None:
        torch.cuda.set_stream(stream)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())


@dataclass(frozen=True, slots=True)
class Seat:
    """A stream, and the multiprocessors that what is launched there should count on; None: all."""

    stream: Any
    sms: int | None = None


class LaneStreams:
    """The streams of a thread's lanes, made when they are first asked for."""

    def __init__(
        self, new_stream: Callable[[], Any], *, sides: dict[int, Side] | None = None
    ) -> None:
        self._new_stream = new_stream
        self._sides = sides or {}
        """Of a division, by lane."""
        self._made: dict[tuple[int, bool], Any] = {}
        self.home: Any = None
        """Of the last run: what it still reads there may be memory of these streams."""

    def seat(self, lane: int, *, sms: int | None, kind: BudgetKind, home: Any) -> Seat:
        """Where a launch with so many multiprocessors goes; ``sms`` None stands for the whole device."""
        side = self._sides.get(lane) if sms is not None and kind == "green" else None
        if side is not None:
            return Seat(self._kept(lane, side.new_stream, is_side=True), side.num_sms)
        stream = home if lane == 0 else self._kept(lane, self._new_stream, is_side=False)
        return Seat(stream, None if kind == "none" else sms)

    def _kept(self, lane: int, new_stream: Callable[[], Any], *, is_side: bool) -> Any:
        if (lane, is_side) not in self._made:
            self._made[lane, is_side] = new_stream()
        return self._made[lane, is_side]


class _OfThread(threading.local):
    """A thread that captures must not meet the launches of another one on its streams."""

    def __init__(self) -> None:
        self.made: dict[tuple[torch.device, int | None], LaneStreams] = {}


_OF_THREAD = _OfThread()


def lane_streams(device: torch.device, budgets: Budgets) -> tuple[LaneStreams, BudgetKind]:
    """Those of this thread, and how budgets are kept: by numbers of blocks where the GPU cannot be divided."""
    kind, sides = (
        budgets.kind,
        _sides(device, budgets.memory_sms) if budgets.kind == "green" else {},
    )
    if kind == "green" and not sides:
        kind = "ctas"
    key = (device, budgets.memory_sms if sides else None)
    if key not in _OF_THREAD.made:
        made = LaneStreams(lambda: torch.cuda.Stream(device), sides=sides)
        _OF_THREAD.made[key] = made
    return _OF_THREAD.made[key], kind


@cache
def _sides(device: torch.device, memory_sms: int) -> dict[int, Side]:
    """By lane; none, after a warning, where the device cannot be divided."""
    try:
        division = divide(device, sms=memory_sms)
        _check_events(device, division.group)
    except (ConfigError, RuntimeError) as error:
        warnings.warn(
            f"SM budgets are kept by the number of thread blocks, not by green contexts: {error}",
            stacklevel=2,
        )
        return {}
    return {COMPUTE_LANE: division.rest, MEMORY_LANE: division.group}


def _check_events(device: torch.device, side: Side) -> None:
    """Streams of a partition and others can wait for each other; raises RuntimeError if not."""
    here, there = torch.cuda.current_stream(device), side.new_stream()
    there.wait_stream(here)
    here.wait_stream(there)


class Lanes:
    """The lanes of one run of a program."""

    def __init__(self, streams: Streams, seats: LaneStreams, *, kind: BudgetKind) -> None:
        self._streams = streams
        self._seats = seats
        self._kind = kind
        self._home = streams.current()
        self._current = self._home
        self._outer = budget()
        self._at: dict[int, Any] = {0: self._home}
        self._events: dict[int, Any] = {}
        if not streams.is_capturing():
            if seats.home is not None and seats.home != self._home:
                self._follow(self._home, seats.home)
            seats.home = self._home
        self._start = streams.new_event()
        self._start.record(self._home)

    def use(self, lane: int, sms: int | None = None) -> None:
        """What is launched next is of this lane, beside others if ``sms`` are given, or else alone."""
        seat = self._seats.seat(lane, sms=sms, kind=self._kind, home=self._home)
        before = self._at.get(lane)
        if before is None:
            seat.stream.wait_event(self._start)
        elif before is not seat.stream:
            self._follow(seat.stream, before)
        self._at[lane] = seat.stream
        if seat.stream is not self._current:
            self._streams.make_current(seat.stream)
            self._current = seat.stream
        set_budget(self._outer if seat.sms is None else seat.sms)

    def record(self, lane: int, event: int) -> None:
        """The event stands for all that the lane has launched."""
        self._events[event] = self._streams.new_event()
        self._events[event].record(self._at[lane])

    def wait(self, lane: int, event: int) -> None:
        """What the lane launches next runs after the event."""
        self._at[lane].wait_event(self._events[event])

    def leave(self) -> None:
        """Lane 0 goes on where it began."""
        if self._at[0] is not self._home:
            self._follow(self._home, self._at[0])
            self._at[0] = self._home

    def join(self) -> None:
        """Also after an error, memory that is let go of is not used again too early."""
        for stream in self._at.values():
            if stream is not self._home:
                self._follow(self._home, stream)

    def come_home(self) -> None:
        """The stream that was current is current."""
        if self._current is not self._home:
            self._streams.make_current(self._home)
            self._current = self._home

    def _follow(self, stream: Any, before: Any) -> None:
        event = self._streams.new_event()
        event.record(before)
        stream.wait_event(event)


@contextmanager
def running_lanes(streams: Streams, seats: LaneStreams, *, kind: BudgetKind) -> Iterator[Lanes]:
    """Lanes for a run; afterwards streams and budget are as before, whatever happened."""
    lanes = Lanes(streams, seats, kind=kind)
    with sm_budget(budget()), beside_others():
        try:
            yield lanes
            lanes.leave()
        except BaseException:
            _join_broken(lanes)
            raise
        finally:
            lanes.come_home()


def _join_broken(lanes: Lanes) -> None:
    try:
        lanes.join()
    except RuntimeError:  # of a capture that failed: there nothing runs
        return
