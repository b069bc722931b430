"""TOKEN rules of operations that move elements: views, slices, gathers, scatters."""

from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import shape_of
from nanoflow_compiler.passes.axis_rules import (
    Operands,
    Placement,
    Refusal,
    broadcast,
    first_rows,
    output_rank,
    packets,
    positive,
    rank_of,
    regroup,
    rule,
    same_rows,
    value_shape,
)
from nanoflow_compiler.rows import Rows

__all__: list[str] = []

aten = torch.ops.aten


@rule(*packets("view reshape _unsafe_view"))
def _view(ops: Operands) -> Placement:
    source = ops.arg(0)
    rows = first_rows(ops)
    if not isinstance(ops.arg(1), list | tuple):
        raise Refusal("reads elements as another type")
    out = regroup(ops, shape_of(source), rows, value_shape(ops.node.meta["val"]))
    ops.read(source, rows)
    return ops.placed(out, size_arg=1)


@rule(aten.expand)
def _expand(ops: Operands) -> Placement:
    rows = first_rows(ops)
    ops.read(ops.arg(0), rows)
    shift = output_rank(ops) - rank_of(ops.arg(0))
    return ops.placed(Rows(rows.dim + shift, rows.multiple), size_arg=1)


@rule(aten.permute)
def _permute(ops: Operands) -> Placement:
    rows = first_rows(ops)
    order = [positive(dim, output_rank(ops)) for dim in ops.arg(1)]
    ops.read(ops.arg(0), rows)
    return ops.placed(Rows(order.index(rows.dim), rows.multiple))


@rule(*packets("transpose t"))
def _transpose(ops: Operands) -> Placement:
    rows = first_rows(ops)
    rank = output_rank(ops)
    if ops.node.target is aten.t.default:
        swapped = (0, rank - 1)
    else:
        swapped = (positive(ops.arg(1), rank), positive(ops.arg(2), rank))
    ops.read(ops.arg(0), rows)
    moves = {swapped[0]: swapped[1], swapped[1]: swapped[0]}
    return ops.placed(Rows(moves.get(rows.dim, rows.dim), rows.multiple))


@rule(aten.unsqueeze)
def _unsqueeze(ops: Operands) -> Placement:
    rows = first_rows(ops)
    at = positive(ops.arg(1), output_rank(ops))
    ops.read(ops.arg(0), rows)
    return ops.placed(Rows(rows.dim + (at <= rows.dim), rows.multiple))


@rule(aten.squeeze)
def _squeeze(ops: Operands) -> Placement:
    rows = first_rows(ops)
    shape = shape_of(ops.arg(0))
    asked = ops.arg(1, "dim", list(range(len(shape))))
    dims = {positive(dim, len(shape)) for dim in ([asked] if isinstance(asked, int) else asked)}
    if rows.dim in dims:
        raise Refusal("would drop the dimension of the tokens where there is one")
    gone = sum(dim < rows.dim and shape[dim] == 1 for dim in dims)
    ops.read(ops.arg(0), rows)
    return ops.placed(Rows(rows.dim - gone, rows.multiple))


@rule(*packets("slice split split_with_sizes"))
def _along_one(ops: Operands) -> Placement:
    return same_rows(ops, [ops.named("dim", 0)])


@rule(*packets("flip roll"))
def _along_several(ops: Operands) -> Placement:
    return same_rows(ops, ops.named("dims", []))


@rule(*packets("select unbind"))
def _drop_dim(ops: Operands) -> Placement:
    rows = first_rows(ops)
    at = positive(ops.arg(1, "dim", 0), rank_of(ops.arg(0)))
    if at == rows.dim:
        raise Refusal("picks one token")
    ops.read(ops.arg(0), rows)
    out = Rows(rows.dim - (at < rows.dim), rows.multiple)
    value = ops.node.meta["val"]
    return ops.placed((out,) * len(value) if isinstance(value, list | tuple) else out)


@rule(aten.cat)
def _cat(ops: Operands) -> Placement:
    pieces = ops.arg(0)
    rank = output_rank(ops)
    at = positive(ops.arg(1, "dim", 0), rank)
    found = {rows for piece in pieces if (rows := ops.rows(piece)) is not None}
    if len(found) != 1:
        raise Refusal("tokens meet on different axes")
    rows = found.pop()
    if rows.dim == at:
        raise Refusal("joins pieces along the tokens")
    for piece in pieces:
        if rank_of(piece) != rank:
            raise Refusal("joins pieces of different rank")
        ops.align(piece, rows)
    return ops.placed(rows)


@rule(aten.stack)
def _stack(ops: Operands) -> Placement:
    pieces = ops.arg(0)
    at = positive(ops.arg(1, "dim", 0), output_rank(ops))
    rows = broadcast(ops, pieces, rank_of(pieces[0]))
    return ops.placed(Rows(rows.dim + (at <= rows.dim), rows.multiple))


@rule(aten.repeat)
def _repeat(ops: Operands) -> Placement:
    rows = first_rows(ops)
    repeats = ops.arg(1)
    dim = rows.dim + len(repeats) - rank_of(ops.arg(0))
    if repeats[dim] != 1:
        raise Refusal("repeats the tokens")
    ops.read(ops.arg(0), rows)
    return ops.placed(Rows(dim, rows.multiple))


