"""What a GEMM does around its main loop: which tile comes next, and what is made of a tile's sums."""

import triton.language as tl

from nanoflow_compiler.kernels.expert_math import activated
from nanoflow_compiler.kernels.jit import jit

__all__ = ["finish", "gate_and_up", "tile_at"]


@jit
def tile_at(place, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Its row and column in the grid of tiles: ``GROUP`` of a column, then as many of the next.

    What runs at the same time then shares both rows of ``x`` and rows of the weight.
    """
    group = place // (GROUP * num_column_tiles)
    first = group * GROUP
    size = tl.minimum(num_row_tiles - first, GROUP)
    within = place - first * num_column_tiles
    return first + within % size, within // size


@jit
def gate_and_up(sums, BLOCK: tl.constexpr):
    """Of columns that alternate: ``BLOCK`` of the gate, then ``BLOCK`` of up. Both stay in a thread."""
    half: tl.constexpr = sums.shape[1] // 2
    blocks = sums.reshape(sums.shape[0], half // BLOCK, 2, BLOCK).permute(0, 1, 3, 2)
    gate, up = blocks.split()
    return gate.reshape(sums.shape[0], half), up.reshape(sums.shape[0], half)


@jit
def _cut(sums, PIECES: tl.constexpr):
    """From left to right; no value leaves its thread."""
    if PIECES == 1:
        return (sums,)
    else:  # noqa: RET505 -- Triton compiles what follows a return
        half: tl.constexpr = sums.shape[1] // 2
        left, right = sums.reshape(sums.shape[0], 2, half).permute(0, 2, 1).split()
        return _cut(left, PIECES // 2) + _cut(right, PIECES // 2)


@jit
def _with_bias(sums, bias_ptr, column, num_columns):
    columns = column + tl.arange(0, sums.shape[1])
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
    return sums + bias.to(tl.float32)[None, :]


@jit
def finish(
    out,
    residual,
    bias_ptr,
    sums,
    up_sums,
    row,
    column,
    num_columns,
    PIECES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Write a tile, rounded wherever separate operations would have written to memory.

    Only one of ``PIECES`` at a time lies in shared memory, on its way to the copy engine.
    """
    columns: tl.constexpr = sums.shape[1] // PIECES
    pieces = _cut(sums, PIECES)
    ups = _cut(up_sums, PIECES)
    for piece in tl.static_range(PIECES):
        place = [row, column + piece * columns]
        sums_of_piece = pieces[piece]
        if HAS_BIAS:
            sums_of_piece = _with_bias(sums_of_piece, bias_ptr, place[1], num_columns)
        result = sums_of_piece.to(out.dtype)
        if ACTIVATION is not None:
            gate = activated(result.to(tl.float32), ACTIVATION).to(out.dtype)
            up = ups[piece].to(out.dtype)
            result = (gate.to(tl.float32) * up.to(tl.float32)).to(out.dtype)
        if RESIDUAL == "read":
            added = residual.load(place).to(tl.float32)
            result = (added + result.to(tl.float32)).to(out.dtype)
        if RESIDUAL == "in place":
            # Added by the copy engine in the cache, which rounds as a sum of float32 does.
            out.atomic_add(place, result)
        else:
            out.store(place, result)
