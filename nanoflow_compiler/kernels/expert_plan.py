"""Which rows of which expert are computed together: counted and ordered on the GPU, in one launch.

A *pair* is a token and one of its experts, numbered as in ``[T, k]``. Pairs are ordered by expert, and
those of one expert by their numbers; the pairs of an expert are divided into tiles. There are as many
tiles as any routing of so many tokens may need, and those without rows come last: shapes depend on nothing
that only the GPU knows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.kernels.jit import jit

__all__ = ["TILE_FIELDS", "ExpertTiles", "is_expert", "most_tiles", "plan_tiles"]

TILE_FIELDS = tl.constexpr(3)
"""Of a tile: its expert, the place of its first pair in the order, and its rows."""
_MOST_PAIRS = 1 << 31
_FEW_PAIRS = 1024
_TILES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """The order of the pairs, and its tiles."""

    pairs: Tensor
    """int32 ``[T * k]``; undefined from the number of pairs that have an expert on."""
    tiles: Tensor
    """int32 ``[most tiles, fields]``."""
    rows: int
    """Of a tile, at most."""
    top_k: int


def most_tiles(num_pairs: int, *, num_experts: int, rows: int) -> int:
    """Tiles that the worst routing needs: each has a pair, and one of each expert may be partly filled."""
    return min(num_pairs, num_pairs // rows + num_experts)


def plan_tiles(top_k_index: Tensor, *, num_experts: int, rows: int) -> ExpertTiles:
    """Tiles for the experts ``top_k_index [T, k]``, contiguous; whatever is no expert has no tile.

    Each expert has a thread block, which reads all pairs twice: to count those of all experts, and to
    give its own their places.
    """
    num_pairs = top_k_index.numel()
    assert num_pairs < _MOST_PAIRS
    num_tiles = most_tiles(num_pairs, num_experts=num_experts, rows=rows)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=top_k_index.device)
    tiles = pairs.new_empty(num_tiles, TILE_FIELDS.value)
    is_small = num_pairs <= _FEW_PAIRS
    launcher: Any = _plan[(num_experts,)]
    launcher(
        top_k_index,
        pairs,
        tiles,
        num_pairs,
        num_tiles,
        NUM_EXPERTS=num_experts,
        BINS=triton.next_power_of_2(num_experts + 1),
        ROWS=rows,
        CHUNK=_FEW_PAIRS if is_small else 4 * _FEW_PAIRS,
        SPAN=_TILES_AT_ONCE,
        num_warps=4 if is_small else 16,
    )
    return ExpertTiles(pairs, tiles, rows, top_k_index.shape[1])


@jit
def is_expert(chosen, NUM_EXPERTS: tl.constexpr):
    return (chosen >= 0) & (chosen < NUM_EXPERTS)


@jit
def _load_experts(chosen_ptr, pairs, num_pairs, NUM_EXPERTS: tl.constexpr):
    """Of some pairs; all that is no expert is the one past the last."""
    chosen = tl.load(chosen_ptr + pairs, mask=pairs < num_pairs, other=NUM_EXPERTS)
    return tl.where(is_expert(chosen, NUM_EXPERTS), chosen, NUM_EXPERTS).to(tl.int32)


@jit(do_not_specialize=["num_pairs", "num_tiles"])
def _plan(
    chosen_ptr,
    pairs_ptr,
    tiles_ptr,
    num_pairs,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
):
    expert = tl.program_id(0)
    within = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, CHUNK):
        chosen = _load_experts(chosen_ptr, start + within, num_pairs, NUM_EXPERTS)
        counts += tl.histogram(chosen, BINS)
    bins = tl.arange(0, BINS)
    is_before = bins < expert
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    first_place = tl.sum(tl.where(is_before, counts, 0), 0)
    first_tile = tl.sum(tl.where(is_before, (counts + ROWS - 1) // ROWS, 0), 0)

    # The last expert writes the tiles without rows, too.
    own_tiles = (count + ROWS - 1) // ROWS
    num_written = tl.where(expert == NUM_EXPERTS - 1, num_tiles - first_tile, own_tiles)
    for start in range(0, num_written, SPAN):
        tiles = start + tl.arange(0, SPAN)
        is_written = tiles < num_written
        fields = tiles_ptr + (first_tile + tiles) * TILE_FIELDS
        rows = tl.minimum(tl.maximum(count - tiles * ROWS, 0), ROWS)
        tl.store(fields, tiles * 0 + expert, mask=is_written)
        tl.store(fields + 1, first_place + tiles * ROWS, mask=is_written)
        tl.store(fields + 2, rows, mask=is_written)

    place = first_place
    if count > 0:
        for start in range(0, num_pairs, CHUNK):
            pairs = start + within
            is_own = _load_experts(chosen_ptr, pairs, num_pairs, NUM_EXPERTS) == expert
            ranks = tl.cumsum(is_own.to(tl.int32), 0)
            tl.store(pairs_ptr + place + ranks - 1, pairs, mask=is_own)
            place += tl.max(ranks, 0)
