"""Draws among tokens without weight, and limits among equals."""

import math

import numpy as np
import pytest
import torch

from nanoflow_compiler.engine.draw import Draw, draw
from nanoflow_compiler.engine.noise import row_keys

NUM_ROWS = 300


def drawn(logits, *, num_ordered=None, min_p=0.0, top_k=None, top_p=1.0):
    """Tokens of equal rows of logits, each with noise of its own."""
    rows = torch.tensor(logits).expand(NUM_ROWS, -1)
    limit = top_k or rows.shape[-1]

    def column(value, dtype):
        return torch.full((NUM_ROWS, 1), value, dtype=dtype)

    seeds = np.arange(NUM_ROWS, dtype=np.uint64)
    low, high = (torch.from_numpy(half)[:, None] for half in row_keys(seeds, seeds))
    settings = Draw(
        temperature=column(1.0, torch.float32),
        least=column(math.log(min_p) if min_p else -math.inf, torch.float32),
        limit=column(limit, torch.int64),
        top_p=column(top_p, torch.float64),
        key_low=low,
        key_high=high,
    )
    return draw(rows, settings, num_ordered=num_ordered).tolist()


@pytest.mark.parametrize("count", [5, 512, 2**18 + 1])
def test_tokens_without_weight_are_never_drawn(count):
    logits = [-math.inf] * count
    logits[count // 2] = 1.0
    assert set(drawn(logits)) == {count // 2}


def test_the_limits_of_other_rows_change_nothing():
    # Three equals at the limit of 2: top_p counts two of them, and all three stay.
    logits = [2.0, 1.0, 1.0, 1.0, 0.0, -1.0]
    for top_p in (0.5, 0.73, 0.74, 0.9, 1.0):
        found = [drawn(logits, num_ordered=count, top_k=2, top_p=top_p) for count in range(2, 7)]
        assert found == found[:1] * 5
        assert max(found[0]) == (0 if top_p < 0.74 else 3)


def test_each_limit_is_of_what_the_one_before_it_kept():
    # Of 8, 4, 2 and 1: min_p keeps three, of which top_k keeps two, where 2/3 is the first.
    logits = [math.log(weight) for weight in (8.0, 4.0, 2.0, 1.0)]
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
        found = drawn(logits, num_ordered=4, **limits)
        assert set(found) == set(range(num_kept)), limits
