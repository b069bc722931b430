"""Matrix products of linear layers on Hopper, and what follows them, in one launch without a copy.

A thread block computes tile after tile. Its tiles of ``x`` and of the weight come through TMA, and its
results leave through it: rows and columns beyond a matrix read as zero and are not written. Where the loop
over tiles is one with the loop over the depth, the next tile is read while the last is written.

Sums are float32. An epilogue rounds wherever separate operations would have written to memory, so that a
fused product computes what the separate ones do, up to the order of additions in a sum.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_compiler.kernels.expert_math import KNOWN
from nanoflow_compiler.kernels.gemm_math import finish, gate_and_up, tile_at
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.sm_budget import current_sms

__all__ = [
    "GATES",
    "SHARED_BYTES",
    "GemmTiling",
    "can_gate",
    "can_run",
    "interleave",
    "multiply",
    "multiply_gated",
]

GATES = KNOWN - {"clamped_swiglu"}
"""Activations of a gate, see ``experts.ACTIVATIONS``."""
SHARED_BYTES = 227 * 1024
"""Of a multiprocessor; a thread block can have all of it."""

_DTYPES = (torch.bfloat16, torch.float16)
_ITEM_BYTES = 2
_BARRIER_BYTES = 1024
_TMA_BYTES = 16
_TMA_CAPABILITY = (9, 0)
_ALIGNED = tl.constexpr(_TMA_BYTES // _ITEM_BYTES)


@dataclass(frozen=True, slots=True)
class GemmTiling:
    """What may be tuned."""

    rows: int = 128
    columns: int = 256
    """Of the weight; a gate needs two for each of its results."""
    depth: int = 64
    num_stages: int = 4
    num_warps: int = 8
    """One for each 16 rows: with more, those of the same rows cut the columns between them."""
    group: int = 16
    """Tiles of rows that go through all columns together: a weight is read once for each such group."""
    store_columns: int = 128
    """Of a result that are written at a time, out of shared memory which the stages do without."""
    persistent: bool = True
    """As many thread blocks as fit at the same time, or one for each tile."""
    ctas_per_sm: int = 1
    """Where they are persistent."""
    flatten: bool = True
    """Read the next tile while the last is written."""
    pairs: bool = False
    """Gate and up as two products, never flattened (which would wait for each), instead of one."""

    def __str__(self) -> str:
        """All that sets it apart, in a word."""
        size = f"{self.rows}x{self.columns}x{self.depth}s{self.num_stages}w{self.num_warps}"
        marks = {
            f"c{self.ctas_per_sm}": self.persistent and self.ctas_per_sm > 1,
            "each": not self.persistent,
            "nested": not self.flatten,
            "pairs": self.pairs,
        }
        words = [f"{size}g{self.group}e{self.store_columns}", *(m for m, on in marks.items() if on)]
        return "-".join(words)

    def width(self, *, gated: bool) -> int:
        """Columns of a tile's result."""
        return self.columns // 2 if gated else self.columns

    def stored(self, *, gated: bool) -> int:
        """Columns that are written at a time."""
        return min(self.store_columns, self.width(gated=gated))

    def shared_bytes(self, *, gated: bool = False, reads_residual: bool = False) -> int:
        """What a thread block needs, at most, where no warps share rows."""
        stage = (self.rows + self.columns) * self.depth * _ITEM_BYTES
        piece = self.rows * self.stored(gated=gated) * _ITEM_BYTES
        return self.num_stages * stage + piece * (1 + reads_residual) + _BARRIER_BYTES


def can_run(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, residual: Tensor | None = None
) -> bool:
    """Whether :func:`multiply` can: TMA reads rows that begin at multiples of 16 bytes.

    ``weight [K, N]`` has to be what a linear layer stores, seen transposed.
    """
    given = [x, weight, *(tensor for tensor in (bias, residual) if tensor is not None)]
    has_types = x.dtype in _DTYPES and all(tensor.dtype is x.dtype for tensor in given)
    rows = [x, weight.t(), *([] if residual is None else [residual])]
    is_read = all(map(_is_described, rows)) and (bias is None or bias.is_contiguous())
    is_written = weight.shape[1] * _ITEM_BYTES % _TMA_BYTES == 0
    return has_types and is_read and is_written and _has_tma(x)


def can_gate(x: Tensor, weight: Tensor, *, activation: str) -> bool:
    """Whether :func:`multiply_gated` can."""
    is_written = weight.shape[1] // 2 * _ITEM_BYTES % _TMA_BYTES == 0
    is_even = weight.shape[1] % 2 == 0
    return activation in GATES and is_even and is_written and can_run(x, weight)


def _is_described(matrix: Tensor) -> bool:
    steps = (matrix.stride(0) * matrix.itemsize, matrix.data_ptr())
    is_aligned = not any(step % _TMA_BYTES for step in steps)
    return matrix.numel() > 0 and matrix.stride(1) == 1 and matrix.stride(0) > 0 and is_aligned


