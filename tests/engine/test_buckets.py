"""Sizes of captured steps: in order, up to the maxima, and the smallest that holds a batch is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.buckets import Bucket, Buckets
from nanoflow_compiler.engine.step_inputs import layout_of

SPARE = 7
sizes = st.tuples(st.integers(1, 1100), st.integers(1, 3000))


def make_batch(query_lens, *, num_rows, num_prompt_rows=0):
    """Requests with nothing before, in blocks of their own."""
    query_lens = np.array(query_lens, dtype=np.int64)
    num_requests, num_tokens = len(query_lens), int(query_lens.sum())
    most = int(-(-query_lens.max(initial=1) // 64))
    return replace(
        Batch.empty(),
        token_ids=np.arange(num_tokens),
        positions=np.concatenate([np.arange(count) for count in [0, *query_lens]]),
        query_lens=query_lens,
        context_lens=np.zeros(num_requests, dtype=np.int64),
        block_tables=1 + np.arange(num_requests * most, dtype=np.int32).reshape(-1, most),
        rows=np.cumsum(query_lens)[:num_rows] - 1,
        slots=np.arange(num_rows),
        prompt_rows=np.arange(num_prompt_rows),
    )


def make_buckets(drawn):
    max_num_seqs, budget = drawn
    return Buckets.of_sizes(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)


@given(sizes)
def test_sizes_are_unique_and_in_order_and_end_with_the_maxima(drawn):
    max_num_seqs, budget = drawn
    buckets = make_buckets(drawn).all
    assert list(buckets) == sorted(set(buckets))
    most = min(max_num_seqs, budget)
    decodes = [bucket for bucket in buckets if not bucket.has_prompts]
    assert all(bucket.num_rows == bucket.num_tokens for bucket in decodes)
    assert decodes[-1] == Bucket(most, most)
    mixed = [bucket for bucket in buckets if bucket.has_prompts]
    if budget > 1:
        assert mixed[-1] == Bucket(budget, most, has_prompts=True)
    for bucket in buckets:
        assert 1 <= bucket.num_rows <= min(bucket.num_tokens, max_num_seqs)
        assert bucket.num_tokens <= budget


@given(sizes)
def test_the_largest_needs_the_most_memory(drawn):
    *others, largest = make_buckets(drawn).all
    assert all(bucket.num_tokens <= largest.num_tokens for bucket in others)
    assert all(bucket.num_rows <= largest.num_rows for bucket in others)


@given(sizes, st.data())
def test_the_smallest_that_holds_a_batch_is_found(drawn, data):
    max_num_seqs, budget = drawn
    buckets = make_buckets(drawn)
    num_requests = data.draw(st.integers(1, min(max_num_seqs, budget)))
    num_more = data.draw(st.integers(0, budget - num_requests))
    num_rows = data.draw(st.integers(0, num_requests))
    batch = make_batch([1 + num_more] + [1] * (num_requests - 1), num_rows=num_rows)
    found = buckets.find(batch)
    assert found is not None
    assert found.has_prompts == (num_more > 0)
    for bucket in buckets.all:
        holds = bucket.num_tokens >= batch.num_tokens and bucket.num_rows >= num_rows
        if holds and bucket.has_prompts == found.has_prompts:
            assert found <= bucket
    assert found.num_tokens >= batch.num_tokens
    assert found.num_rows >= num_rows


def test_what_no_bucket_holds():
    buckets = Buckets.of_sizes(max_num_seqs=4, max_num_batched_tokens=16)
    assert buckets.find(make_batch([1] * 5, num_rows=5)) is None
    assert buckets.find(make_batch([17], num_rows=1)) is None
    assert buckets.find(make_batch([3, 3], num_rows=2, num_prompt_rows=2)) is None
    assert buckets.find(make_batch([1], num_rows=1, num_prompt_rows=1)) is None
    assert Buckets(()).find(make_batch([1], num_rows=1)) is None


@pytest.mark.parametrize("bucket", make_buckets((130, 300)).all, ids=str)
def test_an_example_is_of_its_bucket(bucket):
    example = bucket.example()
    assert example.is_decode != bucket.has_prompts
    assert bucket.holds(example)
    filled = bucket.fill(example, spare_slot=SPARE)
    assert filled.is_decode != bucket.has_prompts
    assert filled.num_tokens == bucket.num_tokens
    assert len(filled.rows) == len(filled.slots) == bucket.num_rows
    assert not filled.block_tables.any()
    assert (layout_of(filled).slots < 64).all()
