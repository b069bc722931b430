"""TOKEN rules of operations that compute: pointwise, reductions, matrix products, attention."""

import operator
from functools import cache
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import is_handle, shape_of
from nanoflow_compiler.passes.axis_rules import (
    RULES,
    Operands,
    Placement,
    Refusal,
    Rule,
    broadcast,
    first_rows,
    output_rank,
    packets,
    positive,
    rank_of,
    rule,
    same_rows,
    value_shape,
)
from nanoflow_compiler.rows import Rows

__all__ = ["is_pointwise", "rule_of"]

aten = torch.ops.aten


@cache
def is_pointwise(packet: object) -> bool:
    """Whether ATen says that it treats every element alike (``torch.Tag.pointwise``).

    Asked of each packet, since there is no list of them: ``dir(torch.ops.aten)`` is of what some
    import has used so far. Where it also draws random numbers, parts would draw others.
    """
    if not isinstance(packet, torch._ops.OpOverloadPacket) or packet.__name__.endswith("_"):
        return False
    tags = {tag for name in packet.overloads() for tag in getattr(packet, name).tags}
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def rule_of(packet: object) -> Rule | None:
    """The rule of an operator packet, if one is known."""
    found = RULES.get(packet)
    return _pointwise if found is None and is_pointwise(packet) else found


def _pointwise(ops: Operands) -> Placement:
    if not isinstance(ops.node.meta["val"], torch.Tensor):
        raise Refusal("makes several tensors")
    operands = [*ops.node.args, *ops.node.kwargs.values()]
    if any(isinstance(operand, list | tuple) for operand in operands):
        raise Refusal("takes a list of tensors")
    return ops.placed(broadcast(ops, operands, output_rank(ops)))


_COPIES = "clone _to_copy contiguous alias detach lift_fresh_copy zeros_like ones_like full_like"
for _packet in packets(_COPIES):
    RULES[_packet] = _pointwise
for _name in ("all_reduce", "wait_tensor"):
    if hasattr(torch.ops._c10d_functional, _name):
        RULES[getattr(torch.ops._c10d_functional, _name)] = _pointwise


@rule(operator.getitem)
def _getitem(ops: Operands) -> Placement:
    source, index = ops.node.args
    assert isinstance(source, fx.Node)
    rows = source.meta["axis"].rows
    if not isinstance(rows, tuple) or not isinstance(index, int):
        raise Refusal("takes an element without tokens")
    if rows[index] is None and not is_handle(ops.node):
        raise Refusal("takes an element without tokens")
    return Placement(rows[index], {source.name: None})


def _dims(dims: Any, rank: int) -> list[int]:
    """A reduction's dimensions; none given means all."""
    if dims is None or dims == []:
        return list(range(rank))
    return [dims] if isinstance(dims, int) else list(dims)


def _reduce(ops: Operands, dims: Any, *, keepdim: bool) -> Placement:
    rows = first_rows(ops)
    rank = rank_of(ops.arg(0))
    gone = {positive(dim, rank) for dim in _dims(dims, rank)}
    if rows.dim in gone:
        raise Refusal("reduces over the tokens")
    ops.read(ops.arg(0), rows)
    shift = 0 if keepdim else sum(dim < rows.dim for dim in gone)
    out = Rows(rows.dim - shift, rows.multiple)
    value = ops.node.meta["val"]
    return ops.placed((out,) * len(value) if isinstance(value, list | tuple) else out)


@rule(*packets("sum mean amax amin any all logsumexp argmax argmin prod max min std var var_mean"))
def _reduction(ops: Operands) -> Placement:
    if isinstance(ops.arg(1), fx.Node):  # max.other and min.other compare two tensors
        return _pointwise(ops)
    return _reduce(ops, ops.named("dim"), keepdim=bool(ops.named("keepdim", False)))


@rule(aten.linalg_vector_norm)
def _vector_norm(ops: Operands) -> Placement:
    return _reduce(ops, ops.named("dim"), keepdim=bool(ops.named("keepdim", False)))


@rule(*packets("_softmax _log_softmax softmax log_softmax cumsum cumprod _safe_softmax topk sort"))
def _along_one(ops: Operands) -> Placement:
    return same_rows(ops, [ops.named("dim", -1)])


