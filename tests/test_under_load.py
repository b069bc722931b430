"""Two hundred requests at once on a real model: each gets exactly the tokens that it gets alone."""

import asyncio

import numpy as np
import pytest

from nanoflow_compiler import LLM, AsyncEngine, EngineSpec, SamplingParams
from nanoflow_compiler.engine.batcher import Batcher

NUM_REQUESTS = 200
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
    """Prompts of 1 to 134 tokens, many of which begin alike or end beside a block's end."""
    rng = np.random.default_rng(0)
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 8
    shared = tokenizer(text)["input_ids"][:120]
    for number in range(NUM_REQUESTS):
        begins = shared[: int(rng.choice([0, 0, 0, 55, 70, 115]))]
        own = rng.integers(3, 2000, int(rng.integers(1, 20))).tolist()
        most = int(rng.integers(1, 12))
        yield (
            begins + own,
            SamplingParams(seed=number, max_tokens=most, **KINDS[number % len(KINDS)]),
        )


def run(requests, model, **settings):
    """The answers, and the counts of the engine."""
    with LLM(model, **settings) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [params for _, params in requests],
        )
        return [answer(output) for output in outputs], llm._core.stats()


def run_in_a_process(requests, model):
    """The same through an engine in a process of its own, all callers at once, as a server has them."""

    async def one(engine, number):
        prompt, params = requests[number]
        async for output in engine.generate(
            {"prompt_token_ids": prompt}, params, request_id=str(number)
        ):
            last = output
        return answer(last)

    async def main():
        async with AsyncEngine.launch(EngineSpec(model=str(model))) as engine:
            answers = await asyncio.gather(*(one(engine, n) for n in range(len(requests))))
            return answers, await engine.stats()

    return asyncio.run(main())


def answer(output):
    (completion,) = output.outputs
    return completion.token_ids, completion.finish_reason


@pytest.mark.timeout(1500)
def test_answers_under_load_equal_those_alone(smollm2, monkeypatch):
    """In one test, because what each request gets alone takes longest."""
    requests, model = list(make_requests(smollm2.tokenizer)), smollm2.path
    alone, _ = run(requests, model, max_num_seqs=1, enable_prefix_caching=False)

    answers, stats = run_in_a_process(requests, model)
    assert answers == alone
    assert stats.num_cache_hits > 0

    cut_everywhere = {"max_num_batched_tokens": 37, "max_num_seqs": 30}
    answers, stats = run(requests, model, enable_prefix_caching=False, **cut_everywhere)
    assert answers == alone
    assert stats.num_cache_hits == 0

    monkeypatch.setattr(Batcher, "_is_expected_to_fit", lambda *_, **__: True)
    answers, stats = run(requests, model, num_kv_blocks=8)
    assert answers == alone
    assert stats.num_preemptions > 0
