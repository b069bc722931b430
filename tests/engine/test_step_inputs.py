"""What a step is given: rows that are sampled come first, and tokens that are not known have a source."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.buckets import Bucket
from nanoflow_compiler.engine.step_inputs import StepInputs, layout_of, pack_inputs


def make_batch(query_lens, *, contexts, rows=(), **changes):
    query_lens, contexts = np.array(query_lens), np.array(contexts)
    counts = zip(contexts.tolist(), query_lens.tolist(), strict=True)
    return replace(
        Batch.empty(),
        token_ids=100 + np.arange(query_lens.sum()),
        positions=np.concatenate([np.arange(first, first + count) for first, count in counts]),
        query_lens=query_lens,
        context_lens=contexts,
        block_tables=np.arange(1, 1 + 3 * len(query_lens), dtype=np.int32).reshape(-1, 3),
        rows=np.array(rows, dtype=np.int64),
        slots=np.arange(len(rows)),
        **changes,
    )


def pack(batch, *, needs_rows=False):
    return pack_inputs(batch, layout_of(batch), needs_rows=needs_rows)


def test_inputs():
    batch = make_batch(
        [1, 3],
        contexts=[64, 0],
        rows=[0, 3],
        unknown=np.array([0]),
        unknown_slots=np.array([5]),
        prompt_rows=np.array([1, 2]),
        prompt_targets=np.array([102, 103]),
    )
    inputs = pack(batch)
    assert inputs.input_ids.tolist() == [100, 101, 102, 103]
    assert inputs.sources.tolist() == [5, -1, -1, -1]
    assert inputs.positions.tolist() == [64, 0, 1, 2]
    assert inputs.kv_slots.tolist() == [2 * 64, 4 * 64, 4 * 64 + 1, 4 * 64 + 2]
    assert inputs.rows.tolist() == [0, 3, 1, 2]
    assert inputs.slots.tolist() == [0, 1]
    assert inputs.targets.tolist() == [102, 103]
    assert StepInputs.of(inputs.arrays) == inputs


def test_a_row_where_kernels_need_one():
    batch = make_batch([2], contexts=[0])
    assert pack(batch).rows.tolist() == []
    assert pack(batch, needs_rows=True).rows.tolist() == [0]


@given(
    query_lens=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    num_rows=st.integers(0, 5),
    has_prompts=st.booleans(),
)
def test_inputs_of_a_bucket_always_have_one_form(query_lens, num_rows, has_prompts):
    """They are copied as bytes to where the captured step reads them."""
    bucket = Bucket(50, 6, has_prompts=has_prompts)
    rows = np.arange(min(num_rows, len(query_lens)))
    batch = make_batch(query_lens, contexts=[3] * len(query_lens), rows=rows)

    def forms(batch):
        filled = bucket.fill(batch, spare_slot=8)
        return [(array.dtype, array.shape) for array in pack(filled, needs_rows=True).arrays]

    assert forms(batch) == forms(bucket.example())
    assert {dtype for dtype, _ in forms(batch)} == {np.dtype(np.int64)}
