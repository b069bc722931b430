"""Small tools over FX graphs at the ATen level, used by passes and backends alike."""

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import unset_fake_temporarily

__all__ = [
    "call_nodes",
    "dtype_name",
    "fake_call",
    "form_of",
    "has_effect",
    "insert_call",
    "is_handle",
    "is_ours",
    "is_size",
    "is_tensor",
    "map_nodes",
    "numel",
    "operand",
    "operands",
    "overload",
    "shape_of",
    "size_expr",
    "size_hint",
    "strides_of",
    "symbol_hint",
]

aten = torch.ops.aten
_UNDEFINED = object()


def overload(node: fx.Node) -> Any:
    """The operator packet of an ATen or custom call (``aten.view``), else the target itself."""
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def call_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that compute something, in order."""
    return (node for node in module.graph.nodes if node.op == "call_function")


def operand(node: fx.Node, index: int) -> fx.Node:
    """The argument at ``index``, which the operator's schema says is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def operands(node: fx.Node, index: int) -> list[fx.Node]:
    """The argument at ``index``, which the operator's schema says is a list of nodes."""
    listed: Any = node.args[index]
    assert all(isinstance(item, fx.Node) for item in listed)
    return list(listed)


def map_nodes(tree: Any, function: Callable[[fx.Node], Any]) -> Any:
    """``tree`` with ``function`` of each node in its place: values, so no longer fx arguments."""
    return fx.node.map_arg(tree, function)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a number that the host computes from sizes."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def size_expr(size: Any) -> sympy.Expr:
    """A size as a sympy expression: of the symbols of the trace, or a plain integer."""
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def size_hint(size: Any) -> int:
    """The size that the trace saw; for an unbacked size, 1."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 1
    return int(size)


def shape_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The shape of a tensor node as expressions."""
    return tuple(size_expr(size) for size in node.meta["val"].shape)


def symbol_hint(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """What the trace of ``size`` saw for one of its symbols."""
    env = size.node.shape_env
    known = getattr(env, "backed_var_to_val", None) or env.var_to_val  # renamed in torch 2.13
    return int(known[symbol])


def strides_of(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The strides of a tensor node as expressions."""
    return tuple(size_expr(stride) for stride in node.meta["val"].stride())


def has_effect(node: fx.Node) -> bool:
    """Whether a node does more than return its value, so that it must run even if unused."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    mutates = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return mutates or bool(node.is_impure())


def is_handle(node: fx.Node) -> bool:
    """Whether a node is the handle of an append, which has no bytes and only orders."""
    if overload(node) is operator.getitem and node.args[1] == 1:
        return overload(operand(node, 0)) is _ours("rotary_append")
    return overload(node) is _ours("kv_append")


def is_ours(node: fx.Node, names: Collection[str]) -> bool:
    """Whether a node calls one of our operators of these names."""
    return overload(node) in [_ours(name) for name in names]


def _ours(name: str) -> Any:
    """An operator of ours, once it is defined; nothing is it before."""
    return getattr(torch.ops.nanoflow, name, _UNDEFINED)


def numel(value: torch.Tensor) -> int:
    """How many elements the trace saw."""
    total = 1
    for size in value.shape:
        total *= size_hint(size)
    return total


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def form_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that a trace can see of a tensor."""
    sizes, strides = (tuple(map(size_expr, of)) for of in (tensor.shape, tensor.stride()))
    offset = size_expr(tensor.storage_offset())
    return (sizes, strides, offset, tensor.dtype, tensor.device, type(tensor))


def fake_call(
    target: Any,
    args: Iterable[Any],
    kwargs: dict[str, Any],
    *,
    like: Any = None,
    known: dict[Any, Any] | None = None,
) -> Any:
    """What ``target`` returns for the fake values of its arguments.

    ``like`` is a value of the same trace, for a call that no tensor goes into. ``known`` are answers to
    calls of the same trace, by what they could see: layers ask the same again and again.
    """
    values = map_nodes((tuple(args), dict(kwargs)), lambda node: node.meta["val"])
    if known is None:
        return _run_fake(target, values, like=like)
    key = (target, _visible(values))
    if key not in known:
        known[key] = _run_fake(target, values, like=like)
    return known[key]


def _visible(value: Any) -> Any:
    """Equal for arguments that a call with fake values cannot tell from each other."""
    if isinstance(value, torch.Tensor):
        return form_of(value)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value), value.node.expr
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_visible, value))
    if isinstance(value, dict):
        return tuple((name, _visible(item)) for name, item in value.items())
    # A number by its name: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    return type(value), repr(value) if isinstance(value, float) else value


def _run_fake(target: Any, values: Any, *, like: Any) -> Any:
    modes = (t.fake_mode for t in _tensors((values, like)) if hasattr(t, "fake_mode"))
    mode = next(modes, nullcontext())
    # Without the dispatcher some operations do not take sizes that are symbols.
    with unset_fake_temporarily(), mode, enable_python_dispatcher(), torch.no_grad():
        return target(*values[0], **values[1])


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def insert_call(
    graph: fx.Graph,
    target: Any,
    *args: Any,
    like: fx.Node,
    known: dict[Any, Any] | None = None,
    **kwargs: Any,
) -> fx.Node:
    """A new call at the insertion point, with its fake value; ``like`` gives the origin.

    ``known``: see :func:`fake_call`.
    """
    node = graph.call_function(target, args, kwargs)
    keep = ("stack_trace", "nn_module_stack")
    node.meta.update({key: like.meta[key] for key in keep if key in like.meta})
    node.meta["val"] = fake_call(target, args, kwargs, like=like.meta.get("val"), known=known)
    return node
