"""lift: fx -> OpGraph. Groups nodes into schedulable operations.

Consumes a graph annotated by ``axis`` and the names of the placeholders that are parameters
(``weights``). Guarantees: every call node is in exactly one operation, except what depends on
parameters through views and merges only, which is ``bound``: evaluated once per set of weights,
and an input of the op graph. Operations are in a topological order; those of repeated layers
carry the layer's number; equal signatures mean equal functions of equally shaped inputs.
The module is not changed.
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import fx

from nanoflow_compiler.graphs import call_nodes, dtype_name, is_handle, is_size
from nanoflow_compiler.ir import Axis, Op, OpGraph, OpKind, Read, Resource, Value, ValueKind, Work
from nanoflow_compiler.merging import merge_rows
from nanoflow_compiler.passes.grouping import (
    Group,
    group_nodes,
    in_order,
    is_view,
    writes_after_reads,
)
from nanoflow_compiler.passes.labels import label_of
from nanoflow_compiler.passes.layers import find_layers
from nanoflow_compiler.passes.signature import signature_of
from nanoflow_compiler.passes.work import work_of
from nanoflow_compiler.rows import Rows, Status

__all__ = ["bound_nodes", "lift"]

_RESOURCES = {
    OpKind.GEMM: Resource.COMPUTE,
    OpKind.EXPERTS: Resource.COMPUTE,
    OpKind.OTHER: Resource.COMPUTE,
    OpKind.ATTENTION: Resource.MEMORY,
    OpKind.KV_APPEND: Resource.MEMORY,
    OpKind.CLUSTER: Resource.MEMORY,
    OpKind.NORM: Resource.MEMORY,
    OpKind.COLLECTIVE: Resource.NETWORK,
    OpKind.VIEW: Resource.HOST,
    OpKind.SIZES: Resource.HOST,
}


def lift(
    module: fx.GraphModule, *, weights: AbstractSet[str], tokens: int, kv_tokens: int = 512
) -> OpGraph:
    """Operations for ``tokens`` tokens, each attending to ``kv_tokens`` where a cache is paged."""
    bound = bound_nodes(module, weights)
    after = writes_after_reads(module)
    groups = in_order(group_nodes(module, skip=set(bound)), after=after)
    names = list(_names(groups))
    orders = _order_values(groups, names, after)
    returned = module.graph.output_node().all_input_nodes
    ops: list[Op] = []
    values: list[Value] = []
    for group, name in zip(groups, names, strict=True):
        op, made = _lift_group(group, name, returned=set(returned), orders=orders[name])
        work = _work(group, op, tokens=tokens, kv_tokens=kv_tokens)
        ops.append(replace(op, work=work))
        values.extend(made)
    layers = find_layers([op.signature for op in ops])
    used = {read.value for op in ops for read in op.reads} | {node.name for node in returned}
    inputs = [node for node in _sources(module, bound) if node.name in used]
    return OpGraph(
        ops=tuple(replace(op, layer=layer) for op, layer in zip(ops, layers, strict=True)),
        values=(*(_value(node, None) for node in inputs), *values),
        inputs=tuple(node.name for node in inputs),
        outputs=tuple(node.name for node in returned),
        tokens=tokens,
        num_layers=len(set(layers) - {None}),
    )


def bound_nodes(module: fx.GraphModule, weights: AbstractSet[str]) -> list[fx.Node]:
    """Views and merges of parameters alone."""
    fixed: set[fx.Node] = {
        n for n in module.graph.find_nodes(op="placeholder") if n.name in weights
    }
    found: list[fx.Node] = []
    for node in call_nodes(module):
        free = is_view(node) or node.target is merge_rows
        if free and node.all_input_nodes and all(arg in fixed for arg in node.all_input_nodes):
            fixed.add(node)
            found.append(node)
    return found


def _sources(module: fx.GraphModule, bound: list[fx.Node]) -> list[fx.Node]:
    given = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    return [*given, *bound]


def _names(groups: list[Group]) -> Iterator[str]:
    counts: dict[OpKind, int] = {}
    for group in groups:
        number = counts[group.kind] = counts.get(group.kind, -1) + 1
        yield f"{group.kind}_{number}"


def _value(node: fx.Node, axis: Axis | None) -> Value:
    if is_size(node):
        return Value(node.name, ValueKind.SIZE)
    tensor = node.meta["val"]
    shape = tuple(str(size) for size in getattr(tensor, "shape", ()))
    dtype = dtype_name(tensor.dtype) if hasattr(tensor, "dtype") else ""
    return Value(node.name, ValueKind.DATA, shape, dtype, axis)


@dataclass(frozen=True, slots=True)
class _Orders:
    """Order values of one operation: what it waits for and what it announces."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def _order_values(
    groups: list[Group], names: list[str], after: dict[fx.Node, list[fx.Node]]
) -> dict[str, _Orders]:
    """An operation that overwrites an input waits for ``!name`` of each that read it before."""
    owner = {node: name for group, name in zip(groups, names, strict=True) for node in group.nodes}
    waits: dict[str, set[str]] = {name: set() for name in names}
    for writer, readers in after.items():
        waits[owner[writer]] |= {owner[node] for node in readers} - {owner[writer]}
    announced = set().union(*waits.values())
    return {
        name: _Orders(
            tuple(f"!{other}" for other in names if other in waits[name]),
            (f"!{name}",) if name in announced else (),
        )
        for name in names
    }


