"""Sampling: against plain arithmetic, seeds that do not depend on the batch, distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.engine import draw, logprobs, sampler
from nanoflow_compiler.engine.sampler import sample
from sampling_rows import (
    draw_rows,
    make_batch,
    packed,
    reference_distribution,
    reference_logits,
    reference_tokens,
    row,
    sample_rows,
)

VOCAB = 50
VOCABS = (5, VOCAB, 513, 1200)
"""Of one chunk, of one that is full but for a bit, of several."""


def random_logits(rows, *, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(1000 * rows + seed)
    return torch.randn(rows, vocab, generator=generator) * 2


def test_greedy():
    logits = random_logits(4)
    greedy = logits.argmax(-1).tolist()
    assert draw_rows(logits, [row(temperature=0)] * 4) == greedy
    all_bits = packed([range(VOCAB)] * 4, vocab=VOCAB)
    assert draw_rows(logits, [row(temperature=0)] * 4, mask=all_bits) == greedy
    biased = row(temperature=0, logit_bias={3: 100})
    assert draw_rows(logits, [*[row(temperature=0)] * 3, biased]) == [*greedy[:3], 3]


MIXED = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
    {"logit_bias": {1: 4.0, 3: -100.0}, "temperature": 0},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5, "temperature": 0},
    {"min_tokens": 3, "stop_token_ids": [4]},
]


@st.composite
def params(draw):
    floats = {
        "temperature": st.sampled_from([0.0, 1e-6, 0.5, 1.0, 3.0]),
        "top_p": st.sampled_from([1e-9, 0.3, 0.5, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.7, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4, -0.1]),
        "top_k": st.sampled_from([-1, 0, 0, 1, 2, 4, 40, 10**9]),
        "min_tokens": st.sampled_from([0, 0, 2]),
        "logit_bias": st.none() | st.dictionaries(st.integers(0, 4), st.sampled_from([-100, 1, 9])),
    }
    return {name: draw(strategy) for name, strategy in floats.items()}


tokens = st.lists(st.integers(0, 4), max_size=9)
rows = st.builds(
    lambda params, seed, prompt, output: row(seed=seed, prompt=prompt, output=output, **params),
    params=params(),
    seed=st.integers(0, 2**64 - 1),
    prompt=tokens.filter(len),
    output=tokens,
)


@given(st.data(), st.lists(rows, min_size=1, max_size=7), st.sampled_from(VOCABS))
@settings(max_examples=60, deadline=None)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(data, rows, vocab):
    logits = random_logits(len(rows), vocab=vocab, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans(), label="coarse"):
        logits = logits.round()
    together = draw_rows(logits, rows, eos=[0])
    alone = [draw_rows(logits[i : i + 1], [one], eos=[0])[0] for i, one in enumerate(rows)]
    order = data.draw(st.permutations(range(len(rows))))
    mixed = draw_rows(logits[order], [rows[i] for i in order], eos=[0])
    assert together == alone
    assert mixed == [together[i] for i in order]


@given(st.data(), st.lists(rows, min_size=1, max_size=5), st.sampled_from(VOCABS))
@settings(max_examples=60, deadline=None)
def test_tokens_are_those_of_the_reference(data, rows, vocab):
    logits = random_logits(len(rows), vocab=vocab, seed=data.draw(st.integers(0, 99)))
    allowed = data.draw(st.none() | st.lists(st.integers(1, vocab - 1), min_size=3), label="mask")
    mask = None if allowed is None else packed([allowed] * len(rows), vocab=vocab)
    before = logits.clone()
    found = draw_rows(logits, rows, eos=[0], mask=mask)
    for token, one, values in zip(found, rows, logits.numpy(), strict=True):
        assert token in reference_tokens(values, one, eos=[0], allowed=allowed)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("params", MIXED[1:6])
def test_tokens_follow_the_truncated_distribution(params):
    logits, count = random_logits(1, vocab=12), 20_000
    found = draw_rows(logits.expand(count, -1), [row(seed=seed, **params) for seed in range(count)])
    drawn = np.bincount(found, minlength=12)
    one = row(**params)
    expected = count * reference_distribution(reference_logits(logits[0], one), one.params)
    kept = expected > 0
    assert drawn[~kept].sum() == 0
    chi_square = ((drawn - expected)[kept] ** 2 / expected[kept]).sum()
    # Mean and standard deviation of the chi-square distribution, which is skewed: 5 of them.
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_narrow_settings_are_greedy():
    logits = random_logits(3)
    greedy = logits.argmax(-1).tolist()
    for params in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert draw_rows(logits, [row(**params)] * 3) == greedy


def test_equal_logits_all_stay():
    logits = torch.zeros(400, VOCAB)
    logits[:, :8] = 3.0
    for params in ({"top_k": 2}, {"top_p": 0.01}, {"min_p": 1.0}):
        found = draw_rows(logits, [row(seed=seed, **params) for seed in range(400)])
        assert set(found) == set(range(8))


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = random_logits(1)
    assert draw_rows(logits, [row(seed=3, top_k=10**30)]) == draw_rows(logits, [row(seed=3)])


def test_the_same_seed_draws_anew_at_each_token():
    logits = torch.zeros(1, VOCAB)
    found = [draw_rows(logits, [row(seed=1, output=[0] * i)])[0] for i in range(20)]
    assert len(set(found)) > 5
    assert found == [draw_rows(logits, [row(seed=1, output=[0] * i)])[0] for i in range(20)]


def test_min_tokens_bars_the_end():
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6], logits[:, 7] = 9.0, 8.0, 7.0
    early = row(temperature=0, min_tokens=2, stop_token_ids=[6], output=[0])
    late = row(temperature=0, min_tokens=2, stop_token_ids=[6], output=[0, 0])
    assert draw_rows(logits, [early, late], eos=[5, 10**6]) == [7, 5]


def test_rows_without_a_number_harm_nobody():
    logits = random_logits(4)
    params = [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0}]
    rows = [row(**one) for one in params]
    good = draw_rows(logits, rows)
    for bad in (float("nan"), float("-inf"), float("inf")):
        for spoilt in range(4):
            changed = logits.clone()
            changed[spoilt] = bad
            found = draw_rows(changed, rows)
            assert 0 <= found[spoilt] < VOCAB
            assert found[:spoilt] + found[spoilt + 1 :] == good[:spoilt] + good[spoilt + 1 :]


def test_large_batches_are_drawn_in_parts(monkeypatch):
    logits = random_logits(len(MIXED) * 3)
    rows = [row(seed=i, output=[3, 3, i], **one) for i, one in enumerate(MIXED * 3)]
    mask = packed([range(i % 7, VOCAB) for i in range(len(rows))], vocab=VOCAB)
    whole = draw_rows(logits, rows, mask=mask)
    monkeypatch.setattr(sampler, "MAX_ELEMENTS", 2 * VOCAB)
    assert draw_rows(logits, rows, mask=mask) == whole
    monkeypatch.setattr(sampler, "MAX_ELEMENTS", 1)
    assert draw_rows(logits, rows, mask=mask) == whole


def test_races_of_a_few_rows_at_a_time_change_nothing(monkeypatch):
    logits = random_logits(200, vocab=700)
    rows = [row(seed=seed) for seed in range(200)]
    found = draw_rows(logits, rows)
    monkeypatch.setattr(draw, "_RACED_ON_CPU", 3 * 700)
    assert draw_rows(logits, rows) == found


def test_rounding_of_logits_hardly_ever_changes_a_token():
    """Kernels for other numbers of rows add in another order; tokens must not follow."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 20_000, generator=generator) * 3
    rounded = logits + 1e-5 * torch.randn(400, 20_000, generator=generator)
    rows = [row(seed=seed) for seed in range(400)]
    found, again = draw_rows(logits, rows), draw_rows(rounded, rows)
    assert sum(one != other for one, other in zip(found, again, strict=True)) <= 1


