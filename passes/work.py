"""FLOPs and bytes of an operation, as linear functions of its tokens."""

import operator
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import dtype_name, numel, operand, overload, size_hint
from nanoflow_compiler.ir import OpKind, Work
from nanoflow_compiler.passes.grouping import Group, is_view

__all__ = ["work_of"]

aten = torch.ops.aten


def work_of(
    group: Group,
    *,
    aligned: Iterable[fx.Node],
    whole: Iterable[fx.Node],
    written: Iterable[fx.Node],
    tokens: int,
    kv_tokens: int,
) -> Work:
    """What a group computes and moves.

    Each tensor that it reads (``aligned`` with its tokens, or ``whole``) or writes counts once.
    Attention on the paged cache also reads ``kv_tokens`` tokens of context for each token.
    """
    fixed = float(sum(map(_nbytes, whole)))
    moved = float(sum(map(_nbytes, [*aligned, *written])))
    flops = float(sum(map(_flops, group.nodes)))
    node = group.nodes[0]
    dtype = _dtype(node)
    if group.kind is OpKind.VIEW or group.kind is OpKind.SIZES:
        return Work(dtype=dtype)
    if not group.splits:
        return Work(flops_fixed=flops, bytes_fixed=fixed + moved, dtype=dtype)
    if _is_paged(node):
        flops += 4.0 * tokens * kv_tokens * _heads_times_width(node)
        moved += float(tokens * kv_tokens * _kv_bytes_per_token(node))
    link = moved if group.kind is OpKind.COLLECTIVE else 0.0
    return Work(
        flops_per_token=flops / tokens,
        bytes_fixed=fixed,
        bytes_per_token=moved / tokens,
        link_bytes_per_token=link / tokens,
        dtype=dtype,
    )


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return numel(value) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _dtype(node: fx.Node) -> str:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return dtype_name(tensors[0].dtype) if tensors else "float32"


def _hints(node: Any) -> list[int]:
    return [size_hint(size) for size in node.meta["val"].shape]


def _flops(node: fx.Node) -> float:
    """Multiply-adds count twice; a pointwise element counts once; a view computes nothing."""
    packet = overload(node)
    if is_view(node) or _is_paged(node):  # whose context is counted apart
        return 0.0
    if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, *_ours("linear_add")):
        return _product_flops(node, left=node.args[-2])
    if packet in _ours("linear", "gated_linear"):
        return _product_flops(node, left=node.args[0], right=node.args[1])
    if "scaled_dot_product" in getattr(packet, "__name__", ""):
        query, key = _hints(node.args[0]), _hints(node.args[1])
        return 4.0 * prod(query) * key[-2]
    if packet is getattr(torch.ops.nanoflow, "moe_experts", None):
        return _expert_flops(node)
    value = node.meta.get("val")
    return float(numel(value)) if isinstance(value, torch.Tensor) else 0.0


def _ours(*names: str) -> list[Any]:
    return [getattr(torch.ops.nanoflow, name, None) for name in names]


def _product_flops(node: fx.Node, *, left: Any, right: Any = None) -> float:
    """Of ``left @ right``, where the columns are those of the result unless ``right`` is given."""
    return 2.0 * prod(_hints(left)) * _hints(right or node)[-1]


def _expert_flops(node: fx.Node) -> float:
    """Each token passes through its ``top_k`` experts' weight matrices."""
    chosen = prod(_hints(node.args[1]))
    matrices = [arg for arg in node.args[3:] if isinstance(arg, fx.Node) and len(_hints(arg)) == 3]
    return sum(2.0 * chosen * prod(_hints(matrix)[1:]) for matrix in matrices)


def _is_paged(node: fx.Node) -> bool:
    return overload(node) is getattr(torch.ops.nanoflow, "paged_attention", None)


def _heads_times_width(node: fx.Node) -> int:
    _, heads, width = _hints(node.args[0])
    return heads * width


def _kv_bytes_per_token(node: fx.Node) -> int:
    append = node.args[1]
    assert isinstance(append, fx.Node)
    if overload(append) is operator.getitem:  # of rotary_append, which begins with the queries
        tensors = operand(append, 0).args[1:3]
    else:
        tensors = append.args[:2]
    return sum(
        prod(_hints(arg)[1:]) * arg.meta["val"].element_size()
        for arg in tensors
        if isinstance(arg, fx.Node)
    )
