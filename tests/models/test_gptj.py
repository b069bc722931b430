"""GPT-J in packed steps equals transformers."""

import pytest
import torch
import transformers as hf
from transformers.models.gptj.modeling_gptj import GPTJAttention

from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.models.verify import verify_packed
from tiny_models import MAX_LENGTH, VOCAB_SIZE, build


def gptj(**changes):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2}
    return build(hf.GPTJConfig(**({"rotary_dim": 4} | sizes | dropouts | tokens | changes)))


@pytest.mark.parametrize("changes", [{}, {"rotary_dim": 8}])
def test_prefill_in_chunks_and_decode_equal_transformers(changes, run_in_steps):
    model = gptj(**changes)
    packed = PackedDecoder(model, max_length=200)
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in (70, 13)]
    ends = [(40, 0), (65, 12), (66, 13), (70, 13)]
    actual = run_in_steps(packed, sequences, ends=ends)
    with torch.no_grad():
        expected = [model(input_ids=tokens[None]).logits[0] for tokens in sequences]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    verify_packed(packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    verify_packed(PackedDecoder(gptj().to(dtype), max_length=64))


def test_the_model_of_the_user_is_left_as_it_was():
    model = gptj()
    PackedDecoder(model, max_length=64)
    assert {type(block.attn) for block in model.transformer.h} == {GPTJAttention}
    assert model.config._attn_implementation == "eager"
