"""The runner: steps in order, nobody waits; cuts anywhere give what one call gives."""

import itertools
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler import ops
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.runner import EagerStep, ModelRunner, even_cuts
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.sampling_columns import SamplingColumns
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.kv_cache import KVCache
from nanoflow_compiler.models.hf import PackedDecoder
from sampling_rows import packed as packed_mask
from tiny_models import BUILDERS

NUM_CELLS = 3


class CutAttention:
    """A step that runs each attention once per cell, as a compiled program may."""

    attention_parts = ((0, NUM_CELLS), *((cell, cell + 1) for cell in range(NUM_CELLS)))
    num_cells = NUM_CELLS

    def __init__(self, model, monkeypatch):
        self.model = model
        self.whole = ops.attention
        monkeypatch.setattr(ops, "attention", self.attention)

    def attention(self, query, key, value, *settings):
        *settings, part = settings
        assert part == 0
        parts = [
            self.whole(query[rows], key[rows], value[rows], *settings, part)
            for part, rows in enumerate(itertools.starmap(slice, self.ranges), start=1)
        ]
        return torch.cat(parts)

    def __call__(self, input_ids, positions, rows, cuts):
        assert cuts[0] == 0
        assert cuts[-1] == len(input_ids)
        self.ranges = list(itertools.pairwise(cuts))
        return self.model(input_ids, positions, rows)


