"""The runner: cuts anywhere give what one call gives; padding leaves no trace."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler import ops
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Entry
from nanoflow_compiler.engine.request import Request
from nanoflow_compiler.engine.runner import EagerStep, ModelRunner, even_cuts
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.kv_cache import KVCache
from nanoflow_compiler.models.hf import PackedDecoder
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


def make_entries(lengths):
    """Requests with (tokens before, tokens now), in blocks of their own."""
    entries, block = [], 1
    for number, (context, new) in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(3, 128, (context + new,), generator=generator).tolist()
        request = Request(
            request_id=number,
            prompt_token_ids=tokens,
            params=SamplingParams(),
            max_tokens=1,
            seed=0,
        )
        count = -(-len(tokens) // 64)
        request.blocks = list(range(block, block + count))
        block += count
        entries.append((Entry(request, 0, context), Entry(request, context, new)))
    return entries


def run(runner, lengths):
    entries = make_entries(lengths)
    if before := [first for first, _ in entries if first.num_tokens]:
        runner.run(runner.prepare(Batch.pack(before)))
    return runner.run(runner.prepare(Batch.pack([second for _, second in entries])))


@pytest.fixture(scope="module")
def packed():
    return PackedDecoder(BUILDERS["mistral"](), max_length=256)


def make_cache(packed):
    return KVCache.allocate(packed.layers, num_blocks=24)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 20)), min_size=1, max_size=5),
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_every_cut_reproduces_the_whole(packed, lengths, where):
    expected = run(ModelRunner(EagerStep(packed), cache=make_cache(packed)), lengths)

    def cut(num_tokens, num_cells):
        assert num_cells == NUM_CELLS
        return [0, *sorted(int(share * num_tokens) for share in where), num_tokens]

    with pytest.MonkeyPatch.context() as monkeypatch:
        step = CutAttention(packed, monkeypatch)
        actual = run(ModelRunner(step, cache=make_cache(packed), cut=cut), lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[(5, 1)], [(0, 1)], [(63, 1)], [(0, 3), (4, 1)]])
def test_padding_leaves_no_trace(packed, lengths):
    plain = ModelRunner(EagerStep(packed), cache=make_cache(packed))
    padded = ModelRunner(EagerStep(packed), cache=make_cache(packed), min_rows=8)
    torch.testing.assert_close(run(padded, lengths), run(plain, lengths), rtol=1e-4, atol=1e-5)
    for mine, other in zip(padded.cache.keys, plain.cache.keys, strict=True):
        torch.testing.assert_close(mine[1:], other[1:], rtol=1e-4, atol=1e-5)
        assert not other[0].any()


def test_a_step_that_samples_nothing_still_stores_keys(packed):
    runner = ModelRunner(EagerStep(packed), cache=make_cache(packed), min_rows=2)
    (_, entry), *_ = make_entries([(0, 6)])
    chunk = Batch.pack([Entry(entry.request, 0, 4)])
    assert runner.run(runner.prepare(chunk)).shape[0] == 0
    assert runner.cache.keys[0][1, :4].any(-1).all()
    assert not runner.cache.keys[0][1, 4:].any()


def test_even_cuts():
    assert even_cuts(7, 3) == [0, 2, 4, 7]
    assert even_cuts(2, 4) == [0, 0, 1, 1, 2]
    assert even_cuts(5, 1) == [0, 5]
