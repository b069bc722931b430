"""GEMMs of few rows, whose time is that of reading the weight once: decode steps of few requests.

A thread block computes some columns of the output for all rows, and streams the rows of the weight that
make them, which TMA keeps coming; several thread blocks share a multiprocessor, so that all of them
read until the end. There is no second pass to add up pieces, as cuBLAS has where it splits the depth.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["MAX_ROWS", "TILINGS", "SkinnyTiling", "can_run", "skinny_mm"]

MAX_ROWS = 16
"""The side of a tensor core's tile: fewer rows cost as much."""
_TMA_BYTES = 16


@dataclass(frozen=True, slots=True)
class SkinnyTiling:
    """What may be tuned."""

    columns: int
    depth: int
    num_stages: int
    num_warps: int


TILINGS = (
    SkinnyTiling(16, 256, 6, 2),
    SkinnyTiling(16, 256, 6, 4),
    SkinnyTiling(32, 256, 4, 4),
    SkinnyTiling(32, 128, 8, 4),
    SkinnyTiling(64, 128, 6, 4),
)


def can_run(weight: Tensor) -> bool:
    """Whether ``weight [K, N]`` is what a linear layer stores, seen transposed, and TMA can read it."""
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    is_dense = weight.stride(0) == 1 and weight.stride(1) * weight.itemsize % _TMA_BYTES == 0
    return is_half and is_dense and weight.data_ptr() % _TMA_BYTES == 0


def skinny_mm(
    x: Tensor, weight: Tensor, *, tiling: SkinnyTiling, bias: Tensor | None = None
) -> Tensor:
    """``x [M, K] @ weight [K, N] + bias [N]`` for ``M`` up to :data:`MAX_ROWS`; sums are float32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (num_rows, depth), columns = x.shape, weight.shape[1]
    out = x.new_empty(num_rows, columns)
    rows = TensorDescriptor.from_tensor(weight.t(), [tiling.columns, tiling.depth])
    launcher: Any = _multiply[(triton.cdiv(columns, tiling.columns),)]
    launcher(
        x,
        rows,
        bias,
        out,
        num_rows,
        columns,
        depth,
        x.stride(0),
        ROWS=MAX_ROWS,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        STAGES=tiling.num_stages,
        HAS_BIAS=bias is not None,
        num_warps=tiling.num_warps,
    )
    return out


@triton.jit
def _multiply(
    x_ptr,
    weight,
    bias_ptr,
    out_ptr,
    num_rows,
    num_columns,
    depth,
    x_row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    first = tl.program_id(0) * COLUMNS
    rows = tl.arange(0, ROWS)
    within = tl.arange(0, DEPTH)
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
        places = start + within
        x = tl.load(
            x_ptr + rows[:, None] * x_row_stride + places[None, :],
            mask=(rows < num_rows)[:, None] & (places < depth)[None, :],
            other=0.0,
        )
        # What lies beyond the weight reads as zero.
        sums = tl.dot(weight.load([first, start]), x.T, sums)
    columns = first + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    tl.store(
        out_ptr + rows[None, :].to(tl.int64) * num_columns + columns[:, None],
        sums.to(out_ptr.dtype.element_ty),
        mask=(rows < num_rows)[None, :] & (columns < num_columns)[:, None],
    )
