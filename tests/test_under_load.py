"""Two hundred requests at once on a real model: each gets exactly the tokens that it gets alone."""

import asyncio

import numpy as np
import pytest

from nanoflow_compiler import LLM, AsyncEngine, EngineConfig, EngineSpec, SamplingParams
from nanoflow_compiler.engine import lengths

NUM_REQUESTS = 200
MAX_MODEL_LEN = 512
KINDS = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "logprobs": 2, "ignore_eos": True},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 40},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5},
    {"temperature": 1.0, "min_p": 0.1, "frequency_penalty": 0.4},
)


def make_requests(tokenizer):
    """Prompts of 1 to 100 tokens, of which many begin alike, and settings of all kinds."""
    rng = np.random.default_rng(0)
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 5
    shared = tokenizer(text)["input_ids"][:90]
    for number in range(NUM_REQUESTS):
        begins = shared[: int(rng.choice([0, 0, 0, 0, 70, 90]))]
        own = rng.integers(3, 2000, int(rng.integers(1, 20))).tolist()
        most = int(rng.integers(1, 12))
        yield (
            begins + own,
            SamplingParams(seed=number, max_tokens=most, **KINDS[number % len(KINDS)]),
        )


@pytest.fixture(scope="module")
def requests(smollm2):
    return list(make_requests(smollm2.tokenizer))


def run(requests, model, **settings):
    """The answers, and how often a request was preempted."""
    with LLM(model, max_model_len=MAX_MODEL_LEN, **settings) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [params for _, params in requests],
        )
        return [answer(output) for output in outputs], llm._core.stats()


def answer(output):
    (completion,) = output.outputs
    return completion.token_ids, completion.finish_reason


@pytest.fixture(scope="module")
def alone(smollm2, requests):
    """One after the other, each prompt computed whole."""
    answers, _ = run(requests, smollm2.path, max_num_seqs=1, enable_prefix_caching=False)
    return answers


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"enable_prefix_caching": False}, id="no-prefix-cache"),
        pytest.param({"max_num_batched_tokens": 37, "max_num_seqs": 30}, id="cut-everywhere"),
    ],
)
def test_answers_under_load_equal_those_alone(smollm2, requests, alone, settings):
    answers, stats = run(requests, smollm2.path, **settings)
    assert answers == alone
    assert (stats.num_cache_hits > 0) == settings.get("enable_prefix_caching", True)


@pytest.mark.timeout(1200)
def test_preempted_requests_too(smollm2, requests, alone, monkeypatch):
    monkeypatch.setattr(lengths, "FIRST_GUESS", 0)
    monkeypatch.setattr(lengths.OutputLengths, "add", lambda *_: None)
    answers, stats = run(requests, smollm2.path, num_kv_blocks=12, max_num_batched_tokens=100)
    assert answers == alone
    assert stats.num_preemptions > 0


@pytest.mark.timeout(1200)
def test_through_a_process_of_its_own(smollm2, requests, alone):
    """All callers at once, as a server has them."""

    async def one(engine, number):
        prompt, params = requests[number]
        async for output in engine.generate(
            {"prompt_token_ids": prompt}, params, request_id=str(number)
        ):
            last = output
        return answer(last)

    async def main():
        spec = EngineSpec(model=str(smollm2.path), config=EngineConfig(max_model_len=MAX_MODEL_LEN))
        async with AsyncEngine.launch(spec) as engine:
            return await asyncio.gather(*(one(engine, number) for number in range(len(requests))))

    assert asyncio.run(main()) == alone
