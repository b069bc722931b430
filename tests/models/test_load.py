import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from nanoflow_compiler.errors import ConfigError, ModelLoadError
from nanoflow_compiler.models import load_decoder


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_directory(pristine):
    decoder = load_decoder(pristine)
    assert decoder.max_model_len == 64
    assert decoder.eos_token_ids == {1}
    assert decoder.path == pristine
    assert decoder.name == str(pristine)
    assert decoder.tokenizer.eos_token == "</s>"
    assert not decoder.model.training
    assert not any(p.requires_grad for p in decoder.model.parameters())


def test_shards(sharded_dir, pristine):
    ids = torch.tensor([[0, 3, 4]])
    expected = load_decoder(pristine).model(ids).logits
    torch.testing.assert_close(load_decoder(sharded_dir).model(ids).logits, expected)


def test_end_tokens_come_from_the_generation_config_first(llama_dir, edit_json):
    edit_json(llama_dir / "generation_config.json", eos_token_id=[1, 2])
    assert load_decoder(llama_dir).eos_token_ids == {1, 2}


def test_no_tokenizer(llama_dir):
    for file in llama_dir.glob("tokenizer*"):
        file.unlink()
    assert load_decoder(llama_dir).tokenizer is None


def test_broken_tokenizer(llama_dir, refuses):
    (llama_dir / "tokenizer.json").write_text("{")
    refuses(load_decoder, llama_dir, words=["tokenizer cannot be loaded", "download"])


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(pristine, dtype):
    assert load_decoder(pristine, dtype=dtype).model.dtype == torch.bfloat16
    assert load_decoder(pristine).model.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers(llama_dir, bad, refuses):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad

    change_weights(llama_dir, spoil)
    refuses(load_decoder, llama_dir, words=["model.layers.1.mlp.up_proj.weight", "NaN"])


def test_missing_tensor(llama_dir, refuses):
    change_weights(llama_dir, lambda weights: weights.pop("model.norm.weight"))
    refuses(load_decoder, llama_dir, words=["model.norm.weight", "in none of its files"])


def test_weights_of_another_shape(llama_dir, edit_json, refuses):
    edit_json(llama_dir / "config.json", intermediate_size=48)
    refuses(load_decoder, llama_dir, words=["cannot be loaded", "belong together"])


def test_not_a_decoder(tmp_path, refuses):
    BertConfig().save_pretrained(tmp_path)
    refuses(load_decoder, tmp_path, words=["bert is not a decoder"])


def test_dummy_from_the_catalog():
    decoder = load_decoder("llama-3.2-1b", load_format="dummy", num_hidden_layers=1, device="meta")
    assert decoder.config.num_hidden_layers == 1
    assert decoder.config.rope_parameters["rope_type"] == "llama3"
    assert decoder.model.dtype == torch.bfloat16
    assert decoder.tokenizer is None


def test_dummy_from_a_directory_is_repeatable(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    before = torch.random.get_rng_state()
    first, second = (load_decoder(llama_dir, load_format="dummy").model for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.get_input_embeddings().weight.std() > 0
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "setting",
    [
        {"dtype": "int3"},
        {"device": "abacus"},
        {"load_format": "pickle"},
        {"dummy_distribution": "cauchy"},
        {"num_hidden_layers": 1},
    ],
)
def test_bad_settings(pristine, setting):
    with pytest.raises(ConfigError, match=r"must be|unknown|only with"):
        load_decoder(pristine, **setting)


def test_overrides_of_a_checkpoint(llama_dir):
    whole = load_decoder(llama_dir).model
    cut = load_decoder(llama_dir, hf_overrides={"num_hidden_layers": 1}).model
    assert len(cut.model.layers) == 1
    assert torch.equal(cut.lm_head.weight, whole.lm_head.weight)
    dummy = load_decoder(llama_dir, load_format="dummy", hf_overrides={"hidden_size": 64}).model
    assert dummy.lm_head.weight.shape[1] == 64
    with pytest.raises(ModelLoadError, match=r"cannot be loaded|none of its files"):
        load_decoder(llama_dir, hf_overrides={"num_hidden_layers": 9})
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_decoder(llama_dir, hf_overrides={"intermediate_size": 7})
    (llama_dir / "model.gguf").touch()
    with pytest.raises(ConfigError, match="not a GGUF file"):
        load_decoder(llama_dir / "model.gguf", hf_overrides={"num_hidden_layers": 1})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_absent_gpu(pristine):
    with pytest.raises(ConfigError, match="no CUDA device here; pass device='cpu'"):
        load_decoder(pristine, device="cuda")
    assert load_decoder(pristine, device="auto").model.device.type == "cpu"


def spread(weight):
    return float(weight.detach().float().std())


def test_distributions_of_dummy_weights(llama_dir):
    normal = load_decoder(llama_dir, load_format="dummy").model
    assert spread(normal.lm_head.weight) == pytest.approx(0.02, rel=0.3)
    assert (normal.model.norm.weight == 1).all()
    drawn = load_decoder(llama_dir, load_format="dummy", dummy_distribution="uniform").model
    for weight in drawn.parameters():
        assert 0 < weight.abs().max() <= 1e-3
        assert spread(weight) == pytest.approx(1e-3 / 3**0.5, rel=0.4)
    # What is no weight is as the configuration says.
    assert torch.equal(drawn.model.rotary_emb.inv_freq, normal.model.rotary_emb.inv_freq)


def test_dummy_weights_are_tied():
    settings = {"load_format": "dummy", "num_hidden_layers": 1, "device": "meta"}
    model = load_decoder("qwen3-0.6b", **settings).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.gpu
def test_a_checkpoint_goes_to_the_gpu(sharded_dir):
    ids = torch.tensor([[0, 3, 4]])
    expected = load_decoder(sharded_dir, device="cpu").model(ids).logits
    model = load_decoder(sharded_dir, device="cuda").model
    assert {weight.device.type for weight in model.state_dict().values()} == {"cuda"}
    assert model.model.rotary_emb.inv_freq.device.type == "cuda"
    torch.testing.assert_close(model(ids.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_dummy_weights_are_made_on_the_gpu(distribution):
    settings = {"load_format": "dummy", "dummy_distribution": distribution, "device": "auto"}
    start = time.perf_counter()
    first = load_decoder("bench-1b", **settings).model
    torch.cuda.synchronize()
    assert time.perf_counter() - start < 10
    assert first.device.type == "cuda"
    assert first.dtype == torch.bfloat16
    second = load_decoder("bench-1b", **settings).model
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_gpu_that_is_not_there(pristine):
    with pytest.raises(ConfigError, match="torch sees"):
        load_decoder(pristine, device="cuda:99")


def test_smollm2_answers(smollm2):
    tokenizer = smollm2.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = smollm2.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert smollm2.eos_token_ids == {tokenizer.eos_token_id} == {2}
    assert smollm2.max_model_len == 8192
