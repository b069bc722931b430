"""find_layers: the repetition that covers most, and nothing that only looks like one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.passes.layers import find_layers


def shown(layers):
    return "".join("." if layer is None else str(layer) for layer in layers)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ("", ""),
        ("a", "."),
        ("ab", ".."),
        ("aa", "01"),
        ("abab", "0011"),
        ("xabcabcabcy", ".000111222."),
        ("aabaab", "000111"),
        ("xababy", ".0011."),
        ("abcabd", "......"),
        # Two layers and the first half of a third: a layer that ends in another way.
        ("xabcdabcdabe", ".0000111122."),
        # Less than half of one is chance.
        ("xabcdabcday", ".00001111.."),
        # The shorter period, though two of it would cover as much.
        ("abababab", "00112233"),
        # The period that covers most: ab three times, and not the pair of x.
        ("xxababab", "..001122"),
    ],
)
def test_before_and_after(sequence, expected):
    assert shown(find_layers(sequence)) == expected


letters = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(letters, min_size=1, max_size=6), st.integers(2, 5), st.lists(letters, max_size=6))
def test_a_repetition_is_found_whatever_surrounds_it(period, count, rest):
    """The markers occur once, so nothing before or behind can be part of it."""
    sequence = ["start", *period * count, "end", *(("once", at) for at, _ in enumerate(rest))]
    layers = find_layers(sequence)
    inside = layers[1 : 1 + len(period) * count]
    assert None not in inside
    assert layers[0] is None
    assert set(layers[1 + len(inside) :]) <= {None}
    width = inside.count(0)
    assert len(period) % width == 0
    assert inside == [at // width for at in range(len(inside))]


@settings(max_examples=60, deadline=None)
@given(st.lists(letters, max_size=30))
def test_layers_are_adjacent_and_equal(sequence):
    """The last one may end early."""
    layers = find_layers(sequence)
    assert len(layers) == len(sequence)
    found = [at for at, layer in enumerate(layers) if layer is not None]
    if not found:
        return
    assert found == list(range(found[0], found[-1] + 1))
    count = layers[found[-1]] + 1
    bodies = [[sequence[at] for at in found if layers[at] == index] for index in range(count)]
    assert count >= 2
    assert all(body == bodies[0] for body in bodies[:-1])
    last = len(bodies[-1])
    assert bodies[-1] == bodies[0][:last]
    assert 2 * last >= len(bodies[0])
