"""Rotary embeddings in a graph, found strictly: what is matched is computed just as it stands there.

``x * cos + cat(-x2, x1) * sin``, of the first ``width`` entries of a head or of all, or the same in
halves: ``cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)``. (:mod:`.patterns` only gives names, and is
less strict.)
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import operand, overload, shape_of

__all__ = ["Rotation", "rotation_of"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rotation:
    """What is rotated, and the nodes that do it."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    width: int
    """Entries of the last dimension that are rotated; the others stay."""
    in_halves: bool
    """Whether cosines and sines are those of one half, which both halves share."""
    nodes: tuple[fx.Node, ...]
    """All between ``x`` and the result, which is the last."""


def rotation_of(node: fx.Node) -> Rotation | None:
    """The rotation whose result a node is."""
    if overload(node) is aten.add:
        return _whole(node)
    pieces = _pieces(node)
    if pieces is None:
        return None
    return _in_halves(node, *pieces) or _of_first_entries(node, *pieces)


def _pieces(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two pieces that a node joins along the last dimension."""
    joined: Any = node.args[0] if overload(node) is aten.cat else ()
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if len(joined) != 2 or dim % len(shape_of(node)) != len(shape_of(node)) - 1:
        return None
    return joined[0], joined[1]


def _whole(add: fx.Node) -> Rotation | None:
    terms = _products(add)
    for straight, turned in (terms, terms[::-1]) if terms else ():
        for x, cos in _both_ways(straight):
            for halves, sin in _both_ways(turned):
                found = _turned_halves(halves, x)
                if found is not None:
                    nodes = (*found, halves, straight, turned, add)
                    return Rotation(x, cos, sin, int(shape_of(x)[-1]), False, nodes)
    return None


def _products(node: fx.Node) -> list[fx.Node] | None:
    """The two products that a node adds or subtracts."""
    terms = [arg for arg in node.args if isinstance(arg, fx.Node)]
    plain = len(node.args) == 2 and not node.kwargs
    if not plain or [term.target for term in terms] != [aten.mul.Tensor] * 2:
        return None
    return terms


def _both_ways(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    factors = [arg for arg in product.args if isinstance(arg, fx.Node)]
    return [(factors[0], factors[1]), (factors[1], factors[0])] if len(factors) == 2 else []


def _turned_halves(node: fx.Node, x: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes below ``cat(-x[half:], x[:half])``."""
    pieces = _pieces(node)
    width = shape_of(x)[-1]
    if pieces is None or not width.is_Integer or width % 2 or overload(pieces[0]) is not aten.neg:
        return None
    negated, first = pieces
    second = operand(negated, 0)
    half = int(width) // 2
    if _range_of(first, x) != (0, half) or _range_of(second, x) != (half, 2 * half):
        return None
    return second, negated, first


def _range_of(node: fx.Node, x: fx.Node) -> tuple[int, int] | None:
    """Which entries of the last dimension of ``x`` a slice takes."""
    if node.target is not aten.slice.Tensor or node.args[0] is not x or node.kwargs:
        return None
    given: list[Any] = [*node.args[1:]]
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    rank, size = len(shape_of(x)), int(shape_of(x)[-1])
    if dim % rank != rank - 1 or step != 1:
        return None
    begin, stop = start or 0, size if end is None else end
    if not isinstance(begin, int) or not isinstance(stop, int) or begin < 0 or stop < 0:
        return None
    return begin, min(stop, size)


def _in_halves(node: fx.Node, first: fx.Node, second: fx.Node) -> Rotation | None:
    """``cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)``, where ``x1`` and ``x2`` are a split of ``x``."""
    if (first.target, second.target) != (aten.sub.Tensor, aten.add.Tensor):
        return None
    low, high = _products(first), _products(second)
    if low is None or high is None:
        return None
    for x1, cos in _both_ways(low[0]):
        for x2, sin in _both_ways(low[1]):
            split = _split_in_halves(x1, x2)
            if split is not None and _is_sum_of(high, {x2, cos}, {x1, sin}):
                nodes = (split, x1, x2, *low, first, *high, second, node)
                return Rotation(operand(split, 0), cos, sin, int(shape_of(node)[-1]), True, nodes)
    return None


def _is_sum_of(terms: list[fx.Node], left: set[fx.Node], right: set[fx.Node]) -> bool:
    found = [set(term.all_input_nodes) for term in terms]
    return found in ([left, right], [right, left])


def _split_in_halves(first: fx.Node, second: fx.Node) -> fx.Node | None:
    elements = [node.target is operator.getitem for node in (first, second)]
    if not all(elements) or (first.args[1], second.args[1]) != (0, 1):
        return None
    split = operand(first, 0)
    if split is not second.args[0] or overload(split) not in (aten.split, aten.split_with_sizes):
        return None
    rank = len(shape_of(first))
    dim: Any = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    equal = len(split.meta["val"]) == 2 and shape_of(first) == shape_of(second)
    return split if equal and dim % rank == rank - 1 else None


def _of_first_entries(node: fx.Node, rotated: fx.Node, rest: fx.Node) -> Rotation | None:
    """``cat(rotation of x[:width], x[width:])``; the rest may be empty."""
    inner = rotation_of(rotated)
    if inner is None:
        return None
    taken = inner.x if overload(inner.x) is aten.slice else None
    x = rest.args[0]
    if not isinstance(x, fx.Node) or _range_of(rest, x) != (inner.width, int(shape_of(x)[-1])):
        return None
    if inner.x is x:
        nodes = (*inner.nodes, rest, node)
    elif taken is not None and _range_of(taken, x) == (0, inner.width):
        nodes = (taken, *inner.nodes, rest, node)
    else:
        return None
    return Rotation(x, inner.cos, inner.sin, inner.width, inner.in_halves, nodes)
