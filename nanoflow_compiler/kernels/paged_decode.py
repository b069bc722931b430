"""Attention of decodes over a paged KV cache: persistent thread blocks that read pages through TMA.

A thread block reads the pages of one KV head that :mod:`decode_plan` gives it, and attends with all
query heads of that KV head at once (they are the rows of a tensor core's tile). What it finds of a
request that others share in goes to a workspace as a sum, its maximum and its normaliser; whoever finishes
such a request last merges its pieces. Scores are in units of log2, softmax is computed in float32.

On one H200 the three benchmarks of ``benchmarks/decode_attention.py`` read 4.0 to 4.4 TB/s.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.kernels import decode_plan
from nanoflow_compiler.kernels.decode_plan import SPLIT_FIELDS, Int32s, plan_decode
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pages import (
    LEAST_SIDE,
    LOG2E,
    add_sink,
    descriptor,
    width,
)
from nanoflow_compiler.kernels.pdl import launch, let_next_begin, wait
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages
from nanoflow_compiler.scoring import Scoring
from nanoflow_compiler.sm_budget import current_sms

__all__ = ["PageReads", "Tiling", "attend_pages", "plan_pages", "reads_with_room"]

_ROW = tl.constexpr(decode_plan.ROW)
_IS_FIRST = tl.constexpr(decode_plan.IS_FIRST)
_IS_LAST = tl.constexpr(decode_plan.IS_LAST)
_FIRST_TOKEN = tl.constexpr(decode_plan.FIRST_TOKEN)
_SHARED_BYTES = 200 << 10
"""Of a multiprocessor's shared memory, for the pages under way."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What may be tuned: pages under way, and who works on them."""

    ctas_per_sm: int = 3
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, pages: HeadPages) -> "Tiling":
        """Three thread blocks for each multiprocessor where their pages fit: they wait by turns."""
        row_bytes = sum(width(pool) * pool.element_size() for pool in (pages.keys, pages.values))
        most = cls()
        num_ctas = _SHARED_BYTES // (most.num_stages * BLOCK_SIZE * row_bytes)
        return replace(most, ctas_per_sm=max(1, min(most.ctas_per_sm, num_ctas)))


@dataclass(frozen=True, slots=True)
class PageReads:
    """Which thread block reads what: a :class:`DecodePlan` on the device."""

    blocks: Tensor
    pages: Tensor
    sizes: Tensor
    splits: Tensor
    pieces: Tensor
    arrived: Tensor
    """``[shares, KV heads]``: of each split request, the pieces that are there. Zero between launches."""
    visibility: Visibility
    num_shares: int
    tiling: Tiling

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blocks, self.pages, self.sizes, self.splits, self.pieces)

    def arrays(self, requests: Requests) -> tuple[Int32s, ...]:
        """What goes to the beginning of :attr:`tensors`, with room, to serve these requests."""
        chosen = requests.decodes
        positions = requests.contexts[chosen]
        plan = plan_decode(
            requests.starts[chosen],
            positions=positions,
            first_keys=self.visibility.first_key(positions),
            tables=requests.tables[chosen],
            num_shares=self.num_shares,
        )
        return (plan.blocks, plan.pages, plan.sizes, plan.splits, plan.pieces)


def plan_pages(
    requests: Requests,
    pages: HeadPages,
    *,
    visibility: Visibility,
    tiling: Tiling | None = None,
) -> PageReads | None:
    """How the requests of a part that have a single row are computed; None without any."""
    if not len(requests.decodes):
        return None
    reads = reads_with_room(pages, visibility=visibility, num_pages=0, tiling=tiling)
    blocks, described, sizes, splits, pieces = requests.tensors(reads.arrays(requests))
    return replace(reads, blocks=blocks, pages=described, sizes=sizes, splits=splits, pieces=pieces)


