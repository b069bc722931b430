"""Packing: the arrays of a step, token by token."""

import numpy as np

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Batcher, Waiting
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.table import RequestTable


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
