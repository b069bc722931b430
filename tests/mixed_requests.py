"""Requests of all kinds in one run, and what an engine answers in a form that can be compared."""

import random

import torch

from nanoflow_compiler.engine.sampling_params import SamplingParams

SETTINGS = [
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.05, "logprobs": 2},
    {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
    {"temperature": 1, "logit_bias": {5: 2.0, 7: -100.0}, "ignore_eos": True},
    {"temperature": 1, "min_tokens": 6, "stop_token_ids": [9, 11]},
    {"temperature": 0, "allowed_token_ids": [3, 17, 40, 77, 99]},
    {"temperature": 1, "prompt_logprobs": 1},
]

PLAIN = SETTINGS[:4]
"""Whose tokens are drawn from the logits as they are."""


def make_requests(number, *, seed=0, longest=130, most=16, settings=SETTINGS):
    """Prompts, and how each is sampled: every setting in turn, with a seed of its own."""
    choice = random.Random(seed)
    prompts, params = [], []
    for at in range(number):
        length = choice.choice([1, 2, 63, 64, choice.randint(1, longest)])
        prompts.append({"prompt_token_ids": [choice.randrange(3, 128) for _ in range(length)]})
        own = settings[at % len(settings)]
        count = max(choice.randint(1, most), own.get("min_tokens", 0))
        params.append(SamplingParams(**own, seed=1000 * seed + at, max_tokens=count))
    return prompts, params


def answers(llm, requests):
    """Tokens and ends, and all log-probabilities as one row."""
    outputs = llm.generate(*requests)
    completions = [output.outputs[0] for output in outputs]
    found = [(one.token_ids, one.finish_reason, one.stop_reason) for one in completions]
    return found, torch.tensor([value for output in outputs for value in _logprobs(output)])


def _logprobs(output):
    for position in (*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())):
        yield from position.logprobs if position else ()


def check_same(found, expected):
    """Rounding may differ with the sizes of GEMMs."""
    assert found[0] == expected[0]
    assert found[1].shape == expected[1].shape
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
