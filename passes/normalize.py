"""normalize: fx -> fx. One spelling per operation, and nothing that does no work.

Consumes the ATen graph of an inference capture (no decompositions), functional but for writes to
its own inputs. Guarantees: no aliases, identity casts, identity products or empty pieces of
``cat``; ``view`` for every reshape that only renames sizes; products over one element as
multiplications; constructors that read no tensor; common subexpressions once; packed attention
as append and attend; an indexed write to an input that ends in a copy to it, done in place.

Must not change what any output is, bit for bit (but for the sign of a zero where a product over
one element becomes a multiplication), nor whose memory it is, nor the order of writes to inputs.
Belongs first.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import (
    call_nodes,
    has_effect,
    insert_call,
    is_tensor,
    operand,
    operands,
    overload,
    shape_of,
    strides_of,
)

__all__ = ["normalize"]

aten = torch.ops.aten

Rewrite = Callable[[fx.Node], fx.Node | None]


def normalize(module: fx.GraphModule) -> fx.GraphModule:
    """Apply the rewrites in order of the graph, then remove duplicates and dead nodes."""
    register_attention()
    kept = returned_memory(module)
    for node in list(call_nodes(module)):
        if overload(node) is aten.cat:  # also where it is returned: what is left is no alias
            _drop_empty_pieces(node)
        rewrite = _REWRITES.get(overload(node))
        replacement = rewrite(node) if rewrite and node not in kept else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
    _write_in_place(module, kept)
    _remove_duplicates(module, kept)
    module.graph.eliminate_dead_code(is_impure_node=has_effect)
    module.recompile()
    return module


def returned_memory(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes whose memory callers receive, perhaps through views: copies there are theirs."""
    found: set[fx.Node] = set()
    pending = list(module.graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes if _may_share_memory(node) else ())
    return found


def _may_share_memory(node: fx.Node) -> bool:
    """Whether what a node returns may lie in the memory of an operand, as its schema says."""
    if node.target is operator.getitem or overload(node) is aten._unsafe_view:
        return True
    target = node.target
    returns = target._schema.returns if isinstance(target, torch._ops.OpOverload) else ()
    return any(item.alias_info is not None for item in returns)


def _same_type_and_shape(node: fx.Node, source: fx.Node) -> bool:
    if not (is_tensor(node) and is_tensor(source)):
        return False
    new, old = node.meta["val"], source.meta["val"]
    alike = (new.dtype, new.device, new.layout) == (old.dtype, old.device, old.layout)
    return alike and shape_of(node) == shape_of(source)


def _identity(node: fx.Node) -> fx.Node | None:
    return operand(node, 0)


def _copy(node: fx.Node) -> fx.Node | None:
    """A copy in a functional graph matters only where it changes type, device or layout."""
    source = operand(node, 0)
    if node.kwargs.get("memory_format") not in (None, torch.preserve_format) and (
        strides_of(node) != strides_of(source)
    ):
        return None
    return source if _same_type_and_shape(node, source) else None


def _one_spelling_of_view(node: fx.Node) -> fx.Node | None:
    source = operand(node, 0)
    if _same_type_and_shape(node, source):
        return source
    if node.target is not aten.view.dtype:
        node.target = aten.reshape.default
    return None


def _no_op_shape(node: fx.Node) -> fx.Node | None:
    source = operand(node, 0)
    return source if _same_type_and_shape(node, source) else None


def _one_spelling_of_transpose(node: fx.Node) -> fx.Node | None:
    """``fuse`` looks for ``t``, whichever of its names a model used for its weights."""
    source = operand(node, 0)
    dims: Any = node.args[1] if overload(node) is aten.permute else node.args[1:]
    if len(shape_of(source)) == 2 and sorted(dim % 2 for dim in dims) == [0, 1]:
        if overload(node) is aten.permute and [dim % 2 for dim in dims] == [0, 1]:
            return source
        node.target, node.args = aten.t.default, (source,)
    return None


