"""Paged attention: in plain PyTorch where no kernel reads the layer's tables."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from nanoflow_compiler.attention_plan import (
    Group,
    Requests,
    Visibility,
    plan_decodes,
    plan_tiles,
)
from nanoflow_compiler.attention_state import AttentionPart
from nanoflow_compiler.decode_attention import Decodes, Heads, attend_decodes, plan_sums
from nanoflow_compiler.errors import CaptureError
from nanoflow_compiler.kv_cache import HeadPages, KVCache, RowTables
from nanoflow_compiler.scoring import Scoring
from nanoflow_compiler.sm_budget import budget, sm_budget

if TYPE_CHECKING:
    from nanoflow_compiler.kernels.paged_decode import PageReads
    from nanoflow_compiler.kernels.prompts import Tiles

__all__ = ["Plan", "PlanKey", "Room", "append", "attend", "plan_of"]


def append(key: Tensor, value: Tensor, *, cache: KVCache, layer: int, part: AttentionPart) -> None:
    """Store keys and values ``[T, KV heads, dim]`` of a part where its slots say."""
    tables = cache.tables[layer]
    if isinstance(tables, HeadPages):
        _gpu("append").append_pages(key, value, tables, slots=part.slots)
    else:
        cache.append(key, value, layer=layer, places=part.places)


def attend(
    query: Tensor,
    *,
    cache: KVCache,
    layer: int,
    part: AttentionPart,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """Causal attention of packed queries ``[T, heads, dim]`` over the blocks of one layer's cache."""
    keys, values, tables = cache.keys[layer], cache.values[layer], cache.tables[layer]
    heads = Heads(query.shape[1], *keys.shape[2:])
    plan = plan_of(
        part, visibility=visibility, heads=heads, tables=tables, is_plain=scoring.is_plain
    )

    def attended(query: Tensor, rows: Decodes | Group) -> Tensor:
        if isinstance(rows, Decodes):
            assert isinstance(tables, RowTables)
            return attend_decodes(query, tables=tables, decodes=rows, scoring=scoring)
        result = _attend_group(query, keys=keys, values=values, group=rows, scoring=scoring)
        return result.view(*query.shape[:2], values.shape[-1])

    if len(plan.groups) == 1:
        return attended(query, plan.groups[0])
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    if plan.reads is not None:
        assert isinstance(tables, HeadPages)
        pdl = _gpu("pdl").may_chain_step(query.device)
        _gpu("paged_decode").attend_pages(
            query, tables, reads=plan.reads, scoring=scoring, out=out, pdl=pdl
        )
    if plan.tiles is not None:
        assert isinstance(tables, HeadPages)
        _gpu("prompts").attend(query, tables, tiles=plan.tiles, scoring=scoring, out=out)
    for rows in plan.groups:
        out[rows.rows] = attended(query[rows.rows], rows)
    return out


@dataclass(frozen=True, slots=True)
class Plan:
    """Who serves which rows of a part."""

    groups: tuple[Decodes | Group, ...]
    reads: "PageReads | None" = None
    """On a GPU, all decodes."""
    tiles: "Tiles | None" = None
    """On a GPU, all requests with several rows; then there are no groups."""

    def inputs(self, requests: Requests) -> Iterator[tuple[Tensor, npt.NDArray[np.generic]]]:
        """Where the plan of these requests goes, and what it is: for a plan with room."""
        for work in (self.reads, self.tiles):
            if work is not None:
                yield from zip(work.tensors, work.arrays(requests), strict=True)


