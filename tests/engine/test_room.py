"""The room of a captured step's plans: enough for any batch of its bucket, however it is cut."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.kernels.decode_plan import plan_decode
from nanoflow_compiler.kernels.prefill_plan import plan_prefill
from nanoflow_compiler.kv_cache import BLOCK_SIZE
from nanoflow_compiler.paged_attention import Room

LONGEST = 5 * BLOCK_SIZE
visibilities = st.builds(Visibility, window=st.integers(0, 200), chunk=st.integers(0, 200))


def make_requests(drawn, *, num_fill, cuts):
    """The middle part of a step of requests as (tokens before, tokens now), and of what fills it up."""
    contexts, counts = np.array([*drawn, *[(0, 1)] * num_fill]).T
    tables = np.ones((len(counts), LONGEST // BLOCK_SIZE), dtype=np.int32)
    layout = StepLayout.pack(query_lens=counts, context_lens=contexts, block_tables=tables)
    start, end = (int(share * counts.sum()) for share in sorted(cuts))
    return Requests.of(layout.part(start, end))


def plans(requests, *, visibility, queries, num_shares):
    """As ``PageReads`` and ``PromptTiles`` make them."""
    chosen = requests.decodes
    reads = plan_decode(
        requests.starts[chosen],
        positions=requests.contexts[chosen],
        first_keys=visibility.first_key(requests.contexts[chosen]),
        tables=requests.tables[chosen],
        num_shares=num_shares,
    )
    chosen = requests.prompts
    tiles = plan_prefill(
        requests.starts[chosen],
        counts=np.diff(requests.starts)[chosen],
        positions=requests.contexts[chosen],
        tables=requests.tables[chosen],
        visibility=visibility,
        queries=queries,
    )
    return reads, tiles


@given(
    drawn=st.lists(
        st.tuples(st.integers(0, LONGEST - 40), st.integers(1, 40)), min_size=1, max_size=6
    ),
    num_fill=st.integers(0, 9),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)) | st.just((0.0, 1.0)),
    visibility=visibilities,
    queries=st.sampled_from([1, 4, 64]),
    num_shares=st.integers(1, 30),
)
def test_every_plan_has_room(drawn, num_fill, cuts, visibility, queries, num_shares):
    requests = make_requests(drawn, num_fill=num_fill, cuts=cuts)
    num_tokens = sum(count for _, count in drawn) + num_fill
    room = Room(
        num_tokens=num_tokens,
        num_requests=len(drawn),
        num_blocks=LONGEST // BLOCK_SIZE,
        has_prompts=True,
    )
    reads, tiles = plans(requests, visibility=visibility, queries=queries, num_shares=num_shares)
    assert len(reads.blocks) == len(reads.pages) <= room.num_decode_pages
    assert len(reads.splits) < num_shares or not len(reads.splits)
    assert len(tiles.tiles) <= room.num_tokens
    assert len(tiles.blocks) <= room.num_prompt_pages


def test_the_room():
    room = Room(num_tokens=8, num_requests=4, num_blocks=10, has_prompts=True)
    assert room.num_decode_pages == 4 * 10 + 8
    assert room.num_prompt_pages == 4 * 10
    room = Room(num_tokens=3, num_requests=4, num_blocks=10, has_prompts=True)
    assert room.num_decode_pages == 3 * 10 + 3
    assert room.num_prompt_pages == 10
