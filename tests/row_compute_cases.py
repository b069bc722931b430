"""For each TOKEN rule of operations that compute: random calls, to be placed or to be refused."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from row_draw import Draw, case, rank
from rows_of_nodes import Case, Operand

aten = torch.ops.aten


# Of many operators one overload stands for all: the rule never looks at which it is.


@case("clone contiguous alias detach lift_fresh_copy zeros_like ones_like")
def _copies(d: Draw, packet: Any) -> Case:
    return d.case(packet.default, d.tensor())


@case("_to_copy")
def _cast(d: Draw, packet: Any) -> Case:
    return d.case(packet.default, d.tensor(), dtype=torch.float32)


@case("full_like")
def _full(d: Draw, packet: Any) -> Case:
    return d.case(packet.default, d.tensor(), 1.5)


def _reduced(d: Draw, x: Operand, *, several: bool) -> tuple[list[int], bool]:
    """Dimensions to reduce, none meaning all, and whether the tokens are among them."""
    found = sorted(d.draw(st.sets(st.integers(0, rank(x) - 1), max_size=rank(x) if several else 1)))
    dims = found if several or found else [0]
    return [d.sign(dim, rank(x)) for dim in dims], not dims or x.dim in dims


@case("sum mean amax amin logsumexp linalg_vector_norm std var var_mean any all")
def _reduce_several(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    dims, mixes = _reduced(d, x, several=True)
    keep = d.chance()
    if packet in (aten.any, aten.all):
        mixes = mixes or not dims
        return d.case(packet.dims, x, dims, keep, mixes=mixes)
    if packet in (aten.std, aten.var, aten.var_mean):
        return d.case(packet.correction, x, dims or None, correction=0, keepdim=keep, mixes=mixes)
    if packet is aten.linalg_vector_norm:
        return d.case(packet.default, x, d.of([1, 2]), dims or None, keep, mixes=mixes)
    if packet is aten.logsumexp:
        dims, mixes = dims or [x.dim], mixes
    overload = {aten.sum: "dim_IntList", aten.mean: "dim"}.get(packet, "default")
    return d.case(getattr(packet, overload), x, dims, keep, mixes=mixes)


@case("argmax argmin prod max min")
def _reduce_one(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    (dim,), mixes = _reduced(d, x, several=False)
    if d.number(0, 5) == 0:
        return d.case(packet.default, x, mixes=True)
    overload = {aten.prod: "dim_int", aten.max: "dim", aten.min: "dim"}.get(packet, "default")
    return d.case(getattr(packet, overload), x, dim, d.chance(), mixes=mixes)


@case("_softmax _log_softmax softmax log_softmax cumsum cumprod _safe_softmax topk sort")
def _along_one(d: Draw, packet: Any) -> Case:
    x = d.tensor()
    dim = d.number(0, rank(x) - 1)
    mixes = dim == x.dim
    signed = d.sign(dim, rank(x))
    if packet in (aten._softmax, aten._log_softmax):
        return d.case(packet.default, x, signed, False, mixes=mixes)
    if packet is aten.topk:
        return d.case(packet.default, x, d.number(1, x.value.shape[dim]), signed, mixes=mixes)
    if packet is aten.sort and d.chance():
        return d.case(packet.stable, x, stable=True, dim=signed, mixes=mixes)
    overload = "int" if packet in (aten.softmax, aten.log_softmax) else "default"
    return d.case(getattr(packet, overload), x, signed, mixes=mixes)


@case("native_layer_norm _fused_rms_norm")
def _norm(d: Draw, packet: Any) -> Case:
    x = d.tensor(low=2)
    count = d.number(1, rank(x) - 1)
    shape = list(x.value.shape[-count:])
    weight = Operand(d.floats(shape)) if d.chance() else None
    mixes = x.dim is not None and x.dim >= rank(x) - count
    rest = (weight, weight, 1e-5) if packet is aten.native_layer_norm else (weight, 1e-5)
    return d.case(packet.default, x, shape, *rest, mixes=mixes)


def _factors(d: Draw, batch: list[int]) -> tuple[Operand, Operand, bool]:
    """Two factors with the tokens in a batch dimension, in either's free one, or in the sum."""
    m, k, n = d.sizes(3)
    place = d.of(["left", "right", "sum", "both", *(["batch"] if batch else [])])
    left, right = [*batch, m, k], [*batch, k, n]
    at = len(batch)
    multiple = d.multiple()
    if place == "left":
        return d.rows(left, at, multiple), Operand(d.floats(right)), False
    if place == "right":
        return Operand(d.floats(left)), d.rows(right, at + 1, multiple), False
    if place == "sum":
        a = d.rows(left, at + 1, multiple)
        right[at] = a.value.shape[at + 1]
        return a, d.rows(right, at, multiple, is_seed=d.chance()), True
    if place == "both":
        return d.rows(left, at), d.rows(right, at + 1), True
    a, b = d.rows(left, 0, multiple), d.rows(right, 0, multiple, is_seed=d.chance())
    if d.chance():
        return a, b, False
    return replace(a, is_seed=False), replace(b, is_seed=True), False


