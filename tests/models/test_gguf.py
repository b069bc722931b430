import struct

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models import load_decoder
from nanoflow_compiler.models.gguf_header import read_gguf_header

TOKENS = ["<unk>", "<s>", "</s>", "Ġ", "1", "2", "a", "b", "ab", "ba"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.0.input_layernorm": "blk.0.attn_norm",
    "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
    "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
    "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
    "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
    "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
    "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
}


def rotary_order(weight):
    """GGUF interleaves the two halves of each head of q and k."""
    return weight.reshape(1, 2, 4, 8).transpose(1, 2).reshape(8, 8)


def write_gguf(path, model, architecture="llama"):
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "b a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        rotated = module.endswith(("q_proj", "k_proj"))
        values = rotary_order(weight) if rotated else weight
        writer.add_tensor(f"{NAMES[module]}.weight", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def gguf_file(model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def decoder(gguf_file):
    return load_decoder(gguf_file)


def test_weights_survive(decoder, model):
    ids = torch.arange(len(TOKENS))[None]
    torch.testing.assert_close(decoder.model(ids).logits, model(ids).logits)


def test_model_is_plain(decoder):
    assert not hasattr(decoder.config, "quantization_config")
    assert decoder.model.dtype == torch.float32
    assert decoder.max_model_len == 32
    assert decoder.path.is_dir()


def test_special_tokens_are_those_of_the_file(decoder):
    tokenizer = decoder.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert decoder.eos_token_ids == {2}
    assert tokenizer.model_max_length == 32


def test_digits_are_cut_before_spaces(decoder):
    tokenizer = decoder.tokenizer
    assert tokenizer.tokenize("12 1ab") == ["1", "2", "Ġ", "1", "ab"]
    assert tokenizer.decode(tokenizer("ab 12")["input_ids"]) == "ab 12"


def test_directory_with_one_gguf_file(gguf_file):
    assert load_decoder(gguf_file.parent).max_model_len == 32


def test_header(gguf_file):
    header = read_gguf_header(gguf_file)
    assert header.architecture == "llama"
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"
    assert len(header.tensors) == len(NAMES)
    assert max(sum(extent) for extent in header.tensors.values()) <= gguf_file.stat().st_size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_truncation_is_refused(gguf_file, tmp_path, data):
    header = read_gguf_header(gguf_file)
    end = max(offset + length for offset, length in header.tensors.values())
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(gguf_file.read_bytes()[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf is not a usable GGUF file"):
        read_gguf_header(damaged)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(noise=st.binary(max_size=200))
def test_noise_is_refused_or_read(tmp_path, noise):
    file = tmp_path / "noise.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + noise)
    try:
        read_gguf_header(file)
    except ModelLoadError as error:
        assert "noise.gguf" in str(error)  # noqa: PT017  # any other exception must fail the test


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "empty"), (b"PK\3\4....", "letters GGUF"), (b"GGUF\x09\0\0\0", "version 9")],
)
def test_other_files(tmp_path, content, word, refuses):
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    refuses(load_decoder, file, words=[str(file), word, "download it again"])


def test_unknown_architecture(model, tmp_path, refuses):
    file = write_gguf(tmp_path / "odd.gguf", model, architecture="zorp")
    refuses(load_decoder, file, words=["odd.gguf", "zorp", "safetensors"])
