"""emit: Schedule -> Program. Turns slots into instructions that a backend can issue.

Parts are launched in the order of their starts. Where a part needs other cells of a value than
its writers made, a split (no bytes move) or a merge comes before it on its lane. Where it needs
something from another lane, that lane records an event behind the writer, and this one waits;
what a lane already knows of through earlier waits is not waited for again, so every wait is
needed. Lane 0 starts the program, and ends it after all lanes.

Guarantees the rules of :func:`nanoflow_compiler.ir.replay.replay`. Belongs last.
"""

from collections.abc import Iterable

from nanoflow_compiler.ir import (
    Instruction,
    Launch,
    Merge,
    NanoOp,
    Program,
    Read,
    Record,
    Schedule,
    Span,
    Split,
    Wait,
)
from nanoflow_compiler.ir.order import Stamp
from nanoflow_compiler.ir.replay import is_order

__all__ = ["emit"]


def emit(schedule: Schedule) -> Program:
    """The program of a schedule."""
    graph = schedule.nano.graph
    ops = schedule.nano.by_name()
    issue = _Issue(schedule)
    for slot in schedule.slots:
        issue.launch(ops[slot.op], lane=slot.lane, sms=slot.sms)
    issue.finish(graph.outputs)
    return Program(
        inputs=graph.inputs,
        outputs=graph.outputs,
        num_cells=schedule.nano.num_cells,
        num_lanes=schedule.num_lanes,
        instructions=tuple(issue.lanes.instructions()),
    )


class _Issue:
    """Provides each launch with the spans that it reads, and remembers those that it writes."""

    def __init__(self, schedule: Schedule) -> None:
        graph = schedule.nano.graph
        self.num_cells = schedule.nano.num_cells
        self.axes = {value.name: value.axis for value in graph.values}
        self.lanes = _Lanes(schedule.num_lanes)
        self.written = {name: {Span(name): self.lanes.start} for name in graph.inputs}

    def launch(self, nano: NanoOp, *, lane: int, sms: int) -> None:
        """Issue one part: first what provides its reads, then itself."""
        reads = tuple(self.read(read, nano, lane) for read in nano.op.reads)
        writes = tuple(self.span(name, nano) for name in nano.op.writes)
        self.require(reads, lane)
        launch = Launch(nano.op.name, nano.first, nano.last, lane, sms, reads, writes)
        stamp = self.lanes.issue(launch)
        for span in writes:
            self.written.setdefault(span.value, {})[span] = stamp

    def finish(self, outputs: tuple[str, ...]) -> None:
        """Lane 0 has every output whole, and ends last."""
        for name in outputs:
            axis = self.axes[name]
            self.provide(self.cells(name, axis.dim if axis else 0, 0, self.num_cells), 0)
        self.lanes.join()

    def span(self, name: str, nano: NanoOp) -> Span:
        """What a part writes of a value."""
        axis = self.axes[name]
        dim = axis.dim if axis else 0
        return self.cells(name, dim, nano.first, nano.last)

    def read(self, read: Read, nano: NanoOp, lane: int) -> Span:
        """What a part reads of a value, made available if it is not."""
        if is_order(read.value):
            last = nano.last if read.prefix else self.num_cells
            return self.cells(read.value, 0, 0, last)
        if read.axis is None:
            axis = self.axes[read.value]
            dim = axis.dim if axis else 0
            return self.provide(self.cells(read.value, dim, 0, self.num_cells), lane)
        return self.provide(self.cells(read.value, read.axis.dim, nano.first, nano.last), lane)

    def cells(self, name: str, dim: int, first: int, last: int) -> Span:
        """A span; all cells are the value itself."""
        whole = (first, last) == (0, self.num_cells)
        return Span(name) if whole else Span(name, dim, first, last)

    def bounds(self, span: Span) -> tuple[int, int]:
        return (0, self.num_cells) if span.dim is None else (span.first, span.last)

    def provide(self, target: Span, lane: int) -> Span:
        """Make exactly ``target`` exist, by a split or a merge of what was written."""
        spans = self.written[target.value]
        if target in spans:
            return target
        first, last = self.bounds(target)
        usable = [span for span in spans if target.dim is None or span.dim in (None, target.dim)]
        holders = [s for s in usable if self.bounds(s)[0] <= first and last <= self.bounds(s)[1]]
        if holders:
            source = min(holders, key=lambda span: self.bounds(span)[1] - self.bounds(span)[0])
            return self.split(source, target, lane)
        pieces = self.tile(usable, first, last, lane)
        self.require(pieces, lane)
        dim = pieces[0].dim
        assert dim is not None
        self.keep(target, self.lanes.issue(Merge(tuple(pieces), target, dim, lane)))
        return target

    def tile(self, usable: list[Span], first: int, last: int, lane: int) -> list[Span]:
        """Adjacent spans that make up the cells, cut from larger ones at the ends."""
        pieces: list[Span] = []
        at = first
        while at < last:
            holding = [s for s in usable if self.bounds(s)[0] <= at < self.bounds(s)[1]]
            source = max(holding, key=lambda span: (self.bounds(span)[0] == at, -span.last))
            end = min(self.bounds(source)[1], last)
            assert source.dim is not None
            piece = Span(source.value, source.dim, at, end)
            is_there = piece in self.written[source.value]
            pieces.append(piece if is_there else self.split(source, piece, lane))
            at = end
        return pieces

    def split(self, source: Span, target: Span, lane: int) -> Span:
        self.require([source], lane)
        self.keep(target, self.lanes.issue(Split(source, target, lane)))
        return target

    def keep(self, span: Span, stamp: Stamp) -> None:
        self.written[span.value][span] = stamp

    def require(self, spans: Iterable[Span], lane: int) -> None:
        """What ``lane`` issues next must find ``spans`` written."""
        self.lanes.require([stamp for span in spans for stamp in self.stamps(span)], lane)

    def stamps(self, span: Span) -> list[Stamp]:
        """Who wrote a span; of a value that only orders, all who wrote cells of it."""
        spans = self.written[span.value]
        if not is_order(span.value):
            return [spans[span]]
        first, last = self.bounds(span)
        bounds = {piece: self.bounds(piece) for piece in spans}
        return [spans[p] for p, (begin, end) in bounds.items() if begin < last and end > first]