@case("mm bmm")
def _product(d: Draw, packet: Any) -> Case:
    left, right, mixes = _factors(d, d.sizes(1) if packet is aten.bmm else [])
    return d.case(packet.default, left, right, mixes=mixes)


@case("addmm baddbmm")
def _product_and_bias(d: Draw, packet: Any) -> Case:
    left, right, mixes = _factors(d, d.sizes(1) if packet is aten.baddbmm else [])
    out = [*left.value.shape[:-1], right.value.shape[-1]]
    if mixes:
        return d.case(packet.default, Operand(d.floats([1])), left, right, mixes=True)
    dims = _row_dims(left, right)
    bias = d.floats([1 if d.chance() else size for size in out][d.number(0, len(out) - 1) :])
    shift = len(out) - bias.ndim
    at = dims - shift
    lines_up = at >= 0 and bias.shape[at] != 1
    given = Operand(bias, at, (left if left.dim is not None else right).multiple, is_seed=False)
    return d.case(packet.default, given if lines_up else Operand(bias), left, right, mixes=mixes)


def _row_dims(left: Operand, right: Operand) -> int:
    found = left.dim if left.dim is not None else right.dim
    assert found is not None
    return found


@case(
    "scaled_dot_product_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_flash_attention_for_cpu"
)
def _attention(d: Draw, packet: Any) -> Case:
    heads, length, keys, width = d.number(1, 3), d.number(1, 4), d.number(1, 4), d.number(1, 4)
    dim = d.of([0, 0, 0, 2])
    if dim == 2:
        length = keys = d.tokens
    multiple = d.multiple() if dim == 0 else 1
    shapes = [[2, heads, length, width], [2, heads, keys, width], [2, heads, keys, width]]
    query, key, value = (d.rows(shape, dim, multiple) for shape in shapes)
    settings: dict[str, Any] = {}
    if d.chance():
        batch = query.value.shape[0]
        shape = d.of(
            [
                [batch, 1, length, keys],
                [batch, heads, length, keys],
                [1, 1, length, keys],
                [length, keys],
            ]
        )
        cut_too = len(shape) == 4 and shape[0] != 1 and dim == 0
        mask = Operand(d.floats(shape), 0 if cut_too else None, multiple, is_seed=d.chance())
        positional = packet is not aten._scaled_dot_product_flash_attention_for_cpu
        if positional:
            return d.case(packet.default, query, key, value, mask, mixes=dim == 2)
        dropout = (0.0, False) if d.chance() else ()
        return d.case(packet.default, query, key, value, *dropout, attn_mask=mask, mixes=dim == 2)
    if d.chance():
        settings["scale"] = 0.5
    return d.case(packet.default, query, key, value, mixes=dim == 2, **settings)


@case("convolution")
def _convolution(d: Draw, packet: Any) -> Case:
    channels, length = d.number(1, 3), d.number(3, 6)
    dim = d.of([0, 0, 2])
    shape = [2, channels, length]
    x = d.rows(shape, dim, d.multiple() if dim == 0 else 2)
    weight = Operand(d.floats([d.number(1, 3), channels, d.number(1, 3)]))
    rest = (None, [1], [2], [1], False, [0], 1)
    return d.case(packet.default, x, weight, *rest, mixes=dim == 2)
