"""Masks, biases, bars and penalties against plain arithmetic, row by row."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.engine import logit_changes
from nanoflow_compiler.engine.logit_changes import change_logits
from sampling_rows import make_batch, packed, reference_logits, row

VOCAB = 37

tokens = st.lists(st.integers(0, 6), max_size=9)
rows = st.builds(
    row,
    prompt=tokens.filter(len),
    output=tokens,
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.1]),
    min_tokens=st.sampled_from([0, 2]),
    stop_token_ids=st.sampled_from([(), (3,), (3, 10**6)]),
    allowed_token_ids=st.sampled_from([None, (1,), (5, 0, 36, 5), tuple(range(VOCAB))]),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 4), st.sampled_from([-100, 1, 9])),
)


@given(st.data(), st.lists(rows, min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_logits_are_those_of_the_reference(data, rows):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(len(rows), VOCAB, generator=generator)
    before = logits.clone()
    allowed = data.draw(st.none() | st.just([0, 1, 2, 31, 32, 36]), label="mask")
    mask = None if allowed is None else packed([allowed] * len(rows), vocab=VOCAB)
    batch, store = make_batch(rows, eos=[6, VOCAB])
    found = change_logits(logits, batch, token_store=store, mask=mask)
    expected = [
        reference_logits(values, one, eos=[6, VOCAB], allowed=allowed)
        for values, one in zip(logits, rows, strict=True)
    ]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


def test_rows_that_ask_for_nothing_are_not_copied():
    logits = torch.zeros(2, VOCAB)
    batch, store = make_batch([row(), row(temperature=0, top_k=3, logprobs=2)])
    assert change_logits(logits, batch, token_store=store, mask=None) is logits


def test_only_rows_of_the_mask_are_masked():
    logits = torch.zeros(4, VOCAB)
    batch, store = make_batch([row()] * 4)
    mask = packed([[1], [2]], vocab=VOCAB, rows=[3, 1])
    found = change_logits(logits, batch, token_store=store, mask=mask)
    assert [(values == 0).sum().item() for values in found] == [VOCAB, 1, VOCAB, 1]
    assert found[3, 1] == found[1, 2] == 0


def test_masks_are_applied_in_parts(monkeypatch):
    logits = torch.zeros(7, VOCAB)
    allowed = [[i, 36 - i] for i in range(7)]
    monkeypatch.setattr(logit_changes, "MAX_ELEMENTS", 3 * VOCAB)
    batch, store = make_batch([row()] * 7)
    found = change_logits(logits, batch, token_store=store, mask=packed(allowed, vocab=VOCAB))
    for values, kept in zip(found, allowed, strict=True):
        assert (values == 0).nonzero().flatten().tolist() == sorted(kept)
