"""Cutting and joining: the same entries, where kernels that were compiled for a layout expect them."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.backends.rows import even_cuts, merge, take, take_dense

layouts = st.tuples(
    st.permutations([0, 1, 2]),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(0, 2),
    st.sampled_from(["dense", "sliced", "expanded"]),
)


def make(rows, layout):
    """A tensor with ``rows`` along one dimension, its dimensions in any order in memory."""
    order, sizes, dim, kind = layout
    other = (dim + 1) % 3
    shape = [*sizes]
    shape[dim] = rows
    held = [*shape]
    held[other] += 3 if kind == "sliced" else 0
    base = torch.arange(float(torch.Size(held).numel())).reshape([held[d] for d in order])
    made = base.permute([order.index(d) for d in range(3)])
    if kind == "sliced":
        return made.narrow(other, 1, shape[other])
    return made.narrow(other, 0, 1).expand(shape) if kind == "expanded" else made


def strides_that_matter(tensor):
    return [s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


@given(layouts, st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 2))
def test_pieces_join_to_what_they_were_cut_from(layout, cells, multiple):
    whole = make(sum(cells) * multiple, layout)
    dim = layout[2]
    cuts = [sum(cells[:at]) for at in range(len(cells) + 1)]
    all_cells = (0, len(cells))
    views = [take(whole, dim, cuts, all_cells, (at, at + 1)) for at in range(len(cells))]
    assert torch.equal(merge(views, dim), whole)
    copies = [take_dense(whole, dim, cuts, all_cells, (at, at + 1)) for at in range(len(cells))]
    for view, copy, count in zip(views, copies, cells, strict=True):
        assert torch.equal(view, copy)
        assert strides_that_matter(copy) == strides_that_matter(make(count * multiple, layout))
    joined = merge(copies, dim)
    assert torch.equal(joined, whole)
    if all(copy.shape[dim] > 1 for copy in copies):  # else the stride along it is anyone's guess
        assert strides_that_matter(joined) == strides_that_matter(whole)


def test_repeated_rows_stay_repeated():
    whole = torch.tensor([1.0, 2.0]).expand(6, 2)
    pieces = [whole[:2], whole[2:]]
    assert merge(pieces, 0).stride() == (0, 1)
    other = [torch.tensor([1.0, 2.0]).expand(2, 2), torch.tensor([3.0, 4.0]).expand(2, 2)]
    assert merge(other, 0).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


@given(st.integers(0, 50), st.integers(1, 8))
def test_even_cuts_differ_by_one_at_most(tokens, num_cells):
    cuts = even_cuts(tokens, num_cells)
    sizes = {end - start for start, end in pairwise(cuts)}
    assert (cuts[0], cuts[-1]) == (0, tokens)
    assert max(sizes) - min(sizes) <= 1
