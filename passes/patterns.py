"""Known patterns of decoders, found by the shape of the graph and marked in ``meta["pattern"]``.

A match only labels nodes: it says what a cluster is in reports, and which kernel may stand in
for it. Names of modules and functions play no part.
"""

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from nanoflow_compiler.graphs import call_nodes, overload, shape_of

__all__ = ["recognise"]

aten = torch.ops.aten

Match = tuple[fx.Node, ...]
Finder = Callable[[fx.Node], Match | None]


def recognise(module: fx.GraphModule) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Label every match; yields its kind and the names of its nodes, in graph order."""
    counts: dict[str, int] = {}
    for node in call_nodes(module):
        for kind, finder in _FINDERS.get(overload(node), ()):
            match = finder(node)
            if match is None or any("pattern" in member.meta for member in match):
                continue
            number = counts[kind] = counts.get(kind, -1) + 1
            for member in match:
                member.meta["pattern"] = f"{kind}:{number}"
            yield kind, tuple(member.name for member in match)
            break


def _only(node: object, packet: object) -> fx.Node | None:
    """``node`` if it is a call of ``packet``, looking through casts."""
    seen = _uncast(node)
    return seen if isinstance(seen, fx.Node) and overload(seen) is packet else None


def _uncast(node: object) -> object:
    while isinstance(node, fx.Node) and overload(node) is aten._to_copy:
        node = node.args[0]
    return node


def _rms_norm(rsqrt: fx.Node) -> Match | None:
    """``x * rsqrt(mean(x ** 2) + eps)``, with its casts and its weight."""
    add = _only(rsqrt.args[0], aten.add)
    mean = _only(add.args[0], aten.mean) if add else None
    square = _only(mean.args[0], aten.pow) if mean else None
    if add is None or mean is None or square is None or square.args[1] != 2:
        return None
    x = square.args[0]
    scaled = _single(user for user in rsqrt.users if overload(user) is aten.mul and x in user.args)
    if scaled is None:
        return None
    return (square, mean, add, rsqrt, scaled, *_weighted(scaled))


def _weighted(node: fx.Node) -> Iterator[fx.Node]:
    """Casts after ``node`` and the product with a vector that follows them."""
    user = _single(iter(node.users))
    while user is not None and overload(user) is aten._to_copy:
        yield user
        user = _single(iter(user.users))
    if user is not None and overload(user) is aten.mul and _has_vector(user):
        yield user


def _has_vector(node: fx.Node) -> bool:
    return any(isinstance(arg, fx.Node) and len(shape_of(arg)) == 1 for arg in node.args)


def _layer_norm(norm: fx.Node) -> Match | None:
    values = [user for user in norm.users if user.target is operator.getitem and user.args[1] == 0]
    return (norm, *values)


def _rotary(add: fx.Node) -> Match | None:
    """``x * cos + cat(-x2, x1) * sin``."""
    terms = [_only(arg, aten.mul) for arg in add.args[:2]]
    if None in terms:
        return None
    for straight, turned in (terms, terms[::-1]):
        assert straight is not None
        assert turned is not None
        cat = next((c for arg in turned.args if (c := _only(arg, aten.cat))), None)
        halves = _rotated_halves(cat) if cat else None
        if cat is not None and halves is not None and halves[-1].args[0] in straight.args:
            return (*halves, cat, straight, turned, add)
    return None


def _rotated_halves(cat: fx.Node) -> Match | None:
    pieces = cat.args[0]
    if not isinstance(pieces, list | tuple) or len(pieces) != 2:
        return None
    negated = _only(pieces[0], aten.neg)
    second = _only(negated.args[0], aten.slice) if negated else None
    first = _only(pieces[1], aten.slice)
    if negated is None or second is None or first is None or first.args[0] is not second.args[0]:
        return None
    return second, negated, first


def _gated(activation: fx.Node) -> Match | None:
    """``act(gate) * up``."""
    product = _single(user for user in activation.users if overload(user) is aten.mul)
    return (activation, product) if product is not None else None


def _router(topk: fx.Node) -> Match | None:
    """The choice of experts: a softmax or sigmoid over experts, then the best few."""
    scores = _uncast(topk.args[0])
    if isinstance(scores, fx.Node) and overload(scores) in (aten._softmax, aten.sigmoid):
        return (scores, topk)
    return None


def _single(nodes: Iterator[fx.Node]) -> fx.Node | None:
    found = list(nodes)
    return found[0] if len(found) == 1 else None


_FINDERS: dict[object, list[tuple[str, Finder]]] = {
    aten.rsqrt: [("rms_norm", _rms_norm)],
    aten.native_layer_norm: [("layer_norm", _layer_norm)],
    aten.add: [("rotary", _rotary)],
    aten.silu: [("gated_activation", _gated)],
    aten.gelu: [("gated_activation", _gated)],
    aten.topk: [("router", _router)],
}
