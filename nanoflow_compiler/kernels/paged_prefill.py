"""Attention of prompts over a paged KV cache: persistent thread blocks that read pages through TMA.

A tile of scores has the queries of one request and all query heads of a KV head as its rows, and its
keys are pages. Scores are in units of log2, softmax is computed in float32.

No value passes through registers: the last page is read from before its begin on, so that it ends with
the last token that the tile sees, and the copy engine fills what lies before the page with zeros. Only
pages at the borders of what is visible are masked. Where a tiling *lags*, the product of weights and
values is one page behind that of queries and keys: then the tensor cores multiply values while the
weights of the next page are computed. Triton leaves a product under way only if nothing but the next turn
of its loop needs the result, hence one page in a turn.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.kernels import prefill_plan
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pages import (
    LEAST_SIDE,
    LOG2E,
    add_sink,
    descriptor,
    launch,
    width,
)
from nanoflow_compiler.kernels.prefill_plan import Int32s, plan_prefill
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages
from nanoflow_compiler.scoring import Scoring
from nanoflow_compiler.sm_budget import current_sms

__all__ = [
    "PromptTiles",
    "PromptTiling",
    "attend_prompts",
    "plan_prompts",
    "prompts_with_room",
]

_SHARED_BYTES = 220 << 10
"""Of a multiprocessor's shared memory, for queries and the pages under way."""
_TILE_FIELDS = tl.constexpr(prefill_plan.TILE_FIELDS)
_NO_LIMIT = 1 << 30
"""A window or a chunk that holds every token."""
_NARROW = 128
"""Dimensions of a head."""
_LOWEST = tl.constexpr(-1e30)
"""Below every score, and finite: a row may see nothing of the first pages of its tile."""


