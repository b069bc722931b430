"""Chooses the next token of every request of a step, all rows at once.

A token is a function of its logits, the request's seed and the token's number in the output: the
uniform number that picks it comes from a counter, not from a generator that other requests advance.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow_compiler.engine.request import Request

__all__ = ["sample", "uniform"]

Unsigned = npt.NDArray[np.uint64]


def sample(logits: Tensor, requests: Sequence[Request], *, eos_token_ids: Iterable[int]) -> Tensor:
    """The next token ``[S]`` of each request from its row of ``logits``, which are left unchanged."""
    logits = _without_early_end(logits, requests, eos_token_ids=frozenset(eos_token_ids))
    chosen = logits.argmax(-1)
    random = [row for row, request in enumerate(requests) if not request.params.is_greedy]
    # Apart, because only a truncated distribution has to be sorted.
    truncated = [row for row in random if _is_truncated(requests[row])]
    whole = [row for row in random if not _is_truncated(requests[row])]
    for rows, draw in ((truncated, _draw_truncated), (whole, _draw_whole)):
        if rows:
            settings = _Settings.of([requests[row] for row in rows], device=logits.device)
            chosen[rows] = draw(logits[rows], settings)
    return chosen


def uniform(seeds: Unsigned, counters: Unsigned) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), one per (seed, counter): two rounds of splitmix64."""
    mixed = _splitmix(_splitmix(seeds) ^ counters)
    return np.ldexp((mixed >> np.uint64(11)).astype(np.float64), -53)


def _splitmix(x: Unsigned) -> Unsigned:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class _Settings:
    """The sampling parameters of some rows as columns ``[rows, 1]``."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, requests: Sequence[Request], *, device: torch.device) -> "_Settings":
        def column(values: object) -> Tensor:
            return torch.as_tensor(values, device=device)[:, None]

        params = [request.params for request in requests]
        seeds = np.array([request.seed % 2**64 for request in requests], dtype=np.uint64)
        counters = np.array([request.num_output_tokens for request in requests], dtype=np.uint64)
        return cls(
            temperature=column([p.temperature for p in params]),
            top_k=column([p.top_k for p in params]),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            uniform=column(uniform(seeds, counters)),
        )


def _is_truncated(request: Request) -> bool:
    return request.params.top_k > 0 or request.params.top_p < 1


def _draw_whole(logits: Tensor, settings: _Settings) -> Tensor:
    probabilities = _probabilities(logits, settings)
    return _invert(probabilities, settings.uniform)


def _draw_truncated(logits: Tensor, settings: _Settings) -> Tensor:
    num_tokens = logits.shape[-1]
    limits = torch.where(settings.top_k > 0, settings.top_k, num_tokens).clamp(max=num_tokens)
    ordered, token_ids = logits.topk(int(limits.max()), dim=-1)
    probabilities = _probabilities(ordered, settings)
    probabilities = probabilities.masked_fill(
        torch.arange(ordered.shape[-1], device=logits.device) >= limits, 0.0
    )
    before = probabilities.cumsum(-1) - probabilities
    beyond = before >= settings.top_p * probabilities.sum(-1, keepdim=True)
    # The most likely token stays, however small top_p is.
    beyond[:, 0] = False
    index = _invert(probabilities.masked_fill(beyond, 0.0), settings.uniform)
    return token_ids.gather(-1, index[:, None])[:, 0]


def _probabilities(logits: Tensor, settings: _Settings) -> Tensor:
    """In float64, so that the sums that invert them are exact enough; not normalised after min_p."""
    # Shifted first, because logits over a tiny temperature overflow.
    shifted = (logits - logits.amax(-1, keepdim=True)).double() / settings.temperature
    probabilities = shifted.softmax(-1)
    least = settings.min_p * probabilities.amax(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < least, 0.0)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The index where the running sum passes the fraction ``uniform`` of the total."""
    sums = probabilities.cumsum(-1)
    index = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0]
    # Rounding may put the fraction at the total, past the last token that has any weight.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(index, last)


def _without_early_end(
    logits: Tensor, requests: Sequence[Request], *, eos_token_ids: frozenset[int]
) -> Tensor:
    """Bar the tokens that would end a request before its ``min_tokens``."""
    barred = [
        (row, token)
        for row, request in enumerate(requests)
        if request.num_output_tokens < request.params.min_tokens
        for token in eos_token_ids.union(request.params.stop_token_ids or ())
        if 0 <= token < logits.shape[-1]
    ]
    if not barred:
        return logits
    rows, tokens = zip(*barred, strict=True)
    logits = logits.clone()
    logits[rows, tokens] = -torch.inf
    return logits