class _Lanes:
    """Instructions per lane with the fewest events that keep what is required."""

    def __init__(self, num_lanes: int) -> None:
        self.start = Stamp(0, 1)
        self._issued: list[tuple[Instruction | None, Stamp]] = [(None, self.start)]
        self._waits: dict[int, list[Stamp]] = {}
        self._known = [[0] * num_lanes for _ in range(num_lanes)]
        self._known[0][0] = 1
        self._snapshots = {self.start: list(self._known[0])}
        self._pending: dict[int, list[Stamp]] = {}

    def require(self, stamps: list[Stamp], lane: int) -> None:
        """The next instruction on ``lane`` runs after these; those that tell most come first."""
        for stamp in sorted(stamps, key=lambda s: (-sum(self._snapshots[s]), s.lane)):
            if self._known[lane][stamp.lane] < stamp.index:
                self._pending.setdefault(lane, []).append(stamp)
                pairs = zip(self._known[lane], self._snapshots[stamp], strict=True)
                self._known[lane] = [max(pair) for pair in pairs]

    def issue(self, instruction: Launch | Split | Merge) -> Stamp:
        """Append an instruction behind the waits that it required."""
        lane = instruction.lane
        self._known[lane][lane] += 1
        stamp = Stamp(lane, self._known[lane][lane])
        self._snapshots[stamp] = list(self._known[lane])
        self._waits[len(self._issued)] = self._pending.pop(lane, [])
        self._issued.append((instruction, stamp))
        return stamp

    def join(self) -> None:
        """Lane 0 learns of the end of every lane."""
        last = {stamp.lane: stamp for _, stamp in self._issued}
        self.require(list(last.values()), 0)
        self._waits[len(self._issued)] = self._pending.pop(0, [])

    def instructions(self) -> list[Instruction]:
        """All in order of issue, with events numbered as they are recorded."""
        wanted = {stamp for stamps in self._waits.values() for stamp in stamps}
        events: dict[Stamp, int] = {}
        result: list[Instruction] = []
        for at, (instruction, stamp) in enumerate(self._issued):
            result += self._wait_instructions(at, instruction, events)
            if instruction is not None:
                result.append(instruction)
            if stamp in wanted:
                events[stamp] = len(events)
                result.append(Record(events[stamp], stamp.lane))
        return result + [Wait(events[stamp], 0) for stamp in self._waits[len(self._issued)]]

    def _wait_instructions(
        self, at: int, instruction: Instruction | None, events: dict[Stamp, int]
    ) -> list[Wait]:
        lane = instruction.lane if instruction is not None else 0
        return [Wait(events[stamp], lane) for stamp in self._waits.get(at, ())]
