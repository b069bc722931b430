"""epilogue: fx -> fx. A linear and what follows it become one operator, where a kernel serves it.

Consumes a fused graph, the names of the placeholders that are parameters (``weights``) and
``serves``, which says of an operator on a shape of weights whether a kernel is worth it. Found by
the shape of the graph alone, in this order:

- a linear whose two halves are ``act(gate) * up`` becomes ``nanoflow.gated_linear``,
- a linear that is added to a tensor of its shape becomes ``nanoflow.linear_add``,
- any other linear becomes ``nanoflow.linear``.

Only where nobody else reads what lies between, and all of it has one type: the operators round as the
nodes did, but that a GPU may add a residual before it rounds (``fused_ops.linear_add_``).
``module.meta["fusions"]`` gets what was fused, and ``module.meta["notes"]`` also what looked alike and
was not, with the reason. Belongs after ``fuse`` and before ``axis``.
"""

import operator
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nanoflow_compiler import fused_ops
from nanoflow_compiler.graphs import (
    call_nodes,
    insert_call,
    operand,
    overload,
    shape_of,
)
from nanoflow_compiler.kernel_choice import LinearShape
from nanoflow_compiler.passes.fuse import Fusion
from nanoflow_compiler.passes.products import (
    Miss,
    Product,
    behind_reshapes,
    last_reshape,
    product_of,
    replace_rows,
)

__all__ = ["epilogue"]

aten = torch.ops.aten

Serves = Callable[[LinearShape], bool]


@dataclass(frozen=True, slots=True)
class _Given:
    """What all of this pass reads."""

    module: fx.GraphModule
    weights: AbstractSet[str]
    serves: Serves
    fusions: list[Fusion] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)

    def product(self, node: fx.Node) -> Product | None:
        return product_of(node, self.weights)

    def check_served(self, product: Product, op: str) -> None:
        if not self.serves(product.shape(op)):
            raise Miss(f"no kernel of {op} is faster on weights of {_size(product)}")

    def done(self, kind: str, nodes: list[fx.Node], result: fx.Node) -> None:
        self.fusions.append(Fusion(kind, tuple(node.name for node in nodes), result.name))


def epilogue(
    module: fx.GraphModule, *, weights: AbstractSet[str], serves: Serves
) -> fx.GraphModule:
    """Fuse what ``serves`` agrees to; see the module's contract."""
    given = _Given(module, weights, serves)
    for rewrite in (_gate, _add, _plain):
        for node in list(call_nodes(module)):
            try:
                rewrite(node, given)
            except Miss as miss:
                given.misses.append(f"{node.name}: {miss}")
        module.graph.eliminate_dead_code()  # what was replaced reads nothing any more
    module.graph.lint()
    module.meta["fusions"] = [*module.meta.get("fusions", ()), *given.fusions]
    module.meta["notes"] = [
        *map(str, given.fusions),
        *(f"not fused, {miss}" for miss in given.misses),
    ]
    module.recompile()
    return module


def _size(product: Product) -> str:
    return " x ".join(str(size) for size in shape_of(product.weight_t))


def _gate(activation: fx.Node, given: _Given) -> None:
    """``act(gate) * up`` of the two halves of one linear."""
    name, multiplied = _activation(activation), _only_user(activation)
    if name is None or multiplied is None or multiplied.target is not aten.mul.Tensor:
        return
    others = [arg for arg in multiplied.args if arg is not activation]
    halves = [_half(activation.args[0]), _half(others[0])] if len(others) == 1 else [None, None]
    if halves[0] is None or halves[1] is None or halves[0].split is not halves[1].split:
        return
    source = behind_reshapes(halves[0].split.args[0])
    product = given.product(source[0]) if source else None
    if source is None or product is None:
        return
    before = [product.node, *source[1], halves[0].split]
    between = [*before, *halves[0].nodes, *halves[1].nodes, activation]
    _check_gate(product, halves[0], halves[1], between=between, result=multiplied)
    given.check_served(product, "gated_linear")
    reshape = last_reshape([*source[1], *halves[0].nodes])
    arguments = (product.x, product.weight_t, name)
    made = replace_rows(multiplied, fused_ops.gated_linear, arguments, reshape=reshape)
    given.done("gated_linear", [product.node, activation, multiplied], made)


def _activation(node: fx.Node) -> str | None:
    """The name by which ``gated_linear`` knows an activation."""
    if node.target is aten.silu.default:
        return "silu"
    if node.target is not aten.gelu.default:
        return None
    kind: Any = node.kwargs.get("approximate", "none")
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(kind)