@rule(*packets("tril triu"))
def _triangle(ops: Operands) -> Placement:
    return same_rows(ops, [-1, -2])


@rule(aten.constant_pad_nd)
def _pad(ops: Operands) -> Placement:
    padded = range(1, len(ops.arg(1)) // 2 + 1)
    return same_rows(ops, [-dim for dim in padded] or [-1])


@rule(aten.embedding)
def _embedding(ops: Operands) -> Placement:
    table, index = ops.arg(0), ops.arg(1)
    rows = ops.rows(index)
    ops.whole(table)
    if rows is None:
        raise Refusal("the table depends on tokens")
    ops.read(index, rows)
    return ops.placed(rows)


@rule(aten.index_select)
def _index_select(ops: Operands) -> Placement:
    source, dim, index = (ops.arg(i) for i in range(3))
    at = positive(dim, rank_of(source))
    rows = ops.rows(source)
    if rows is None:
        rows = first_rows(ops, 2)
        ops.read(index, rows)
        return ops.placed(Rows(at, rows.multiple))
    if rows.dim == at:
        raise Refusal("picks tokens by index")
    ops.read(source, rows)
    return ops.placed(rows)


@rule(aten.gather)
def _gather(ops: Operands) -> Placement:
    source, dim, index = (ops.arg(i) for i in range(3))
    at = positive(dim, rank_of(source))
    rows = ops.rows(index) or ops.rows(source)
    assert rows is not None
    if rows.dim == at:
        ops.whole(source)
        ops.read(index, rows)
        return ops.placed(rows)
    ops.align_exactly(source, rows)
    ops.align_exactly(index, rows)
    return ops.placed(rows)


def _indexed(rank: int, indices: Any) -> tuple[list[fx.Node], int, int]:
    """The index tensors, the first dimension that they replace, and by how many dimensions."""
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if not used or used != list(range(used[0], used[-1] + 1)) or len(indices) > rank:
        raise Refusal("indexes dimensions that are not adjacent")
    nodes = [indices[dim] for dim in used]
    if any(node.meta["val"].dtype in (torch.bool, torch.uint8) for node in nodes):
        raise Refusal("picks elements by a mask")
    return nodes, used[0], max(rank_of(node) for node in nodes)


@rule(aten.index)
def _index(ops: Operands) -> Placement:
    source, indices = ops.arg(0), ops.arg(1)
    nodes, start, width = _indexed(rank_of(source), indices)
    rows = ops.rows(source)
    if rows is None:
        found = broadcast(ops, nodes, width)
        return ops.placed(Rows(start + found.dim, found.multiple))
    ops.read(source, rows)
    return ops.placed(_rows_beside(rows, start, len(nodes), width))


def _rows_beside(rows: Rows, start: int, count: int, width: int) -> Rows:
    """Where rows are after ``count`` dimensions from ``start`` became ``width``."""
    if start <= rows.dim < start + count:
        raise Refusal("picks tokens by index")
    return Rows(rows.dim + (width - count if rows.dim >= start else 0), rows.multiple)


@rule(*packets("index_put index_put_ _unsafe_index_put"))
def _index_put(ops: Operands) -> Placement:
    target, indices, values = (ops.arg(i) for i in range(3))
    rows = first_rows(ops)
    nodes, start, width = _indexed(rank_of(target), indices)
    beside = _rows_beside(rows, start, len(nodes), width)
    rank = rank_of(target) - len(nodes) + width
    ops.read(target, rows)
    ops.align(values, Rows(beside.dim - (rank - rank_of(values)), beside.multiple))
    return ops.placed(rows)


@rule(*packets("index_copy index_copy_ index_add index_fill"))
def _index_copy(ops: Operands) -> Placement:
    target, dim, _, source = (ops.arg(i) for i in range(4))
    rows = first_rows(ops)
    if positive(dim, rank_of(target)) == rows.dim:
        raise Refusal("writes tokens by index")
    ops.read(target, rows)
    if isinstance(source, fx.Node) and rank_of(source):  # a number may fill, too
        ops.align_exactly(source, rows)
    return ops.placed(rows)


@rule(*packets("scatter scatter_add"))
def _scatter(ops: Operands) -> Placement:
    target, dim, index, source = (ops.arg(i) for i in range(4))
    rows = ops.rows(target) or ops.rows(index)
    if rows is None or positive(dim, rank_of(target)) == rows.dim:
        raise Refusal("writes tokens by index")
    for operand in (target, index, source):
        ops.align_exactly(operand, rows)
    return ops.placed(rows)


@rule(aten.slice_scatter)
def _slice_scatter(ops: Operands) -> Placement:
    target, source = ops.arg(0), ops.arg(1)
    rows = ops.rows(target) or ops.rows(source)
    assert rows is not None
    if positive(ops.arg(2, "dim", 0), rank_of(target)) == rows.dim:
        raise Refusal("writes a range of tokens")
    ops.align_exactly(target, rows)
    ops.align_exactly(source, rows)
    return ops.placed(rows)
