"""Attention of prompts in Gluon: two pages in a turn, and every wait where it has to be.

Triton orders the products of a loop itself. It leaves one under way, and only if nothing else of the turn
needs the result; and it asks for a page a turn before it is read. Here the values of the pages before are
multiplied while the weights of the next two are computed, sums are raised to a greater maximum once for
both, and pages are asked for as soon as their place is free. It serves what is plain: causal, no soft cap,
no sinks. Tiles, blocks and their order are those of :mod:`prefill_plan`.

Pages lie in a ring, and are counted over all items of a thread block: the number of a page tells its place
and how often that place was filled before. Behind an odd number of pages comes one that is read as zeros.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoflow_compiler.kernels import prefill_plan
from nanoflow_compiler.kernels.pages import LOG2E, launch
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages

__all__ = ["attend_tiles", "serves"]

_DIMS = (64, 128)
_TILE_FIELDS = gl.constexpr(prefill_plan.TILE_FIELDS)
_LOWEST = gl.constexpr(-1e30)
"""Below every score, and finite."""


def serves(pages: HeadPages) -> bool:
    """Whether sums of such heads fit into registers, and tensor cores multiply them."""
    dims = (pages.keys.shape[-1], pages.values.shape[-1])
    return pages.keys.dtype.itemsize == 2 and dims[0] == dims[1] and dims[0] in _DIMS


def attend_tiles(
    query: Tensor,
    pages: HeadPages,
    *,
    plan: tuple[Tensor, Tensor, Tensor],
    shape: dict[str, int],
    scale: float,
    out: Tensor,
) -> None:
    """As ``attend_prompts``, for a plan's tiles, blocks and sizes.

    ``shape`` is of tiles: rows, rows of each query, stages, warps, and thread blocks.
    """
    assert shape["stages"] % 2 == 0, "places are filled two at a time"
    launch(_attend, (shape["ctas"],))(
        query,
        query.stride(0),
        query.stride(1),
        _descriptor(pages.keys),
        _descriptor(pages.values),
        out,
        *plan,
        scale * LOG2E,
        ROWS=shape["rows"],
        NUM_HEADS=query.shape[1],
        NUM_KV_HEADS=pages.keys.shape[1],
        HEADS_OF_EACH=shape["heads_of_each"],
        DIM=query.shape[-1],
        PAGE=BLOCK_SIZE,
        STAGES=shape["stages"],
        WARPS=shape["warps"],
        num_warps=shape["warps"],
    )


def _descriptor(pool: Tensor) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    block = [1, BLOCK_SIZE, pool.shape[-1]]
    assert pool.dtype in (torch.bfloat16, torch.float16)
    return TensorDescriptor.from_tensor(pool.flatten(0, 1), block, layout)


@gluon.jit
def _item(turn, cta, num_ctas):
    """To and fro: who had the longest item of a turn has the shortest of the next."""
    return turn * num_ctas + gl.where(turn % 2 == 0, cta, num_ctas - 1 - cta)


@gluon.jit
def _shift(last, page, PAGE: gl.constexpr):
    """Where a page is read from: before its begin, if it has tokens after the last that is seen."""
    return gl.minimum(last - page * PAGE - (PAGE - 1), 0)


@gluon.jit
def _fetch(pool, ring, bars, number, place, is_page, STAGES: gl.constexpr):
    """Ask for a page of a head, ``place = (page, first token)``."""
    bar = bars.index(number % STAGES)
    there = ring.index(number % STAGES)
    mbarrier.expect(bar, pool.block_type.nbytes, pred=is_page)
    tma.async_copy_global_to_shared(pool, [place[0], place[1], 0], bar, there, pred=is_page)


@gluon.jit
def _await(bars, number, STAGES: gl.constexpr):
    """Until both pages from ``number`` on are there."""
    for half in gl.static_range(2):
        at = number + half
        mbarrier.wait(bars.index(at % STAGES), (at // STAGES) & 1)


@gluon.jit
def _multiply(query, ring, number, zeros, STAGES: gl.constexpr):
    """Scores of a page, under way."""
    key = ring.index(number % STAGES).permute((1, 0))
    return warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)


@gluon.jit
def _add_values(sums, weights, more_weights, ring, number, STAGES: gl.constexpr):
    """The sums with the values of two pages, under way."""
    sums = warpgroup_mma(weights, ring.index(number % STAGES), sums, is_async=True)
    return warpgroup_mma(more_weights, ring.index((number + 1) % STAGES), sums, is_async=True)


@gluon.jit
def _mask(scores, positions, page, last, PAGE: gl.constexpr):
    """Without those of what a row does not see, as of tokens that were read from before the page."""
    columns: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    keys = page * PAGE + _shift(last, page, PAGE) + gl.arange(0, PAGE, layout=columns)
    is_seen = (keys[None, :] >= page * PAGE) & (keys[None, :] <= positions[:, None])
    return gl.where(is_seen, scores, float("-inf"))


@gluon.jit
def _weigh(scores, more_scores, greatest, normaliser, scale):
    """The greatest scores with those of two pages, what sums before are scaled by, and the weights."""
    raised = gl.maximum(greatest, gl.max(gl.maximum(scores, more_scores), 1) * scale)
    factor = gl.exp2(greatest - raised)
    weights = gl.exp2(scores * scale - raised[:, None])
    more_weights = gl.exp2(more_scores * scale - raised[:, None])
    normaliser = normaliser * factor + gl.sum(weights + more_weights, 1)
    return raised, factor, weights, more_weights, normaliser


@gluon.jit
def _attend(
    query_ptr,
    query_row_stride,
    query_head_stride,
    keys,
    values,
    out_ptr,
    tiles_ptr,
    blocks_ptr,
    sizes_ptr,
    scale,
    ROWS: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEADS_OF_EACH: gl.constexpr,
    DIM: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    group: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PAGE, 16])
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_sums, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    of_sum_rows: gl.constexpr = gl.SliceLayout(1, of_sums)
    in_memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=128, element_bitwidth=16, rank=2
    )
    queries = gl.allocate_shared_memory(dtype, [ROWS, DIM], swizzled)
    key_ring = gl.allocate_shared_memory(dtype, [STAGES, PAGE, DIM], swizzled)
    value_ring = gl.allocate_shared_memory(dtype, [STAGES, PAGE, DIM], swizzled)
    key_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(key_bars.index(slot), count=1)
        mbarrier.init(value_bars.index(slot), count=1)
    fence_async_shared()

    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, in_memory))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, in_memory))
    head_in_group = rows % HEADS_OF_EACH
    query_at = rows // HEADS_OF_EACH

    cta = gl.program_id(0)
    num_ctas = gl.num_programs(0)
    num_items = gl.load(sizes_ptr) * NUM_KV_HEADS
    num_full_turns = num_items // num_ctas
    has_more = _item(num_full_turns, cta, num_ctas) < num_items
    done = 0
    for turn in range(num_full_turns + has_more.to(gl.int32)):
        item = _item(turn, cta, num_ctas)
        kv_head = item % NUM_KV_HEADS
        tile = tiles_ptr + item // NUM_KV_HEADS * _TILE_FIELDS
        first_row = gl.load(tile)
        num_queries = gl.load(tile + 1)
        position = gl.load(tile + 2)
        num_pages = gl.load(tile + 4)
        blocks = blocks_ptr + gl.load(tile + 5)
        last = position + num_queries - 1
        last_page = num_pages - 1
        num_fetched = (num_pages + 1) // 2 * 2

        gl.thread_barrier()  # nobody reads any longer what is overwritten now
        for page in gl.static_range(STAGES):
            block = gl.load(blocks + gl.minimum(page, last_page))
            place = (block * NUM_KV_HEADS + kv_head, _shift(last, page, PAGE))
            is_page = page < num_fetched
            _fetch(keys, key_ring, key_bars, done + page, place, is_page, STAGES)
            _fetch(values, value_ring, value_bars, done + page, place, is_page, STAGES)

        heads = kv_head * group + head_in_group
        is_row = (query_at < num_queries) & (head_in_group < group)
        token_rows = (first_row + query_at).to(gl.int64)
        query_rows = token_rows * query_row_stride + heads * query_head_stride
        query = gl.load(
            query_ptr + query_rows[:, None] + dims[None, :], mask=is_row[:, None], other=0.0
        )
        queries.store(query)
        fence_async_shared()
        gl.thread_barrier()

        positions = position + gl.arange(0, ROWS, layout=of_rows) // HEADS_OF_EACH
        greatest = gl.full([ROWS], _LOWEST, gl.float32, layout=of_rows)
        normaliser = gl.full([ROWS], 0.0, gl.float32, layout=of_rows)
        zeros = gl.full([ROWS, PAGE], 0.0, gl.float32, layout=of_scores)
        sums = gl.full([ROWS, DIM], 0.0, gl.float32, layout=of_sums)

        _await(key_bars, done, STAGES)
        product = _multiply(queries, key_ring, done, zeros, STAGES)
        more_product = _multiply(queries, key_ring, done + 1, zeros, STAGES)
        scores, more_scores = warpgroup_mma_wait(0, deps=(product, more_product))
        gl.thread_barrier()
        for half in gl.static_range(2):
            ahead = half + STAGES
            block = gl.load(blocks + gl.minimum(ahead, last_page))
            place = (block * NUM_KV_HEADS + kv_head, _shift(last, ahead, PAGE))
            is_page = ahead < num_fetched
            _fetch(keys, key_ring, key_bars, done + ahead, place, is_page, STAGES)
        if position < 2 * PAGE - 1:
            scores = _mask(scores, positions, 0, last, PAGE)
            more_scores = _mask(more_scores, positions, 1, last, PAGE)
        greatest, factor, weights, more_weights, normaliser = _weigh(
            scores, more_scores, greatest, normaliser, scale
        )
        taken = gl.convert_layout(weights.to(dtype), of_weights)
        more_taken = gl.convert_layout(more_weights.to(dtype), of_weights)

        for page in range(2, num_pages, 2):
            number = done + page
            ahead = page + STAGES
            block = gl.load(blocks + gl.minimum(ahead, last_page))
            more_block = gl.load(blocks + gl.minimum(ahead + 1, last_page))
            value_block = gl.load(blocks + gl.minimum(ahead - 2, last_page))
            more_value_block = gl.load(blocks + gl.minimum(ahead - 1, last_page))

            _await(key_bars, number, STAGES)
            product = _multiply(queries, key_ring, number, zeros, STAGES)
            more_product = _multiply(queries, key_ring, number + 1, zeros, STAGES)
            _await(value_bars, number - 2, STAGES)
            added = _add_values(sums, taken, more_taken, value_ring, number - 2, STAGES)
            scores, more_scores = warpgroup_mma_wait(2, deps=(product, more_product))

            gl.thread_barrier()  # all have multiplied these keys
            is_page = ahead < num_fetched
            place = (block * NUM_KV_HEADS + kv_head, _shift(last, ahead, PAGE))
            _fetch(keys, key_ring, key_bars, number + STAGES, place, is_page, STAGES)
            place = (more_block * NUM_KV_HEADS + kv_head, _shift(last, ahead + 1, PAGE))
            _fetch(keys, key_ring, key_bars, number + STAGES + 1, place, is_page, STAGES)
            if position < (page + 2) * PAGE - 1:
                scores = _mask(scores, positions, page, last, PAGE)
                more_scores = _mask(more_scores, positions, page + 1, last, PAGE)
            greatest, factor, weights, more_weights, normaliser = _weigh(
                scores, more_scores, greatest, normaliser, scale
            )

            sums = warpgroup_mma_wait(0, deps=(added,))
            gl.thread_barrier()  # all have multiplied these values
            is_page = ahead - 2 < num_fetched
            place = (value_block * NUM_KV_HEADS + kv_head, _shift(last, ahead - 2, PAGE))
            _fetch(values, value_ring, value_bars, number + STAGES - 2, place, is_page, STAGES)
            place = (more_value_block * NUM_KV_HEADS + kv_head, _shift(last, ahead - 1, PAGE))
            _fetch(values, value_ring, value_bars, number + STAGES - 1, place, is_page, STAGES)
            taken = gl.convert_layout(weights.to(dtype), of_weights)
            more_taken = gl.convert_layout(more_weights.to(dtype), of_weights)
            sums = sums * gl.convert_layout(factor, of_sum_rows)[:, None]

        done += num_fetched
        _await(value_bars, done - 2, STAGES)
        added = _add_values(sums, taken, more_taken, value_ring, done - 2, STAGES)
        sums = warpgroup_mma_wait(0, deps=(added,))
        sums = sums * gl.convert_layout(1 / normaliser, of_sum_rows)[:, None]
        gl.store(
            out_ptr + ((token_rows * NUM_HEADS + heads) * DIM)[:, None] + dims[None, :],
            gl.convert_layout(sums.to(dtype), in_memory),
            mask=is_row[:, None],
        )