@rule(*packets("native_layer_norm _fused_rms_norm"))
def _layer_norm(ops: Operands) -> Placement:
    rows = first_rows(ops)
    if rows.dim >= rank_of(ops.arg(0)) - len(ops.arg(1)):
        raise Refusal("normalizes over the tokens")
    ops.read(ops.arg(0), rows)
    return ops.placed((rows,) * len(ops.node.meta["val"]))


def _product(ops: Operands, left: Any, right: Any) -> Rows:
    """Rows of ``left @ right``: those of left's rows, of right's columns, or of both's batch."""
    a, b = ops.rows(left), ops.rows(right)
    rank = output_rank(ops)
    batch = rank - 2
    if a is not None and a.dim == batch and b is None:
        out = a
    elif b is not None and b.dim == batch + 1 and a is None:
        out = b
    elif {r.dim if r else 0 for r in (a, b)} == {0} and batch == 1:
        out = a or b or Rows(0, rank)
        ops.align(left, out)
        ops.align(right, out)
        return out
    else:
        raise Refusal("multiplies tokens with tokens" if a and b else "sums over the tokens")
    ops.read(left, a)
    ops.read(right, b)
    return out


@rule(*packets("mm bmm"))
def _matmul(ops: Operands) -> Placement:
    return ops.placed(_product(ops, ops.arg(0), ops.arg(1)))


@rule(*packets("addmm baddbmm"))
def _matmul_add(ops: Operands) -> Placement:
    rows = _product(ops, ops.arg(1), ops.arg(2))
    bias = ops.arg(0)
    ops.align(bias, Rows(rows.dim - (output_rank(ops) - rank_of(bias)), rows.multiple))
    return ops.placed(rows)


_SDPA = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "scaled_dot_product_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable"
)


@rule(*packets(_SDPA))
def _attention(ops: Operands) -> Placement:
    """Batch entries are independent; positions within one are not."""
    query, key, value = (ops.arg(index) for index in range(3))
    rows = ops.rows(query)
    if rows is None or rows.dim != 0:
        raise Refusal("attends over the tokens")
    for operand in (query, key, value):
        ops.align(operand, rows)
    if ops.named("dropout_p") or ops.named("dropout_mask") is not None:
        raise Refusal("draws random numbers")
    mask = ops.named("attn_mask") or ops.named("attn_bias")
    if isinstance(mask, fx.Node):
        ops.align(mask, Rows(rank_of(mask) - rank_of(query), rows.multiple))
    return ops.placed(_first_dim_rows(ops, rows))


def _first_dim_rows(ops: Operands, rows: Rows) -> Rows | tuple[Rows | None, ...]:
    """Each tensor of the output that begins with the tokens carries them; random states do not."""
    result = ops.node.meta["val"]
    if isinstance(result, torch.Tensor):
        return rows
    expected = shape_of(ops.arg(0))[0]
    shapes = [value_shape(t) if isinstance(t, torch.Tensor) else () for t in result]
    return tuple(rows if shape and shape[0] == expected else None for shape in shapes)


@rule(*packets("convolution"))
def _convolution(ops: Operands) -> Placement:
    rows = first_rows(ops)
    if rows.dim != 0 or rank_of(ops.arg(0)) != rank_of(ops.arg(1)):
        raise Refusal("convolves over the tokens")
    ops.read(ops.arg(0), rows)
    return ops.placed(rows)


def _packed(count: int) -> Any:
    """Operations on packed tokens: their first ``count`` tensors have the tokens in front."""

    def place(ops: Operands) -> Placement:
        rows = first_rows(ops)
        if rows.dim != 0:
            raise Refusal("the tokens must be the first dimension")
        for index in range(count):
            if isinstance(ops.arg(index), fx.Node):
                ops.align(ops.arg(index), rows)
        value = ops.node.meta["val"]
        if isinstance(value, tuple | list):  # the last is the handle of an append
            return ops.placed((*[rows] * (len(value) - 1), None))
        return ops.placed(rows if value.ndim > 1 else None)

    return place


PACKED_OPERATIONS = {
    "attention": 3,
    "kv_append": 2,
    "paged_attention": 1,
    "moe_experts": 3,
    "linear": 1,
    "linear_add": 2,
    "gated_linear": 1,
    "rms_norm": 1,
    "rotary_append": 5,
}


def register_packed() -> None:
    """Add the rules of our own operations, once they are defined."""
    for name, count in PACKED_OPERATIONS.items():
        if hasattr(torch.ops.nanoflow, name):
            RULES[getattr(torch.ops.nanoflow, name)] = _packed(count)
