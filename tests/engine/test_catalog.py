"""Every configuration of the catalog with two of its layers, from random weights to tokens, on a GPU."""

import pytest

from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.models.published import catalog_config, catalog_names

# Inductor's advice on a reduction that it splits.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160000,
}
"""For the CPU; the largest vocabulary has ids of special tokens near its end."""


def on_gpu(name):
    return pytest.param("cuda", name, {}, marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    ("device", "name", "changes"),
    [("cpu", "llama-3-8b", NARROW), ("cpu", "mixtral-8x7b", NARROW), *map(on_gpu, catalog_names())],
)
def test_tokens_of_every_configuration(device, name, changes):
    """Warnings, such as that of a step that is not captured, are errors."""
    overrides = {"num_hidden_layers": 2, **changes}
    settings = {
        "device": device,
        "load_format": "dummy",
        "hf_overrides": overrides,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "num_kv_blocks": 128,
        "enforce_eager": device == "cpu",
        "options": {"cache": False},
    }
    prompts = [
        {"prompt_token_ids": [5 + at] * length} for at, length in enumerate((1, 64, 200, 300))
    ]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    with LLM(name, **settings) as llm:
        assert llm.facts["dtype"] == catalog_config(name)["torch_dtype"]
        if device == "cuda":
            assert llm._core.runner.graphs.buckets.all
        first = llm.generate(prompts, params)
        again = llm.generate(prompts, params)
    for output in first:
        (one,) = output.outputs
        assert len(one.token_ids) == 8
        assert all(value <= 0 for position in one.logprobs for value in position.logprobs)
    # The second time beginnings are found in the cache, and steps have other sizes.
    for one, other in zip(first, again, strict=True):
        likely = [output.outputs[0].logprobs[0].logprobs[0] for output in (one, other)]
        assert likely[0] == pytest.approx(likely[1], abs=0.1)
