"""Matrix products of many experts in one launch: tiles of tokens, each with the matrix of its expert.

A thread block computes a tile of rows for some columns. Matrices come through TMA where it can read them,
rows of tokens by their numbers. Results are computed transposed, because tensor cores multiply 64 rows or
more at a time on one side only, and tiles of few tokens are what decodes have. Thread blocks that run at
the same time share both rows and matrices: a group of tiles goes through all columns before the next.

The tile of a program depends on the number of pairs for each expert, on average, and with it, beyond
float32, the order of additions inside of a tensor core: the result of a token may differ in the last bits
between steps of different sizes. It never depends on what the other tokens are, or where they are routed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_compiler.kernels.expert_math import activated, clamped_swiglu
from nanoflow_compiler.kernels.expert_plan import TILE_FIELDS, ExpertTiles
from nanoflow_compiler.kernels.jit import jit

__all__ = ["TILINGS", "Activation", "Matrices", "Tiling", "can_describe", "multiply_tiles"]

_TMA_BYTES = 16
_TMA_CAPABILITY = (9, 0)
_GROUP = tl.constexpr(16)
"""Tiles that go through all columns together."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What may be tuned."""

    rows: int
    columns: int
    """Rows of the matrix as a linear layer stores it; a gate needs two for each of its results."""
    depth: int
    num_stages: int
    num_warps: int

    @classmethod
    def of(cls, num_pairs: int, *, num_experts: int, dtype: torch.dtype) -> "Tiling":
        """For an average routing: most experts have one tile, or whole ones are many.

        Float32 is multiplied without tensor cores, by code that grows with the rows of a tile.
        """
        if dtype is torch.float32:
            return _EXACT
        wanted = 1.5 * num_pairs / num_experts
        return next((tiling for tiling in TILINGS if tiling.rows >= wanted), TILINGS[-1])


_EXACT = Tiling(16, 64, 32, 1, 4)
TILINGS = (
    Tiling(16, 64, 128, 5, 4),
    Tiling(32, 128, 64, 5, 4),
    Tiling(64, 128, 64, 4, 4),
    Tiling(128, 256, 64, 4, 8),
)
"""By rows; shared memory holds two thread blocks of a multiprocessor, or one of the last."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """The same linear layer of all experts: ``[E, out, in]``, or ``[E, in, out]`` if transposed."""

    stacked: Tensor
    bias: Tensor | None
    transposed: bool

    @property
    def num_columns(self) -> int:
        return self.stacked.shape[2 if self.transposed else 1]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of an expert, a column of the result, and a column of the input."""
        expert, first, second = self.stacked.stride()
        return (expert, second, first) if self.transposed else (expert, first, second)

    def block(self, columns: int, depth: int) -> list[int]:
        return [1, depth, columns] if self.transposed else [1, columns, depth]


@dataclass(frozen=True, slots=True)
class Activation:
    """Applied to a result; a gate halves its columns."""

    name: str
    gated: bool

    @property
    def columns(self) -> str:
        """How gate and up lie beside each other."""
        if self.name == "clamped_swiglu":
            return "alternating"
        return "halves" if self.gated else "plain"


def can_describe(stacked: Tensor) -> bool:
    """Whether TMA can read these matrices."""
    steps = (*(stride * stacked.itemsize for stride in stacked.stride()[:2]), stacked.data_ptr())
    is_aligned = stacked.stride(2) == 1 and not any(step % _TMA_BYTES for step in steps)
    return is_aligned and torch.cuda.get_device_capability(stacked.device) >= _TMA_CAPABILITY


def multiply_tiles(
    x: Tensor,
    matrices: Matrices,
    *,
    tiles: ExpertTiles,
    tiling: Tiling,
    to_pairs: bool,
    activation: Activation | None = None,
) -> Tensor:
    """Each pair's row, times the matrix of its expert; rows of no expert are left undefined.

    From tokens ``x [T, in]`` to ``[T * k, out]`` in the order of the tiles, or ``to_pairs``: from that
    order to the order of the pairs' numbers.
    """
    columns = activation.columns if activation else "plain"
    width = tiling.columns if columns == "plain" else tiling.columns // 2
    num_columns = matrices.num_columns if columns == "plain" else matrices.num_columns // 2
    out = x.new_empty(len(tiles.pairs), num_columns)
    # Where up follows gate, it has to begin where TMA may begin to read.
    described = can_describe(matrices.stacked) and num_columns * x.itemsize % _TMA_BYTES == 0
    stages = tiling.num_stages if described else min(tiling.num_stages, 2)
    block_columns = width if columns == "halves" else tiling.columns
    bias = None if matrices.bias is None else matrices.bias.contiguous()
    launcher: Any = _multiply[(len(tiles.tiles) * triton.cdiv(num_columns, width),)]
    launcher(
        x,
        x.stride(0),
        _descriptor(matrices, block_columns, tiling.depth) if described else matrices.stacked,
        *matrices.strides,
        bias,
        0 if bias is None else bias.stride(0),
        out,
        tiles.pairs,
        tiles.tiles,
        len(tiles.tiles),
        num_columns,
        x.shape[1],
        TOP_K=tiles.top_k,
        TO_PAIRS=to_pairs,
        ROWS=tiles.rows,
        BLOCK_COLUMNS=block_columns,
        WIDTH=width,
        DEPTH=tiling.depth,
        STAGES=stages,
        LAYOUT=columns,
        ACTIVATION=activation.name if activation else "",
        HAS_BIAS=matrices.bias is not None,
        IS_DESCRIBED=described,
        TRANSPOSED=matrices.transposed,
        IS_EXACT=x.dtype is torch.float32,
        num_warps=tiling.num_warps,
    )
    return out


