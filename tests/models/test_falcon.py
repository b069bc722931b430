"""Falcon in packed steps: every variant equals transformers, or is refused."""

import pytest
import torch
from transformers.models.falcon.modeling_falcon import FalconAttention

from nanoflow_compiler import ops
from nanoflow_compiler.capture import capture_step
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.kv_cache import LayerShape
from nanoflow_compiler.models.falcon import PackedFalconAttention
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.verify import verify_packed
from tiny_models import VOCAB_SIZE, falcon

OLD = {"new_decoder_architecture": False, "num_kv_heads": None}
# Changes of the tiny configuration, and how many heads its keys and values then have.
VARIANTS = {
    "40b": ({}, 2),
    "11b, one norm": ({"num_ln_in_parallel_attn": 1}, 2),
    "new, one group": ({"num_kv_heads": 1}, 1),
    "new, no groups": ({"num_kv_heads": 4, "bias": True}, 4),
    "7b, multi-query": (OLD, 1),
    "multi-query, serial": (OLD | {"parallel_attn": False, "bias": True}, 1),
    "multi-head": (OLD | {"multi_query": False}, 4),
    "multi-head, serial": (OLD | {"multi_query": False, "parallel_attn": False}, 4),
}
LENGTHS = (70, 3, 13)
# A prompt in chunks that cross a block, beside prompts that start later and single tokens.
ENDS = ((40, 1, 0), (63, 2, 7), (65, 3, 12), (66, 3, 13), (70, 3, 13))


def make_sequences(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def expected_logits(model, sequences):
    return [model(input_ids=tokens[None], use_cache=False).logits[0] for tokens in sequences]


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_in_chunks_and_decode_equal_transformers(name, run_in_steps):
    changes, num_kv_heads = VARIANTS[name]
    model = falcon(**changes)
    packed = PackedDecoder(model, max_length=200)
    assert packed.layers == (LayerShape(num_kv_heads, 8, 8, torch.float32),) * 2
    sequences = make_sequences(*LENGTHS)
    actual = run_in_steps(packed, sequences, ends=ENDS)
    torch.testing.assert_close(actual, expected_logits(model, sequences), rtol=1e-5, atol=1e-5)
    verify_packed(packed)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_captured_step_picks_no_heads_by_index(name):
    captured = capture_step(PackedDecoder(falcon(**VARIANTS[name][0]), max_length=200))
    calls = list(call_nodes(captured.module))
    assert sum(node.target is ops.attention for node in calls) == 2
    # The one that is left picks the rows whose logits are wanted.
    picks = [node for node in calls if node.target is torch.ops.aten.index.Tensor]
    assert [str(node.args[1][-1]) for node in picks] == ["rows"]


def test_rotary_embeddings_that_depend_on_length(run_in_steps):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = falcon(rope_parameters=rope, max_position_embeddings=32)
    sequences = make_sequences(70)
    packed = PackedDecoder(model, max_length=70)
    actual = run_in_steps(packed, sequences, ends=[(40,), (70,)])
    torch.testing.assert_close(actual, expected_logits(model, sequences), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [OLD, OLD | {"multi_query": False, "bias": True}])
def test_alibi_is_refused(changes):
    with pytest.raises(UnsupportedGraphError) as caught:
        PackedDecoder(falcon(alibi=True, **changes), max_length=64)
    message = str(caught.value)
    assert "FalconForCausalLM" in message
    assert "alibi" in message
    assert "\n" not in message


def test_the_model_of_the_user_is_left_as_it_was():
    model = falcon()
    sequences = make_sequences(9)
    before = expected_logits(model, sequences)
    contents = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    packed = PackedDecoder(model, max_length=64)
    assert isinstance(packed.model.transformer.h[0].self_attention, PackedFalconAttention)
    assert contents == {n: (type(module), set(vars(module))) for n, module in model.named_modules()}
    assert type(model.transformer.h[0].self_attention) is FalconAttention
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(expected_logits(model, sequences), before, rtol=0, atol=0)
    pairs = zip(model.parameters(), packed.model.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)


def test_verification_compares_with_the_attention_of_transformers(monkeypatch):
    packed = PackedDecoder(falcon(), max_length=64)
    split = PackedFalconAttention._split_groups

    def confuse(self, fused):
        query, key, value = split(self, fused)
        return query, value, key

    monkeypatch.setattr(PackedFalconAttention, "_split_groups", confuse)
    with pytest.raises(UnsupportedGraphError, match="relative error"):
        verify_packed(packed)


class OtherAttention(FalconAttention):
    def forward(self, *args, **kwargs):
        out, scores = super().forward(*args, **kwargs)
        return 2 * out, scores


def test_an_attention_that_a_user_changed_is_not_replaced():
    model = falcon()
    for layer in model.transformer.h:
        layer.self_attention.__class__ = OtherAttention
    with pytest.raises(UnsupportedGraphError, match="computes attention itself"):
        PackedDecoder(model, max_length=64)
