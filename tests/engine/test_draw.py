"""Draws at the points where one token ends and the next begins, and limits among equals."""

import math

import pytest
import torch

from nanoflow_compiler.engine.draw import NUM_CHUNK_TOKENS, Draw, draw


def draw_at(logits, points, *, num_ordered=None, min_p=0.0, top_k=None, top_p=1.0):
    """Tokens of one row of logits at several fractions of its total."""
    rows = torch.tensor(logits).expand(len(points), -1)
    limit = top_k or rows.shape[-1]

    def column(value, dtype):
        return torch.full((len(points), 1), value, dtype=dtype)

    settings = Draw(
        temperature=column(1.0, torch.float32),
        least=column(math.log(min_p) if min_p else -math.inf, torch.float32),
        limit=column(limit, torch.int64),
        top_p=column(top_p, torch.float64),
        uniform=torch.tensor(points, dtype=torch.float64)[:, None],
    )
    return draw(rows, settings, num_ordered=num_ordered).tolist()


BELOW_1 = 1 - 2**-53


def test_a_token_begins_where_the_one_before_it_ends():
    assert draw_at([0.0] * 4, [0.0, 0.25, 0.5, 0.75, BELOW_1]) == [0, 1, 2, 3, 3]


def test_chunks_begin_where_the_one_before_them_ends():
    count = 4 * NUM_CHUNK_TOKENS
    points = [0.0, 0.25, 0.5, 0.75, BELOW_1]
    assert draw_at([0.0] * count, points) == [
        0,
        NUM_CHUNK_TOKENS,
        2 * NUM_CHUNK_TOKENS,
        3 * NUM_CHUNK_TOKENS,
        count - 1,
    ]


@pytest.mark.parametrize("count", [5, NUM_CHUNK_TOKENS, 3 * NUM_CHUNK_TOKENS + 1])
def test_tokens_without_weight_are_never_drawn(count):
    logits = [-math.inf] * count
    logits[count // 2] = 1.0
    assert draw_at(logits, [0.0, 0.3, BELOW_1]) == [count // 2] * 3


@pytest.mark.parametrize("count", [2**13, 2**14 - 3, 2**14, 2**14 + 1, 2**15 + 12345, 2**18 - 1])
def test_the_last_point_is_below_the_whole_weight(count):
    # Beyond 2**13 tokens, float64 cannot hold the sum of weights exactly.
    logits = [0.0] * count + [-0.1, -math.inf, -math.inf]
    assert draw_at(logits, [BELOW_1]) == [count]


def test_the_limits_of_other_rows_change_nothing():
    # Three equals at the limit of 2: top_p counts two of them, and all three stay.
    logits = [2.0, 1.0, 1.0, 1.0, 0.0, -1.0]
    points = [i / 64 for i in range(64)]
    for top_p in (0.5, 0.73, 0.74, 0.9, 1.0):
        found = [
            draw_at(logits, points, num_ordered=count, top_k=2, top_p=top_p)
            for count in range(2, 7)
        ]
        assert found == found[:1] * 5
        assert max(found[0]) == (0 if top_p < 0.74 else 3)


def test_each_limit_is_of_what_the_one_before_it_kept():
    # Of 8, 4, 2 and 1: min_p keeps three, of which top_k keeps two, where 2/3 is the first.
    logits = [math.log(weight) for weight in (8.0, 4.0, 2.0, 1.0)]
    points = [i / 64 for i in range(64)]
    for num_kept, limits in (
        (4, {"min_p": 0.12}),
        (3, {"min_p": 0.2}),
        (2, {"min_p": 0.2, "top_k": 2}),
        (1, {"min_p": 0.2, "top_k": 2, "top_p": 0.66}),
        (2, {"min_p": 0.2, "top_k": 2, "top_p": 0.67}),
        (2, {"min_p": 0.2, "top_p": 0.82}),
        (2, {"top_p": 0.55}),
        (1, {"top_p": 0.53}),
    ):
        found = draw_at(logits, points, num_ordered=4, **limits)
        assert set(found) == set(range(num_kept)), limits