def make_batches(lengths):
    """Requests with (tokens before, tokens now): what was computed before, and what is now."""
    contexts, news = zip(*lengths, strict=True)
    tokens = [
        torch.randint(3, 128, (sum(both),), generator=torch.Generator().manual_seed(number)).numpy()
        for number, both in enumerate(lengths)
    ]
    counts = [-(-sum(both) // 64) for both in lengths]
    tables = np.zeros((len(lengths), max(counts)), dtype=np.int64)
    block = 1
    for row, count in enumerate(counts):
        tables[row, :count] = range(block, block + count)
        block += count
    zeros = [0] * len(lengths)
    return make_batch(tokens, tables, zeros, contexts), make_batch(tokens, tables, contexts, news)


def make_batch(tokens, tables, starts, counts):
    """The tokens of those that have any, the last row of each sampled."""
    kept = [row for row, count in enumerate(counts) if count]
    starts, counts = np.array(starts)[kept], np.array(counts)[kept]
    pieces = [
        tokens[row][start : start + count]
        for row, start, count in zip(kept, starts, counts, strict=True)
    ]
    positions = [
        np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)
    ]
    none = np.zeros(0, dtype=np.int64)
    return Batch(
        token_ids=np.concatenate([none, *pieces]),
        unknown=none,
        unknown_slots=none,
        positions=np.concatenate([none, *positions]),
        query_lens=counts,
        context_lens=starts,
        block_tables=tables[kept],
        rows=np.cumsum(counts) - 1,
        slots=np.array(kept),
        keys=np.array(kept),
        counters=np.zeros(len(kept), dtype=np.int64),
        prompt_rows=none,
        prompt_targets=none,
        prompt_keys=none,
        prompt_counts=none,
    )


def plain_sampling(num_rows):
    """Greedy rows."""
    columns = SamplingColumns.allocate(num_rows)
    for slot in range(num_rows):
        columns.put(slot, SamplingParams(temperature=0), seed=0, eos_token_ids=())
    return SamplingBatch.gather(
        columns,
        slots=np.arange(num_rows),
        num_prompt_tokens=np.ones(num_rows, dtype=np.int64),
        num_output_tokens=np.zeros(num_rows, dtype=np.int64),
        block_tables=np.zeros((num_rows, 1), dtype=np.int32),
        block_size=64,
    )


class Recorded:
    """A step that keeps its logits."""

    def __init__(self, step):
        self.step = step
        self.attention_parts, self.num_cells = step.attention_parts, step.num_cells

    def __call__(self, *arguments):
        self.logits = self.step(*arguments)
        return self.logits

    def close(self):
        self.step.close()


def make_runner(step, packed, **settings):
    cache = KVCache.allocate(packed.layers, num_blocks=24)
    return ModelRunner(Recorded(step), cache=cache, num_slots=8, **settings)


def run(runner, lengths):
    """The logits of the second batch."""
    before, now = make_batches(lengths)
    for batch in (before, now):
        if batch.num_tokens:
            runner.submit(batch, plain_sampling(len(batch.rows))).result()
    return runner.forward.step.logits


@pytest.fixture(scope="module")
def packed():
    return PackedDecoder(BUILDERS["mistral"](), max_length=256)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 20)), min_size=1, max_size=5),
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_every_cut_reproduces_the_whole(packed, lengths, where):
    expected = run(make_runner(EagerStep(packed), packed), lengths)

    def cut(num_tokens, num_cells):
        assert num_cells == NUM_CELLS
        return [0, *sorted(int(share * num_tokens) for share in where), num_tokens]

    with pytest.MonkeyPatch.context() as monkeypatch:
        step = CutAttention(packed, monkeypatch)
        actual = run(make_runner(step, packed, cut=cut), lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_step_that_samples_nothing_still_stores_keys_and_tokens(packed):
    runner = make_runner(EagerStep(packed), packed)
    _, batch = make_batches([(0, 4)])
    chunk = replace(batch, rows=batch.rows[:0], slots=batch.slots[:0], keys=batch.keys[:0])
    sampled = runner.submit(chunk, plain_sampling(0)).result()
    assert sampled.tokens.shape == (0,)
    assert runner.cache.keys[0][1, :4].any(-1).all()
    assert not runner.cache.keys[0][1, 4:].any()
    assert runner.forward.token_store[64:68].tolist() == batch.token_ids.tolist()


def test_the_last_token_of_a_slot_is_read_on_the_device(packed):
    runner = make_runner(EagerStep(packed), packed)
    _, prompt = make_batches([(0, 5)])
    first = runner.submit(prompt, plain_sampling(1))
    _, decode = make_batches([(5, 1)])
    unknown = replace(decode, unknown=np.array([0]), unknown_slots=decode.slots)
    second = runner.submit(unknown, plain_sampling(1)).result()
    known = replace(decode, token_ids=first.result().tokens.numpy())
    expected = runner.submit(known, plain_sampling(1)).result()
    assert second.tokens.tolist() == expected.tokens.tolist()
    assert runner.forward.token_store[64 + 5] == first.result().tokens[0]


def test_steps_run_in_order_and_nobody_waits(packed):
    gate, order = threading.Event(), []

    def step(*arguments):
        gate.wait(10)
        order.append(len(arguments[0]))
        return packed(*arguments[:3])

    runner = make_runner(EagerStep(step), packed, is_threaded=True)
    runner.forward.step.step = step
    futures = []
    for size in (3, 2, 1):
        _, batch = make_batches([(0, size)])
        futures.append(runner.submit(batch, plain_sampling(1)))
    assert not any(future.done() for future in futures)
    gate.set()
    for future in futures:
        future.result()
    assert order == [3, 2, 1]
    runner.forward.step.close = lambda: order.append("closed")
    runner.close()
    assert order[-1] == "closed"


def test_even_cuts():
    assert even_cuts(7, 3) == [0, 2, 4, 7]
    assert even_cuts(2, 4) == [0, 0, 1, 1, 2]
    assert even_cuts(5, 1) == [0, 5]


@pytest.mark.parametrize("is_threaded", [False, True])
def test_only_sampling_waits_for_the_mask(packed, is_threaded):
    runner = make_runner(EagerStep(packed), packed, is_threaded=is_threaded)
    _, batch = make_batches([(0, 5), (0, 3)])
    free = runner.submit(batch, plain_sampling(2)).result().tokens.tolist()
    mask = Future()
    guided = runner.submit(batch, plain_sampling(2), mask=mask)
    assert not guided.done()
    mask.set_result(packed_mask([[9]], vocab=128, rows=[1]))
    assert guided.result(10).tokens.tolist() == [free[0], 9]
    runner.close()


@pytest.mark.parametrize("is_threaded", [False, True])
def test_a_mask_that_never_comes_is_an_error_of_its_step(packed, is_threaded):
    runner = make_runner(EagerStep(packed), packed, is_threaded=is_threaded)
    _, batch = make_batches([(0, 5)])
    mask = Future()
    guided = runner.submit(batch, plain_sampling(1), mask=mask)
    mask.cancel()
    with pytest.raises(CancelledError):
        guided.result(10)
    runner.close()


def test_rows_of_prompts_are_only_looked_at(packed):
    runner = make_runner(EagerStep(packed), packed)
    _, batch = make_batches([(0, 5)])
    asking = replace(
        batch,
        prompt_rows=np.arange(4),
        prompt_targets=batch.token_ids[1:].copy(),
        prompt_keys=np.zeros(4, dtype=np.int64),
        prompt_counts=np.full(4, 2),
    )
    sampled = runner.submit(asking, plain_sampling(1)).result()
    rows = runner.forward.step.logits[1:].log_softmax(-1)
    assert sampled.tokens.tolist() == [runner.forward.step.logits[0].argmax()]
    expected = rows.gather(1, torch.from_numpy(asking.prompt_targets)[:, None])[:, 0]
    torch.testing.assert_close(sampled.prompt_logprobs.logprobs[:, 0], expected)
    assert sampled.prompt_logprobs.token_ids.shape == (4, 3)
