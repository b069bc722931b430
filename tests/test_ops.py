"""Packed attention and experts against naive float64 references, whole and in parts cut anywhere."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler import attention_plan, ops
from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.decode_attention import Heads
from nanoflow_compiler.errors import InvalidProgramError, UnsupportedGraphError
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape
from nanoflow_compiler.paged_attention import plan_of


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


def naive(case, query, key, value, sinks):
    """One request, one query, one head at a time; tensors [L, heads, dim] of which the last are queries."""
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=torch.float64)
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

    def __init__(self, case, *, dtype=torch.float32):
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

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
        self.cache = KVCache.allocate([shape], num_blocks=sum(needed) + 1)
        self._fill_contexts()

    def _fill_contexts(self):
        for row, (context, _) in enumerate(self.case.requests):
            part = self._layout([context], [0], self.tables[row : row + 1]).part(0, context)
            key, value = self.keys[row][:context], self.values[row][:context]
            self.cache.append(key, value, layer=0, places=part.places)

    def _layout(self, query_lens, context_lens, tables):
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
        layout = self._layout(new, contexts, self.tables)
        query = torch.cat(self.queries)
        key = torch.cat([k[c:] for k, c in zip(self.keys, contexts, strict=True)])
        value = torch.cat([v[c:] for v, c in zip(self.values, contexts, strict=True)])
        edges = [0, *cuts, len(query)]
        ranges = list(itertools.pairwise(edges))
        parts = tuple(layout.part(start, end) for start, end in [(0, len(query)), *ranges])
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


limits = st.one_of(st.just(0), st.integers(1, 150))
cases = st.builds(
    Case,
    requests=st.lists(
        st.tuples(st.integers(0, 200), st.one_of(st.just(1), st.integers(1, 150))),
        min_size=1,
        max_size=5,
    ),
    kv_heads=st.integers(1, 3),
    heads_per_kv=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    v_head_dim=st.sampled_from([4, 6, 8]),
    window=limits,
    chunk=limits,
    softcap=st.sampled_from([0.0, 1.5]),
    has_sinks=st.booleans(),
    cuts=st.lists(st.floats(0, 1), max_size=4).map(tuple),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_cut_equals_the_naive_reference(case):
    step = Step(case)
    num_tokens = sum(new for _, new in case.requests)
    cuts = sorted(int(cut * num_tokens) for cut in case.cuts)
    expected = step.expected().float()
    torch.testing.assert_close(step.run(cuts), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.run(cuts, halves=True), expected, rtol=1e-4, atol=1e-5)


def test_many_decodes_of_unequal_length():
    case = Case(requests=[(length, 1) for length in range(0, 640, 37)])
    step = Step(case)
    torch.testing.assert_close(step.run(), step.expected().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.run([3, 4, 11]), step.run(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limits", [{}, {"window": 20}, {"chunk": 96}, {"softcap": 2.0}])
def test_a_long_prompt_is_served_in_tiles(limits, monkeypatch):
    monkeypatch.setattr(attention_plan, "TILE_ROWS", 16)
    step = Step(Case(requests=[(70, 90), (0, 50), (5, 1)], **limits))
    torch.testing.assert_close(step.run(), step.expected().float(), rtol=1e-4, atol=1e-5)


def test_bfloat16():
    step = Step(Case(requests=[(70, 40), (130, 1), (3, 1)], has_sinks=True), dtype=torch.bfloat16)
    out = step.run([20])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), step.expected(), rtol=3e-2, atol=3e-2)


def test_a_plan_is_made_once_for_all_layers():
    step = Step(Case(requests=[(9, 3), (4, 1)]))
    layout = step._layout([3, 1], [9, 4], step.tables)
    part = layout.part(0, 4)
    for heads in (None, Heads(4, 2, 8)):
        plan = plan_of(part, visibility=Visibility(), heads=heads)
        assert plan_of(part, visibility=Visibility(), heads=heads) is plan
    assert len(part.plans) == 2


def test_a_part_keeps_only_its_requests():
    layout = StepLayout.pack(
        query_lens=np.array([3, 1, 4]),
        context_lens=np.array([10, 5, 0]),
        block_tables=np.array([[1], [2], [3]]),
    )
    part = layout.part(2, 6)
    assert part.query_starts.tolist() == [0, 1, 2, 4]
    assert part.context_lens.tolist() == [12, 5, 0]
    assert part.slots.tolist() == [64 + 12, 128 + 5, 192, 193]
    assert layout.part(3, 3).num_tokens == 0
    assert layout.part(4, 8).block_tables.tolist() == [[3]]


def test_outside_a_state_attention_says_so():
    x = torch.zeros(1, 1, 4)
    with pytest.raises(InvalidProgramError, match="attention_state"):
        ops.attention(x, x, x, 0, 1.0, 0, 0, 0.0, None, True, 0)


def test_attention_that_is_not_causal_is_refused():
    x = torch.zeros(1, 1, 4)
    with pytest.raises(UnsupportedGraphError, match="not causal"):
        ops.paged_attention(x, x.new_empty(0), 0, 4, 1.0, 0, 0, 0.0, None, False, 0)


def test_schemas_and_fakes_agree_with_the_implementations():
    step = Step(Case(requests=[(3, 2)], v_head_dim=6, has_sinks=True))
    layout = step._layout([2], [3], step.tables)
    query, key, value = step.queries[0], step.keys[0][3:], step.values[0][3:]
    rest = (0.5, 0, 0, 0.0, step.sinks, True, 0)
    # The cache is outside the graph on purpose, so only what concerns shapes is checked.
    checks = ("test_schema", "test_faketensor")
    with attention_state(AttentionState(step.cache, (layout.part(0, 2),))):
        torch.library.opcheck(ops.attention, (query, key, value, 0, *rest), test_utils=checks)
        torch.library.opcheck(ops.kv_append, (key, value, 0, 0), test_utils=checks)
        handle = ops.kv_append(key, value, 0, 0)
        torch.library.opcheck(ops.paged_attention, (query, handle, 0, 6, *rest), test_utils=checks)
    experts = random_experts(top_k=2, gated=True, transposed=False, has_bias=True)
    torch.library.opcheck(ops.moe_experts, (*experts, "silu", True, False), test_utils=checks)


def random_experts(*, top_k, gated, transposed, has_bias, tokens=7, experts=5, hidden=6, inner=4):
    generator = torch.Generator().manual_seed(top_k)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    outer = inner * 2 if gated else inner
    up, down = random(experts, outer, hidden), random(experts, hidden, inner)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (random(experts, outer), random(experts, hidden)) if has_bias else (None, None)
    index = random(tokens, experts).topk(top_k).indices
    return random(tokens, hidden), index, random(tokens, top_k).softmax(-1), up, down, *biases


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_experts_equal_one_token_at_a_time(top_k, gated, transposed, has_bias):
    inputs = random_experts(top_k=top_k, gated=gated, transposed=transposed, has_bias=has_bias)
    hidden, index, weights, up, down, up_bias, down_bias = inputs
    expected = torch.zeros_like(hidden)
    for token, slot in np.ndindex(*index.shape):
        expert = index[token, slot]
        up_matrix, down_matrix = (m[expert].mT if transposed else m[expert] for m in (up, down))
        inner = up_matrix @ hidden[token] + (up_bias[expert] if has_bias else 0)
        if gated:
            gate, inner = inner.chunk(2)
            inner = torch.nn.functional.silu(gate) * inner
        else:
            inner = torch.nn.functional.silu(inner)
        result = down_matrix @ inner + (down_bias[expert] if has_bias else 0)
        expected[token] += weights[token, slot] * result
    actual = ops.moe_experts(*inputs, "silu", gated, transposed)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # Row by row, and for no row at all: what lets a program cut the token axis anywhere.
    for rows in (slice(0, 3), slice(3, 4), slice(0, 0)):
        cut = ops.moe_experts(
            hidden[rows], index[rows], weights[rows], *inputs[3:], "silu", gated, transposed
        )
        torch.testing.assert_close(cut, expected[rows], rtol=1e-4, atol=1e-5)


def test_an_expert_index_past_the_last_adds_nothing():
    inputs = random_experts(top_k=2, gated=True, transposed=False, has_bias=False)
    hidden, index, weights, up, *rest = inputs
    away = torch.full_like(index, up.shape[0])
    assert not ops.moe_experts(hidden, away, weights, up, *rest, "silu", True, False).any()