@dataclass(frozen=True, slots=True)
class _Half:
    """One of two equal pieces of a split along the last dimension."""

    split: fx.Node
    index: int
    nodes: list[fx.Node]
    """From the piece to what is read of it."""


def _half(node: Any) -> _Half | None:
    found = behind_reshapes(node)
    if found is None or found[0].target is not operator.getitem:
        return None
    piece, reshapes = found
    split, index = operand(piece, 0), piece.args[1]
    if overload(split) not in (aten.split, aten.split_with_sizes) or not isinstance(index, int):
        return None
    rank = len(shape_of(piece))
    dim: Any = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    widths = [size.shape[-1] for size in split.meta["val"]]
    if dim % rank != rank - 1 or len(widths) != 2 or widths[0] != widths[1]:
        return None
    return _Half(split, index, [piece, *reshapes])


def _check_gate(
    product: Product, gate: _Half, up: _Half, *, between: list[fx.Node], result: fx.Node
) -> None:
    if product.bias is not None:
        raise Miss("the linear has a bias")
    if (gate.index, up.index) != (0, 1):
        raise Miss("the gate is not the first half")
    if set(gate.split.users) != {gate.nodes[0], up.nodes[0]}:
        raise Miss(f"{gate.split.name} has other readers")
    _check_alone([node for node in between if node is not gate.split])
    _check_types(product, result)


def _check_alone(nodes: list[fx.Node]) -> None:
    for node in nodes:
        if len(node.users) != 1:
            raise Miss(f"{node.name} has other readers")


def _check_types(product: Product, *others: fx.Node) -> None:
    used = (product.node, product.x, product.weight_t, *others)
    if len({node.meta["val"].dtype for node in used}) > 1:
        raise Miss("its types differ")


def _add(node: fx.Node, given: _Given) -> None:
    """A tensor plus a linear of its shape; of two linears, the later one is fused."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return
    found = [_term(node, at, given) for at in (0, 1)]
    terms = [term for term in found if term is not None]
    if not terms:
        return
    term = terms[-1]
    if len(terms) > 1:
        order = {each: at for at, each in enumerate(given.module.graph.nodes)}
        term = max(terms, key=lambda term: order[term.product.node])
    _check_alone([term.product.node, *term.reshapes])
    if term.product.bias is not None:
        raise Miss("the linear has a bias")
    if not shape_of(term.residual) == shape_of(term.value) == shape_of(node):
        raise Miss("it broadcasts")
    _check_types(term.product, term.residual, node)
    given.check_served(term.product, "linear_add")
    columns = shape_of(term.product.node)[-1]
    with node.graph.inserting_before(node):
        residual = _as_rows(term.residual, int(columns))
    arguments = (residual, term.product.x, term.product.weight_t)
    reshape = last_reshape(term.reshapes)
    made = replace_rows(node, fused_ops.linear_add, arguments, reshape=reshape)
    given.done("linear_add", [term.product.node, node], made)


@dataclass(frozen=True, slots=True)
class _Term:
    product: Product
    reshapes: list[fx.Node]
    value: fx.Node
    residual: fx.Node


def _term(add: fx.Node, at: int, given: _Given) -> _Term | None:
    """The operand ``at`` of an addition, if it is a linear, perhaps reshaped."""
    value, residual = add.args[at], add.args[1 - at]
    found = behind_reshapes(value)
    product = given.product(found[0]) if found else None
    if found is None or product is None or not isinstance(residual, fx.Node) or residual is value:
        return None
    assert isinstance(value, fx.Node)
    return _Term(product, found[1], value, residual)


def _as_rows(node: fx.Node, columns: int) -> fx.Node:
    """A tensor as ``[rows, columns]``: what it was reshaped from, where that has this shape."""
    if len(shape_of(node)) == 2:
        return node
    found = behind_reshapes(node)
    if found is not None and len(shape_of(found[0])) == 2:
        return found[0]
    return insert_call(node.graph, aten.reshape.default, node, [-1, columns], like=node)


def _plain(node: fx.Node, given: _Given) -> None:
    """Without a note where no kernel serves it: most linears of most models are ATen's."""
    product = given.product(node)
    if product is None or not given.serves(product.shape("linear")):
        return
    _check_types(product, *([] if product.bias is None else [product.bias]))
    arguments = (product.x, product.weight_t, product.bias)
    made = replace_rows(node, fused_ops.linear, arguments, reshape=None)
    given.done("linear", [node], made)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
