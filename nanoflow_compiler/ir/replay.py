"""Walk a program as a device would be allowed to run it, and check every read against it."""

from typing import NoReturn

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir.order import HappensBefore, Stamp
from nanoflow_compiler.ir.program import (
    Instruction,
    Launch,
    Merge,
    Program,
    Record,
    Span,
    Split,
    Wait,
)

__all__ = ["is_order", "replay"]


def is_order(value: str) -> bool:
    """Whether a value only orders operations: it has no bytes, and its spans add up."""
    return value.startswith("!")


def replay(program: Program, *, where: str) -> dict[str, list[tuple[int, int]]]:
    """The cells launched of each operation, after checking that

    every read follows its write in happens-before order and finds exactly the span that was
    written (or, for order values, spans that cover it), every launch reads and writes its own
    cells, and lane 0 ends after all lanes.
    """
    walk = _Walk(program, where)
    for instruction in program.instructions:
        walk.step(instruction)
    walk.finish()
    return walk.launched


class _Walk:
    def __init__(self, program: Program, where: str) -> None:
        self.program = program
        self.where = where
        self.order = HappensBefore(program.num_lanes, where=where)
        self.written: dict[str, dict[Span, Stamp]] = {}
        self.launched: dict[str, list[tuple[int, int]]] = {}
        start = self.order.issue(0)
        for name in program.inputs:
            self.written[name] = {Span(name): start}

    def step(self, instruction: Instruction) -> None:
        if not 0 <= instruction.lane < self.program.num_lanes:
            self.fail(f"no lane {instruction.lane} for: {instruction}")
        match instruction:
            case Record():
                self.order.record(instruction.event, instruction.lane)
            case Wait():
                self.order.wait(instruction.event, instruction.lane)
            case Launch():
                self.launch(instruction)
            case Split():
                self.split(instruction)
            case Merge():
                self.merge(instruction)

    def launch(self, launch: Launch) -> None:
        for span in launch.reads:
            self.read(span, launch.lane, str(launch))
            self.check_cells(span, launch)
        stamp = self.order.issue(launch.lane)
        for span in launch.writes:
            self.check_cells(span, launch)
            self.write(span, stamp)
        self.launched.setdefault(launch.op, []).append((launch.first, launch.last))

    def check_cells(self, span: Span, launch: Launch) -> None:
        """A part touches only its own cells of what it reads or writes in part."""
        is_whole = (launch.first, launch.last) == (0, self.program.num_cells)
        if span.dim is None:
            return
        first_ok = span.first == (
            0 if is_order(span.value) and span in launch.reads else launch.first
        )
        if is_whole or not first_ok or span.last != launch.last:
            self.fail(f"{span} is not the part [{launch.first}:{launch.last}] of {launch.op}")

    def split(self, split: Split) -> None:
        source, target = split.source, split.target
        self.read(source, split.lane, str(split))
        first, last = self.cells(source)
        inside = first <= target.first < target.last <= last and target.dim is not None
        along = source.dim in (None, target.dim)
        if source.value != target.value or not inside or not along:
            self.fail(f"cannot take {target} from {source}")
        self.write(target, self.order.issue(split.lane))

    def merge(self, merge: Merge) -> None:
        for span in merge.sources:
            self.read(span, merge.lane, str(merge))
        bounds = [self.cells(span) for span in merge.sources]
        first, last = self.cells(merge.target)
        joined = [first, *(end for _, end in bounds)] == [*(begin for begin, _ in bounds), last]
        alike = merge.target.dim in (None, merge.dim) and all(
            (span.value, span.dim) == (merge.target.value, merge.dim) for span in merge.sources
        )
        if not joined or not alike:
            self.fail(f"does not join: {merge}")
        self.write(merge.target, self.order.issue(merge.lane))

    def cells(self, span: Span) -> tuple[int, int]:
        return (0, self.program.num_cells) if span.dim is None else (span.first, span.last)

    def write(self, span: Span, stamp: Stamp) -> None:
        spans = self.written.setdefault(span.value, {})
        if span in spans:
            self.fail(f"{span} is written twice")
        spans[span] = stamp

    def read(self, span: Span, lane: int, reader: str) -> None:
        spans = self.written.get(span.value, {})
        if is_order(span.value):
            stamps = self.covering(span, spans, reader)
        elif span in spans:
            stamps = [spans[span]]
        else:
            self.fail(f"{span} is not written before: {reader}")
        for stamp in stamps:
            if not self.order.sees(lane, stamp):
                self.fail(f"lane {lane} does not wait for {span} from lane {stamp.lane}: {reader}")

    def covering(self, span: Span, spans: dict[Span, Stamp], reader: str) -> list[Stamp]:
        first, last = self.cells(span)
        pieces = {self.cells(piece): stamp for piece, stamp in spans.items()}
        at = first
        stamps: list[Stamp] = []
        for (begin, end), stamp in sorted(pieces.items(), key=lambda item: item[0]):
            if end > first and begin < last:
                stamps.append(stamp)
                at = max(at, end) if begin <= at else at
        if at < last:
            self.fail(f"{span} is not complete before: {reader}")
        return stamps

    def finish(self) -> None:
        for name in self.program.outputs:
            self.read(Span(name), 0, "the end of the program")
        if lanes := self.order.unseen_lanes(0):
            self.fail(f"lane 0 ends before lanes {lanes}")

    def fail(self, message: str) -> NoReturn:
        raise InvalidProgramError(message, where=self.where)
