"""How likely tokens were, beside the most likely ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TopLogprobs", "prompt_logprobs", "top_logprobs"]

# Elements of logits that are looked at together: what is computed of them takes as much memory.
MAX_ELEMENTS = 2**25


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Rows of a token and the ``n`` most likely ones, most likely first."""

    token_ids: Tensor
    """``[rows, 1 + n]``: the token itself first."""
    logprobs: Tensor
    """``[rows, 1 + n]``, float32."""
    ranks: Tensor
    """``[rows]``: 1 is the most likely token; equals share a rank."""


def top_logprobs(logits: Tensor, tokens: Tensor, *, num: int) -> TopLogprobs:
    """Of ``logits [rows, V]`` as they are: neither temperature nor penalties count."""
    logits = logits.float()
    of_tokens = logits.gather(-1, tokens[:, None])
    top = logits.topk(min(num, logits.shape[-1]), dim=-1)
    values = torch.cat([of_tokens, top.values], dim=-1) - logits.logsumexp(-1, keepdim=True)
    return TopLogprobs(
        token_ids=torch.cat([tokens[:, None], top.indices], dim=-1),
        logprobs=values,
        ranks=(logits > of_tokens).sum(-1) + 1,
    )


def prompt_logprobs(logits: Tensor, targets: Tensor, *, num: int) -> TopLogprobs:
    """Of the tokens ``targets [T]`` that follow the positions of ``logits [T, V]``, part by part."""
    size = max(1, MAX_ELEMENTS // logits.shape[-1])
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return _joined([top_logprobs(part, tokens, num=num) for part, tokens in parts])


def _joined(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    return TopLogprobs(
        token_ids=torch.cat([part.token_ids for part in parts]),
        logprobs=torch.cat([part.logprobs for part in parts]),
        ranks=torch.cat([part.ranks for part in parts]),
    )
