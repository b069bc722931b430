"""Draws tokens from logits, so that a row's token never depends on the rows beside it.

Weights that top_p adds up are integers: their sums are exact, whatever order a device adds them in.
Truncation keeps every token at or above a limit, so the order of equal logits never matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow_compiler.engine.logprobs import MAX_ELEMENTS
from nanoflow_compiler.engine.noise import log_arrivals

__all__ = ["Draw", "draw"]

# Weights are relative to the most likely token; 2**18 tokens of this weight still add up in int64.
ONE = 2.0**40
_RACED_ON_CPU = 2**18
"""Elements that are drawn together there: what is computed of them stays in the cache of a core."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How rows are drawn, as columns ``[rows, 1]`` on the device of the logits.

    The kernel takes them as ``[rows]``, with those of greedy rows among them.
    """

    temperature: Tensor
    least: Tensor
    """The logarithm of ``min_p``."""
    limit: Tensor
    """Of tokens, from 1 to the size of the vocabulary."""
    top_p: Tensor
    key_low: Tensor
    key_high: Tensor
    """Of the noise."""


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
    return _race(scaled, settings)


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


def _race(scaled: Tensor, settings: Draw) -> Tensor:
    """The tokens that come first, when each takes an exponential time with its weight as the rate.

    Each is the first with the probability of its weight (the Gumbel-max trick: Maddison et al., "A*
    Sampling", 2014). Rounding of a logit matters only where two tokens come at almost the same time.
    Where a sum of weights passes a random point, rounding would move the borders of all tokens.
    """
    size = max(
        1, (_RACED_ON_CPU if scaled.device.type == "cpu" else MAX_ELEMENTS) // len(scaled[0])
    )
    parts = zip(
        *(x.split(size) for x in (scaled, settings.key_low, settings.key_high)), strict=True
    )
    winners = [
        (part - log_arrivals(low, high, num_tokens=scaled.shape[-1])).argmax(-1)
        for part, low, high in parts
    ]
    return torch.cat(winners)