def _lift_group(
    group: Group, name: str, *, returned: set[fx.Node], orders: _Orders
) -> tuple[Op, list[Value]]:
    inside = set(group.nodes)
    written = [
        node
        for node in group.nodes
        if node in returned or any(user not in inside for user in node.users)
    ]
    values = [_written_value(node, group) for node in written]
    values += [Value(order, ValueKind.CONTROL) for order in orders.writes]
    reads = _reads(group)
    op = Op(
        name=name,
        kind=group.kind,
        resource=_RESOURCES[group.kind],
        nodes=tuple(node.name for node in group.nodes),
        reads=(*reads, *(Read(order) for order in orders.reads)),
        writes=tuple(value.name for value in values),
        splits=group.splits,
        label=label_of(group),
        reason="; ".join(_join_reasons(group)),
        signature=signature_of(group, reads),
    )
    return op, values


def _written_value(node: fx.Node, group: Group) -> Value:
    if is_handle(node):
        return Value(f"!{node.name}", ValueKind.KV)
    rows = node.meta["axis"].rows
    splits = group.splits and isinstance(rows, Rows)
    return _value(node, Axis(rows.dim, str(rows.multiple)) if splits else None)


def _reads(group: Group) -> tuple[Read, ...]:
    """What a group reads from outside, each value in each way once."""
    inside = set(group.nodes)
    reads: dict[Read, None] = {}
    for node in group.nodes:
        ways = node.meta["axis"].reads
        for arg in node.all_input_nodes:
            if arg in inside:
                continue
            if is_handle(arg):
                reads[Read(f"!{arg.name}", prefix=group.splits)] = None
                continue
            rows = ways.get(arg.name) if group.splits else None
            reads[Read(arg.name, Axis(rows.dim, str(rows.multiple)) if rows else None)] = None
    return tuple(reads)


def _join_reasons(group: Group) -> list[str]:
    marks = (node.meta["axis"] for node in group.nodes)
    return list(dict.fromkeys(mark.reason for mark in marks if mark.status is Status.JOIN))


def _work(group: Group, op: Op, *, tokens: int, kv_tokens: int) -> Work:
    nodes = {arg.name: arg for node in group.nodes for arg in node.all_input_nodes}
    by_name = {node.name: node for node in group.nodes}
    reads = [(nodes[read.value], read.axis) for read in op.reads if read.value in nodes]
    return work_of(
        group,
        aligned=[node for node, axis in reads if axis],
        whole=[node for node, axis in reads if not axis],
        written=[by_name[name] for name in op.writes if name in by_name],
        tokens=tokens,
        kv_tokens=kv_tokens,
    )
