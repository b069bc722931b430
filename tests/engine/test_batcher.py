"""Batches: the budget holds, blocks are conserved, every request ends once with all its tokens."""

import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.blocks import BlockAllocator
from nanoflow_compiler.engine.request import Request
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import OutOfBlocksError

BLOCK = 4


def make_request(number, *, prompt, output):
    return Request(
        request_id=number,
        prompt_token_ids=tuple(range(prompt)),
        params=SamplingParams(max_tokens=output),
        max_tokens=output,
        seed=0,
    )


def make_batcher(*, blocks=100, max_num_seqs=8, budget=16):
    return Batcher(
        BlockAllocator(blocks + 1, block_size=BLOCK),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )


def advance(batcher, *, computed=None):
    """One step: check the batch, pretend to sample, end what is complete."""
    entries = batcher.next_batch()
    assert len({entry.request.request_id for entry in entries}) == len(entries)
    assert sum(entry.num_tokens for entry in entries) <= batcher.max_num_batched_tokens
    assert len(batcher.running) <= batcher.max_num_seqs
    held = [block for request in batcher.running for block in request.blocks]
    assert len(set(held)) == len(held)
    assert len(held) + batcher.allocator.num_free == batcher.allocator.num_usable
    for entry in entries:
        request = entry.request
        assert entry.num_tokens >= 1
        assert len(request.blocks) * BLOCK >= entry.start + entry.num_tokens
        if computed is not None:
            stored = computed.setdefault(request.request_id, [])
            assert entry.start in {0, len(stored)}
            stored[entry.start :] = request.token_ids[entry.start : request.num_computed]
        if entry.is_sampled:
            request.token_ids.append(1000 + request.num_output_tokens)
            if request.num_output_tokens == request.max_tokens:
                batcher.finish(request, reason="length")
    return entries


requests_strategy = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(
    sizes=requests_strategy,
    blocks=st.integers(13, 40),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    arrivals=st.lists(st.integers(0, 30), min_size=12, max_size=12),
)
def test_every_request_ends_once_with_all_its_tokens(sizes, blocks, max_num_seqs, budget, arrivals):
    batcher = make_batcher(blocks=blocks, max_num_seqs=max_num_seqs, budget=budget)
    requests = [make_request(i, prompt=p, output=o) for i, (p, o) in enumerate(sizes)]
    coming = sorted(zip(arrivals, range(len(requests)), strict=False))
    coming = [(step, requests[index]) for step, index in coming]
    computed = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(20000):
            while coming and coming[0][0] <= step:
                batcher.add(coming.pop(0)[1])
            if not batcher.has_requests and not coming:
                break
            entries = advance(batcher, computed=computed)
            assert entries or not batcher.has_requests or coming
    assert all(request.finish_reason == "length" for request in requests)
    assert batcher.allocator.num_free == batcher.allocator.num_usable
    for request in requests:
        assert request.num_output_tokens == request.max_tokens
        assert computed[request.request_id] == request.token_ids[:-1]


def test_decode_first_then_prefill_then_admission():
    batcher = make_batcher(budget=10)
    first = make_request(1, prompt=4, output=5)
    batcher.add(first)
    advance(batcher)
    batcher.add(make_request(2, prompt=25, output=1))
    batcher.add(make_request(3, prompt=5, output=1))
    steps = [[(e.request.request_id, e.num_tokens) for e in advance(batcher)] for _ in range(3)]
    assert steps == [[(1, 1), (2, 9)], [(1, 1), (2, 9)], [(1, 1), (2, 7), (3, 2)]]


def test_the_youngest_is_preempted_and_keeps_its_place():
    batcher = make_batcher(blocks=4)
    old, young, late = (make_request(i, prompt=7, output=6) for i in range(3))
    for request in (old, young, late):
        batcher.add(request)
    advance(batcher)
    assert batcher.running == [old, young]
    advance(batcher)
    with pytest.warns(RuntimeWarning, match="num_kv_blocks"):
        advance(batcher)
    assert batcher.running == [old]
    assert list(batcher.waiting) == [young, late]
    assert (young.num_computed, young.blocks, young.num_output_tokens) == (0, [], 2)
    assert batcher.num_preemptions == 1
    while batcher.has_requests:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            advance(batcher)
    assert young.num_output_tokens == late.num_output_tokens == 6


def test_a_request_that_cannot_fit_alone_is_refused_at_once():
    batcher = make_batcher(blocks=3)
    batcher.add(make_request(1, prompt=10, output=3))
    with pytest.raises(OutOfBlocksError, match="raise num_kv_blocks"):
        batcher.add(make_request(2, prompt=10, output=4))


def test_a_waiting_request_can_end():
    batcher = make_batcher(max_num_seqs=1)
    for number in (1, 2):
        batcher.add(make_request(number, prompt=3, output=2))
    advance(batcher)
    waiting = batcher.waiting[0]
    batcher.finish(waiting, reason="abort")
    assert not batcher.waiting
    assert waiting.finish_reason == "abort"
    with pytest.raises(AssertionError, match="ended twice"):
        batcher.finish(waiting, reason="abort")


@pytest.mark.parametrize("module", ["request", "blocks", "batcher", "batch"])
def test_bookkeeping_needs_no_torch(module):
    code = (
        "import sys, types; package = types.ModuleType('nanoflow_compiler'); "
        "import importlib.util as u; "
        "package.__path__ = list(u.find_spec('nanoflow_compiler').submodule_search_locations); "
        "sys.modules['nanoflow_compiler'] = package; "
        f"import nanoflow_compiler.engine.{module}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
