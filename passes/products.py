"""Linears of parameters in a graph, and the chains of nodes by which others read what they make."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import dtype_name, operand, overload, shape_of
from nanoflow_compiler.kernel_choice import LinearShape
from nanoflow_compiler.merging import merge_rows

__all__ = ["Product", "behind_reshapes", "product_of"]

aten = torch.ops.aten


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
