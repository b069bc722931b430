"""``NanoGraph``: operations cut into parts, with an edge wherever token ranges meet."""

from dataclasses import dataclass

from nanoflow_compiler.ir.graph import Cost, Op, OpGraph, Read

__all__ = ["Edge", "NanoGraph", "NanoOp", "required_edges"]

_ALL_CELLS = 1 << 30


@dataclass(frozen=True, slots=True)
class NanoOp:
    """One part of an operation.

    The token axis is divided into cells, whose boundaries are chosen at run time; a part
    covers the cells ``first`` to ``last`` (exclusive).
    """

    op: Op
    part: int
    num_parts: int
    first: int
    last: int
    cost: Cost

    @property
    def name(self) -> str:
        """``gemm_3`` for a whole operation, ``gemm_3.0`` for a part."""
        return self.op.name if self.num_parts == 1 else f"{self.op.name}.{self.part}"

    def __str__(self) -> str:
        cells = "" if self.num_parts == 1 else f" cells[{self.first}:{self.last}]"
        return f"{self.name}{cells} {self.op.resource} {self.cost.time_us:.1f}us"


@dataclass(frozen=True, slots=True)
class Edge:
    """``target`` may start when ``source`` has ended, because of ``value``."""

    source: str
    target: str
    value: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} ({self.value})"


@dataclass(frozen=True, slots=True)
class NanoGraph:
    """Parts in a topological order, and the edges between them."""

    graph: OpGraph
    ops: tuple[NanoOp, ...]
    edges: tuple[Edge, ...]
    cell_tokens: tuple[int, ...]
    """Tokens of each cell that the costs assume."""

    @property
    def num_cells(self) -> int:
        """How many cells the token axis is divided into."""
        return len(self.cell_tokens)

    def by_name(self) -> dict[str, NanoOp]:
        """Parts by name."""
        return {op.name: op for op in self.ops}

    def __str__(self) -> str:
        head = f"nano graph: {len(self.ops)} nano-ops, {len(self.edges)} edges"
        cells = f"  cells of {', '.join(map(str, self.cell_tokens))} tokens"
        incoming: dict[str, list[str]] = {}
        for edge in self.edges:
            incoming.setdefault(edge.target, []).append(edge.source)
        lines = [
            f"  {op} after ({', '.join(dict.fromkeys(incoming.get(op.name, ())))})"
            for op in self.ops
        ]
        return "\n".join([head, cells, *lines])


def required_edges(ops: tuple[NanoOp, ...]) -> list[Edge]:
    """The edges that data, KV ranges and overwritten inputs ask for, in order of their targets.

    A part that reads a value in parts follows the writers whose cells meet its own; one that
    reads it whole follows all of its writers; one that reads tokens up to its end (attention
    on the KV cache of its layer) follows the writers of every cell before that end.
    """
    writers: dict[str, list[NanoOp]] = {}
    edges: list[Edge] = []
    for nano in ops:
        for read in nano.op.reads:
            first, last = _needed_cells(nano, read)
            edges.extend(
                Edge(writer.name, nano.name, read.value)
                for writer in writers.get(read.value, ())
                if writer.first < last and writer.last > first
            )
        for value in nano.op.writes:
            writers.setdefault(value, []).append(nano)
    return list(dict.fromkeys(edges))


def _needed_cells(nano: NanoOp, read: Read) -> tuple[int, int]:
    if read.prefix:
        return 0, nano.last
    return (nano.first, nano.last) if read.axis else (0, _ALL_CELLS)
