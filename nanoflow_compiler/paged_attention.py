"""Paged attention in plain PyTorch: the CPU kernel, and what other kernels are checked against."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nanoflow_compiler.attention_plan import Group, Visibility, plan_of
from nanoflow_compiler.attention_state import AttentionPart

__all__ = ["Scoring", "attend"]


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores become weights: ``softmax(softcap * tanh(scale * q.k / softcap))``, sinks beside them."""

    scale: float
    softcap: float = 0.0  # 0: none
    sinks: Tensor | None = None  # one logit per head, which takes weight and has no value


def attend(
    query: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    part: AttentionPart,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """Causal attention of packed queries ``[T, heads, dim]`` over the blocks of one layer's cache."""
    plan = plan_of(part, visibility=visibility)
    shape = (*query.shape[:2], values.shape[-1])
    if len(plan) == 1:
        out = _attend_group(query, keys=keys, values=values, group=plan[0], scoring=scoring)
        return out.view(shape)
    out = query.new_empty(shape)
    for group in plan:
        rows = query[group.rows]
        result = _attend_group(rows, keys=keys, values=values, group=group, scoring=scoring)
        out[group.rows] = result.view(-1, *shape[1:])
    return out


def _attend_group(
    query: Tensor, *, keys: Tensor, values: Tensor, group: Group, scoring: Scoring
) -> Tensor:
    query = _query_heads(query, num_kv_heads=keys.shape[2], group=group)
    key = _gather(keys, group=group, like=query)
    value = _gather(values, group=group, like=query)
    if scoring.softcap or scoring.sinks is not None:
        result = _explicit(query, key, value, group=group, scoring=scoring)
    else:
        result = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=group.is_causal, scale=scoring.scale
        )
    return (result if group.is_decode else result.permute(2, 0, 1, 3)).contiguous()


def _query_heads(query: Tensor, *, num_kv_heads: int, group: Group) -> Tensor:
    """The query heads of a KV head as its rows, ``[requests, KV heads, heads of each, dim]``, in decode.

    Otherwise as heads whose batch is the KV head, ``[KV heads, heads of each, rows, dim]``. Neither way
    copies keys once per query head.
    """
    query = query.unflatten(1, (num_kv_heads, -1))
    return query if group.is_decode else query.permute(1, 2, 0, 3)


def _gather(pool: Tensor, *, group: Group, like: Tensor) -> Tensor:
    if isinstance(group.blocks, slice):
        gathered = pool[group.blocks]
    else:
        gathered = pool.index_select(0, group.blocks)
    tokens = gathered.view(group.num_requests, -1, *pool.shape[2:])[:, group.keys].transpose(1, 2)
    return tokens if group.is_decode else tokens[0][:, None].expand(-1, like.shape[1], -1, -1)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, *, group: Group, scoring: Scoring
) -> Tensor:
    """Attention with its scores in sight, for what SDPA has no argument: softcap and sinks."""
    scores = (query @ key.transpose(-1, -2)).float() * scoring.scale
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    mask = group.mask
    if group.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if scoring.sinks is None:
        return scores.softmax(-1).to(value.dtype) @ value
    heads = query.shape[1:3] if group.is_decode else (*query.shape[:2], 1)
    logits = scoring.sinks.float().view(*heads, 1)
    scores = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(-1)[..., :-1].to(value.dtype) @ value
