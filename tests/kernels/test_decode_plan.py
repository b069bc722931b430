"""Plans of decode attention, carried out in plain Python: every token once, every piece merged."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.kernels.decode_plan import plan_decode
from nanoflow_compiler.kv_cache import BLOCK_SIZE

requests = st.lists(st.tuples(st.integers(1, 700), st.integers(0, 400)), min_size=1, max_size=8)


def make(lengths, *, num_shares):
    """A plan of requests as (tokens, window), whose blocks have numbers of their own."""
    positions = np.array([length - 1 for length, _ in lengths])
    windows = np.array([window or length for length, window in lengths])
    first_keys = np.maximum(positions - windows + 1, 0)
    most = positions.max() // BLOCK_SIZE + 1
    tables = np.arange(len(lengths) * most).reshape(len(lengths), most)[::-1].copy()
    rows = 3 * np.arange(len(lengths)) + 1
    plan = plan_decode(
        rows, positions=positions, first_keys=first_keys, tables=tables, num_shares=num_shares
    )
    expected = {
        (row, tables[at, token // BLOCK_SIZE], token % BLOCK_SIZE)
        for at, row in enumerate(rows.tolist())
        for token in range(first_keys[at], positions[at] + 1)
    }
    return plan, expected


def runs(plan, num_shares):
    """What each thread block finds: (row, slot or None if it is whole, tokens as (block, place))."""
    num_pages, share = plan.sizes.tolist()
    for thread_block in range(num_shares):
        begin, end = thread_block * share, min((thread_block + 1) * share, num_pages)
        for at in range(begin, end):
            page = int(plan.pages[at])
            is_first, is_last = page >> 13 & 1, page >> 12 & 1
            if is_first or at == begin:
                run_begin, has_first, tokens = at, is_first, []
            places = range(page >> 6 & 63, (page & 63) + 1)
            tokens += [(int(plan.blocks[at]), place) for place in places]
            if is_last or at == end - 1:
                slot = None if has_first and is_last else 2 * thread_block + (run_begin != begin)
                yield page >> 14, slot, tokens


@given(requests, st.integers(1, 20))
def test_every_visible_token_is_read_once(lengths, num_shares):
    plan, expected = make(lengths, num_shares=num_shares)
    read = [(row, *token) for row, _, tokens in runs(plan, num_shares) for token in tokens]
    assert len(read) == len(expected)
    assert set(read) == expected


@given(requests, st.integers(1, 20))
def test_the_pieces_of_a_request_are_merged_once(lengths, num_shares):
    plan, _ = make(lengths, num_shares=num_shares)
    whole, pieces = [], {}
    for row, slot, _ in runs(plan, num_shares):
        if slot is None:
            whole.append(row)
        else:
            assert slot not in pieces
            pieces[slot] = row
    merged = {}
    for row, first_slot, first, last in plan.splits.tolist():
        for share in range(first, last + 1):
            merged[first_slot if share == first else 2 * share] = row
    assert merged == pieces
    assert sorted([*whole, *set(pieces.values())]) == [3 * at + 1 for at in range(len(lengths))]


@given(requests, st.integers(1, 20))
def test_shares_are_equal(lengths, num_shares):
    plan, _ = make(lengths, num_shares=num_shares)
    num_pages, share = plan.sizes.tolist()
    assert len(plan.pages) == len(plan.blocks) == num_pages
    assert share * num_shares >= num_pages > (share - 1) * num_shares


def test_a_plan_of_no_request():
    none = np.zeros(0, dtype=np.int64)
    plan = plan_decode(
        none, positions=none, first_keys=none, tables=np.zeros((0, 3), dtype=np.int64), num_shares=5
    )
    assert plan.sizes.tolist() == [0, 1]
    assert (plan.blocks.shape, plan.pages.shape, plan.splits.shape) == ((0,), (0,), (0, 4))
    assert not list(runs(plan, 5))


@given(requests, st.integers(1, 20))
def test_fewer_requests_are_split_than_there_are_shares(lengths, num_shares):
    plan, _ = make(lengths, num_shares=num_shares)
    assert len(plan.splits) < num_shares
