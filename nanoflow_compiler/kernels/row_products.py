"""The kernels of :mod:`few_rows`: a thread block computes some columns of the result for all rows.

It streams the rows of the weight that make these columns, through as many stages of shared memory as hide
how far memory is. There is no second pass to add up pieces, so a result never depends on what runs beside
it. Before it waits for the kernel before it, it asks the second-level cache for what it will read first.
"""

import triton.language as tl

from nanoflow_compiler.kernels.gated import gated
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.norm import normed
from nanoflow_compiler.kernels.pdl import let_next_begin, prefetch_rows, wait

__all__ = ["add_products", "dot_products"]

_NORM_ELEMENTS = tl.constexpr(4096)
"""Of rows, that are squared together."""


@jit
def _prefetch(
    weight_ptr,
    weight_row_stride,
    first,
    num_columns,
    depth,
    prefetch,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    for part in tl.static_range(2 if ACTIVATION != "" else 1):
        begin = part * num_columns
        prefetch_rows(
            weight_ptr,
            weight_row_stride,
            begin + first,
            begin + num_columns,
            tl.minimum(depth, prefetch),
            COLUMNS,
            THREADS,
            PDL,
        )


@jit
def _store(
    sums,
    up_sums,
    rows,
    columns,
    num_rows,
    num_columns,
    bias_ptr,
    residual_ptr,
    residual_row_stride,
    out_ptr,
    out_row_stride,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Sums are ``[rows, columns]``; what a model that runs in the dtype rounds is rounded."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    is_column = columns < num_columns
    is_there = (rows < num_rows)[:, None] & is_column[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0)
        sums += bias.to(tl.float32)[None, :]
        if ACTIVATION != "":
            up_bias = tl.load(bias_ptr + num_columns + columns, mask=is_column, other=0.0)
            up_sums += up_bias.to(tl.float32)[None, :]
    if ACTIVATION != "":
        sums = gated(sums, up_sums, dtype, ACTIVATION)
    rows = rows.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + rows * residual_row_stride + columns[None, :]
        residual = tl.load(residual_ptrs, mask=is_there, other=0.0)
        sums = sums.to(dtype).to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + rows * out_row_stride + columns[None, :], sums.to(dtype), mask=is_there)


@jit(do_not_specialize=["num_rows"])
def dot_products(
    x_ptr,
    x_row_stride,
    matrix,
    weight_ptr,
    weight_row_stride,
    bias_ptr,
    residual_ptr,
    residual_row_stride,
    out_ptr,
    out_row_stride,
    num_rows,
    num_columns,
    depth,
    prefetch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BEGINS_EARLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """With tensor cores; the copy engine brings the weight, ``matrix`` describes it."""
    if BEGINS_EARLY:
        let_next_begin(PDL)
    first = tl.program_id(0) * COLUMNS
    _prefetch(
        weight_ptr,
        weight_row_stride,
        first,
        num_columns,
        depth,
        prefetch,
        COLUMNS,
        THREADS,
        ACTIVATION,
        PDL,
    )
    rows = tl.arange(0, ROWS)
    within = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride + within[None, :]
    # Transposed, because the rows of a tile are at least as many as tensor cores multiply at once.
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    up_sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    wait(PDL)
    for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
        is_there = (rows < num_rows)[:, None] & (start + within < depth)[None, :]
        x = tl.load(x_ptrs + start, mask=is_there, other=0.0).T
        # What lies beyond the weight reads as zero.
        sums = tl.dot(matrix.load([first, start]), x, sums)
        if ACTIVATION != "":
            up_sums = tl.dot(matrix.load([num_columns + first, start]), x, up_sums)
    if not BEGINS_EARLY:
        let_next_begin(PDL)
    _store(
        sums.T,
        up_sums.T,
        rows,
        first + tl.arange(0, COLUMNS),
        num_rows,
        num_columns,
        bias_ptr,
        residual_ptr,
        residual_row_stride,
        out_ptr,
        out_row_stride,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
    )


@jit
def _norm_factors(
    x_ptr, x_row_stride, rows, num_rows, depth, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """What scales each row; every thread block finds it anew, while its weight is on the way."""
    squares = tl.zeros([ROWS, DEPTH], tl.float32)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_row_stride
    for start in range(0, depth, DEPTH):
        places = start + tl.arange(0, DEPTH)[None, :]
        is_there = (rows < num_rows)[:, None] & (places < depth)
        x = tl.load(x_ptrs + places, mask=is_there, other=0.0).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, 1) / depth + eps)


@jit(do_not_specialize=["num_rows"])
def add_products(
    x_ptr,
    x_row_stride,
    norm_ptr,
    eps,
    weight_ptr,
    weight_row_stride,
    bias_ptr,
    residual_ptr,
    residual_row_stride,
    out_ptr,
    out_row_stride,
    num_rows,
    num_columns,
    depth,
    prefetch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    THREADS: tl.constexpr,
    BEGINS_EARLY: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    ROUNDS_LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Without tensor cores, whose tiles are mostly empty for the least rows: a sum for each product."""
    if BEGINS_EARLY:
        let_next_begin(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0) * COLUMNS
    _prefetch(
        weight_ptr,
        weight_row_stride,
        first,
        num_columns,
        depth,
        prefetch,
        COLUMNS,
        THREADS,
        ACTIVATION,
        PDL,
    )
    rows = tl.arange(0, ROWS)
    within = tl.arange(0, DEPTH)[None, None, :]
    is_row = (rows < num_rows)[:, None, None]
    columns = first + tl.arange(0, COLUMNS)
    # Beyond the last column, that column again: nobody stores it.
    weight_rows = tl.minimum(columns, num_columns - 1).to(tl.int64)[None, :, None]
    weight_ptrs = weight_ptr + weight_rows * weight_row_stride + within
    up_ptrs = weight_ptrs + num_columns.to(tl.int64) * weight_row_stride
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None, None] * x_row_stride + within
    sums = tl.zeros([ROWS, COLUMNS, DEPTH], tl.float32)
    up_sums = tl.zeros([ROWS, COLUMNS, DEPTH], tl.float32)
    wait(PDL)
    if HAS_NORM:
        span: tl.constexpr = _NORM_ELEMENTS // ROWS
        factors = _norm_factors(x_ptr, x_row_stride, rows, num_rows, depth, eps, ROWS, span)
        factors = factors[:, None, None]
    for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
        is_deep = within >= 0 if IS_EVEN else start + within < depth
        x = tl.load(x_ptrs + start, mask=is_row & is_deep, other=0.0).to(tl.float32)
        if HAS_NORM:
            norm = tl.load(norm_ptr + start + within, mask=is_deep, other=0.0)
            x = normed(x, factors, norm, dtype, ADDS_ONE, ROUNDS_LAST)
        weight = tl.load(weight_ptrs + start, mask=is_deep, other=0.0)
        sums += x * weight.to(tl.float32)
        if ACTIVATION != "":
            up = tl.load(up_ptrs + start, mask=is_deep, other=0.0)
            up_sums += x * up.to(tl.float32)
    if not BEGINS_EARLY:
        let_next_begin(PDL)
    _store(
        tl.sum(sums, 2),
        tl.sum(up_sums, 2),
        rows,
        columns,
        num_rows,
        num_columns,
        bias_ptr,
        residual_ptr,
        residual_row_stride,
        out_ptr,
        out_row_stride,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
    )