def reads_with_room(
    pages: HeadPages, *, visibility: Visibility, num_pages: int, tiling: Tiling | None = None
) -> PageReads:
    """Of nothing yet, with room for so many pages: see :meth:`PageReads.arrays`."""
    tiling = tiling or Tiling.of(pages)
    device = pages.keys.device
    num_shares = max(1, current_sms(device) * tiling.ctas_per_sm // pages.keys.shape[1])

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return PageReads(
        blocks=zeros(num_pages),
        pages=zeros(num_pages),
        sizes=zeros(2),
        # Fewer requests are split than there are borders of shares.
        splits=zeros(num_shares, SPLIT_FIELDS),
        pieces=zeros(num_shares, 2) - 1,
        arrived=zeros(num_shares, pages.keys.shape[1]),
        visibility=visibility,
        num_shares=num_shares,
        tiling=tiling,
    )


def attend_pages(
    query: Tensor,
    pages: HeadPages,
    *,
    reads: PageReads,
    scoring: Scoring,
    out: Tensor,
    pdl: bool = False,
) -> None:
    """Write the rows of ``reads`` in ``out [T, heads, v dim]``, for ``query [T, heads, dim]``.

    With ``pdl``, what ``reads`` holds has been on the device since before the step's first kernel.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    num_heads, num_kv_heads = query.shape[1], pages.keys.shape[1]
    group, v_dim = num_heads // num_kv_heads, pages.values.shape[-1]
    slots = (2 * reads.num_shares, num_heads)
    sums = torch.empty(*slots, v_dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(*slots, 2, dtype=torch.float32, device=query.device)
    softcap = scoring.softcap
    launch(_read_pages, (reads.num_shares, num_kv_heads), pdl=pdl)(
        query,
        query.stride(0),
        query.stride(1),
        descriptor(pages.keys),
        descriptor(pages.values),
        out,
        sums,
        stats,
        reads.blocks,
        reads.pages,
        reads.sizes,
        reads.splits,
        reads.pieces,
        reads.arrived,
        scoring.sinks,
        scoring.scale / softcap if softcap else scoring.scale * LOG2E,
        softcap * LOG2E,
        GROUP=group,
        GROUP_ROWS=triton.next_power_of_2(group),
        NUM_HEADS=num_heads,
        ROWS=max(LEAST_SIDE, triton.next_power_of_2(group)),
        DIM=query.shape[-1],
        WIDTH=width(pages.keys),
        V_DIM=v_dim,
        V_WIDTH=width(pages.values),
        HAS_SOFTCAP=bool(softcap),
        HAS_SINKS=scoring.sinks is not None,
        IS_EXACT=query.dtype is torch.float32,
        PAGE=BLOCK_SIZE,
        STAGES=reads.tiling.num_stages,
        SPLIT_FIELDS=SPLIT_FIELDS,
        PIECES=_PIECES,
        num_warps=reads.tiling.num_warps,
    )


_PIECES = 8
"""Of a split request, that are merged together."""


@jit
def _merge(
    sums_ptr,
    stats_ptr,
    split_ptr,
    out_ptr,
    sinks_ptr,
    kv_head,
    GROUP: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """All pieces of a split request, for the heads of a KV head."""
    row = tl.load(split_ptr).to(tl.int64)
    first_slot = tl.load(split_ptr + 1)
    first = tl.load(split_ptr + 2)
    last = tl.load(split_ptr + 3)
    members = tl.arange(0, GROUP_ROWS)
    heads = kv_head * GROUP + members
    is_head = members < GROUP
    dims = tl.arange(0, V_WIDTH)
    greatest = tl.full([GROUP_ROWS], float("-inf"), tl.float32)
    normaliser = tl.zeros([GROUP_ROWS], tl.float32)
    sums = tl.zeros([GROUP_ROWS, V_WIDTH], tl.float32)
    for start in range(first, last + 1, PIECES):
        shares = start + tl.arange(0, PIECES)
        slots = tl.where(shares == first, first_slot, 2 * shares)
        pieces = slots[:, None] * NUM_HEADS + heads[None, :]
        is_piece = (shares <= last)[:, None] & is_head[None, :]
        # Others wrote them while this kernel ran: not through a cache that does not know.
        peaks = tl.load(
            stats_ptr + pieces * 2, mask=is_piece, other=float("-inf"), cache_modifier=".cg"
        )
        parts = tl.load(stats_ptr + pieces * 2 + 1, mask=is_piece, other=0.0, cache_modifier=".cg")
        values = tl.load(
            sums_ptr + pieces[:, :, None] * V_DIM + dims[None, None, :],
            mask=is_piece[:, :, None] & (dims < V_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        raised = tl.maximum(greatest, tl.max(peaks, 0))
        factors = tl.exp2(peaks - raised[None, :])
        factor = tl.exp2(greatest - raised)
        normaliser = normaliser * factor + tl.sum(parts * factors, 0)
        sums = sums * factor[:, None] + tl.sum(values * factors[:, :, None], 0)
        greatest = raised
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + heads, mask=is_head, other=0.0)
        normaliser, sums = add_sink(greatest, normaliser, sums, sink)
    places = (row * NUM_HEADS + heads)[:, None] * V_DIM + dims[None, :]
    result = (sums / normaliser[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, result, mask=is_head[:, None] & (dims < V_DIM)[None, :])


@jit
def _read_pages(
    query_ptr,
    query_row_stride,
    query_head_stride,
    keys,
    values,
    out_ptr,
    sums_ptr,
    stats_ptr,
    blocks_ptr,
    pages_ptr,
    sizes_ptr,
    splits_ptr,
    pieces_ptr,
    arrived_ptr,
    sinks_ptr,
    scale,
    softcap,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    V_DIM: tl.constexpr,
    V_WIDTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_EXACT: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT_FIELDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_begin(PDL)
    share_at = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    # Other steps had other plans: until the wait, not through a cache that may remember one.
    num_pages = tl.load(sizes_ptr, cache_modifier=".cg")
    share = tl.load(sizes_ptr + 1, cache_modifier=".cg")
    begin = share_at * share
    end = tl.minimum(begin + share, num_pages)
    # Who has no pages makes room at once; of those that wait, one is always there.
    if (begin < end) | (share_at == 0):
        wait(PDL)

    rows = tl.arange(0, ROWS)
    heads = kv_head * GROUP + rows
    is_head = rows < GROUP
    dims = tl.arange(0, WIDTH)
    v_dims = tl.arange(0, V_WIDTH)
    tokens = tl.arange(0, PAGE)
    precision: tl.constexpr = "ieee" if IS_EXACT else "tf32"

    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    normaliser = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, V_WIDTH], tl.float32)
    run_begin = begin
    has_first = 0
    for at in tl.range(begin, end, num_stages=STAGES):
        block = tl.load(blocks_ptr + at)
        page = tl.load(pages_ptr + at)
        row = (page >> _ROW).to(tl.int64)
        is_first = (page >> _IS_FIRST) & 1
        is_last = (page >> _IS_LAST) & 1
        query = tl.load(
            query_ptr + row * query_row_stride + heads[:, None] * query_head_stride + dims[None, :],
            mask=is_head[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        place = block * num_kv_heads + kv_head
        # From before the page on, where its last tokens are not seen: what lies before it reads as zero.
        shift = (page & (PAGE - 1)) - (PAGE - 1)
        key = tl.reshape(keys.load([place, shift, 0]), [PAGE, WIDTH])
        scores = tl.dot(query, key.T, input_precision=precision) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores) - 1)
        first_token = (page >> _FIRST_TOKEN) & (PAGE - 1)
        is_seen = tokens + shift >= first_token
        scores = tl.where(is_seen[None, :], scores, float("-inf"))

        is_start = (at == begin) | (is_first == 1)
        run_begin = tl.where(is_start, at, run_begin)
        has_first = tl.where(is_start, is_first, has_first)
        before = tl.where(is_start, float("-inf"), greatest)
        greatest = tl.maximum(before, tl.max(scores, 1))
        weights = tl.exp2(scores - greatest[:, None])
        factor = tl.exp2(before - greatest)
        normaliser = tl.where(is_start, 0.0, normaliser) * factor + tl.sum(weights, 1)
        sums = tl.where(is_start, 0.0, sums) * factor[:, None]
        value = tl.reshape(values.load([place, shift, 0]), [PAGE, V_WIDTH])
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision=precision)

        if (is_last == 1) | (at == end - 1):
            is_written = is_head[:, None] & (v_dims < V_DIM)[None, :]
            if (has_first == 1) & (is_last == 1):
                if HAS_SINKS:
                    sink = tl.load(sinks_ptr + heads, mask=is_head, other=0.0)
                    whole, totals = add_sink(greatest, normaliser, sums, sink)
                else:
                    whole = normaliser
                    totals = sums
                places = (row * NUM_HEADS + heads)[:, None] * V_DIM + v_dims[None, :]
                result = totals / whole[:, None]
                tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=is_written)
            else:
                slot = 2 * share_at + tl.where(run_begin == begin, 0, 1)
                pieces = slot * NUM_HEADS + heads
                tl.store(
                    sums_ptr + pieces[:, None] * V_DIM + v_dims[None, :], sums, mask=is_written
                )
                tl.store(stats_ptr + pieces * 2, greatest, mask=is_head)
                tl.store(stats_ptr + pieces * 2 + 1, normaliser, mask=is_head)

    # Behind the loop, because a loop that holds another is not pipelined.
    for which in tl.static_range(2):
        split = tl.load(pieces_ptr + 2 * share_at + which, cache_modifier=".cg")
        if split >= 0:
            described = splits_ptr + split * SPLIT_FIELDS
            num_pieces = tl.load(described + 3) - tl.load(described + 2) + 1
            arrived = arrived_ptr + split * num_kv_heads + kv_head
            # All threads have written before one of them says so, and whoever comes last sees it all.
            tl.debug_barrier()
            if tl.atomic_add(arrived, 1, sem="acq_rel") == num_pieces - 1:
                tl.store(arrived, 0)
                _merge(
                    sums_ptr,
                    stats_ptr,
                    described,
                    out_ptr,
                    sinks_ptr,
                    kv_head,
                    GROUP,
                    NUM_HEADS,
                    V_DIM,
                    V_WIDTH,
                    HAS_SINKS,
                    GROUP_ROWS,
                    PIECES,
                )
