"""Packing: the arrays of a step, token by token."""

from dataclasses import fields

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Batcher, Waiting
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.step_inputs import layout_of
from nanoflow_compiler.engine.table import EMPTY, RequestTable


def make_batcher(*prompts, budget=100):
    table = RequestTable(num_slots=4, max_model_len=200, block_size=64)
    allocator = BlockAllocator(20, block_size=64)
    batcher = Batcher(table, allocator, max_num_batched_tokens=budget)
    for key, prompt in enumerate(prompts, start=7):
        request = EngineRequest(
            key=key,
            request_id=str(key),
            prompt_token_ids=prompt,
            params=SamplingParams(),
            group=key,
        )
        batcher.add(Waiting(request, 200))
    return batcher


def test_prompts_and_then_decode():
    batcher = make_batcher([5, 6, 7], range(10, 80))
    first = Batch.pack(batcher.table, batcher.next_batch())
    assert first.token_ids.tolist() == [5, 6, 7, *range(10, 80)]
    assert first.positions.tolist() == [*range(3), *range(70)]
    assert first.query_lens.tolist() == [3, 70]
    assert first.context_lens.tolist() == [0, 0]
    assert first.block_tables.tolist() == [[1, 0], [2, 3]]
    assert first.rows.tolist() == [2, 72]
    assert first.keys.tolist() == [7, 8]
    assert first.counters.tolist() == [0, 0]
    assert not len(first.unknown)

    second = Batch.pack(batcher.table, batcher.next_batch())
    assert second.positions.tolist() == [3, 70]
    assert second.unknown.tolist() == [0, 1]
    assert second.unknown_slots.tolist() == second.slots.tolist()
    assert second.counters.tolist() == [1, 1]

    batcher.table.append(second.slots, np.array([91, 92]))
    batcher.table.append(second.slots, np.array([93, 94]))
    third = Batch.pack(batcher.table, batcher.next_batch())
    assert third.token_ids.tolist() == [93, 94]
    assert not len(third.unknown)


def test_a_prompt_in_pieces():
    batcher = make_batcher(range(50), budget=20)
    pieces = [Batch.pack(batcher.table, batcher.next_batch()) for _ in range(3)]
    assert [piece.token_ids.tolist() for piece in pieces] == [
        list(range(20)),
        list(range(20, 40)),
        list(range(40, 50)),
    ]
    assert [piece.context_lens.tolist() for piece in pieces] == [[0], [20], [40]]
    assert [piece.rows.tolist() for piece in pieces] == [[], [], [9]]


def first_batch(prompts):
    batcher = make_batcher(*prompts)
    return Batch.pack(batcher.table, batcher.next_batch())


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    num_more=st.integers(0, 9),
    num_more_rows=st.integers(0, 9),
)
def test_what_fills_a_batch_up_changes_nothing_of_it(lengths, num_more, num_more_rows):
    batch = first_batch([range(length) for length in lengths])
    padded = batch.padded(
        num_tokens=batch.num_tokens + num_more,
        num_rows=len(batch.rows) + num_more_rows,
        spare_slot=9,
    )
    for field in fields(Batch):
        before, after = getattr(batch, field.name), getattr(padded, field.name)
        assert after.dtype == before.dtype, field.name
        assert after[: len(before)].tolist() == before.tolist(), field.name
    # Requests of one token, whose key and value go to the scratch block.
    new = slice(len(lengths), None)
    assert padded.query_lens[new].tolist() == [1] * num_more
    assert padded.context_lens[new].tolist() == [0] * num_more
    assert not padded.block_tables[new].any()
    slots = layout_of(padded).slots
    assert slots[: batch.num_tokens].tolist() == layout_of(batch).slots.tolist()
    assert slots[batch.num_tokens :].tolist() == [0] * num_more
    # Rows of logits that nobody reads, and that belong to nobody.
    new = slice(len(batch.rows), None)
    assert padded.rows[new].tolist() == [0] * num_more_rows
    assert padded.slots[new].tolist() == [9] * num_more_rows
    assert padded.keys[new].tolist() == [EMPTY] * num_more_rows


def test_an_empty_batch():
    empty = Batch.empty()
    assert empty.num_tokens == 0
    assert empty.is_decode
    packed = first_batch([[5, 6]])
    for field in fields(Batch):
        assert getattr(empty, field.name).dtype == getattr(packed, field.name).dtype, field.name


def test_what_is_a_decode():
    batcher = make_batcher([5, 6, 7], [8])
    batches = [Batch.pack(batcher.table, batcher.next_batch()) for _ in range(2)]
    assert [batch.is_decode for batch in batches] == [False, True]
    assert first_batch([[5], [6]]).is_decode
