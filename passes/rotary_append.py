"""rotary_append: fx -> fx. Rotary embedding and the append of keys and values become one operator.

Consumes a fused graph in which attention is append and attend, and ``serves``, which says of the keys
and values of a layer whether its cache is stored by a kernel that rotates. Where queries and keys of an
attention are rotated by the same cosines and sines, and nobody else reads what is rotated,
``nanoflow.rotary_append`` rotates both and appends; its handle takes the place of that of ``kv_append``.

Cosines and sines are brought to rows ``[tokens, width]`` once, for all layers that share them. Roundings
are those of the nodes, so that no output changes. ``module.meta["fusions"]`` gets what was fused,
``module.meta["notes"]`` also what was not, with the reason. Belongs after ``fuse`` and before ``axis``.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from nanoflow_compiler import fused_ops
from nanoflow_compiler.graphs import (
    call_nodes,
    fake_call,
    insert_call,
    operand,
    overload,
    shape_of,
    size_expr,
)
from nanoflow_compiler.passes.fuse import Fusion
from nanoflow_compiler.passes.grouping import is_view
from nanoflow_compiler.passes.rotations import Rotation, rotation_of

__all__ = ["rotary_append"]

aten = torch.ops.aten

Serves = Callable[[torch.Tensor, torch.Tensor], bool]


class _Miss(Exception):  # noqa: N818 - a reason, never an error of the caller
    """Why an attention stays as it is."""


@dataclass(frozen=True, slots=True)
class _Rotated:
    """A rotation, and the views between it and who reads its rows ``[tokens, heads, dim]``."""

    rotation: Rotation
    views: tuple[fx.Node, ...]

    @property
    def spelling(self) -> list[tuple[Any, ...]]:
        """Equal for views that do the same."""
        return [(node.target, *node.args[1:]) for node in self.views]


@dataclass(slots=True)
class _Tables:
    """Cosines and sines as rows, by the node that they come from and how."""

    rows: dict[Any, fx.Node] = field(default_factory=dict)


def rotary_append(module: fx.GraphModule, *, serves: Serves) -> fx.GraphModule:
    """Fuse where ``serves`` agrees; see the module's contract."""
    tables = _Tables()
    fusions: list[Fusion] = []
    misses: list[str] = []
    for node in list(call_nodes(module)):
        if overload(node) is not getattr(torch.ops.nanoflow, "paged_attention", None):
            continue
        try:
            fusions.append(_fuse(node, tables, serves))
        except _Miss as miss:
            misses.append(f"{node.name}: {miss}")
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.meta["fusions"] = [*module.meta.get("fusions", ()), *fusions]
    module.meta["notes"] = [*map(str, fusions), *(f"not fused, {miss}" for miss in misses)]
    module.recompile()
    return module


def _fuse(attention: fx.Node, tables: _Tables, serves: Serves) -> Fusion:
    append = operand(attention, 1)
    if overload(append) is not getattr(torch.ops.nanoflow, "kv_append", None):
        raise _Miss("it does not read what an append made")
    key, value, layer, part = append.args
    assert isinstance(value, fx.Node)
    turned = [_rotated(operand(attention, 0), "queries"), _rotated(key, "keys")]
    query, keys = turned
    _check(query, keys, value, append)
    if not serves(_fake(append, 0), _fake(append, 1)):
        raise _Miss("no kernel rotates into its pages")
    graph = attention.graph
    with graph.inserting_before(attention):
        rows = [_rows(each) for each in turned]
        angles = [_angles(node, query, tables) for node in (query.rotation.cos, query.rotation.sin)]
        arguments = (*rows, _direct(value), *angles, layer, part)
        made = insert_call(graph, fused_ops.rotary_append, *arguments, like=append)
        rotated = insert_call(graph, operator.getitem, made, 0, like=append)
        handle = insert_call(graph, operator.getitem, made, 1, like=append)
    if shape_of(rotated) != shape_of(operand(attention, 0)):
        raise _Miss("the rotated queries have another shape")
    attention.update_arg(0, rotated)
    attention.update_arg(1, handle)
    names = (query.rotation.nodes[-1].name, keys.rotation.nodes[-1].name, append.name)
    return Fusion("rotary_append", names, made.name)


def _fake(node: fx.Node, index: int) -> torch.Tensor:
    value: torch.Tensor = operand(node, index).meta["val"]
    return value