def _descriptor(matrices: Matrices, columns: int, depth: int) -> Any:
    """What is read beyond the end of a matrix is zero."""
    return TensorDescriptor.from_tensor(matrices.stacked, matrices.block(columns, depth))


@jit
def _tile_and_block(program, num_tiles, num_blocks):
    """Of a group of tiles, first all for one block of columns."""
    group = program // (_GROUP * num_blocks)
    first = group * _GROUP
    size = tl.minimum(num_tiles - first, _GROUP)
    within = program - first * num_blocks
    return first + within % size, within // size


@jit
def _load_matrix(
    matrix,
    expert_stride,
    column_stride,
    depth_stride,
    expert,
    column,
    start,
    end_column,
    depth,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """``[COLUMNS, DEPTH]``; zero beyond the matrix."""
    if IS_DESCRIBED:
        if TRANSPOSED:
            block = matrix.load([expert, start, column]).reshape(DEPTH, COLUMNS).T
        else:
            block = matrix.load([expert, column, start]).reshape(COLUMNS, DEPTH)
    else:
        columns = column + tl.arange(0, COLUMNS)
        places = start + tl.arange(0, DEPTH)
        begin = matrix + expert.to(tl.int64) * expert_stride
        offsets = columns.to(tl.int64)[:, None] * column_stride
        offsets += places.to(tl.int64)[None, :] * depth_stride
        is_there = (columns < end_column)[:, None] & (places < depth)[None, :]
        block = tl.load(begin + offsets, mask=is_there, other=0.0)
    return block


@jit
def _load_bias(bias_ptr, columns, is_column):
    return tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]


@jit(do_not_specialize=["num_tiles"])
def _multiply(
    x_ptr,
    x_row_stride,
    matrix,
    expert_stride,
    column_stride,
    depth_stride,
    bias_ptr,
    bias_stride,
    out_ptr,
    pairs_ptr,
    tiles_ptr,
    num_tiles,
    num_columns,
    depth,
    TOP_K: tl.constexpr,
    TO_PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    precision: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    tile, block = _tile_and_block(tl.program_id(0), num_tiles, tl.cdiv(num_columns, WIDTH))
    tiles_ptr += tile * TILE_FIELDS
    expert = tl.load(tiles_ptr)
    first = tl.load(tiles_ptr + 1)
    num_rows = tl.load(tiles_ptr + 2)
    if num_rows == 0:
        return

    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    places = first + rows
    pairs = tl.load(pairs_ptr + places, mask=is_row, other=0)
    x_rows = places if TO_PAIRS else pairs // TOP_K
    out_rows = pairs if TO_PAIRS else places
    within = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + (x_rows.to(tl.int64) * x_row_stride)[:, None] + within[None, :]
    column = block * WIDTH * 2 if LAYOUT == "alternating" else block * WIDTH
    end_column = num_columns * 2 if LAYOUT == "alternating" else num_columns
    sums = tl.zeros([BLOCK_COLUMNS, ROWS], tl.float32)
    up_sums = tl.zeros([BLOCK_COLUMNS, ROWS], tl.float32)
    for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
        is_there = is_row[:, None] & (start + within < depth)[None, :]
        x = tl.load(x_ptrs + start, mask=is_there, other=0.0)
        weights = _load_matrix(
            matrix,
            expert_stride,
            column_stride,
            depth_stride,
            expert,
            column,
            start,
            end_column,
            depth,
            BLOCK_COLUMNS,
            DEPTH,
            IS_DESCRIBED,
            TRANSPOSED,
        )
        sums = tl.dot(weights, x.T, sums, input_precision=precision)
        if LAYOUT == "halves":
            up_weights = _load_matrix(
                matrix,
                expert_stride,
                column_stride,
                depth_stride,
                expert,
                column + num_columns,
                start,
                2 * num_columns,
                depth,
                BLOCK_COLUMNS,
                DEPTH,
                IS_DESCRIBED,
                TRANSPOSED,
            )
            up_sums = tl.dot(up_weights, x.T, up_sums, input_precision=precision)

    columns = block * WIDTH + tl.arange(0, WIDTH)
    is_column = columns < num_columns
    if LAYOUT == "alternating":
        result, up = tl.split(tl.reshape(sums.T, [ROWS, WIDTH, 2]))
        bias_columns = columns * 2
        up_columns = columns * 2 + 1
    else:
        result = sums.T
        up = up_sums.T
        bias_columns = columns
        up_columns = columns + num_columns
    if HAS_BIAS:
        bias_ptr += expert.to(tl.int64) * bias_stride
        result += _load_bias(bias_ptr, bias_columns, is_column)
        if LAYOUT != "plain":
            up += _load_bias(bias_ptr, up_columns, is_column)
    if ACTIVATION == "clamped_swiglu":
        result = clamped_swiglu(result, up)
    elif ACTIVATION != "":
        result = activated(result, ACTIVATION)
        if LAYOUT == "halves":
            result = result * up
    tl.store(
        out_ptr + (out_rows.to(tl.int64) * num_columns)[:, None] + columns[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )
