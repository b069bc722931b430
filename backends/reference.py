"""reference: interprets any Program on any device, one node at a time, and checks it as it goes.

Lanes take turns in a random (seeded) order that the program's events allow, so that a missing
wait shows as a read of something not yet written, which is an error and never a wrong answer.
"""

import random
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.backends.clusters import Kernels
from nanoflow_compiler.backends.rows import merge, take
from nanoflow_compiler.backends.unit import Binding, Unit, attention_parts, takes_part
from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.graphs import is_handle, map_nodes
from nanoflow_compiler.ir import (
    Instruction,
    Launch,
    Merge,
    Program,
    Read,
    Record,
    Span,
    Split,
    Wait,
)
from nanoflow_compiler.ir.replay import is_order
from nanoflow_compiler.ir.verify import verify

__all__ = ["ReferenceExecutable", "build"]


def build(
    program: Program,
    *,
    unit: Unit,
    kernels: Kernels,
    clusters: str,
    path: Path | None,
    budgets: Any = None,
) -> "ReferenceExecutable":
    """An interpreter of the program; clusters always run as the ATen nodes that they are."""
    del kernels, clusters, budgets
    executable = ReferenceExecutable(program, unit)
    if path is not None:
        path.with_suffix(".txt").write_text(executable.source, encoding="utf-8")
    return executable


class ReferenceExecutable:
    """Runs a program and its checks."""

    def __init__(self, program: Program, unit: Unit, *, seed: int = 0) -> None:
        self.source = str(program)
        self.num_cells = program.num_cells
        self._program: Program | None = program
        self._unit = unit
        self._random = random.Random(seed)
        verify(program, where="reference")
        _check_launches(program, unit)
        self.attention_parts = attention_parts(program, unit)

    def __call__(self, inputs: list[Any], cuts: tuple[int, ...]) -> list[Any]:
        """Outputs in the order of the graph."""
        if self._program is None:
            raise InvalidProgramError("this executable is closed", where="run")
        env = _Environment(self._program, self._unit, self.attention_parts, cuts)
        env.values.update(zip(map(Span, self._program.inputs), inputs, strict=True))
        for instruction in _interleaved(self._program, self._random):
            env.run(instruction)
        return env.outputs()

    def close(self) -> None:
        """Drop the program."""
        self._program = None


def _check_launches(program: Program, unit: Unit) -> None:
    """Every operation is launched, and each launch reads and writes what its operation does."""
    launches = [item for item in program.instructions if isinstance(item, Launch)]
    if missing := unit.ops.keys() - {launch.op for launch in launches}:
        raise InvalidProgramError(f"{', '.join(sorted(missing))} never run", where="reference")
    for launch in launches:
        op = unit.ops.get(launch.op)
        if op is None or [(span.value, span.dim) for span in launch.reads] != [
            _place(read, launch, program.num_cells) for read in op.reads
        ]:
            raise InvalidProgramError(f"reads other values: {launch}", where="reference")
        if [span.value for span in launch.writes] != list(op.writes):
            raise InvalidProgramError(f"writes other values: {launch}", where="reference")


def _place(read: Read, launch: Launch, num_cells: int) -> tuple[str, int | None]:
    """A value, and the dimension along which a launch reads it in part; for an order value 0."""
    first = 0 if read.prefix else launch.first
    if (first, launch.last) == (0, num_cells):
        return read.value, None
    dim = read.axis.dim if read.axis else None
    return read.value, 0 if read.prefix else dim


def _interleaved(program: Program, choice: random.Random) -> list[Instruction]:
    """A random order in which the lanes could run."""
    queues: list[deque[Instruction]] = [deque() for _ in range(program.num_lanes)]
    for instruction in program.instructions:
        queues[instruction.lane].append(instruction)
    recorded: set[int] = set()
    order: list[Instruction] = []
    while any(queues):
        able = [q for q in queues if q and not _blocked(q[0], recorded)]
        if not able:
            raise InvalidProgramError("every lane waits for another", where="run")
        order.append(choice.choice(able).popleft())
        if isinstance(order[-1], Record):
            recorded.add(order[-1].event)
    return order


def _blocked(instruction: Instruction, recorded: set[int]) -> bool:
    return isinstance(instruction, Wait) and instruction.event not in recorded


class _Environment:
    """The spans that exist so far."""

    def __init__(
        self,
        program: Program,
        unit: Unit,
        parts: tuple[tuple[int, int], ...],
        cuts: tuple[int, ...],
    ) -> None:
        self.num_cells = program.num_cells
        self.unit = unit
        self.parts = parts
        self.cuts = cuts
        self.values: dict[Span, Any] = {}

    def run(self, instruction: Instruction) -> None:
        match instruction:
            case Launch():
                self.launch(instruction)
            case Split(source=source, target=target):
                assert target.dim is not None
                cells = (0, self.num_cells) if source.dim is None else (source.first, source.last)
                at = (target.first, target.last)
                self.values[target] = take(self.read(source), target.dim, self.cuts, cells, at)
            case Merge():
                pieces = [self.read(span) for span in instruction.sources]
                self.values[instruction.target] = merge(pieces, instruction.dim)

    def read(self, span: Span) -> Any:
        if span not in self.values:
            raise InvalidProgramError(f"{span} is read before it is written", where="run")
        return self.values[span]

    def launch(self, launch: Launch) -> None:
        op = self.unit.ops[launch.op]
        binding = Binding.of(launch, op)
        for span in launch.reads:
            if not is_order(span.value):
                self.read(span)
        made: dict[fx.Node, Any] = {}
        for node in self.unit.op_nodes(op):
            made[node] = self.call(node, binding, made, (launch.first, launch.last))
        for span in launch.writes:
            if not is_order(span.value):
                self.values[span] = made[self.unit.nodes[span.value]]

    def call(
        self, node: fx.Node, binding: Binding, made: dict[fx.Node, Any], cells: tuple[int, int]
    ) -> Any:
        def value(arg: fx.Node) -> Any:
            if arg in made:
                return made[arg]
            if is_handle(arg):
                return torch.empty(0)
            span = binding.span(node, arg)
            assert span is not None
            return self.read(span)

        args, kwargs = map_nodes((node.args, node.kwargs), value)
        if takes_part(node):
            args = (*args[:-1], self.parts.index(cells))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def outputs(self) -> list[Any]:
        def value(node: fx.Node) -> Any:
            return self.read(Span(node.name))

        (result,) = map_nodes(self.unit.module.graph.output_node().args, value)
        return list(result)
