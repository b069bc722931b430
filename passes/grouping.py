"""Which FX nodes make one operation: anchors alone, all between them in clusters.

An anchor (a product, an attention, an append, a collective, or what has no kernel of ours) is an
operation by itself. The other nodes form clusters: connected nodes of one class (in parts, or
whole) between which no path leads through an anchor or through the other class. That is so if
each node's depth, the number of such borders on the longest path to it, is the same.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import call_nodes, has_effect, is_size, overload
from nanoflow_compiler.ir import OpKind
from nanoflow_compiler.rows import Status

__all__ = ["Group", "group_nodes", "in_order", "is_view", "writes_after_reads"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Group:
    """The nodes of one operation in graph order, and what it is."""

    kind: OpKind
    nodes: tuple[fx.Node, ...]
    splits: bool


_ANCHORS: dict[Any, OpKind] = {
    aten.mm: OpKind.GEMM,
    aten.addmm: OpKind.GEMM,
    aten.bmm: OpKind.GEMM,
    aten.baddbmm: OpKind.GEMM,
    aten._grouped_mm: OpKind.GEMM,
    aten.convolution: OpKind.GEMM,
    aten._scaled_dot_product_flash_attention_for_cpu: OpKind.ATTENTION,
    aten._scaled_dot_product_flash_attention: OpKind.ATTENTION,
    aten._scaled_dot_product_efficient_attention: OpKind.ATTENTION,
    aten._scaled_dot_product_cudnn_attention: OpKind.ATTENTION,
    aten.scaled_dot_product_attention: OpKind.ATTENTION,
    aten._scaled_dot_product_attention_math: OpKind.ATTENTION,
    aten.index_copy_: OpKind.KV_APPEND,
    aten.index_put_: OpKind.KV_APPEND,
}
_OURS = {
    "kv_append": OpKind.KV_APPEND,
    "paged_attention": OpKind.ATTENTION,
    "attention": OpKind.ATTENTION,
    "moe_experts": OpKind.EXPERTS,
    "linear": OpKind.GEMM,
    "linear_add": OpKind.GEMM,
    "gated_linear": OpKind.GEMM,
    "rotary_append": OpKind.KV_APPEND,
    "rms_norm": OpKind.NORM,
}
_VIEWS = {
    *(aten.reshape, aten.view, aten.permute, aten.transpose, aten.t, aten.unsqueeze),
    *(aten.squeeze, aten.expand, aten.slice, aten.select, aten.split, aten.split_with_sizes),
    *(aten.unbind, aten.alias, aten.detach, aten.narrow),
}


def is_view(node: fx.Node) -> bool:
    """Whether the node moves no bytes (a reshape may, where strides do not allow a view)."""
    return overload(node) in _VIEWS or overload(node).__name__ == "getitem"


def anchor_kind(node: fx.Node) -> OpKind | None:
    """The kind of an anchor; None for a node that joins a cluster."""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target.namespace, overload(node).__name__
        if namespace == "nanoflow" and name in _OURS:
            return _OURS[name]
        if namespace == "_c10d_functional":
            return OpKind.COLLECTIVE
        if kind := _ANCHORS.get(overload(node)):
            return kind
        if namespace not in ("aten", "prims"):
            return OpKind.OTHER
    if has_effect(node) or _has_unknown_sizes(node):
        return OpKind.OTHER
    return None


def _has_unknown_sizes(node: fx.Node) -> bool:
    """Sizes that only the data tells cannot be planned for inside a kernel."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    sizes: list[Any] = [
        size for leaf in leaves if isinstance(leaf, torch.Tensor) for size in leaf.shape
    ]
    return any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in sizes)


def group_nodes(module: fx.GraphModule, *, skip: set[fx.Node]) -> list[Group]:
    """Every call node but those in ``skip`` is in exactly one group."""
    nodes = [node for node in call_nodes(module) if node not in skip]
    sizes = [node for node in nodes if _is_host_size(node)]
    rest = [node for node in nodes if node not in set(sizes)]
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, root in _roots(rest).items():
        members.setdefault(root, []).append(node)
    groups = [_group(tuple(group)) for group in members.values()]
    if sizes:
        groups.insert(0, Group(OpKind.SIZES, tuple(sizes), splits=False))
    return groups


