"""Packed attention and experts against naive float64 references, whole and in parts cut anywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import Case, Step
from nanoflow_compiler import attention_plan, ops
from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.decode_attention import Heads
from nanoflow_compiler.errors import InvalidProgramError, UnsupportedGraphError
from nanoflow_compiler.paged_attention import plan_of

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
    layout = step.layout([3, 1], [9, 4], step.tables)
    part = layout.part(0, 4)
    for tables in (None, *step.cache.tables):
        given = {"visibility": Visibility(), "heads": Heads(4, 2, 8), "tables": tables}
        assert plan_of(part, **given) is plan_of(part, **given)
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
    layout = step.layout([2], [3], step.tables)
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
