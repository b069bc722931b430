"""Which thread block reads which pages: decode attention balanced for any mixture of lengths.

The pages of all decodes lie in one row, a request's one after the other, and each thread block takes
an equal *share* of the row (as stream-K does with the tiles of a GEMM: Osama et al., 2023). A request
that reaches over the border of a share is *split*: the pieces are merged afterwards.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.kv_cache import BLOCK_SIZE

__all__ = ["SPLIT_FIELDS", "DecodePlan", "Int32s", "plan_decode"]

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

# A page as the kernel reads it: row << 14 | is_first << 13 | is_last << 12 | first token << 6 | last token.
ROW, IS_FIRST, IS_LAST, FIRST_TOKEN = 14, 13, 12, 6
MAX_ROWS = 1 << (31 - ROW)

SPLIT_FIELDS = 4


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The work of one decode attention, the same for every KV head."""

    blocks: Int32s
    """``[P]``, where each page is in the cache."""
    pages: Int32s
    """``[P]``: the row of its request, what of the page is visible, and whether a request begins or ends."""
    sizes: Int32s
    """``[2]``: pages, and pages of a share."""
    splits: Int32s
    """``[S, 4]`` of split requests: row, slot of the first piece, first and last share."""
    pieces: Int32s
    """``[shares, 2]``: for both slots of a share the split request that it has a piece of, or -1."""


def plan_decode(
    rows: Ints, *, positions: Ints, first_keys: Ints, tables: Ints, num_shares: int
) -> DecodePlan:
    """For ``R`` requests, each with one query.

    ``rows [R]`` are the rows of the queries, ``positions [R]`` their places in the requests, ``first_keys
    [R]`` the first keys that they see (and then all up to themselves), ``tables [R, blocks]`` their blocks.
    """
    assert rows.max(initial=0) < MAX_ROWS, "a row number does not fit into a page's description"
    first_pages, last_pages = first_keys // BLOCK_SIZE, positions // BLOCK_SIZE
    counts = last_pages - first_pages + 1
    ends = np.cumsum(counts)
    starts = ends - counts
    num_pages = int(counts.sum())
    owners = np.repeat(np.arange(len(rows)), counts)
    at = np.arange(num_pages)
    columns = at - starts[owners] + first_pages[owners]
    is_first, is_last = at == starts[owners], at == ends[owners] - 1
    first_tokens = np.where(is_first, first_keys[owners] % BLOCK_SIZE, 0)
    last_tokens = np.where(is_last, positions[owners] % BLOCK_SIZE, BLOCK_SIZE - 1)
    pages = rows[owners] << ROW
    pages |= (is_first << IS_FIRST) | (is_last << IS_LAST) | (first_tokens << FIRST_TOKEN)
    pages |= last_tokens
    share = max(1, -(-num_pages // num_shares))
    splits = _splits(rows, starts=starts, ends=ends, share=share)
    return DecodePlan(
        blocks=tables[owners, columns].astype(np.int32),
        pages=pages.astype(np.int32),
        sizes=np.array([num_pages, share], dtype=np.int32),
        splits=splits,
        pieces=_pieces(splits, num_shares=num_shares),
    )


def _splits(rows: Ints, *, starts: Ints, ends: Ints, share: int) -> Int32s:
    """A thread block has two slots: for a request that it begins with, and for one that it ends with."""
    first, last = starts // share, (ends - 1) // share
    slots = 2 * first + (starts % share != 0)
    splits = np.stack([rows, slots, first, last], axis=1)[first < last]
    return splits.astype(np.int32)


def _pieces(splits: Int32s, *, num_shares: int) -> Int32s:
    """All pieces of a request but the first are what their share begins with."""
    pieces = np.full((num_shares, 2), -1, dtype=np.int32)
    numbers = np.arange(len(splits), dtype=np.int32)
    _, first_slots, first, last = splits.T
    counts = last - first
    others = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces[np.repeat(first, counts) + 1 + others, 0] = np.repeat(numbers, counts)
    pieces.reshape(-1)[first_slots] = numbers
    return pieces
