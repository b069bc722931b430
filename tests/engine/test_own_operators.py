"""Engines on our operators find the very tokens of the model itself, whole and in parts."""

import pytest
import torch

from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.sampling_params import SamplingParams
from tiny_models import BUILDERS

GREEDY = SamplingParams(temperature=0, max_tokens=8)
# What each is fused to: all that there is, rotation in halves, parts of heads, linears and no rotation.
OPERATORS = {
    "llama": {"linear", "linear_add", "gated_linear", "rotary_append", "rms_norm"},
    "gemma2": {"linear", "gated_linear", "rotary_append"},
    "gpt_oss": {"linear", "rotary_append"},
    "gpt_neox": {"linear", "rotary_append"},
    "deepseek_v3": {"linear", "linear_add", "gated_linear", "rms_norm"},
}
WAYS = [("codegen", 2, name) for name in OPERATORS] + [
    ("codegen", 1, "llama"),
    ("reference", 3, "llama"),
]


def make_prompts():
    generator = torch.Generator().manual_seed(3)
    return [
        {"prompt_token_ids": torch.randint(3, 128, (n,), generator=generator).tolist()}
        for n in (40, 1, 13, 5)
    ]


def tokens_of(llm):
    return [output.outputs[0].token_ids for output in llm.generate(make_prompts(), GREEDY)]


@pytest.mark.parametrize(("backend", "parts", "name"), WAYS)
def test_tokens_are_those_without(backend, parts, name):
    model = BUILDERS[name]()
    with LLM(model, enforce_eager=True) as llm:
        expected = tokens_of(llm)
    options = {"backend": backend, "parts": parts, "clusters": "eager", "kernels": "own"}
    with LLM(model, options=options, max_num_batched_tokens=33) as llm:
        assert tokens_of(llm) == expected
        if backend == "codegen":
            assert used(llm._core.runner.forward.step.source) == OPERATORS[name]


def used(source):
    ours = ("linear", "linear_add", "gated_linear", "rotary_append", "rms_norm")
    return {name for name in ours if f"ops.nanoflow.{name}.default(" in source}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("parts", [1, 2])
def test_logits_are_close_on_a_gpu(name, parts):
    """In bfloat16: the log-probabilities of prompts, whatever implementation runs."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    model = BUILDERS[name](**sizes).to(torch.bfloat16).cuda()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for kernels in ("aten", "own"):
        options = {"kernels": kernels, "parts": parts}
        with LLM(model, options=options) as llm:
            outputs = llm.generate(make_prompts(), params)
        found.append([values_of(output.prompt_logprobs) for output in outputs])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1)


def values_of(prompt_logprobs):
    """Of each token of a prompt but the first."""
    known = [each for each in prompt_logprobs if each]
    return torch.tensor([each.logprobs[0] for each in known])
