"""Draws tokens from logits, so that a row's token never depends on the rows beside it.

Weights are integers: their sums are exact, whatever order a device adds them in. Truncation keeps
every token at or above a limit, so the order of equal logits never matters.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

__all__ = ["Draw", "draw"]

# Weights are relative to the most likely token; 2**18 tokens of this weight still add up in int64.
ONE = 2.0**40
NUM_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Draw:
    """How rows are drawn, as columns ``[rows, 1]`` on the device of the logits."""

    temperature: Tensor
    least: Tensor
    """The logarithm of ``min_p``."""
    limit: Tensor
    """Of tokens, from 1 to the size of the vocabulary."""
    top_p: Tensor
    uniform: Tensor
    """In [0, 1), float64."""


def draw(logits: Tensor, settings: Draw, *, num_ordered: int | None) -> Tensor:
    """One token per row.

    ``num_ordered`` is the largest limit, 0 if ``min_p`` alone truncates, ``None`` if nothing does.
    """
    # Shifted first, because logits over a tiny temperature overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(settings.temperature)
    least = settings.least
    if num_ordered:
        least = _least_kept(scaled, settings, num_ordered=num_ordered)
    if num_ordered is not None:
        scaled.masked_fill_(scaled < least, -torch.inf)
    return _invert(scaled, settings.uniform)


def _least_kept(scaled: Tensor, settings: Draw, *, num_ordered: int) -> Tensor:
    """The smallest scaled logit that ``min_p``, ``top_k`` and ``top_p`` keep, in this order."""
    ordered = _ordered(scaled, num_ordered)
    least = torch.maximum(settings.least, ordered.gather(-1, settings.limit - 1))
    places = torch.arange(num_ordered, device=scaled.device)
    is_cut = (ordered < least) | (places >= settings.limit)
    weights = _weights(ordered.masked_fill_(is_cut, -torch.inf)).long()
    sums = weights.cumsum(-1)
    is_within = (sums - weights) < settings.top_p * sums[:, -1:]
    # Where no weight is known (all logits infinite), the first place stands in.
    last = (is_within.sum(-1, keepdim=True) - 1).clamp(min=0)
    return torch.maximum(least, ordered.gather(-1, last))


def _ordered(scaled: Tensor, count: int) -> Tensor:
    if count < scaled.shape[-1]:
        return scaled.topk(count, dim=-1).values
    return scaled.sort(dim=-1, descending=True).values


def _weights(scaled: Tensor) -> Tensor:
    """To be cut to int64, which happens where they are stored."""
    return scaled.exp().mul_(ONE)


def _invert(scaled: Tensor, uniform: Tensor) -> Tensor:
    """The tokens where the running sum of weights passes the fraction ``uniform`` of the total.

    First the chunk of tokens where it does, then the token inside of it: one pass over the weights.
    """
    num_rows, num_tokens = scaled.shape
    num_chunks = ceil(num_tokens / NUM_CHUNK_TOKENS)
    weights = scaled.new_empty(num_rows, num_chunks * NUM_CHUNK_TOKENS, dtype=torch.int64)
    weights[:, :num_tokens] = _weights(scaled)
    weights[:, num_tokens:] = 0
    chunks = weights.view(num_rows, num_chunks, NUM_CHUNK_TOKENS)
    own = chunks.sum(-1)
    sums = own.cumsum(-1)
    # Below the total, however it is rounded, because the largest number below 1 is 1 - 2**-53.
    target = (uniform * sums[:, -1:]).long()
    # Clamped for rows without a number, which must not read outside.
    chunk = torch.searchsorted(sums, target, right=True).clamp(max=num_chunks - 1)
    left = target - (sums - own).gather(-1, chunk)
    inside = chunks.gather(1, chunk[:, :, None].expand(-1, -1, NUM_CHUNK_TOKENS))[:, 0]
    place = torch.searchsorted(inside.cumsum(-1), left, right=True)
    return (chunk * NUM_CHUNK_TOKENS + place).clamp(max=num_tokens - 1)[:, 0]
