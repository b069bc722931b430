"""Guesses of output lengths, and of the most that requests will hold at once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.engine.lengths import FIRST_GUESS, OutputLengths, peak_tokens


def ints(*values):
    return np.array(values, dtype=np.int64)


def test_before_any_output_has_ended():
    found = OutputLengths().expected(ints(0, 0, 500), most=ints(1000, 10, 2000))
    assert found.tolist() == [FIRST_GUESS, 10, 1000]


def test_the_mean_of_outputs_that_became_longer():
    lengths = OutputLengths()
    lengths.add(ints(10, 20, 60))
    found = lengths.expected(ints(0, 10, 20, 60, 0), most=ints(100, 100, 100, 100, 15))
    assert found.tolist() == [30, 40, 60, 100, 15]


def test_only_the_last_outputs_count():
    lengths = OutputLengths()
    for value in (1, 500, 7):
        lengths.add(np.full(1024, value, dtype=np.int64))
    assert lengths.expected(ints(0), most=ints(9999)).tolist() == [7]
    lengths.add(ints(1031))
    assert lengths.expected(ints(0), most=ints(9999)).tolist() == [8]


def simulated_peak(stored, remaining):
    """Step by step: every request grows by a token, and leaves after its last one."""
    held = [
        sum(tokens + time for tokens, left in zip(stored, remaining, strict=True) if left >= time)
        for time in range(max(remaining, default=0) + 1)
    ]
    return max(held, default=0)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), max_size=8))
def test_the_peak_is_that_of_a_simulation(requests):
    stored, remaining = [a for a, _ in requests], [b for _, b in requests]
    found = peak_tokens(ints(*stored), ints(*remaining), block_size=1)
    assert found == simulated_peak(stored, remaining)
