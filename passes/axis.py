"""axis: fx -> fx. Says of every node whether it can run in parts along the token axis.

Consumes a normalized graph and ``seeds``, input dimensions of one size (the tokens of a packed
step, or the batch). Guarantees that each node's ``meta["axis"]`` is a :class:`NodeAxis`:

- ``TOKEN``: row t of the output depends on row t of the operands in ``reads`` that carry an
  axis, and on all of the others; so it may run on any range of rows,
- ``JOIN``: depends on tokens but mixes them, or no rule is known for it (``reason``): it runs
  once, on whole operands, and what it makes may be cut again,
- ``SHARED``: does not depend on tokens: it runs once,
- ``SIZE``: a number that the host computes.

Sizes of the token axis in the arguments of TOKEN nodes become -1, so that the very same node is
right for every range of rows. Nothing else of the graph changes. What makes this sound is only
the TOKEN rules (:mod:`nanoflow_compiler.passes.axis_rules`): they prove row independence for
whichever dimension they are asked about, so a badly chosen seed costs speed, never an answer.

Belongs after ``fuse`` and before ``lift``.
"""

import operator
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.graphs import has_effect, is_size, overload, shape_of, size_expr
from nanoflow_compiler.passes import axis_compute_rules, axis_shape_rules
from nanoflow_compiler.passes.axis_compute_rules import register_packed, rule_of
from nanoflow_compiler.passes.axis_rules import (
    Operands,
    Placement,
    Refusal,
)
from nanoflow_compiler.rows import NodeAxis, Rows, Status

__all__ = ["axis", "joins"]

aten = torch.ops.aten

# Importing these modules fills axis_rules.RULES.
RULE_MODULES = (axis_compute_rules, axis_shape_rules)


def axis(module: fx.GraphModule, *, seeds: Sequence[tuple[str, int]]) -> fx.GraphModule:
    """Annotate every node; with no seeds every node is SHARED."""
    register_packed()
    tokens = _tokens(module, seeds)
    dims = dict(seeds)
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            node.meta["axis"] = _placeholder(node, dims.get(node.name))
        else:
            node.meta["axis"] = _classify(node, tokens)
    module.graph.eliminate_dead_code(is_impure_node=has_effect)  # sizes that no one needs now
    module.meta["notes"] = [f"join {node}: {why}" for node, why in joins(module)]
    module.recompile()
    return module


def joins(module: fx.GraphModule) -> list[tuple[str, str]]:
    """Node names and reasons of the JOIN nodes, in order."""
    marked = ((node, node.meta.get("axis")) for node in module.graph.nodes)
    return [(n.name, a.reason) for n, a in marked if a is not None and a.status is Status.JOIN]


def _tokens(module: fx.GraphModule, seeds: Sequence[tuple[str, int]]) -> sympy.Expr | None:
    nodes = {node.name: node for node in module.graph.find_nodes(op="placeholder")}
    sizes = {shape_of(nodes[name])[dim] for name, dim in seeds}
    if len(sizes) > 1:
        raise UnsupportedGraphError(f"the token axis has several sizes, {sizes}: seeds must agree")
    return sizes.pop() if sizes else None


def _placeholder(node: fx.Node, dim: int | None) -> NodeAxis:
    if is_size(node):
        return NodeAxis(Status.SIZE)
    if dim is None:
        return NodeAxis(Status.SHARED)
    return NodeAxis(Status.TOKEN, rows=Rows(dim, sympy.Integer(1)))


def _classify(node: fx.Node, tokens: sympy.Expr | None) -> NodeAxis:
    if is_size(node):
        return NodeAxis(Status.SIZE)
    marks = [arg.meta["axis"] for arg in node.all_input_nodes]
    if tokens is None or not any(_carries_rows(mark) for mark in marks):
        return NodeAxis(Status.SHARED, rows=_element_of_join(node, marks, tokens))
    try:
        rule = rule_of(overload(node))
        if rule is None:
            raise Refusal("no rule for this operation")
        placement = rule(Operands(node, tokens))
        _check_sizes(node, placement, tokens)
        _free_token_sizes(node, placement)
    except Refusal as refusal:
        reason = f"{_target_name(node)}: {refusal}"
        return NodeAxis(Status.JOIN, rows=_recut(node, tokens), reason=reason)
    return NodeAxis(Status.TOKEN, rows=placement.rows, reads=placement.reads)


def _carries_rows(mark: NodeAxis) -> bool:
    return any(mark.rows) if isinstance(mark.rows, tuple) else mark.rows is not None


def _element_of_join(
    node: fx.Node, marks: list[NodeAxis], tokens: sympy.Expr | None
) -> Rows | None:
    """One tensor of a join that makes several can be cut again, as a join of one can."""
    of_join = node.target is operator.getitem and marks and marks[0].status is Status.JOIN
    return _recut(node, tokens) if of_join and tokens is not None else None


def _target_name(node: fx.Node) -> str:
    target = overload(node)
    return getattr(target, "__name__", str(target))


def _check_sizes(node: fx.Node, placement: Placement, tokens: sympy.Expr) -> None:
    """The dimension that a rule names must have the size that its rows imply."""
    value = node.meta["val"]
    for tensor, rows in _outputs(value, placement.rows):
        if rows is None:
            continue
        size = sympy.expand(size_expr(tensor.shape[rows.dim]))
        if size != sympy.expand(rows.multiple * tokens):
            raise Refusal(f"dimension {rows.dim} of {list(tensor.shape)} is not the tokens")


def _outputs(value: object, rows: object) -> list[tuple[torch.Tensor, Rows | None]]:
    if isinstance(value, torch.Tensor):
        return [(value, rows)] if isinstance(rows, Rows | None) else []
    tensors = value if isinstance(value, list | tuple) else []
    each = rows if isinstance(rows, tuple) else [rows] * len(tensors)
    return [(t, r) for t, r in zip(tensors, each, strict=True) if isinstance(t, torch.Tensor)]


def _recut(node: fx.Node, tokens: sympy.Expr) -> Rows | None:
    """The one dimension of a join's output that holds the tokens, if there is just one."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    dims = [dim for dim, size in enumerate(value.shape) if size_expr(size) == tokens]
    return Rows(dims[0], sympy.Integer(1)) if len(dims) == 1 else None


def _free_token_sizes(node: fx.Node, placement: Placement) -> None:
    if placement.size_arg is None or not isinstance(placement.rows, Rows):
        return
    sizes = list(node.args[placement.size_arg])  # type: ignore[arg-type]
    keeps = overload(node) is aten.expand  # where -1 keeps a size, and does not infer it
    shape = node.meta["val"].shape
    for dim, size in enumerate(sizes):
        if dim == placement.rows.dim:
            sizes[dim] = -1
        elif isinstance(size, int) and size == -1 and not keeps:
            sizes[dim] = _static(shape[dim])
        if dim != placement.rows.dim and not keeps and sizes[dim] == 0:
            raise Refusal("an empty tensor does not tell how many tokens it has")
    node.update_arg(placement.size_arg, sizes)


def _static(size: int | torch.SymInt) -> int:
    expr = size_expr(size)
    if not expr.is_Integer:
        raise Refusal(f"a size other than the tokens, {expr}, is left open")
    return int(expr)
