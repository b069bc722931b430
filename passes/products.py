"""Linears of parameters in a graph, the reshapes by which others read them, and operators in their place."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import (
    dtype_name,
    insert_call,
    operand,
    overload,
    shape_of,
    strides_of,
)
from nanoflow_compiler.kernel_choice import LinearShape
from nanoflow_compiler.merging import merge_rows

__all__ = ["Miss", "Product", "behind_reshapes", "last_reshape", "product_of", "replace_rows"]

aten = torch.ops.aten


class Miss(Exception):  # noqa: N818 - a reason, never an error of the caller
    """Why nodes that look like a pattern stay as they are."""


@dataclass(frozen=True, slots=True)
class Product:
    """``x @ weight_t (+ bias)``, where ``weight_t`` is the transpose of parameters."""

    node: fx.Node
    x: fx.Node
    weight_t: fx.Node
    bias: fx.Node | None

    def shape(self, op: str) -> LinearShape:
        """What tables of kernels know this product by, as ``op``."""
        value = self.weight_t.meta["val"]
        depth, columns = value.shape
        return LinearShape(op, dtype_name(value.dtype), int(depth), int(columns))


def product_of(node: fx.Node, weights: AbstractSet[str]) -> Product | None:
    """The linear that a node is, if it is one of parameters (names in ``weights``)."""
    if node.kwargs or node.target not in (aten.mm.default, aten.addmm.default):
        return None
    x, weight_t = operand(node, -2), operand(node, -1)
    bias = operand(node, 0) if node.target is aten.addmm.default else None
    if not _is_transposed_parameter(weight_t, weights):
        return None
    if bias is not None and shape_of(bias) != shape_of(node)[1:]:
        return None
    return Product(node, x, weight_t, bias)


def _is_transposed_parameter(node: fx.Node, weights: AbstractSet[str]) -> bool:
    if node.target is not aten.t.default:
        return False
    source = operand(node, 0)
    return source.name in weights or source.target is merge_rows


def behind_reshapes(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """What a chain of reshapes that keep the last dimension begins with, and the reshapes.

    None where ``node`` is no node. The reshapes are in the order of the graph.
    """
    if not isinstance(node, fx.Node):
        return None
    reshapes: list[fx.Node] = []
    while overload(node) is aten.reshape and shape_of(operand(node, 0))[-1] == shape_of(node)[-1]:
        reshapes.append(node)
        node = operand(node, 0)
    return node, reshapes[::-1]


def last_reshape(nodes: list[fx.Node]) -> fx.Node | None:
    """The last reshape of nodes in the order of the graph."""
    return next((node for node in reversed(nodes) if overload(node) is aten.reshape), None)


def replace_rows(
    old: fx.Node, target: Any, arguments: tuple[Any, ...], *, reshape: fx.Node | None
) -> fx.Node:
    """A call of ``target``, which makes rows, in place of ``old``, which has them as ``reshape`` does.

    Returns the call. Raises :class:`Miss` where ``old`` lies otherwise in memory.
    """
    graph = old.graph
    with graph.inserting_before(old):
        made = shaped = insert_call(graph, target, *arguments, like=old)
        if len(shape_of(old)) != 2:
            assert reshape is not None
            leading: Any = reshape.args[1]
            sizes = [*leading[:-1], int(shape_of(made)[-1])]
            shaped = insert_call(graph, aten.reshape.default, made, sizes, like=old)
    if (shape_of(shaped), strides_of(shaped)) != (shape_of(old), strides_of(old)):
        raise Miss("what it makes lies otherwise in memory")  # and no one reads the new nodes
    for user in list(old.users):
        if overload(user) is aten.reshape and shape_of(user) == shape_of(made):
            user.replace_all_uses_with(made)
    old.replace_all_uses_with(shaped)
    return made
