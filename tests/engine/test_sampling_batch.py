"""The columns of a step: rows follow their slots, and rare settings are listed by row."""

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.sampling_columns import SamplingColumns
from nanoflow_compiler.engine.sampling_params import SamplingParams

NUM_SLOTS = 6
PLAIN = SamplingParams()


def columns_of(params, *, eos=(7,)):
    columns = SamplingColumns.allocate(NUM_SLOTS)
    for slot, one in params.items():
        columns.put(slot, one, seed=10 + slot, eos_token_ids=eos)
    return columns


def gather(columns, slots, *, prompts=None, outputs=None, tables=None, block_size=4):
    count = len(slots)
    return SamplingBatch.gather(
        columns,
        slots=np.array(slots, dtype=np.int64),
        num_prompt_tokens=np.array(prompts or [3] * count),
        num_output_tokens=np.array(outputs or [0] * count),
        block_tables=np.zeros((NUM_SLOTS, 8), dtype=np.int32) if tables is None else tables,
        block_size=block_size,
    )


def test_rows_follow_their_slots():
    a = SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, logprobs=4)
    b = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5)
    batch = gather(columns_of({1: a, 4: b}), [4, 1], outputs=[2, 9])
    assert batch.num_rows == 2
    assert batch.temperature.tolist() == [1.0, 0.5]
    assert batch.top_k.tolist() == [0, 3]
    assert batch.top_p.tolist() == [1.0, 0.25]
    assert batch.min_p.tolist() == [0.0, 0.125]
    assert batch.repetition.tolist() == [1.5, 1.0]
    assert batch.presence.tolist() == [0.5, 0.0]
    assert batch.frequency.tolist() == [-0.5, 0.0]
    assert batch.seeds.tolist() == [14, 11]
    assert batch.counters.tolist() == [2, 9]
    assert batch.num_logprobs.tolist() == [-1, 4]
    assert batch.penalty_rows.tolist() == [0]
    assert {batch.seeds.dtype, batch.counters.dtype} == {np.dtype(np.uint64)}
    assert batch.temperature.dtype == batch.top_p.dtype == np.float32


def test_plain_rows_have_no_lists():
    batch = gather(columns_of(dict.fromkeys(range(NUM_SLOTS), PLAIN)), range(NUM_SLOTS))
    lists = (batch.barred_rows, batch.allowed_rows, batch.bias_rows, batch.penalty_rows)
    assert [len(one) for one in (*lists, batch.history_lens)] == [0] * 5


def test_allowed_tokens_are_listed_by_row():
    columns = columns_of({1: SamplingParams(allowed_token_ids=[5, 3]), 4: PLAIN})
    batch = gather(columns, [4, 1])
    assert batch.allowed_rows.tolist() == [1, 1]
    assert batch.allowed_tokens.tolist() == [5, 3]
    columns.put(1, PLAIN, seed=0, eos_token_ids=())
    assert not len(gather(columns, [4, 1]).allowed_rows)
    assert not batch.is_greedy.any()


def test_greedy_rows():
    params = {0: SamplingParams(temperature=0), 1: SamplingParams(top_k=1), 2: PLAIN}
    assert gather(columns_of(params), [2, 1, 0]).is_greedy.tolist() == [False, True, True]


def test_ends_are_barred_until_min_tokens():
    params = SamplingParams(min_tokens=2, stop_token_ids=[9, 5])
    batch = gather(columns_of(dict.fromkeys(range(4), params)), [3, 0, 2], outputs=[1, 2, 0])
    assert batch.barred_rows.tolist() == [0, 0, 0, 2, 2, 2]
    assert batch.barred_tokens.tolist() == [5, 7, 9] * 2


def test_biases_are_listed():
    params = {0: SamplingParams(logit_bias={8: 1.5, 2: -1}), 1: PLAIN}
    params[2] = SamplingParams(logit_bias={4: 3})
    batch = gather(columns_of(params), [2, 1, 0])
    assert batch.bias_rows.tolist() == [0, 2, 2]
    assert batch.bias_tokens.tolist() == [4, 8, 2]
    assert batch.bias_values.tolist() == [3.0, 1.5, -1.0]


def test_a_slot_forgets_who_had_it():
    rare = SamplingParams(
        logit_bias={1: 1}, min_tokens=3, frequency_penalty=1, temperature=0, seed=3, logprobs=2
    )
    columns = columns_of({0: rare, 1: PLAIN})
    columns.put(0, PLAIN, seed=10, eos_token_ids=[])
    assert not columns.ends
    assert not columns.bias
    kept, fresh = (gather(one, [0, 1]) for one in (columns, columns_of({0: PLAIN, 1: PLAIN})))
    for name in SamplingBatch.__slots__:
        assert np.array_equal(getattr(kept, name), getattr(fresh, name)), name


def test_seeds_and_top_k_of_any_size():
    columns = SamplingColumns.allocate(2)
    columns.put(0, SamplingParams(top_k=10**30), seed=-1, eos_token_ids=[])
    columns.put(1, PLAIN, seed=2**70 + 5, eos_token_ids=[])
    assert columns.seeds.tolist() == [2**64 - 1, 5]
    assert columns.top_k[0] > 10**18


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans()), max_size=6))
@settings(max_examples=60, deadline=None)
def test_history_is_every_token_of_the_rows_with_penalties(rows):
    penalised = SamplingParams(presence_penalty=1.0)
    slots = np.random.default_rng(0).permutation(NUM_SLOTS)[: len(rows)]
    columns = columns_of(
        {slot: penalised if has else PLAIN for slot, (_, _, has) in zip(slots, rows, strict=True)}
    )
    tables = np.random.default_rng(1).permutation(NUM_SLOTS * 8).reshape(NUM_SLOTS, 8)
    batch = gather(
        columns,
        slots,
        prompts=[prompt for prompt, _, _ in rows],
        outputs=[output for _, output, _ in rows],
        tables=tables.astype(np.int32),
    )
    expected = [
        (row, position >= prompt, tables[slots[row], position // 4] * 4 + position % 4)
        for row, (prompt, output, has) in enumerate(rows)
        if has
        for position in range(prompt + output)
    ]
    history = zip(
        batch.penalty_rows.tolist(),
        batch.history_tables.tolist(),
        batch.history_lens.tolist(),
        batch.history_prompt_lens.tolist(),
        strict=True,
    )
    found = [
        (row, position >= prompt, blocks[position // 4] * 4 + position % 4)
        for row, blocks, length, prompt in history
        for position in range(length)
    ]
    assert found == expected
    assert batch.history_tables.dtype == np.int32


def test_it_is_made_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import nanoflow_compiler.engine.sampling_batch, nanoflow_compiler.engine.structured"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
