"""``Program``: what a backend runs, one instruction a line; it prints and parses back."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from nanoflow_compiler.errors import InvalidProgramError

__all__ = [
    "Instruction",
    "Launch",
    "Merge",
    "Program",
    "Record",
    "Span",
    "Split",
    "Wait",
]


@dataclass(frozen=True, slots=True)
class Span:
    """A value, whole (``dim`` None) or its cells ``first`` to ``last`` along ``dim``."""

    value: str
    dim: int | None = None
    first: int = 0
    last: int = 0

    def __str__(self) -> str:
        if self.dim is None:
            return self.value
        return f"{self.value}@{self.dim}[{self.first}:{self.last}]"


@dataclass(frozen=True, slots=True)
class Launch:
    """Run the cells ``first`` to ``last`` of an operation on a lane, with a budget of SMs."""

    op: str
    first: int
    last: int
    lane: int
    sms: int
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]

    def __str__(self) -> str:
        reads, writes = _join(self.reads), _join(self.writes)
        return (
            f"launch {self.op}[{self.first}:{self.last}] lane={self.lane} sms={self.sms}"
            f" ({reads}) -> ({writes})"
        )


@dataclass(frozen=True, slots=True)
class Split:
    """Name cells of a value; no bytes move."""

    source: Span
    target: Span
    lane: int

    def __str__(self) -> str:
        return f"split lane={self.lane} ({self.source}) -> ({self.target})"


@dataclass(frozen=True, slots=True)
class Merge:
    """Join adjacent spans of a value into one along ``dim``."""

    sources: tuple[Span, ...]
    target: Span
    dim: int
    lane: int

    def __str__(self) -> str:
        return f"merge lane={self.lane} dim={self.dim} ({_join(self.sources)}) -> ({self.target})"


@dataclass(frozen=True, slots=True)
class Record:
    """Mark an event: everything issued on the lane before it has ended."""

    event: int
    lane: int

    def __str__(self) -> str:
        return f"record lane={self.lane} event={self.event}"


@dataclass(frozen=True, slots=True)
class Wait:
    """What the lane issues after this runs after the event."""

    event: int
    lane: int

    def __str__(self) -> str:
        return f"wait lane={self.lane} event={self.event}"


Instruction = Launch | Split | Merge | Record | Wait


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions in the order in which the host issues them; lane 0 starts and ends it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    num_cells: int
    num_lanes: int
    instructions: tuple[Instruction, ...]

    def __str__(self) -> str:
        head = [
            f"program cells={self.num_cells} lanes={self.num_lanes}",
            f"inputs ({', '.join(self.inputs)})",
        ]
        lines = [f"  {instruction}" for instruction in self.instructions]
        return "\n".join([*head, *lines, f"outputs ({', '.join(self.outputs)})"])

    @classmethod
    def parse(cls, text: str) -> "Program":
        """The program that printed ``text``; raises :class:`InvalidProgramError`."""
        lines = [line.strip() for line in text.strip().splitlines()]
        if len(lines) < 3:
            raise InvalidProgramError("a program has a head, inputs and outputs", where="parse")
        cells, lanes = _match(r"program cells=(\d+) lanes=(\d+)", lines[0])
        (inputs,) = _match(r"inputs \((.*)\)", lines[1])
        (outputs,) = _match(r"outputs \((.*)\)", lines[-1])
        return cls(
            inputs=_names(inputs),
            outputs=_names(outputs),
            num_cells=int(cells),
            num_lanes=int(lanes),
            instructions=tuple(map(_parse_instruction, lines[2:-1])),
        )


def _join(spans: tuple[Span, ...]) -> str:
    return ", ".join(map(str, spans))


def _match(pattern: str, line: str) -> tuple[str, ...]:
    if found := re.fullmatch(pattern, line):
        return found.groups()
    raise InvalidProgramError(f"cannot read line {line!r}", where="parse")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(", ") if name)


def _span(text: str) -> Span:
    if "@" not in text:
        return Span(text)
    value, dim, first, last = _match(r"([^@]+)@(\d+)\[(\d+):(\d+)\]", text)
    return Span(value, int(dim), int(first), int(last))


def _spans(text: str) -> tuple[Span, ...]:
    return tuple(map(_span, _names(text)))


def _parse_launch(line: str) -> Launch:
    pattern = r"launch (.+)\[(\d+):(\d+)\] lane=(\d+) sms=(\d+) \((.*)\) -> \((.*)\)"
    op, first, last, lane, sms, reads, writes = _match(pattern, line)
    numbers = int(first), int(last), int(lane), int(sms)
    return Launch(op, *numbers, _spans(reads), _spans(writes))


def _parse_split(line: str) -> Split:
    lane, source, target = _match(r"split lane=(\d+) \((.*)\) -> \((.*)\)", line)
    return Split(_span(source), _span(target), int(lane))


def _parse_merge(line: str) -> Merge:
    pattern = r"merge lane=(\d+) dim=(\d+) \((.*)\) -> \((.*)\)"
    lane, dim, sources, target = _match(pattern, line)
    return Merge(_spans(sources), _span(target), int(dim), int(lane))


def _parse_record(line: str) -> Record:
    lane, event = _match(r"record lane=(\d+) event=(\d+)", line)
    return Record(int(event), int(lane))


def _parse_wait(line: str) -> Wait:
    lane, event = _match(r"wait lane=(\d+) event=(\d+)", line)
    return Wait(int(event), int(lane))


_PARSERS: dict[str, Callable[[str], Instruction]] = {
    "launch": _parse_launch,
    "split": _parse_split,
    "merge": _parse_merge,
    "record": _parse_record,
    "wait": _parse_wait,
}


def _parse_instruction(line: str) -> Instruction:
    verb = line.split(" ", 1)[0]
    if verb not in _PARSERS:
        raise InvalidProgramError(f"unknown instruction {verb!r}", where="parse")
    return _PARSERS[verb](line)
