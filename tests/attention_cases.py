"""Attention of packed requests with random tensors, and what a naive computation finds for it."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow_compiler import ops
from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape


@dataclass(frozen=True)
class Case:
    """Requests as (tokens in the cache, tokens in the step), heads, and what limits attention."""

    requests: list[tuple[int, int]]
    kv_heads: int = 2
    heads_per_kv: int = 2
    head_dim: int = 8
    v_head_dim: int = 8
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    has_sinks: bool = False
    scale: float = 0.3
    cuts: tuple[float, ...] = ()
    seed: int = 0

    @property
    def settings(self):
        return self.scale, self.window, self.chunk, self.softcap


@dataclass(frozen=True)
class Drawn:
    """Sizes and limits of attention in a GPU's kernels."""

    sizes: dict
    limits: tuple[int, int]
    """Window and chunk; 0 is none."""
    softcap: float
    has_sinks: bool
    scale: float


def random_attention(rng):
    """What a model may have: any heads of multiples of 16 bytes."""
    dtype = (torch.float32, torch.float16, torch.bfloat16)[rng.integers(3)]
    # Float32 is not multiplied by tensor cores, and is for tests.
    dim, v_dim = (8 * int(rng.integers(1, 17 if dtype is torch.float32 else 33)) for _ in "kv")
    kv_heads = int(rng.choice([1, 2, 3, 4, 8]))
    return Drawn(
        sizes={
            "heads": kv_heads * int(rng.choice([1, 2, 3, 4, 5, 7, 8, 16])),
            "kv_heads": kv_heads,
            "dim": dim,
            "v_dim": dim if rng.random() < 0.5 else v_dim,
            "dtype": dtype,
        },
        limits=(int(rng.choice([0, 0, 1, 64, 100])), int(rng.choice([0, 0, 64, 96, 2500]))),
        softcap=float(rng.choice([0.0, 0.0, 2.0, 30.0])),
        has_sinks=bool(rng.random() < 0.3),
        scale=float(dim**-0.5),
    )


def naive(case, query, key, value, sinks):
    """One request, one query, one head at a time; tensors [L, heads, dim] of which the last are queries."""
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    context = key.shape[0] - query.shape[0]
    for row in range(query.shape[0]):
        position = context + row
        first = max(0, position - case.window + 1) if case.window else 0
        if case.chunk:
            first = max(first, position // case.chunk * case.chunk)
        for head in range(query.shape[1]):
            kv_head = head // case.heads_per_kv
            scores = key[first : position + 1, kv_head] @ query[row, head] * case.scale
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weights = scores.softmax(0)[: position + 1 - first]
            out[row, head] = weights @ value[first : position + 1, kv_head]
    return out


class Step:
    """A case with random tensors, its cache filled with the contexts, its blocks scattered."""

    def __init__(self, case, *, dtype=torch.float32, device="cpu"):
        self.case = case
        self.device = device
        generator = torch.Generator().manual_seed(case.seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        heads = case.kv_heads * case.heads_per_kv
        self.sinks = random(heads) if case.has_sinks else None
        totals = [context + new for context, new in case.requests]
        self.keys = [random(n, case.kv_heads, case.head_dim) for n in totals]
        self.values = [random(n, case.kv_heads, case.v_head_dim) for n in totals]
        self.queries = [random(new, heads, case.head_dim) for _, new in case.requests]
        needed = [-(-n // BLOCK_SIZE) for n in totals]
        order = torch.randperm(sum(needed), generator=generator).numpy() + 1
        self.tables = np.zeros((len(totals), max(needed)), dtype=np.int64)
        for row, (start, count) in enumerate(zip(np.cumsum([0, *needed]), needed, strict=False)):
            self.tables[row, :count] = order[start : start + count]
        shape = LayerShape(case.kv_heads, case.head_dim, case.v_head_dim, dtype)
        self.cache = KVCache.allocate([shape], num_blocks=sum(needed) + 1, device=device)
        self._fill_contexts()

    def _fill_contexts(self):
        for row, (context, _) in enumerate(self.case.requests):
            layout = self.layout([context], [0], self.tables[row : row + 1])
            part = layout.part(0, context, device=self.device)
            key, value = self.keys[row][:context], self.values[row][:context]
            self.cache.append(key, value, layer=0, places=part.places)

    def layout(self, query_lens, context_lens, tables):
        return StepLayout.pack(
            query_lens=np.array(query_lens),
            context_lens=np.array(context_lens),
            block_tables=tables,
        )

    def expected(self):
        sinks = None if self.sinks is None else self.sinks.double()
        rows = zip(self.queries, self.keys, self.values, strict=True)
        return torch.cat(
            [naive(self.case, q.double(), k.double(), v.double(), sinks) for q, k, v in rows]
        )

    def run(self, cuts=(), *, halves=False):
        contexts, new = zip(*self.case.requests, strict=True)
        layout = self.layout(new, contexts, self.tables)
        query = torch.cat(self.queries)
        key = torch.cat([k[c:] for k, c in zip(self.keys, contexts, strict=True)])
        value = torch.cat([v[c:] for v, c in zip(self.values, contexts, strict=True)])
        edges = [0, *cuts, len(query)]
        ranges = list(itertools.pairwise(edges))
        parts = tuple(
            layout.part(start, end, device=self.device) for start, end in [(0, len(query)), *ranges]
        )
        call = split_call if halves else ops.attention
        out = []
        with attention_state(AttentionState(self.cache, parts)):
            for part, (start, end) in enumerate(ranges, start=1):
                rows = slice(start, end)
                tensors = query[rows], key[rows], value[rows]
                out.append(call(*tensors, 0, *self.case.settings, self.sinks, True, part))
        return torch.cat(out)


def split_call(query, key, value, layer, *rest):
    handle = ops.kv_append(key, value, layer, rest[-1])
    assert handle.shape == (0,)
    return ops.paged_attention(query, handle, layer, value.shape[-1], *rest)
