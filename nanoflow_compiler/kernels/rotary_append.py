"""Rotates queries and keys by their positions, and stores keys and values in pages: one launch.

A thread block has some query heads of a token, or some KV heads: their keys and values. Products are
rounded to the dtype before they are added, which is what a model computes that runs in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pdl import launch, take_turn
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages

__all__ = ["Rotary", "can_rotate", "rotate_and_append"]

_HEADS = 8
_HEADS_PER_WARP = 4


@dataclass(frozen=True, slots=True)
class Rotary:
    """By how much the tokens of a step are rotated: ``[T, rotary dim]``, both halves the same angles.

    Dimensions of a head beyond the rotary ones stay as they are.
    """

    cos: Tensor
    sin: Tensor

    def fits(self, query: Tensor) -> bool:
        """Whether it may rotate ``query [T, heads, dim]``."""
        is_even = self.cos.shape[-1] % 2 == 0 and self.cos.shape[-1] <= query.shape[-1]
        return is_even and all(
            table.ndim == 2
            and len(table) == len(query)
            and table.dtype is query.dtype
            and table.stride(1) == 1
            for table in (self.cos, self.sin)
        )


def can_rotate(query: Tensor, key: Tensor, value: Tensor, *, rotary: Rotary) -> bool:
    """Whether these are ``[T, heads, dim]`` with dense heads, one beside the other or not, of one dtype."""
    is_dense = all(rows.ndim == 3 and rows.stride(2) == 1 for rows in (query, key, value))
    is_same = query.dtype is key.dtype is value.dtype and query.shape[2] == key.shape[2]
    is_known = query.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return is_dense and is_same and is_known and rotary.fits(query)


def rotate_and_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    rotary: Rotary,
    pages: HeadPages,
    slots: Tensor,
    out: Tensor | None = None,
    block: int = _HEADS,
    pdl: bool = False,
) -> Tensor:
    """The rotated ``query [T, heads, dim]``; keys and values go to ``slots [T]`` of the pages.

    ``block`` are the heads of a thread block, a power of 2.
    """
    out = query.new_empty(query.shape) if out is None else out
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    dim, v_dim, rotary_dim = query.shape[2], value.shape[2], rotary.cos.shape[1]
    groups = triton.cdiv(num_heads, block)
    sizes: dict[str, Any] = {
        "HALF": rotary_dim // 2,
        "HALF_WIDTH": triton.next_power_of_2(rotary_dim // 2),
        "REST": dim - rotary_dim,
        "REST_WIDTH": triton.next_power_of_2(max(dim - rotary_dim, 1)),
        "V_DIM": v_dim,
        "V_WIDTH": triton.next_power_of_2(v_dim),
        "HEADS": block,
        "PAGE": BLOCK_SIZE,
        "num_warps": max(1, block // _HEADS_PER_WARP),
        # A product and a sum in one operation would not round the product.
        "enable_fp_fusion": False,
    }
    launch(_rotate, (len(query), groups + triton.cdiv(num_kv_heads, block)), pdl=pdl)(
        query,
        *query.stride()[:2],
        num_heads,
        groups,
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        num_kv_heads,
        rotary.cos,
        rotary.cos.stride(0),
        rotary.sin,
        rotary.sin.stride(0),
        slots,
        pages.keys,
        pages.values,
        out,
        *out.stride()[:2],
        **sizes,
    )
    return out


@jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@jit
def _rotate_heads(
    from_ptr,
    to_ptr,
    from_places,
    to_places,
    is_head,
    cos_ptr,
    sin_ptr,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
):
    """Places are ``[HEADS, 1]``, of the first dimension of each head."""
    dtype: tl.constexpr = from_ptr.dtype.element_ty
    dims = tl.arange(0, HALF_WIDTH)
    is_dim = dims < HALF
    low_cos = tl.load(cos_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos_ptr + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin_ptr + HALF + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    is_there = is_head & is_dim[None, :]
    from_ptrs = from_ptr + from_places + dims[None, :]
    low = tl.load(from_ptrs, mask=is_there, other=0.0).to(tl.float32)
    high = tl.load(from_ptrs + HALF, mask=is_there, other=0.0).to(tl.float32)
    new_low = _rounded(low * low_cos, dtype) - _rounded(high * low_sin, dtype)
    new_high = _rounded(high * high_cos, dtype) + _rounded(low * high_sin, dtype)
    to_ptrs = to_ptr + to_places + dims[None, :]
    tl.store(to_ptrs, new_low.to(dtype), mask=is_there)
    tl.store(to_ptrs + HALF, new_high.to(dtype), mask=is_there)
    if REST:
        rest = 2 * HALF + tl.arange(0, REST_WIDTH)
        is_rest = is_head & (rest < 2 * HALF + REST)[None, :]
        same = tl.load(from_ptr + from_places + rest[None, :], mask=is_rest, other=0.0)
        tl.store(to_ptr + to_places + rest[None, :], same, mask=is_rest)


@jit
def _rotate(
    query_ptr,
    query_row_stride,
    query_head_stride,
    num_heads,
    num_groups,
    key_ptr,
    key_row_stride,
    key_head_stride,
    value_ptr,
    value_row_stride,
    value_head_stride,
    num_kv_heads,
    cos_ptr,
    cos_row_stride,
    sin_ptr,
    sin_row_stride,
    slots_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    out_row_stride,
    out_head_stride,
    HALF: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    REST: tl.constexpr,
    REST_WIDTH: tl.constexpr,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    take_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    cos_ptr += row * cos_row_stride
    sin_ptr += row * sin_row_stride
    if group < num_groups:
        heads = (group * HEADS + tl.arange(0, HEADS))[:, None]
        _rotate_heads(
            query_ptr,
            out_ptr,
            row * query_row_stride + heads * query_head_stride,
            row * out_row_stride + heads * out_head_stride,
            heads < num_heads,
            cos_ptr,
            sin_ptr,
            HALF,
            HALF_WIDTH,
            REST,
            REST_WIDTH,
        )
    else:
        heads = ((group - num_groups) * HEADS + tl.arange(0, HEADS))[:, None]
        is_head = heads < num_kv_heads
        slot = tl.load(slots_ptr + row).to(tl.int64)
        # Pages are [heads, PAGE, dim].
        places = (slot // PAGE * num_kv_heads + heads) * PAGE + slot % PAGE
        v_dims = tl.arange(0, V_WIDTH)[None, :]
        is_value = is_head & (v_dims < V_DIM)
        value_ptrs = value_ptr + row * value_row_stride + heads * value_head_stride + v_dims
        value = tl.load(value_ptrs, mask=is_value, other=0.0)
        tl.store(values_ptr + places * V_DIM + v_dims, value, mask=is_value)
        _rotate_heads(
            key_ptr,
            keys_ptr,
            row * key_row_stride + heads * key_head_stride,
            places * (2 * HALF + REST),
            is_head,
            cos_ptr,
            sin_ptr,
            HALF,
            HALF_WIDTH,
            REST,
            REST_WIDTH,
        )