def _rotated(node: Any, what: str) -> _Rotated:
    """The rotation that ``node`` is a view of."""
    views: list[fx.Node] = []
    while overload(node) in (aten.select, aten.transpose):
        views.append(node)
        node = operand(node, 0)
    rotation = rotation_of(node)
    if rotation is None:
        raise _Miss(f"its {what} are not rotated as one of the known patterns does")
    _check_views(views, what)
    inner = [*rotation.nodes, *views]
    if any(len(each.users) != 1 for each in inner if not _is_shared(each, rotation)):
        raise _Miss(f"its rotated {what} have other readers")
    return _Rotated(rotation, tuple(reversed(views)))


def _is_shared(node: fx.Node, rotation: Rotation) -> bool:
    """Halves and slices that several nodes of the rotation read; no one else may."""
    return is_view(node) and set(node.users) <= set(rotation.nodes)


def _check_views(views: list[fx.Node], what: str) -> None:
    """They may move heads and tokens, and drop what has one entry, but not touch the rotated entries."""
    for node in views:
        source = operand(node, 0)
        rank = len(shape_of(source))
        dims = node.args[1:2] if overload(node) is aten.select else node.args[1:3]
        if any(dim % rank == rank - 1 for dim in dims):  # type: ignore[operator]
            raise _Miss(f"its rotated {what} are turned round")
        if overload(node) is aten.select and shape_of(source)[dims[0]] != 1:  # type: ignore[index]
            raise _Miss(f"it reads some of its rotated {what}")


def _check(query: _Rotated, key: _Rotated, value: fx.Node, append: fx.Node) -> None:
    ours, other = query.rotation, key.rotation
    if len(append.users) != 1:
        raise _Miss("its append has other readers")
    if (ours.cos, ours.sin, ours.width) != (other.cos, other.sin, other.width):
        raise _Miss("queries and keys are rotated by different angles")
    if query.spelling != key.spelling or ours.in_halves != other.in_halves:
        raise _Miss("queries and keys are rotated in different ways")
    used = (ours.x, ours.cos, ours.sin, ours.nodes[-1], other.x, other.nodes[-1], value)
    if len({node.meta["val"].dtype for node in used}) > 1:
        raise _Miss("its types differ")


def _rows(turned: _Rotated) -> fx.Node:
    """What is rotated, as ``[tokens, heads, dim]``."""
    return _direct(_viewed(turned.rotation.x, turned))


def _viewed(node: fx.Node, like: _Rotated) -> fx.Node:
    for view in like.views:
        node = insert_call(node.graph, view.target, node, *view.args[1:], like=view)
    return node


def _direct(node: fx.Node) -> fx.Node:
    """One reshape in place of a chain of views, where it is the same view of the same memory."""
    inner = shape_of(node)[1:]
    if not all(size.is_Integer for size in inner):
        return node
    source, sizes = node, [-1, *map(int, inner)]
    while is_view(source) and source.target is not operator.getitem:
        source = operand(source, 0)
        arguments = (source, sizes)
        if len(shape_of(source)) != 2 or source.op == "placeholder":
            continue
        other = fake_call(aten.reshape.default, arguments, {})
        if _place(other) == _place(node.meta["val"]):
            return insert_call(node.graph, aten.reshape.default, *arguments, like=node)
    return node


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    sizes = (*value.shape, *value.stride(), value.storage_offset())
    return tuple(sympy.expand(size_expr(size)) for size in sizes)


def _angles(node: fx.Node, turned: _Rotated, tables: _Tables) -> fx.Node:
    """Cosines or sines as rows: those of a token are all that its heads share."""
    key = (node, str(turned.spelling), turned.rotation.in_halves)
    if key not in tables.rows:
        tables.rows[key] = _new_angles(node, turned)
    return tables.rows[key]


def _new_angles(node: fx.Node, turned: _Rotated) -> fx.Node:
    if len(shape_of(node)) != len(shape_of(turned.rotation.x)):
        raise _Miss("its angles have another rank than what they rotate")
    rows = node
    for view in turned.views:
        dim: Any = view.args[1]
        if overload(view) is aten.select and shape_of(rows)[dim] != 1:
            raise _Miss("its angles differ between what it reads")
        rows = insert_call(node.graph, view.target, rows, *view.args[1:], like=view)
    width = turned.rotation.width // (2 if turned.rotation.in_halves else 1)
    heads, last = shape_of(rows)[1:]
    if heads != 1 or last != width:
        raise _Miss("its angles differ between heads")
    rows = insert_call(node.graph, aten.select.int, rows, 1, 0, like=node)
    if turned.rotation.in_halves:
        rows = insert_call(node.graph, aten.cat.default, [rows, rows], -1, like=node)
    return rows
