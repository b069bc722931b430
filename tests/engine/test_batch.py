"""Packing: entries to arrays."""

import numpy as np

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Entry
from nanoflow_compiler.engine.request import Request
from nanoflow_compiler.engine.sampling_params import SamplingParams


def make_request(*tokens, blocks):
    request = Request(
        request_id=1, prompt_token_ids=tokens, params=SamplingParams(), max_tokens=4, seed=0
    )
    request.blocks = blocks
    return request


def test_pack():
    decode = make_request(10, 11, 12, blocks=[4, 2])
    chunk = make_request(20, 21, 22, 23, blocks=[5])
    last = make_request(30, 31, blocks=[6])
    batch = Batch.pack([Entry(decode, 2, 1), Entry(chunk, 1, 2), Entry(last, 0, 2)])
    assert batch.token_ids.tolist() == [12, 21, 22, 30, 31]
    assert batch.positions.tolist() == [2, 1, 2, 0, 1]
    assert batch.query_lens.tolist() == [1, 2, 2]
    assert batch.context_lens.tolist() == [2, 1, 0]
    assert batch.block_tables.tolist() == [[4, 2], [5, 0], [6, 0]]
    assert batch.rows.tolist() == [0, 4]
    assert batch.sampled == (decode, last)
    assert batch.num_tokens == 5


def test_a_batch_may_sample_nothing():
    batch = Batch.pack([Entry(make_request(1, 2, 3, blocks=[1]), 0, 2)])
    assert batch.rows.shape == (0,)
    assert batch.rows.dtype == np.int64