def _squeeze(node: fx.Node) -> fx.Node | None:
    """Drop the dimensions that the trace saw as one for any number of tokens, also for one token."""
    source = operand(node, 0)
    rank = len(shape_of(source))
    if rank == 0:
        return source
    asked: Any = node.args[1] if len(node.args) > 1 else range(rank)
    dims = [dim % rank for dim in ([asked] if isinstance(asked, int) else asked)]
    ones = [dim for dim in dims if shape_of(source)[dim] == 1]
    if not ones:
        return source
    node.target, node.args = aten.squeeze.dims, (source, ones)
    return None


def _overwritten(node: fx.Node) -> fx.Node | None:
    """``copy(x, y)``, an assignment made functional, is ``y`` where that has the type and shape."""
    source = operand(node, 1)
    return source if _same_type_and_shape(node, source) else None


def _assembled(node: fx.Node) -> fx.Node | None:
    """Slices that fill an empty tensor along one dimension are the pieces of a ``cat``."""
    dim = _scatter_range(node)[0]
    pieces: dict[tuple[int, int], fx.Node] = {}
    base = node
    while overload(base) is aten.slice_scatter and _scatter_range(base)[0] == dim:
        _, start, end = _scatter_range(base)
        pieces.setdefault((start, end), operand(base, 1))  # the last write, seen first, counts
        base = operand(base, 0)
    ranges = sorted(pieces)
    edges = [0, *(end for _, end in ranges)]
    full = edges[-1] == shape_of(node)[dim] and [start for start, _ in ranges] == edges[:-1]
    if overload(base) not in (aten.new_empty, aten.empty) or not full:
        return None
    with node.graph.inserting_before(node):
        ordered = [pieces[each] for each in ranges]
        return insert_call(node.graph, aten.cat.default, ordered, dim, like=node)


def _scatter_range(node: fx.Node) -> tuple[int, int, int]:
    """Dimension, start and end of a ``slice_scatter``; -1 and -1 for what is no plain range."""
    given: list[Any] = [*node.args[2:]]
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    size = shape_of(node)[dim]
    begin, stop = start or 0, size if end is None else end
    numbers = all(isinstance(each, int) for each in (begin, end or 0))
    if not numbers or not size.is_Integer or begin < 0 or stop < 0 or step != 1:
        return dim, -1, -1
    return dim, begin, min(int(stop), int(size))


def _times_one(node: fx.Node) -> fx.Node | None:
    """``x * 1.0`` is ``x``, also for NaN, infinities and signed zeros."""
    source, factor = node.args[0], node.args[1]
    neutral = isinstance(factor, int | float) and factor == 1
    if neutral and isinstance(source, fx.Node) and _same_type_and_shape(node, source):
        return source
    return None


def _plus_zero(node: fx.Node) -> fx.Node | None:
    """Integers only: for floats ``-0.0 + 0`` is ``0.0``."""
    source, term = node.args[0], node.args[1]
    neutral = isinstance(term, int) and term == 0
    if not neutral or not isinstance(source, fx.Node) or not _same_type_and_shape(node, source):
        return None
    value = node.meta["val"]
    return None if value.is_floating_point() or value.is_complex() else source


def _drop_empty_pieces(node: fx.Node) -> None:
    """A fresh ``DynamicCache`` begins as an empty tensor, joined to the first keys: a copy of those."""
    pieces = [piece for piece in operands(node, 0) if shape_of(piece) != (0,)]
    if not pieces or any(piece.meta["val"].dtype != node.meta["val"].dtype for piece in pieces):
        return
    if len(pieces) > 1:
        node.update_arg(0, pieces)
        return
    node.target, node.args = aten.clone.default, (pieces[0],)
    node.kwargs = {"memory_format": torch.contiguous_format}


def _product_of_one(node: fx.Node) -> fx.Node | None:
    """Rotary frequencies are a batched product over one element: a multiplication."""
    left, right = operand(node, 0), operand(node, 1)
    if shape_of(left)[2] != 1 or left.meta["val"].dtype != torch.float32:
        return None
    with node.graph.inserting_before(node):
        return insert_call(node.graph, aten.mul.Tensor, left, right, like=node)


