"""Plans of prefill attention: every query in one tile, and with it just the pages that it sees."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.kernels.prefill_plan import plan_prefill
from nanoflow_compiler.kv_cache import BLOCK_SIZE

requests = st.lists(st.tuples(st.integers(0, 700), st.integers(2, 400)), min_size=1, max_size=8)
visibilities = st.builds(Visibility, window=st.integers(0, 300), chunk=st.integers(0, 300))


def make(drawn, *, visibility, queries):
    """A plan of requests as (tokens before, queries), whose blocks have numbers of their own."""
    contexts, counts = np.array(drawn).T
    most = (contexts + counts - 1).max() // BLOCK_SIZE + 1
    tables = np.arange(len(drawn) * most).reshape(len(drawn), most)[::-1].copy()
    rows = np.cumsum(counts + 1) - counts  # one row that is not ours before each request
    plan = plan_prefill(
        rows,
        counts=counts,
        positions=contexts,
        tables=tables,
        visibility=visibility,
        queries=queries,
    )
    return plan, rows, tables


@given(requests, visibilities, st.sampled_from([1, 4, 32, 128]))
def test_every_query_is_in_one_tile(drawn, visibility, queries):
    plan, rows, _ = make(drawn, visibility=visibility, queries=queries)
    assert plan.sizes.tolist() == [len(plan.tiles)]
    found = [
        (row + at, position + at)
        for row, count, position, *_ in plan.tiles.tolist()
        for at in range(count)
    ]
    expected = {
        (row + at, context + at)
        for row, (context, count) in zip(rows.tolist(), drawn, strict=True)
        for at in range(count)
    }
    assert len(found) == len(expected)
    assert set(found) == expected
    assert plan.tiles[:, 1].max() <= queries


@given(requests, visibilities, st.sampled_from([1, 4, 32, 128]))
def test_a_tile_has_the_pages_that_its_queries_see(drawn, visibility, queries):
    plan, rows, tables = make(drawn, visibility=visibility, queries=queries)
    for row, count, position, first_page, num_pages, place in plan.tiles.tolist():
        owner = int(np.searchsorted(rows, row, side="right")) - 1
        first_key = int(visibility.first_key(np.array([position]))[0])
        last_page = (position + count - 1) // BLOCK_SIZE
        seen = tables[owner, first_key // BLOCK_SIZE : last_page + 1]
        assert first_page == first_key // BLOCK_SIZE
        assert plan.blocks[place : place + num_pages].tolist() == seen.tolist()


@given(requests, visibilities)
def test_a_block_is_named_once(drawn, visibility):
    plan, _, _ = make(drawn, visibility=visibility, queries=16)
    assert len(np.unique(plan.blocks)) == len(plan.blocks)


@given(requests)
def test_tiles_that_are_much_longer_come_first(drawn):
    plan, _, _ = make(drawn, visibility=Visibility(), queries=32)
    num_pages = plan.tiles[:, 4]
    after = np.maximum.accumulate(num_pages[::-1])[::-1]
    assert (num_pages >= after - num_pages.max() / 8).all()


def test_a_plan_of_no_request():
    none = np.zeros(0, dtype=np.int64)
    plan = plan_prefill(
        none,
        counts=none,
        positions=none,
        tables=np.zeros((0, 3), dtype=np.int64),
        visibility=Visibility(window=5),
        queries=16,
    )
    assert plan.sizes.tolist() == [0]
    assert (plan.tiles.shape, plan.blocks.shape) == ((0, 6), (0,))
