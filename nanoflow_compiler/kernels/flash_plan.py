"""Which thread block computes which queries of which head, as FlashInfer's kernel for prompts reads it.

An item has up to 128 queries of a request and one head. A thread block computes its items in order, and
keys and values come from the cache of the GPU for those that read what others read at the same time:
the items of a request that share a KV head go around together.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.attention_plan import TILE_OF_ONE_HEAD
from nanoflow_compiler.kv_cache import BLOCK_SIZE

__all__ = ["ITEM_FIELDS", "QUERIES", "FlashPlan", "plan_flash"]

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

QUERIES = TILE_OF_ONE_HEAD
"""Of an item."""
ITEM_FIELDS = 6
_KEYS_OF_AN_ITEM = 2 * QUERIES
"""What beginning and ending an item costs, in keys."""


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """The work of all thread blocks, one after the other."""

    items: Int32s
    """``[6, N]``: which of the request's tiles, head, the request's first row, where its first page is in
    ``blocks``, its queries, and its keys."""
    ends: Int32s
    """``[thread blocks + 1]``, where the items of each begin; then the end."""
    blocks: Int32s
    """``[P]``, where each page of each request is in the cache."""


def plan_flash(
    rows: Ints,
    *,
    counts: Ints,
    positions: Ints,
    tables: Ints,
    heads: tuple[int, int],
    num_ctas: int,
) -> FlashPlan:
    """For ``R`` requests: ``counts [R]`` queries each from row ``rows`` on, the first at ``positions``.

    ``tables [R, blocks]`` are their blocks, ``heads`` those of queries and of keys.
    """
    keys = positions + counts
    num_pages = -(-keys // BLOCK_SIZE)
    places = np.cumsum(num_pages) - num_pages
    owners, tiles, of_heads = _items(keys, counts, heads=heads)
    last = np.minimum((tiles + 1) * QUERIES, counts[owners])
    owner_of_item = _deal(positions[owners] + last + _KEYS_OF_AN_ITEM, num_ctas)
    order = np.argsort(owner_of_item, kind="stable")
    items = np.stack([tiles, of_heads, rows[owners], places[owners], counts[owners], keys[owners]])
    holders = np.repeat(np.arange(len(keys)), num_pages)
    columns = np.arange(len(holders)) - places[holders]
    return FlashPlan(
        items=items[:, order].astype(np.int32),
        ends=np.searchsorted(owner_of_item[order], np.arange(num_ctas + 1)).astype(np.int32),
        blocks=tables[holders, columns].astype(np.int32),
    )


def _items(keys: Ints, counts: Ints, *, heads: tuple[int, int]) -> tuple[Ints, Ints, Ints]:
    """Request, tile and head of each item: long requests first, and of each KV head the last tiles."""
    num_heads, num_kv_heads = heads
    of_heads = np.arange(num_heads).reshape(num_kv_heads, 1, -1)
    found = [np.zeros((3, 0), dtype=np.int64)]
    for request in np.argsort(-keys, kind="stable"):
        tiles = np.arange(-(-counts[request] // QUERIES))[::-1, None]
        items = np.broadcast_arrays(request, tiles, of_heads)
        found.append(np.stack(items).reshape(3, -1))
    owners, numbers, numbers_of_heads = np.concatenate(found, axis=1)
    return owners, numbers, numbers_of_heads


def _deal(costs: Ints, num_ctas: int) -> Ints:
    """For each item its thread block: in rounds, the greatest of a round to who has the least so far."""
    loads = np.zeros(num_ctas, dtype=np.int64)
    dealt = np.empty(len(costs), dtype=np.int64)
    for start in range(0, len(costs), num_ctas):
        order = start + np.argsort(-costs[start : start + num_ctas], kind="stable")
        takers = np.argsort(loads, kind="stable")[: len(order)]
        dealt[order] = takers
        loads[takers] += costs[order]
    return dealt