_FULL = {"new_ones": 1, "new_zeros": 0}


def _constructor(node: fx.Node) -> fx.Node | None:
    """``x.new_ones(...)`` reads only the type and device of ``x``."""
    name = overload(node).__name__
    value = node.args[2] if name == "new_full" else _FULL[name]
    result = node.meta["val"]
    kwargs = {"dtype": result.dtype, "device": result.device}
    with node.graph.inserting_before(node):
        return insert_call(node.graph, aten.full.default, node.args[1], value, like=node, **kwargs)


def _split_attention(node: fx.Node) -> fx.Node | None:
    """Append and attend become two nodes, so that parts can be ordered by what they append."""
    query, key, value, layer, *rest = node.args
    part = rest[-1]
    assert isinstance(value, fx.Node)
    ours = torch.ops.nanoflow
    with node.graph.inserting_before(node):
        handle = insert_call(node.graph, ours.kv_append.default, key, value, layer, part, like=node)
        width = value.meta["val"].shape[-1]
        arguments = (query, handle, layer, int(width), *rest)
        return insert_call(node.graph, ours.paged_attention.default, *arguments, like=node)


_REWRITES: dict[Any, Rewrite] = {
    aten.alias: _identity,
    aten.detach: _identity,
    aten.lift_fresh_copy: _identity,
    aten.clone: _copy,
    aten._to_copy: _copy,
    aten.view: _one_spelling_of_view,
    aten._unsafe_view: _one_spelling_of_view,
    aten.reshape: _one_spelling_of_view,
    aten.expand: _no_op_shape,
    aten.slice: _no_op_shape,
    aten.squeeze: _squeeze,
    aten.permute: _one_spelling_of_transpose,
    aten.transpose: _one_spelling_of_transpose,
    aten.mul: _times_one,
    aten.add: _plus_zero,
    aten.copy: _overwritten,
    aten.slice_scatter: _assembled,
    aten.bmm: _product_of_one,
    aten.new_ones: _constructor,
    aten.new_zeros: _constructor,
    aten.new_full: _constructor,
}


def register_attention() -> None:
    """Add the rewrite of our packed attention, once the operation is defined."""
    if hasattr(torch.ops.nanoflow, "attention"):
        _REWRITES[torch.ops.nanoflow.attention] = _split_attention


_IN_PLACE: dict[object, torch._ops.OpOverload] = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.index_put.default: aten.index_put_.default,
}


def _write_in_place(module: fx.GraphModule, kept: set[fx.Node]) -> None:
    """``y = index_copy(x, ...); x.copy_(y)`` is ``y = x.index_copy_(...)`` if no one else reads x."""
    for copy in list(call_nodes(module)):
        if copy.target is not aten.copy_.default:
            continue
        target, write = operand(copy, 0), operand(copy, 1)
        in_place = _IN_PLACE.get(write.target)
        alone = write.args[0] is target and set(target.users) == {write, copy}
        if in_place is None or not alone or write in kept:
            continue
        write.target = in_place
        copy.replace_all_uses_with(write)
        module.graph.erase_node(copy)


def _remove_duplicates(module: fx.GraphModule, kept: set[fx.Node]) -> None:
    """Common subexpressions of functional, deterministic nodes; two outputs stay two tensors."""
    seen: dict[Any, fx.Node] = {}
    for node in list(call_nodes(module)):
        if not _is_pure(node) or node in kept:
            continue
        key = _key(node)
        if (first := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    if target.namespace != "aten" or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _key(node: fx.Node) -> Any:
    """Equal for nodes that compute the same: constants by type too, since ``1 == 1.0 == True``."""

    def frozen(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return tuple(map(frozen, item))
        return item if isinstance(item, fx.Node) else (type(item), repr(item))

    kwargs = tuple((name, frozen(value)) for name, value in sorted(node.kwargs.items()))
    return node.target, frozen(node.args), kwargs