@dataclass(frozen=True, slots=True)
class Room:
    """The most that a plan has to hold."""

    num_tokens: int
    num_requests: int
    num_blocks: int
    """Of a request."""
    has_prompts: bool
    is_long: bool = False
    """Prompts are by the kernel of long ones, where there is one for the layer."""

    @property
    def num_decode_pages(self) -> int:
        """Beside the requests, a page for each token that only fills a step up."""
        return min(self.num_tokens, self.num_requests) * self.num_blocks + self.num_tokens

    @property
    def num_prompts(self) -> int:
        """A prompt has two tokens at least."""
        return min(self.num_tokens // 2, self.num_requests)

    @property
    def num_prompt_pages(self) -> int:
        return self.num_prompts * self.num_blocks


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan depends on beside the requests: the layers that share it share the plan."""

    visibility: Visibility
    heads: Heads | None = None
    """Where a kernel reads the tables of a layer."""
    num_sms: int | None = None
    """For which its work is divided; None: all of the device."""
    tables: RowTables | HeadPages | None = field(default=None, compare=False)
    """Of any of the layers."""
    is_plain: bool = False
    """Whether the weights are the softmax of scaled products, also where no kernel asks."""

    @property
    def least_long_keys(self) -> int | None:
        """From how many keys of a prompt's row on, on average, it has a kernel of long prompts."""
        if not self.is_plain or not isinstance(self.tables, HeadPages):
            return None
        least: int | None = _gpu("prompts").least_keys(self.tables, visibility=self.visibility)
        return least

    def with_room(self, room: Room) -> Plan:
        """A plan of nothing yet, at a place that stays: captured steps are planned anew each time."""
        if not isinstance(self.tables, HeadPages):
            raise CaptureError(
                "attention is planned on the host, because its kernels need heads of multiples of 16 "
                "bytes and a GPU of compute capability 9.0"
            )
        with sm_budget(self.num_sms):
            return self._gpu_plan(self.tables, room)

    def _gpu_plan(self, tables: HeadPages, room: Room) -> Plan:
        assert self.heads is not None
        reads = _gpu("paged_decode").reads_with_room(
            tables, visibility=self.visibility, num_pages=room.num_decode_pages
        )
        if not room.has_prompts:
            return Plan((), reads)
        tiles = _gpu("prompts").with_room(
            tables,
            num_heads=self.heads.num_heads,
            visibility=self.visibility,
            sizes=(room.num_tokens, room.num_prompts, room.num_prompt_pages),
            is_long=room.is_long and self.least_long_keys is not None,
        )
        return Plan((), reads, tiles)


def plan_of(
    part: AttentionPart,
    *,
    visibility: Visibility,
    heads: Heads,
    tables: RowTables | HeadPages | None,
    is_plain: bool = False,
) -> Plan:
    """Made when first asked for.

    A plan depends on the part, on what is visible and, where a kernel reads ``tables``, on ``heads`` and on
    whether scores ``is_plain``: the layers that share those, and as many multiprocessors, share its index
    tensors and masks.
    """
    key = PlanKey(visibility, heads, budget(), tables, is_plain) if tables else PlanKey(visibility)
    if key not in part.plans:
        part.plans[key] = _plan(Requests.of(part), key)
    plan: Plan = part.plans[key]
    return plan


def _plan(requests: Requests, key: PlanKey) -> Plan:
    visibility, tables = key.visibility, key.tables
    if isinstance(tables, HeadPages):
        assert key.heads is not None
        reads = _gpu("paged_decode").plan_pages(requests, tables, visibility=visibility)
        tiles = _gpu("prompts").plan(
            requests,
            tables,
            num_heads=key.heads.num_heads,
            visibility=visibility,
            is_plain=key.is_plain,
        )
        return Plan((), reads, tiles)
    prompts = tuple(plan_tiles(requests, visibility=visibility))
    if isinstance(tables, RowTables):
        assert key.heads is not None
        sums = plan_sums(requests, visibility=visibility, heads=key.heads)
        return Plan((sums, *prompts) if sums else prompts)
    return Plan((*plan_decodes(requests, visibility=visibility), *prompts))


def _gpu(name: str) -> Any:
    """Triton is there where CUDA is."""
    return import_module(f"nanoflow_compiler.kernels.{name}")


def _attend_group(
    query: Tensor, *, keys: Tensor, values: Tensor, group: Group, scoring: Scoring
) -> Tensor:
    query = _query_heads(query, num_kv_heads=keys.shape[2], group=group)
    key = _gather(keys, group=group, like=query)
    value = _gather(values, group=group, like=query)
    if scoring.is_plain:
        result = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=group.is_causal, scale=scoring.scale
        )
    else:
        result = _explicit(query, key, value, group=group, scoring=scoring)
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
        gathered = pool[group.blocks].contiguous()  # no copy where the pool is
    else:
        gathered = pool.index_select(0, group.blocks)
    tokens = gathered.view(group.num_requests, -1, *pool.shape[2:])[:, group.keys].transpose(1, 2)
    return tokens if group.is_decode else tokens[0][:, None].expand(-1, like.shape[1], -1, -1)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, *, group: Group, scoring: Scoring
) -> Tensor:
    """Attention with its scores in sight, for what SDPA has no argument: softcap and sinks."""
    scores = scoring.cap((query @ key.transpose(-1, -2)).float() * scoring.scale)
    mask = group.mask
    if group.is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    heads = query.shape[1:3] if group.is_decode else (*query.shape[:2], 1)
    return scoring.weigh(scores, heads=heads).to(value.dtype) @ value
