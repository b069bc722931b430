"""fuse: fx -> fx. One GEMM for linears that share an input, and names for known patterns.

Consumes a normalized graph and the names of the placeholders that are parameters (``weights``).
Linears with transposed parameters that read the same tensor (q/k/v, gate/up, found by shape of
the graph alone) become one product with ``merge_rows(weights)``, split again; what they compute
is unchanged. Norms, rotary embeddings, gated activations and expert routing are recognised and
only labelled, in ``meta["pattern"]``, so that later steps can name and choose kernels for them.

``module.meta["fusions"]`` lists what was merged and recognised, ``module.meta["misses"]`` what
was not and why. Belongs after ``normalize`` and before ``axis``.
"""

import operator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import (
    call_nodes,
    dtype_name,
    fake_call,
    insert_call,
    operand,
    shape_of,
    size_expr,
)
from nanoflow_compiler.merging import merge_rows
from nanoflow_compiler.passes.patterns import recognise

__all__ = ["Fusion", "fuse"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Fusion:
    """What was found: a kind, the nodes it was made of, and the node that stands for it."""

    kind: str
    nodes: tuple[str, ...]
    result: str

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.nodes)} -> {self.result}"


@dataclass(frozen=True, slots=True)
class _Linear:
    """A product of ``source`` with a transposed parameter, with or without a bias."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def fuse(
    module: fx.GraphModule, *, weights: AbstractSet[str], merge: bool = True
) -> fx.GraphModule:
    """Merge linears (if ``merge``), then label patterns; see the module's contract."""
    fusions: list[Fusion] = []
    misses: list[str] = []
    known: dict[Any, Any] = {}
    for group in _groups(module, weights) if merge else ():
        if reason := _obstacle(group):
            misses.append(f"{', '.join(item.node.name for item in group)}: {reason}")
        else:
            fusions.append(_merge(group, known))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    fusions += [Fusion(kind, names, names[-1]) for kind, names in recognise(module)]
    module.meta["fusions"] = fusions
    module.meta["misses"] = misses
    module.meta["notes"] = [*map(str, fusions), *(f"not merged, {miss}" for miss in misses)]
    module.recompile()
    return module


def _groups(module: fx.GraphModule, weights: AbstractSet[str]) -> list[list[_Linear]]:
    """Linears of parameters by what they read, with two or more members, in graph order."""
    found: dict[fx.Node, list[_Linear]] = {}
    for node in call_nodes(module):
        if (linear := _as_linear(node, weights)) is not None:
            found.setdefault(linear.source, []).append(linear)
    return [group for group in found.values() if len(group) > 1]


def _as_linear(node: fx.Node, weights: AbstractSet[str]) -> _Linear | None:
    bias = None
    if node.target is aten.addmm.default and not node.kwargs:
        bias = operand(node, 0)
        if bias.name not in weights or shape_of(bias) != shape_of(node)[1:]:
            return None  # also of one element for all outputs: beside others it would not be
    elif node.target is not aten.mm.default:
        return None
    source, transposed = operand(node, -2), operand(node, -1)
    if transposed.target is not aten.t.default or operand(transposed, 0).name not in weights:
        return None
    return _Linear(node, source, operand(transposed, 0), bias)


def _obstacle(group: list[_Linear]) -> str:
    """Why linears of one input cannot be one GEMM; empty if they can."""
    if len({item.bias is None for item in group}) > 1:
        return "some have a bias and some do not"
    kinds = {dtype_name(item.weight.meta["val"].dtype) for item in group}
    if len(kinds) > 1:
        return f"weights of different types, {', '.join(sorted(kinds))}"
    if len({item.weight for item in group}) < len(group):
        return "two use the same weight"
    return ""


def _merge(group: list[_Linear], known: dict[Any, Any]) -> Fusion:
    """``known`` are answers of fake calls."""
    first = group[0].node
    graph = first.graph
    insert = partial(insert_call, graph, known=known)
    widths = [item.weight.meta["val"].shape[0] for item in group]
    with graph.inserting_before(first):
        weight = insert(merge_rows, [item.weight for item in group], like=first)
        transposed = insert(aten.t.default, weight, like=first)
        if group[0].bias is None:
            product = insert(aten.mm.default, group[0].source, transposed, like=first)
        else:
            biases = [item.bias for item in group]
            bias = insert(merge_rows, biases, like=first)
            operands = (bias, group[0].source, transposed)
            product = insert(aten.addmm.default, *operands, like=first)
        pieces = insert(aten.split_with_sizes.default, product, widths, 1, like=first)
        for index, item in enumerate(group):
            piece = insert(operator.getitem, pieces, index, like=item.node)
            item.node.replace_all_uses_with(piece)
            _refresh_users(piece, known)
    return Fusion("gemm", tuple(item.node.name for item in group), product.name)


def _refresh_users(changed: fx.Node, known: dict[Any, Any]) -> None:
    """Recompute the fake values that depend on the strides of ``changed``, and no others."""
    pending = list(changed.users)
    while pending:
        node = pending.pop(0)
        if node.op != "call_function":
            continue
        before = _layout(node)
        node.meta["val"] = fake_call(node.target, node.args, node.kwargs, known=known)
        if _layout(node) != before:
            pending.extend(node.users)


def _layout(node: fx.Node) -> list[tuple[Any, ...]]:
    """The strides of a tensor, or of each that a tuple holds."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return [tuple(map(size_expr, t.stride())) for t in leaves if isinstance(t, torch.Tensor)]