def _is_host_size(node: fx.Node) -> bool:
    """Arithmetic on sizes of inputs; a number read from computed data is an operation."""
    sources = (arg for arg in node.all_input_nodes if not is_size(arg))
    return is_size(node) and all(source.op == "placeholder" for source in sources)


def _group(nodes: tuple[fx.Node, ...]) -> Group:
    kind = anchor_kind(nodes[0])
    if kind is None:
        kind = OpKind.VIEW if all(map(is_view, nodes)) else OpKind.CLUSTER
    return Group(kind, nodes, splits=_in_parts(nodes[0]))


def _in_parts(node: fx.Node) -> bool:
    return bool(node.meta["axis"].status is Status.TOKEN)


def _roots(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """A representative per group, by joining neighbours of one depth and class."""
    depth: dict[fx.Node, int] = {}
    root: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            node = root[node]
        return node

    for node in nodes:
        inputs = [arg for arg in node.all_input_nodes if arg in depth]
        if owner := _owner_of_element(node, depth):
            depth[node], root[node] = depth[owner], find(owner)
            continue
        alone = anchor_kind(node) is not None
        depth[node] = max((depth[arg] + _border(arg, node) for arg in inputs), default=0)
        root[node] = node
        for arg in inputs if not alone else ():
            if not _border(arg, node) and depth[arg] == depth[node]:
                root[find(arg)] = find(node)
    return {node: find(node) for node in nodes}


def _owner_of_element(node: fx.Node, known: dict[fx.Node, int]) -> fx.Node | None:
    """A tuple never leaves its operation: its elements belong to whoever made it."""
    source = node.args[0] if node.args else None
    is_element = overload(node).__name__ == "getitem"
    return source if is_element and isinstance(source, fx.Node) and source in known else None


def _border(source: fx.Node, target: fx.Node) -> bool:
    """Whether an edge leaves an anchor or changes between parts and whole."""
    maker = source.args[0] if overload(source).__name__ == "getitem" else source
    anchored = isinstance(maker, fx.Node) and anchor_kind(maker) is not None
    return anchored or _in_parts(source) != _in_parts(target)


def writes_after_reads(module: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """For each node that overwrites an input, the earlier nodes that read the old content."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in call_nodes(module):
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            overwritten = node.args[0]
            if isinstance(overwritten, fx.Node):
                found[node] = [user for user in overwritten.users if user in seen]
        seen.add(node)
    return found


def in_order(groups: list[Group], *, after: dict[fx.Node, list[fx.Node]]) -> list[Group]:
    """A topological order of groups, as close to the graph's own as it can be."""
    owner = {node: at for at, group in enumerate(groups) for node in group.nodes}
    needs = [_needs(group, owner, after) - {at} for at, group in enumerate(groups)]
    users: list[list[int]] = [[] for _ in groups]
    for at, sources in enumerate(needs):
        for source in sources:
            users[source].append(at)
    position = {node: at for at, node in enumerate(owner_graph(groups))}
    ready = [(position[groups[at].nodes[0]], at) for at, n in enumerate(needs) if not n]
    heapq.heapify(ready)
    ordered: list[Group] = []
    while ready:
        _, at = heapq.heappop(ready)
        ordered.append(groups[at])
        for user in users[at]:
            needs[user].discard(at)
            if not needs[user]:
                heapq.heappush(ready, (position[groups[user].nodes[0]], user))
    assert len(ordered) == len(groups), "clusters must be convex"
    return ordered


def owner_graph(groups: list[Group]) -> list[fx.Node]:
    """The nodes of the graph that the groups came from, in its order."""
    return list(groups[0].nodes[0].graph.nodes) if groups else []


def _needs(
    group: Group, owner: dict[fx.Node, int], after: dict[fx.Node, list[fx.Node]]
) -> set[int]:
    data = {owner[arg] for node in group.nodes for arg in node.all_input_nodes if arg in owner}
    order = {owner[other] for node in group.nodes for other in after.get(node, ())}
    return data | order