@dataclass(frozen=True, slots=True)
class PromptTiling:
    """What may be tuned: the rows of a tile, pages under way, and who works on them."""

    rows: int = 64
    num_warps: int = 4
    num_stages: int = 2
    ctas_per_sm: int = 2
    lags: bool = True
    holds_queries: bool = False
    """In registers, instead of shared memory."""

    @classmethod
    def of(cls, pages: HeadPages) -> "PromptTiling":
        """As many pages under way as fit beside the queries.

        Two small thread blocks wait by turns; sums of wide heads fit into the registers of a large one.
        Float32 is multiplied without tensor cores, by code that grows with the rows of a tile.
        """
        if pages.keys.dtype is torch.float32:
            return cls(rows=LEAST_SIDE, num_warps=8, num_stages=1, ctas_per_sm=1, lags=False)
        sizes = (width(pages.keys), width(pages.values))
        wide = cls(rows=128, num_warps=8, num_stages=3, ctas_per_sm=1)
        most = cls() if max(sizes) <= _NARROW else wide
        row_bytes = sum(sizes) * pages.keys.element_size()
        query_bytes = most.rows * sizes[0] * pages.keys.element_size()
        room = _SHARED_BYTES // most.ctas_per_sm - query_bytes
        return replace(
            most, num_stages=max(1, min(most.num_stages, room // (BLOCK_SIZE * row_bytes)))
        )


@dataclass(frozen=True, slots=True)
class PromptTiles:
    """Which queries are computed together, and on which pages: a :class:`PrefillPlan` on the device."""

    tiles: Tensor
    blocks: Tensor
    sizes: Tensor
    visibility: Visibility
    rows: int
    """Of a tile: queries, times the heads of each."""
    queries: int
    num_ctas: int
    tiling: PromptTiling

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tiles, self.blocks, self.sizes)

    def arrays(self, requests: Requests) -> tuple[Int32s, ...]:
        """What goes to the beginning of :attr:`tensors`, to serve the prompts of these requests."""
        chosen = requests.prompts
        plan = plan_prefill(
            requests.starts[chosen],
            counts=requests.starts[chosen + 1] - requests.starts[chosen],
            positions=requests.contexts[chosen],
            tables=requests.tables[chosen],
            visibility=self.visibility,
            queries=self.queries,
        )
        return (plan.tiles, plan.blocks, plan.sizes)


def plan_prompts(
    requests: Requests,
    pages: HeadPages,
    *,
    num_heads: int,
    visibility: Visibility,
    tiling: PromptTiling | None = None,
) -> PromptTiles | None:
    """How the requests of a part that have several rows are computed; None without any."""
    if not len(requests.prompts):
        return None
    tiles = prompts_with_room(
        pages,
        num_heads=num_heads,
        visibility=visibility,
        tiling=tiling,
        num_tiles=0,
        num_pages=0,
    )
    described, blocks, sizes = requests.tensors(tiles.arrays(requests))
    return replace(tiles, tiles=described, blocks=blocks, sizes=sizes)


def prompts_with_room(
    pages: HeadPages,
    *,
    num_heads: int,
    visibility: Visibility,
    num_tiles: int,
    num_pages: int,
    tiling: PromptTiling | None = None,
) -> PromptTiles:
    """Of nothing yet, with room for so many tiles and pages: see :meth:`PromptTiles.arrays`."""
    tiling = tiling or PromptTiling.of(pages)
    device = pages.keys.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    heads_of_each = _heads_of_each(num_heads, pages)
    rows = max(tiling.rows, heads_of_each)
    return PromptTiles(
        tiles=zeros(num_tiles, prefill_plan.TILE_FIELDS),
        blocks=zeros(num_pages),
        sizes=zeros(1),
        visibility=visibility,
        rows=rows,
        queries=rows // heads_of_each,
        num_ctas=current_sms(device) * tiling.ctas_per_sm,
        tiling=tiling,
    )


def _heads_of_each(num_heads: int, pages: HeadPages) -> int:
    """The rows of a query in a tile: the query heads of a KV head, and rows that nothing is made of."""
    rows: int = triton.next_power_of_2(num_heads // pages.keys.shape[1])
    return rows


def attend_prompts(
    query: Tensor, pages: HeadPages, *, tiles: PromptTiles, scoring: Scoring, out: Tensor
) -> None:
    """Write the rows of ``tiles`` in ``out [T, heads, v dim]``, for ``query [T, heads, dim]``."""
    assert scoring.scale > 0, "the greatest score is that of the greatest product"
    query = query if query.stride(-1) == 1 else query.contiguous()
    num_heads, num_kv_heads = query.shape[1], pages.keys.shape[1]
    softcap = scoring.softcap
    launch(_attend_tiles, (tiles.num_ctas,))(
        query,
        query.stride(0),
        query.stride(1),
        descriptor(pages.keys),
        descriptor(pages.values),
        out,
        tiles.tiles,
        tiles.blocks,
        tiles.sizes,
        scoring.sinks,
        scoring.scale / softcap if softcap else scoring.scale * LOG2E,
        softcap * LOG2E,
        tiles.visibility.window or _NO_LIMIT,
        tiles.visibility.chunk or _NO_LIMIT,
        ROWS=tiles.rows,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEADS_OF_EACH=_heads_of_each(num_heads, pages),
        DIM=query.shape[-1],
        WIDTH=width(pages.keys),
        V_DIM=pages.values.shape[-1],
        V_WIDTH=width(pages.values),
        HAS_SOFTCAP=bool(softcap),
        HAS_SINKS=scoring.sinks is not None,
        IS_EXACT=query.dtype is torch.float32,
        LAGS=tiles.tiling.lags,
        HOLDS_QUERIES=tiles.tiling.holds_queries,
        PAGE=BLOCK_SIZE,
        STAGES=tiles.tiling.num_stages,
        num_warps=tiles.tiling.num_warps,
    )


@jit
def _item(turn, cta, num_ctas):
    """To and fro: who had the longest item of a turn has the shortest of the next."""
    return turn * num_ctas + tl.where(turn % 2 == 0, cta, num_ctas - 1 - cta)


@jit
def _mask(scores, positions, first_keys, page, shift, PAGE: tl.constexpr):
    """Without those of what a row does not see, as of tokens that were read from before the page."""
    keys = page * PAGE + shift + tl.arange(0, PAGE)
    least = tl.maximum(first_keys, page * PAGE)
    is_seen = (keys[None, :] >= least[:, None]) & (keys[None, :] <= positions[:, None])
    return tl.where(is_seen, scores, float("-inf"))


@jit
def _cap(scores, softcap):
    return softcap * (2 * tl.sigmoid(2 * scores) - 1)


@jit
def _add_values(sums, factor, weights, values, place, shift, IS_EXACT: tl.constexpr):
    """The sums of a row, those before times ``factor``, and the values of a page by their weights."""
    precision: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    value = values.load([place, shift, 0]).reshape(weights.shape[1], sums.shape[1])
    weights = weights.to(value.dtype)
    return tl.dot(weights, value, sums * factor[:, None], input_precision=precision)


@jit(do_not_specialize=["window", "chunk"])
def _attend_tiles(
    query_ptr,
    query_row_stride,
    query_head_stride,
    keys,
    values,
    out_ptr,
    tiles_ptr,
    blocks_ptr,
    sizes_ptr,
    sinks_ptr,
    scale,
    softcap,
    window,
    chunk,
    ROWS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_OF_EACH: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_EXACT: tl.constexpr,
    LAGS: tl.constexpr,
    HOLDS_QUERIES: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
):
    precision: tl.constexpr = "ieee" if IS_EXACT else "tf32"
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    rows = tl.arange(0, ROWS)
    head_in_group = rows % HEADS_OF_EACH
    query_at = rows // HEADS_OF_EACH
    dims = tl.arange(0, WIDTH)
    v_dims = tl.arange(0, V_WIDTH)
    unit = 1.0 if HAS_SOFTCAP else scale

    cta = tl.program_id(0)
    num_ctas = tl.num_programs(0)
    num_items = tl.load(sizes_ptr) * NUM_KV_HEADS
    num_full_turns = num_items // num_ctas
    has_more = _item(num_full_turns, cta, num_ctas) < num_items
    for turn in range(num_full_turns + has_more.to(tl.int32)):
        item = _item(turn, cta, num_ctas)
        kv_head = item % NUM_KV_HEADS
        tile = tiles_ptr + item // NUM_KV_HEADS * _TILE_FIELDS
        first_row = tl.load(tile)
        num_queries = tl.load(tile + 1)
        position = tl.load(tile + 2)
        first_page = tl.load(tile + 3)
        num_pages = tl.load(tile + 4)
        place = tl.load(tile + 5)

        heads = kv_head * group + head_in_group
        is_row = (query_at < num_queries) & (head_in_group < group)
        token_rows = (first_row + query_at).to(tl.int64)
        query = tl.load(
            query_ptr
            + (token_rows * query_row_stride + heads * query_head_stride)[:, None]
            + dims[None, :],
            mask=is_row[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        if HOLDS_QUERIES:
            # What comes from a load as it is, Triton brings to shared memory.
            query = tl.where(is_row[:, None], query, 0.0)
        positions = position + query_at
        first_keys = tl.maximum(positions - window + 1, positions // chunk * chunk)
        last = position + num_queries - 1
        # From here to ``position``, every query of the tile sees every key.
        seen_from = tl.maximum(last - window + 1, last // chunk * chunk)

        greatest = tl.full([ROWS], _LOWEST, tl.float32)
        normaliser = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, V_WIDTH], tl.float32)
        # Of the page before: at first, of one that is read as zeros.
        weights = tl.zeros([ROWS, PAGE], tl.float32)
        factor = tl.full([ROWS], 1.0, tl.float32)
        value_place = 0
        value_shift = -PAGE
        last_place = place + num_pages - 1
        block = tl.load(blocks_ptr + place)
        for page in tl.range(first_page, first_page + num_pages, num_stages=STAGES):
            key_place = block * NUM_KV_HEADS + kv_head
            shift = tl.minimum(last - page * PAGE - (PAGE - 1), 0)
            place += 1
            block = tl.load(blocks_ptr + tl.minimum(place, last_place))
            key = keys.load([key_place, shift, 0]).reshape(PAGE, WIDTH)
            scores = tl.dot(query, key.T, input_precision=precision)
            if LAGS:
                sums = _add_values(
                    sums, factor, weights, values, value_place, value_shift, IS_EXACT
                )
                value_place = key_place
                value_shift = shift
            if HAS_SOFTCAP:
                scores = _cap(scores * scale, softcap)
            if (page * PAGE < seen_from) | (page * PAGE + PAGE - 1 > position):
                scores = _mask(scores, positions, first_keys, page, shift, PAGE)
            raised = tl.maximum(greatest, tl.max(scores, 1) * unit)
            factor = tl.exp2(greatest - raised)
            weights = tl.exp2(scores * unit - raised[:, None])
            normaliser = normaliser * factor + tl.sum(weights, 1)
            greatest = raised
            if not LAGS:
                sums = _add_values(sums, factor, weights, values, key_place, shift, IS_EXACT)
        if LAGS:
            sums = _add_values(sums, factor, weights, values, value_place, value_shift, IS_EXACT)

        if HAS_SINKS:
            sink = tl.load(sinks_ptr + heads, mask=is_row, other=0.0)
            normaliser, sums = add_sink(greatest, normaliser, sums, sink)
        tl.store(
            out_ptr + ((token_rows * NUM_HEADS + heads) * V_DIM)[:, None] + v_dims[None, :],
            (sums * (1 / normaliser)[:, None]).to(out_ptr.dtype.element_ty),
            mask=is_row[:, None] & (v_dims < V_DIM)[None, :],
        )
