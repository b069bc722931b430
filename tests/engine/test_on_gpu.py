"""The engine on a GPU: the tokens that it finds on the CPU, in float32."""

import warnings

import pytest
import torch

from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from tiny_models import BUILDERS

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice on a reduction that it splits.
    pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled"),
]

# Its values have heads of 40 bytes, which TMA cannot read.
UNCAPTURED = pytest.mark.filterwarnings("ignore:.* are not captured")
NAMES = [
    *("llama", "gemma2", "gpt2", "gpt_oss", "mixtral", "qwen3_moe"),
    pytest.param("deepseek_v3", marks=UNCAPTURED),
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1, seed=3, max_tokens=20, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.8, seed=4, top_k=20, max_tokens=9, repetition_penalty=1.2),
]


def make_prompts():
    generator = torch.Generator().manual_seed(3)
    lengths = (60, 1, 13, 62, 5, 130)
    return [
        {"prompt_token_ids": torch.randint(3, 128, (n,), generator=generator).tolist()}
        for n in lengths
    ]


def tokens_of(model, **settings):
    prompts = make_prompts()
    params = [PARAMS[at % len(PARAMS)] for at in range(len(prompts))]
    with LLM(model, **settings) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_those_of_the_cpu(name):
    model = BUILDERS[name]()
    expected = tokens_of(model, enforce_eager=True)
    model = model.cuda()
    assert tokens_of(model, enforce_eager=True) == expected
    assert tokens_of(model) == expected
    assert tokens_of(model, options={"parts": 2}) == expected
    # Steps of prompts alone, of which nothing is sampled.
    assert tokens_of(model, max_num_batched_tokens=16) == expected


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_steps_with_experts_are_captured(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LLM(BUILDERS[name]().cuda()) as llm:
            assert llm._core.runner.graphs.buckets.all
    assert not [one for one in caught if "not captured" in str(one.message)]


def test_preempted_requests_end_with_the_same_tokens():
    model = BUILDERS["llama"]()
    expected = tokens_of(model, enforce_eager=True)
    found = tokens_of(model.cuda(), enforce_eager=True, num_kv_blocks=4, max_num_batched_tokens=64)
    assert found == expected
