"""nano_split: OpGraph -> NanoGraph. Cuts operations into parts along the token axis.

Consumes an estimated graph. ``parts`` says into how many parts each splittable operation is cut:
one number for all, or a number per operation name (what it does not name stays whole). The
token axis is divided into cells, as many as the least common multiple of the numbers, so that
every part is a range of whole cells; an operation that cannot be cut is one part that covers
all. Where the cells end is decided at run time (any token, also inside a request).

Guarantees: the parts of an operation tile its cells; an edge wherever data, KV ranges or an
overwritten input ask for one (``required_edges``). Belongs after ``estimate``.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import lcm

from nanoflow_compiler.hardware import DeviceSpec
from nanoflow_compiler.ir import NanoGraph, NanoOp, Op, OpGraph
from nanoflow_compiler.ir.nano import required_edges
from nanoflow_compiler.passes.estimate import roofline

__all__ = ["nano_split"]


def nano_split(graph: OpGraph, *, parts: int | Mapping[str, int], device: DeviceSpec) -> NanoGraph:
    """Parts of every operation, with costs for an even division of the graph's tokens."""
    counts = {op.name: _count(op, parts) for op in graph.ops}
    num_cells = lcm(*counts.values()) if counts else 1
    cells = _even_cells(graph.tokens, num_cells)
    ops = tuple(
        _part(op, index, counts[op.name], cells, device)
        for op in graph.ops
        for index in range(counts[op.name])
    )
    return NanoGraph(graph, ops, tuple(required_edges(ops)), cells)


def _count(op: Op, parts: int | Mapping[str, int]) -> int:
    if not op.splits:
        return 1
    return parts if isinstance(parts, int) else parts.get(op.name, 1)


def _even_cells(tokens: int, num_cells: int) -> tuple[int, ...]:
    bounds = [tokens * at // num_cells for at in range(num_cells + 1)]
    return tuple(end - start for start, end in pairwise(bounds))


def _part(op: Op, index: int, count: int, cells: tuple[int, ...], device: DeviceSpec) -> NanoOp:
    width = len(cells) // count
    first, last = index * width, (index + 1) * width
    tokens = sum(cells[first:last])
    cost = roofline(op.work, kind=op.kind, tokens=tokens, device=device)
    return NanoOp(op, index, count, first, last, cost)
