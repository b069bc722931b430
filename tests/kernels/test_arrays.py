"""What plans write to the memory of a captured step, also where a step has nothing for one of them."""

import numpy as np
import pytest
import torch

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout

pytest.importorskip("triton")  # the kernels' modules need it; no kernel runs here

from nanoflow_compiler.kernels.paged_decode import PageReads, Tiling
from nanoflow_compiler.kernels.paged_prefill import PromptTiles, PromptTiling

pytestmark = pytest.mark.gpu
NUM_SHARES = 4


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32)


def make_plans(num_tokens=8, num_pages=30):
    reads = PageReads(
        blocks=zeros(num_pages),
        pages=zeros(num_pages),
        sizes=zeros(2),
        splits=zeros(NUM_SHARES, 4),
        pieces=zeros(NUM_SHARES, 2) - 1,
        arrived=zeros(NUM_SHARES, 1),
        visibility=Visibility(),
        num_shares=NUM_SHARES,
        tiling=Tiling(),
    )
    tiles = PromptTiles(
        tiles=zeros(num_tokens, 6),
        blocks=zeros(num_pages),
        sizes=zeros(1),
        visibility=Visibility(),
        rows=16,
        queries=4,
        num_ctas=2,
        tiling=PromptTiling(),
    )
    return reads, tiles


def make_requests(counts, contexts):
    tables = np.arange(1, 1 + 5 * len(counts)).reshape(-1, 5)
    layout = StepLayout.pack(
        query_lens=np.array(counts), context_lens=np.array(contexts), block_tables=tables
    )
    return Requests.of(layout.part(0, sum(counts)))


@pytest.mark.parametrize(
    ("counts", "contexts"), [([1, 1], [0, 200]), ([3, 5], [0, 100]), ([1, 6], [299, 64])]
)
def test_arrays_fit_in_their_memory(counts, contexts):
    requests = make_requests(counts, contexts)
    for plan in make_plans():
        for there, array in zip(plan.tensors, plan.arrays(requests), strict=True):
            assert array.dtype == np.int32
            assert there[: len(array)].shape == array.shape


def test_without_decodes():
    reads, _ = make_plans()
    blocks, pages, sizes, splits, pieces = reads.arrays(make_requests([3, 5], [0, 100]))
    assert len(blocks) == len(pages) == sizes[0] == 0
    assert not len(splits)
    assert len(pieces) == NUM_SHARES
    assert (pieces < 0).all()


def test_without_prompts():
    _, tiles = make_plans()
    described, blocks, sizes = tiles.arrays(make_requests([1, 1], [0, 200]))
    assert len(described) == len(blocks) == sizes[0] == 0


def test_splits_of_a_step_before_are_gone():
    """What is no piece of a request now is marked so, for every share."""
    reads, _ = make_plans()
    *_, splits, pieces = reads.arrays(make_requests([1], [300]))
    assert len(splits) == 1
    assert (pieces >= 0).any()
    *_, splits, pieces = reads.arrays(make_requests([1], [3]))
    assert not len(splits)
    assert (pieces < 0).all()