def test_logprobs_are_of_the_logits_as_they_came():
    logits = random_logits(5)
    asked = [None, 3, 0, None, 2]
    rows = [
        row(seed=i, logprobs=num, temperature=2.0, logit_bias={9: 30.0}, presence_penalty=1.0)
        for i, num in enumerate(asked)
    ]
    found = sample_rows(logits, rows)
    assert found.logprobs.token_ids.shape == found.logprobs.logprobs.shape == (5, 4)
    assert found.logprobs.ranks.shape == (5,)
    expected = logits.double().log_softmax(-1)
    for i in (1, 2, 4):
        check_top(found.logprobs, i, token=found.tokens[i].item(), expected=expected[i])


def check_top(found, i, *, token, expected):
    ids = found.token_ids[i].tolist()
    assert ids[0] == token
    assert ids[1:] == expected.argsort(descending=True)[: len(ids) - 1].tolist()
    torch.testing.assert_close(found.logprobs[i].double(), expected[ids], atol=1e-5, rtol=0)
    assert found.ranks[i] == (expected > expected[token]).sum() + 1


def test_no_logprobs_unless_asked():
    assert sample_rows(random_logits(2), [row(), row()]).logprobs is None
    alone = sample_rows(random_logits(2), [row(logprobs=0), row(logprobs=0)]).logprobs
    assert alone.token_ids.shape == (2, 1)


@pytest.mark.parametrize("max_elements", [1, 3 * VOCAB, 10**9])
def test_logprobs_of_a_prompt(monkeypatch, max_elements):
    monkeypatch.setattr(logprobs, "MAX_ELEMENTS", max_elements)
    logits = random_logits(7).bfloat16()
    targets = torch.arange(7)
    found = logprobs.prompt_logprobs(logits, targets, num=2)
    # Coarse logits are often equal, so only the values of the most likely tokens are certain.
    expected = logits.double().log_softmax(-1)
    assert found.token_ids[:, 0].tolist() == targets.tolist()
    values = torch.cat([expected.gather(-1, targets[:, None]), expected.topk(2).values], -1)
    torch.testing.assert_close(found.logprobs.double(), values, atol=1e-5, rtol=0)
    assert found.ranks.tolist() == ((expected > values[:, :1]).sum(-1) + 1).tolist()


def test_seeds_of_any_size():
    logits = random_logits(1)
    for seed in (-1, 2**70):
        assert draw_rows(logits, [row(seed=seed)]) == draw_rows(logits, [row(seed=seed)])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_a_device_without_waiting_for_it():
    rows = [row(seed=i, output=[3, 3, i], logprobs=i % 3, **one) for i, one in enumerate(MIXED)]
    logits = random_logits(len(rows), vocab=1200)
    mask = packed([range(i % 7, 1200) for i in range(len(rows))], vocab=1200)
    batch, store = make_batch(rows, eos=[5])
    expected = sample(logits, batch, token_store=store, mask=mask)
    there = logits.cuda(), store.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sample(there[0], batch, token_store=there[1], mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(found.logprobs.logprobs.cpu(), expected.logprobs.logprobs)
