"""RMSNorm of rows, with the addition of a residual before it: a thread block holds a row in registers.

Sums are float32. What is rounded on the way to the result is part of a model, see :class:`RmsNorm`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pdl import launch, let_next_begin, wait

__all__ = ["RmsNorm", "can_norm", "normed", "rms_norm"]

_MOST_COLUMNS = 16384
_MANY_ROWS = 256
_MOST_WARPS = 16


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """A norm as its model computes it.

    Llama scales in float32, rounds to the dtype, and multiplies with the weight in the dtype. With
    ``rounds_last`` the weight is multiplied in float32 too; Gemma does that with ``adds_one``: 1 + weight.
    """

    weight: Tensor
    eps: float
    adds_one: bool = False
    rounds_last: bool = False

    def fits(self, x: Tensor) -> bool:
        """Whether it is of rows such as these."""
        weight = self.weight
        return weight.shape == x.shape[-1:] and weight.dtype is x.dtype and weight.is_contiguous()


def can_norm(x: Tensor, norm: RmsNorm) -> bool:
    """Whether these kernels compute it: ``x [T, columns]`` whose rows are dense."""
    is_known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    is_dense = x.ndim == 2 and x.stride(1) == 1
    return is_known and is_dense and x.shape[1] <= _MOST_COLUMNS and norm.fits(x)


def rms_norm(
    x: Tensor,
    norm: RmsNorm,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    num_warps: int | None = None,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of ``x [T, columns]``, or of ``residual + x``; and what it is the norm of.

    The sum is new memory.
    """
    num_rows, num_columns = x.shape
    out = x.new_empty(x.shape) if out is None else out
    total = x if residual is None else x.new_empty(x.shape)
    block = triton.next_power_of_2(num_columns)
    launch(_norm, (num_rows,), pdl=pdl)(
        x,
        x.stride(0),
        residual,
        0 if residual is None else residual.stride(0),
        norm.weight,
        norm.eps,
        total,
        out,
        out.stride(0),
        num_columns,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        ADDS_ONE=norm.adds_one,
        ROUNDS_LAST=norm.rounds_last,
        num_warps=num_warps or _num_warps(num_rows, block),
    )
    return out, total


def _num_warps(num_rows: int, num_columns: int) -> int:
    """Many rows keep a GPU busy with fewer threads for each, of which more memory is asked at a time."""
    columns_per_warp = 512 if num_rows < _MANY_ROWS else 1024
    return min(max(num_columns // columns_per_warp, 1), _MOST_WARPS)


@jit
def normed(
    x, factor, weight, dtype: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_LAST: tl.constexpr
):
    """``x``, in float32 as the result is, times the factor of its row and the weight of its column."""
    weight = weight.to(tl.float32)
    if ADDS_ONE:
        weight += 1.0
    x = x * factor
    if not ROUNDS_LAST:
        x = x.to(dtype).to(tl.float32)
    return (x * weight).to(dtype).to(tl.float32)


@jit
def _norm(
    x_ptr,
    x_row_stride,
    residual_ptr,
    residual_row_stride,
    weight_ptr,
    eps,
    total_ptr,
    out_ptr,
    out_row_stride,
    num_columns,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < num_columns
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0)
    wait(PDL)
    x = tl.load(x_ptr + row * x_row_stride + columns, mask=is_column, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptr += row * residual_row_stride
        x += tl.load(residual_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(total_ptr + row * num_columns + columns, total, mask=is_column)
        x = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    result = normed(x, factor, weight, dtype, ADDS_ONE, ROUNDS_LAST)
    tl.store(out_ptr + row * out_row_stride + columns, result.to(dtype), mask=is_column)
