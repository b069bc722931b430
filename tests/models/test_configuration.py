import pytest
import torch
from transformers import AutoModelForCausalLM

from nanoflow_compiler.models import configuration, published

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
BILLIONS = {
    "deepseek-67b": 67.4,
    "llama-2-70b": 69.0,
    "llama-3-70b": 70.6,
    "llama-3-8b": 8.0,
    "llama-3.2-1b": 1.2,
    "mixtral-8x7b": 46.7,
    "qwen2-72b": 72.7,
    "qwen3-8b": 8.2,
}


@pytest.mark.parametrize("name", published.catalog_names())
def test_catalog_has_the_published_number_of_parameters(name):
    config = configuration.make_config(published.catalog_config(name), where=name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 1) == BILLIONS[name]


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


def test_layers_must_be_positive(refuses):
    refuses(
        configuration.make_config, LLAMA, where="x", num_hidden_layers=0, words=["at least 1", "0"]
    )
