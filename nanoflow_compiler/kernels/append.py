"""Stores the keys and values of a step in the pages of a layer: one launch, a thread block for each token."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages

__all__ = ["append_pages"]


def append_pages(key: Tensor, value: Tensor, pages: HeadPages, *, slots: Tensor) -> None:
    """Write ``key [T, KV heads, dim]`` and ``value [T, KV heads, v dim]`` at ``slots [T]``."""
    key, value = _rows(key), _rows(value)
    launcher: Any = _append[(len(slots),)]
    heads, dim, v_dim = key.shape[1], key.shape[2], value.shape[2]
    sizes: dict[str, Any] = {
        "HEADS": heads,
        "HEAD_ROWS": triton.next_power_of_2(heads),
        "DIM": dim,
        "WIDTH": triton.next_power_of_2(dim),
        "V_DIM": v_dim,
        "V_WIDTH": triton.next_power_of_2(v_dim),
    }
    strides = (key.stride(0), key.stride(1), value.stride(0), value.stride(1))
    launcher(key, value, pages.keys, pages.values, slots, *strides, PAGE=BLOCK_SIZE, **sizes)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@jit
def _append(
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    heads = tl.arange(0, HEAD_ROWS)[:, None]
    # Pages are [heads, PAGE, dim].
    places = (slot // PAGE * HEADS + heads) * PAGE + slot % PAGE
    dims = tl.arange(0, WIDTH)[None, :]
    is_key = (heads < HEADS) & (dims < DIM)
    key = tl.load(
        key_ptr + row * key_row_stride + heads * key_head_stride + dims, mask=is_key, other=0.0
    )
    tl.store(keys_ptr + places * DIM + dims, key, mask=is_key)
    v_dims = tl.arange(0, V_WIDTH)[None, :]
    is_value = (heads < HEADS) & (v_dims < V_DIM)
    value = tl.load(
        value_ptr + row * value_row_stride + heads * value_head_stride + v_dims,
        mask=is_value,
        other=0.0,
    )
    tl.store(values_ptr + places * V_DIM + v_dims, value, mask=is_value)
