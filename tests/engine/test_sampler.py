"""Sampling: greedy, truncation, seeds that do not depend on the batch, distribution."""

import numpy as np
import pytest
import torch

from nanoflow_compiler.engine.request import Request
from nanoflow_compiler.engine.sampler import sample, uniform
from nanoflow_compiler.engine.sampling_params import SamplingParams

VOCAB = 50


def make_request(*, seed=0, outputs=0, **params):
    request = Request(
        request_id=seed,
        prompt_token_ids=(1, 2),
        params=SamplingParams(**params),
        max_tokens=16,
        seed=seed,
    )
    request.token_ids += [0] * outputs
    return request


def random_logits(rows):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 2


def draw(logits, requests, eos=()):
    return sample(logits, requests, eos_token_ids=eos).tolist()


def test_greedy():
    logits = random_logits(4)
    assert draw(logits, [make_request(temperature=0)] * 4) == logits.argmax(-1).tolist()


MIXED = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
]


def test_a_row_does_not_depend_on_the_rest_of_the_batch():
    logits = random_logits(len(MIXED))
    requests = [make_request(seed=7, outputs=i, **params) for i, params in enumerate(MIXED)]
    together = draw(logits, requests)
    alone = [draw(logits[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    backwards = draw(logits.flip(0), requests[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("params", MIXED[1:])
def test_tokens_follow_the_truncated_distribution(params):
    logits = random_logits(1)
    count = 4000
    requests = [make_request(seed=seed, **params) for seed in range(count)]
    drawn = np.bincount(draw(logits.expand(count, -1), requests), minlength=VOCAB) / count
    expected = naive_distribution(logits[0].double(), SamplingParams(**params)).numpy()
    assert drawn[expected == 0].sum() == 0
    assert abs(drawn - expected).max() < 0.03


def naive_distribution(logits, params):
    p = (logits / params.temperature).softmax(-1)
    p = torch.where(p >= params.min_p * p.max(), p, 0.0)
    order = p.argsort(descending=True)
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p = p / p.sum()
    kept, total = [], 0.0
    for token in order.tolist():
        if total < params.top_p:
            kept.append(token)
        total += p[token].item()
    mask = torch.zeros_like(p)
    mask[kept] = 1
    return p * mask / (p * mask).sum()


def test_top_k_of_one_and_a_tiny_top_p_are_greedy():
    logits = random_logits(3)
    greedy = logits.argmax(-1).tolist()
    assert draw(logits, [make_request(top_k=1)] * 3) == greedy
    assert draw(logits, [make_request(top_p=1e-9)] * 3) == greedy
    assert draw(logits, [make_request(min_p=1.0)] * 3) == greedy
    assert draw(logits, [make_request(temperature=1e-6)] * 3) == greedy


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = random_logits(1)
    assert draw(logits, [make_request(seed=3, top_k=10**6)]) == draw(
        logits, [make_request(seed=3, top_k=VOCAB)]
    )


def test_the_same_seed_draws_anew_at_each_token():
    logits = torch.zeros(1, VOCAB)
    tokens = [draw(logits, [make_request(seed=1, outputs=i)])[0] for i in range(20)]
    assert len(set(tokens)) > 5
    assert tokens == [draw(logits, [make_request(seed=1, outputs=i)])[0] for i in range(20)]


def test_min_tokens_bars_the_end():
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 9.0, 8.0, 7.0
    request = make_request(temperature=0, min_tokens=2, stop_token_ids=[6], outputs=1)
    done = make_request(temperature=0, min_tokens=2, stop_token_ids=[6], outputs=2)
    before = logits.clone()
    assert draw(logits, [request, done], eos=[5, 10**6]) == [7, 5]
    assert torch.equal(logits, before)


def test_uniform_numbers_look_uniform():
    seeds = np.arange(20_000, dtype=np.uint64)
    numbers = uniform(seeds, np.zeros_like(seeds))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(np.histogram(numbers, bins=10, range=(0, 1))[0] / 2000 - 1).max() < 0.1
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03


def test_seeds_of_any_size():
    logits = random_logits(1)
    for seed in (-1, 2**70):
        assert draw(logits, [make_request(seed=seed)]) == draw(logits, [make_request(seed=seed)])
