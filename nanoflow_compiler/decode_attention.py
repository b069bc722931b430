"""Attention of decodes on a CPU that copies no key and no value: weighted sums of rows of the cache.

Where blocks hold keys by dimension, the scores of a block's 64 tokens are the sum of the rows of its
dimensions, weighted by the query; an output is the sum of the rows of values, weighted by the softmax of
the scores. Sums over rows picked by number are what ``embedding_bag`` computes, one *bag* for each. So
requests of any lengths go together, and nothing but what they see is read.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoflow_compiler.attention_plan import Bools, Ints, Requests, Visibility
from nanoflow_compiler.kv_cache import BLOCK_SIZE, RowTables
from nanoflow_compiler.scoring import Scoring

__all__ = ["Decodes", "Heads", "attend_decodes", "plan_sums"]


@dataclass(frozen=True, slots=True)
class Heads:
    """What row numbers depend on beside the blocks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Bags:
    """The rows of all bags, one after the other, and where each bag begins; then the end."""

    rows: Tensor
    starts: Tensor

    def sum(self, table: Tensor, weights: Tensor) -> Tensor:
        """For each bag the sum of its rows of ``table``; there is a weight for each of ``rows``."""
        sums: Tensor = torch.ops.aten._embedding_bag_forward_only(
            table, self.rows, self.starts, per_sample_weights=weights, include_last_offset=True
        )[0]
        return sums


@dataclass(frozen=True, slots=True)
class Decodes:
    """Requests with one row each; blocks are counted from the first that a request sees."""

    rows: slice | Tensor
    requests: Tensor  # whose each block is
    keys: Bags  # one for each request, block (up to the most that one has) and head
    bias: Tensor  # [R, 1, blocks, 64]: 0 where a token is seen, else -inf
    seen: slice | Tensor  # the same tokens of each request, or tokens among those of all heads
    values: Bags  # one for each request and head


def attend_decodes(
    query: Tensor, *, tables: RowTables, decodes: Decodes, scoring: Scoring
) -> Tensor:
    """For queries ``[R, heads, dim]``."""
    num_requests, num_heads = query.shape[:2]
    weights = query.flatten(1).index_select(0, decodes.requests).view(-1)
    sums = decodes.keys.sum(tables.keys, weights)
    products = sums.view(num_requests, -1, num_heads, BLOCK_SIZE).transpose(1, 2)
    scores = query.new_empty(products.shape)
    if scoring.softcap:
        torch.add(decodes.bias, scoring.cap(products * scoring.scale), out=scores)
    else:
        torch.add(decodes.bias, products, alpha=scoring.scale, out=scores)
    probabilities = scoring.weigh(scores.flatten(2), heads=(num_heads,))
    if isinstance(decodes.seen, slice):
        probabilities = probabilities[..., decodes.seen].flatten()
    else:
        probabilities = probabilities.flatten().index_select(0, decodes.seen)
    return decodes.values.sum(tables.values, probabilities).view(num_requests, num_heads, -1)


def plan_sums(requests: Requests, *, visibility: Visibility, heads: Heads) -> Decodes | None:
    """How the decodes of a part are computed; None without any."""
    chosen = requests.decodes
    if not len(chosen):
        return None
    positions = requests.contexts[chosen]
    first_blocks = visibility.first_key(positions) // BLOCK_SIZE
    num_blocks = positions // BLOCK_SIZE - first_blocks + 1
    columns = np.arange(num_blocks.max())
    exists = columns < num_blocks[:, None]
    columns = first_blocks[:, None] + columns
    blocks = requests.blocks_of(chosen, columns=columns)
    tokens = (columns[..., None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(len(chosen), -1)
    seen = visibility.mask(positions, keys=tokens)
    slots = (blocks[..., None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(tokens.shape)
    bias = np.where(seen, np.float32(0), -np.float32(np.inf))
    return Decodes(
        rows=requests.index(requests.starts[chosen]),
        requests=requests.tensor(np.nonzero(exists)[0]),
        keys=_key_bags(blocks, exists, heads=heads, requests=requests),
        bias=requests.tensor(bias.reshape(len(chosen), 1, -1, BLOCK_SIZE)),
        seen=_seen(seen, heads=heads, requests=requests),
        values=_value_bags(slots, seen, heads=heads, requests=requests),
    )


def _kv_heads(heads: Heads) -> Ints:
    """Of each head the one whose keys and values it reads."""
    return np.arange(heads.num_heads) // (heads.num_heads // heads.num_kv_heads)


def _key_bags(blocks: Ints, exists: Bools, *, heads: Heads, requests: Requests) -> Bags:
    """A block that does not exist is an empty bag, and its sum zero."""
    first_rows = blocks[exists][:, None] * heads.num_kv_heads + _kv_heads(heads)
    rows = first_rows[..., None] * heads.head_dim + np.arange(heads.head_dim)
    lengths = np.repeat(exists.ravel() * heads.head_dim, heads.num_heads)
    return _bags(rows, lengths, requests=requests)


def _value_bags(slots: Ints, seen: Bools, *, heads: Heads, requests: Requests) -> Bags:
    rows = slots[:, None] * heads.num_kv_heads + _kv_heads(heads)[:, None]
    lengths = np.repeat(seen.sum(1), heads.num_heads)
    return _bags(rows[np.broadcast_to(seen[:, None], rows.shape)], lengths, requests=requests)


def _bags(rows: Ints, lengths: Ints, *, requests: Requests) -> Bags:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Bags(requests.tensor(rows.ravel()), requests.tensor(starts))


def _seen(seen: Bools, *, heads: Heads, requests: Requests) -> slice | Tensor:
    if (seen == seen[0]).all():
        (tokens,) = np.nonzero(seen[0])
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    every_head = np.broadcast_to(seen[:, None], (len(seen), heads.num_heads, seen.shape[1]))
    return requests.tensor(np.flatnonzero(every_head))
