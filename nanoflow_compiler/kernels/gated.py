"""Between the two matrix products of a gated MLP: the activated gate times up, read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.kernels.expert_math import activated
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pdl import launch, take_turn

__all__ = ["GATES", "can_gate", "gate_rows", "gated"]

GATES = frozenset({"silu", "gelu", "gelu_tanh"})
_COLUMNS = 2048
_NUM_WARPS = 4


def can_gate(gate_up: Tensor, *, activation: str) -> bool:
    """Whether ``gate_up [T, 2 F]`` holds dense rows of gates, then of what they multiply."""
    is_known = gate_up.dtype in (torch.bfloat16, torch.float16, torch.float32)
    is_dense = gate_up.ndim == 2 and gate_up.stride(1) == 1 and gate_up.shape[1] % 2 == 0
    return activation in GATES and is_known and is_dense


def gate_rows(
    gate_up: Tensor,
    *,
    activation: str,
    out: Tensor | None = None,
    block: int = _COLUMNS,
    pdl: bool = False,
) -> Tensor:
    """``activation(gate) * up``, both factors rounded to the dtype, for ``gate_up [T, 2 F]``.

    ``block`` are the columns of a thread block, a power of 2.
    """
    num_rows, num_columns = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, num_columns) if out is None else out
    launch(_gate, (num_rows, triton.cdiv(num_columns, block)), pdl=pdl)(
        gate_up,
        gate_up.stride(0),
        out,
        out.stride(0),
        num_columns,
        COLUMNS=block,
        ACTIVATION=activation,
        num_warps=_NUM_WARPS,
    )
    return out


@jit
def gated(gate, up, dtype: tl.constexpr, ACTIVATION: tl.constexpr):
    """In float32, of float32, rounded where a model that runs in ``dtype`` rounds."""
    factor = activated(gate.to(dtype).to(tl.float32), ACTIVATION)
    return factor.to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)


@jit
def _gate(
    gate_up_ptr,
    row_stride,
    out_ptr,
    out_row_stride,
    num_columns,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    gate_ptr = gate_up_ptr + row * row_stride
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    take_turn(PDL)
    gate = tl.load(gate_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + num_columns + columns, mask=is_column, other=0.0).to(tl.float32)
    result = gated(gate, up, dtype, ACTIVATION).to(dtype)
    tl.store(out_ptr + row * out_row_stride + columns, result, mask=is_column)
