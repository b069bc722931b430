"""Which queries share a tile of scores, and in which order the tiles are computed.

A tile has the queries of one request that its rows have room for, with all query heads of a KV head; it
is computed once for each KV head. Thread blocks take tiles in the order of the plan.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.kv_cache import BLOCK_SIZE

__all__ = ["TILE_FIELDS", "Int32s", "PrefillPlan", "plan_prefill"]

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

TILE_FIELDS = 6
_NUM_CLASSES = 8


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The work of the attention of many queries, the same for every KV head."""

    tiles: Int32s
    """``[N, 6]``: row, number and position of the (first) query, number of the first page that it sees,
    number of pages that the tile sees, and where the first of them is in ``blocks``."""
    blocks: Int32s
    """``[P]``, where each page is in the cache: those that a request sees, in order."""
    sizes: Int32s
    """``[1]``: tiles."""


def plan_prefill(
    rows: Ints,
    *,
    counts: Ints,
    positions: Ints,
    tables: Ints,
    visibility: Visibility,
    queries: int,
) -> PrefillPlan:
    """For ``R`` requests: ``counts [R]`` queries each from row ``rows`` on, the first at ``positions``.

    ``tables [R, blocks]`` are their blocks, ``queries`` is how many a tile has room for.
    """
    owners, starts = _pieces(-(-counts // queries))
    starts *= queries
    nums = np.minimum(counts[owners] - starts, queries)
    at = positions[owners] + starts
    first_pages = visibility.first_key(at) // BLOCK_SIZE
    num_pages = (at + nums - 1) // BLOCK_SIZE - first_pages + 1

    first_seen = visibility.first_key(positions) // BLOCK_SIZE
    num_seen = (positions + counts - 1) // BLOCK_SIZE - first_seen + 1
    holders, columns = _pieces(num_seen)
    places = (np.cumsum(num_seen) - num_seen - first_seen)[owners] + first_pages

    tiles = np.stack([rows[owners] + starts, nums, at, first_pages, num_pages, places], axis=1)
    return PrefillPlan(
        tiles=tiles[_order(num_pages)].astype(np.int32),
        blocks=tables[holders, first_seen[holders] + columns].astype(np.int32),
        sizes=np.array([len(tiles)], dtype=np.int32),
    )


def _pieces(counts: Ints) -> tuple[Ints, Ints]:
    """For each piece of each request: the request, and the number of the piece in it."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)


def _order(num_pages: Ints) -> Ints:
    """Long tiles first, so that only short ones are left when some thread blocks have no more.

    Only by classes of length: in a class, the tiles of a request stay together, so that those which run
    at the same time read the same pages, which then come from the cache of the GPU.
    """
    classes = -(-num_pages * _NUM_CLASSES // num_pages.max(initial=1))
    order: Ints = np.argsort(-classes, kind="stable")
    return order
