import pytest
import torch
from transformers import AutoModelForCausalLM

from nanoflow_compiler.errors import NanoflowError
from nanoflow_compiler.models import configuration, published

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
BILLIONS = {
    "bench-1b": 1.532,
    "deepseek-67b": 67.4,
    "llama-2-70b": 68.98,
    "llama-3-70b": 70.55,
    "llama-3-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.236,
    "mixtral-8x7b": 46.70,
    "qwen2-72b": 72.71,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.19,
}
"""Parameters, those that are tied counted once."""


@pytest.mark.parametrize("name", published.catalog_names())
def test_catalog_has_the_published_number_of_parameters(name):
    config = configuration.make_config(published.catalog_config(name), where=name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.001)


def test_llama_31_stretches_its_positions():
    config = configuration.make_config(published.catalog_config("llama-3.1-8b"), where="x")
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["factor"] == 8


@pytest.mark.parametrize("model_type", ["bert", "t5", "vit", "clip", "bart"])
def test_not_a_decoder(model_type, refuses):
    values = {"model_type": model_type}
    refuses(configuration.make_config, values, where="x", words=["x:", "not a decoder", model_type])


def test_bert_that_looks_one_way_is_a_decoder():
    configuration.make_config({"model_type": "bert", "is_decoder": True}, where="x")


@pytest.mark.parametrize("values", [{"model_type": "zorp"}, {}, {"model_type": ["llama"]}])
def test_unknown_architecture(values, refuses):
    refuses(configuration.make_config, values, where="x", words=["unknown", "upgrade"])


def test_bad_value_is_one_line(refuses):
    values = {**LLAMA, "hidden_size": "wide"}
    refuses(configuration.make_config, values, where="x", words=["hidden_size", "correct"])


def test_layers_can_be_cut():
    values = published.catalog_config("qwen3-8b") | {"layer_types": ["full_attention"] * 36}
    config = configuration.make_config(values, where="x", num_hidden_layers=2)
    assert (config.num_hidden_layers, len(config.layer_types)) == (2, 2)


def make(values, **overrides):
    return configuration.make_config(values, where="x", overrides=overrides)


def test_overrides_replace_values():
    values = published.catalog_config("qwen3-8b")
    config = make(values, num_hidden_layers=2, hidden_size=512, rope_theta=5e4, head_dim=64)
    assert (config.num_hidden_layers, config.layer_types) == (2, ["full_attention"] * 2)
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (512, 64, 151936)
    assert config.rope_parameters["rope_theta"] == 5e4
    assert make(values | {"layer_types": ["full_attention"] * 36}, num_hidden_layers=2).layer_types
    # By the name of the architecture, and by that which all have.
    assert make({"model_type": "gpt2"}, n_layer=3).num_hidden_layers == 3
    assert make({"model_type": "gpt2"}, num_hidden_layers=3).n_layer == 3
    assert values == published.catalog_config("qwen3-8b")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_hiden_layers": 2}, "has no setting 'num_hiden_layers' .did you mean 'num_hidden"),
        ({"model_type": "qwen3"}, "cannot change model_type"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"hidden_size": "wide"}, "bad configuration"),
    ],
)
def test_overrides_that_cannot_be(overrides, words):
    with pytest.raises(NanoflowError, match=words):
        make(LLAMA, **overrides)


def test_layers_must_be_positive(refuses):
    refuses(
        configuration.make_config, LLAMA, where="x", num_hidden_layers=0, words=["at least 1", "0"]
    )
