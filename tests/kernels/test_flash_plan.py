"""Plans of FlashInfer's kernel: every query of every head in one item, and nobody with much more work."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.attention_plan import Requests
from nanoflow_compiler.kernels.flash_plan import QUERIES, plan_flash
from nanoflow_compiler.kv_cache import BLOCK_SIZE

requests = st.lists(st.tuples(st.integers(0, 700), st.integers(2, 600)), min_size=1, max_size=8)
many_heads = st.sampled_from([(4, 4), (8, 2), (6, 1)])
nums_ctas = st.sampled_from([1, 3, 132])


def make(drawn, *, heads=(8, 2), num_ctas=132):
    """A plan of requests as (tokens before, queries), whose blocks have numbers of their own."""
    contexts, counts = np.array(drawn, dtype=np.int64).reshape(-1, 2).T
    most = (contexts + counts).max(initial=1) // BLOCK_SIZE + 1
    tables = np.arange(len(drawn) * most).reshape(len(drawn), most)[::-1].copy()
    rows = np.cumsum(counts + 1) - counts  # one row that is not ours before each request
    plan = plan_flash(
        rows, counts=counts, positions=contexts, tables=tables, heads=heads, num_ctas=num_ctas
    )
    return plan, rows, tables


@given(requests, many_heads, nums_ctas)
def test_every_query_of_every_head_is_in_one_item(drawn, heads, num_ctas):
    plan, rows, _ = make(drawn, heads=heads, num_ctas=num_ctas)
    found = [
        (first + row, head)
        for tile, head, first, _, count, _ in plan.items.T.tolist()
        for row in range(tile * QUERIES, min((tile + 1) * QUERIES, count))
    ]
    expected = {
        (row + at, head)
        for row, (_, count) in zip(rows.tolist(), drawn, strict=True)
        for at in range(count)
        for head in range(heads[0])
    }
    assert len(found) == len(expected)
    assert set(found) == expected


@given(requests, nums_ctas)
def test_an_item_has_the_keys_and_the_pages_of_its_request(drawn, num_ctas):
    plan, rows, tables = make(drawn, num_ctas=num_ctas)
    for _, _, first, place, count, keys in plan.items.T.tolist():
        owner = rows.tolist().index(first)
        assert (keys - count, count) == drawn[owner]
        num_pages = -(-keys // BLOCK_SIZE)
        seen = tables[owner, :num_pages].tolist()
        assert plan.blocks[place : place + num_pages].tolist() == seen


@given(requests, many_heads, nums_ctas)
def test_nobody_has_an_item_more_than_another(drawn, heads, num_ctas):
    plan, _, _ = make(drawn, heads=heads, num_ctas=num_ctas)
    tiles, _, _, _, counts, keys = plan.items.astype(np.int64)
    costs = keys - counts + np.minimum((tiles + 1) * QUERIES, counts) + 2 * QUERIES
    sums = np.concatenate([[0], np.cumsum(costs)])[plan.ends]
    assert (len(plan.ends), plan.ends[0], plan.ends[-1]) == (num_ctas + 1, 0, len(costs))
    assert np.ptp(np.diff(sums)) <= costs.max()


def test_items_that_run_at_once_read_the_same_keys():
    plan, _, _ = make([(0, 4096), (0, 4096)], heads=(32, 8), num_ctas=128)
    first = plan.items[:, plan.ends[:-1]]
    assert len(set(first[2].tolist())) == 1
    assert set(first[1].tolist()) == set(range(4))
    assert set(first[0].tolist()) == set(range(32))


@pytest.mark.parametrize(
    ("drawn", "mean_keys", "are_long"),
    [
        ([(0, 3)], 2, False),
        ([(0, 401)], 201, False),
        ([(300, 130)], 365.5, False),  # more than three tiles of four
        ([(0, 511)], 256, True),
        ([(500, 128), (9, 1)], 564.5, True),  # what decodes is not asked
        ([(0, 128), (640, 128)], 384.5, True),
        ([(5000, 100)], 5050.5, False),
        ([(7, 1)], 0, False),
    ],
)
def test_long_prompts(drawn, mean_keys, are_long):
    contexts, counts = np.array(drawn).T
    starts = np.concatenate([[0], np.cumsum(counts)])
    requests = Requests(starts, contexts, np.zeros((len(drawn), 1)), torch.device("cpu"))
    assert requests.mean_keys == mean_keys
    assert requests.are_long(202) == are_long


def test_a_plan_of_no_request():
    plan, _, _ = make([])
    assert plan.items.shape == (6, 0)
    assert plan.ends.tolist() == [0] * 133
    assert len(plan.blocks) == 0