def _has_tma(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= _TMA_CAPABILITY


_READING = GemmTiling(store_columns=64)
"""Leaves shared memory for a piece of the residual."""


def multiply(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tiling: GemmTiling | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """``x [M, K] @ weight [K, N] + bias [N]``, then ``+ residual [M, N]``; written to ``out`` if given.

    ``out`` may be ``residual`` itself, which nobody then has to read: the cache adds to it. Persistent
    thread blocks occupy ``num_sms`` multiprocessors, all of them by default.
    """
    out = x.new_empty(len(x), weight.shape[1]) if out is None else out
    is_in_place = residual is not None and _is_same(residual, out)
    tiling = tiling or (_READING if residual is not None and not is_in_place else GemmTiling())
    block = [tiling.rows, tiling.stored(gated=False)]
    _launch(
        x,
        TensorDescriptor.from_tensor(weight.t(), [tiling.columns, tiling.depth]),
        out,
        tiling=tiling,
        num_sms=num_sms,
        bias_ptr=bias,
        residual=_described(residual, block) if residual is not None and not is_in_place else None,
        ACTIVATION=None,
        GATE="",
        BLOCK=0,
        HAS_BIAS=bias is not None,
        RESIDUAL="" if residual is None else "in place" if is_in_place else "read",
    )
    return out


def multiply_gated(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str,
    block: int | None = None,
    out: Tensor | None = None,
    tiling: GemmTiling | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """``activation(x @ gate) * (x @ up)`` for ``weight [K, 2 F]``: the columns of the gate, then those of up.

    With a ``block``, for what :func:`interleave` made with it; this has to divide half of a tile's columns.
    """
    tiling = tiling or GemmTiling()
    num_columns, width = weight.shape[1] // 2, tiling.width(gated=True)
    assert block is None or (width % block == 0 and num_columns % block == 0)
    out = x.new_empty(len(x), num_columns) if out is None else out
    stored = weight.t()
    if block:
        gate, rows = "interleaved", _described(stored, [tiling.columns, tiling.depth])
    elif tiling.pairs:
        gate, rows = "pair", _described(stored, [width, tiling.depth])
    else:
        both = stored.unflatten(0, (2, num_columns))
        gate, rows = "stacked", _described(both, [2, width, tiling.depth])
    _launch(
        x,
        rows,
        out,
        tiling=tiling,
        num_sms=num_sms,
        bias_ptr=None,
        residual=None,
        ACTIVATION=activation,
        GATE=gate,
        BLOCK=block or width,
        HAS_BIAS=False,
        RESIDUAL="",
    )
    return out


def interleave(weight: Tensor, block: int) -> Tensor:
    """``weight [K, 2 F]``, gate then up, with columns that alternate: ``block`` of each at a time.

    A copy, of rows as a linear layer stores them; ``block`` has to divide ``F``.
    """
    blocks: Tensor = weight.t().unflatten(0, (2, -1, block)).transpose(0, 1)
    return blocks.flatten(0, 2).t()


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    """In memory."""
    return tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride()


def _described(tensor: Tensor, block: list[int]) -> Any:
    return TensorDescriptor.from_tensor(tensor, block)


def _launch(
    x: Tensor,
    weight: Any,
    out: Tensor,
    *,
    tiling: GemmTiling,
    num_sms: int | None,
    **given: Any,
) -> None:
    """The kernel on a grid of its own size; ``given`` is what an epilogue needs."""
    (num_rows, depth), num_columns = x.shape, out.shape[1]
    gated = given["ACTIVATION"] is not None
    width, stored = tiling.width(gated=gated), tiling.stored(gated=gated)
    num_tiles = triton.cdiv(num_rows, tiling.rows) * triton.cdiv(num_columns, width)
    num_ctas = num_tiles
    if tiling.persistent:
        num_ctas = min(num_tiles, (num_sms or current_sms(x.device)) * tiling.ctas_per_sm)
    launcher: Any = _multiply[(num_ctas,)]
    launcher(
        _described(x, [tiling.rows, tiling.depth]),
        weight,
        out=_described(out, [tiling.rows, stored]),
        num_rows=num_rows,
        num_columns=num_columns,
        depth=depth,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        GROUP=tiling.group,
        PIECES=width // stored,
        FLATTEN=tiling.flatten and given["GATE"] != "pair",
        num_stages=tiling.num_stages,
        num_warps=tiling.num_warps,
        **given,
    )


@jit(do_not_specialize=["num_rows", "num_columns", "depth"])
def _multiply(
    x,
    weight,
    bias_ptr,
    residual,
    out,
    num_rows,
    num_columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    FLATTEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    width: tl.constexpr = COLUMNS if ACTIVATION is None else COLUMNS // 2
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    num_column_tiles = tl.cdiv(num_columns, width)
    num_steps = tl.cdiv(depth, DEPTH)
    num_columns = tl.multiple_of(num_columns, _ALIGNED)
    # Without it a flattened loop is compiled twice, once for tiles of no depth.
    tl.assume(num_steps > 0)
    for place in tl.range(
        tl.program_id(0),
        num_row_tiles * num_column_tiles,
        tl.num_programs(0),
        flatten=FLATTEN,
    ):
        row_tile, column_tile = tile_at(place, num_row_tiles, num_column_tiles, GROUP)
        row = row_tile * ROWS
        column = column_tile * width
        if GATE == "pair":
            sums = tl.zeros([ROWS, width], tl.float32)
            up_sums = tl.zeros([ROWS, width], tl.float32)
            for step in range(num_steps):
                rows = x.load([row, step * DEPTH])
                gate = weight.load([column, step * DEPTH])
                up = weight.load([num_columns + column, step * DEPTH])
                sums = tl.dot(rows, gate.T, sums)
                up_sums = tl.dot(rows, up.T, up_sums)
        else:
            both = tl.zeros([ROWS, COLUMNS], tl.float32)
            for step in range(num_steps):
                rows = x.load([row, step * DEPTH])
                if GATE == "stacked":
                    columns = weight.load([0, column, step * DEPTH]).reshape(COLUMNS, DEPTH)
                else:
                    columns = weight.load([column_tile * COLUMNS, step * DEPTH])
                both = tl.dot(rows, columns.T, both)
            if ACTIVATION is None:
                sums = both
                up_sums = both
            else:
                sums, up_sums = gate_and_up(both, BLOCK)
        finish(
            out,
            residual,
            bias_ptr,
            sums,
            up_sums,
            row,
            column,
            num_columns,
            PIECES,
            ACTIVATION,
            HAS_BIAS,
            RESIDUAL,
        )
