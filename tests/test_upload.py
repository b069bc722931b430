"""Arrays in one piece of memory: whatever they are, each is found where it was put."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from nanoflow_compiler.upload import num_bytes, stage, upload, views

DTYPES = [np.bool_, np.uint8, np.int32, np.int64, np.float32, np.float64]
arrays_of = st_np.arrays(
    st.sampled_from(DTYPES),
    st_np.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)
lists_of_arrays = st.lists(arrays_of, max_size=6)


def check(found, expected):
    assert len(found) == len(expected)
    for tensor, array in zip(found, expected, strict=True):
        assert tensor.shape == array.shape
        assert tensor.dtype == torch.from_numpy(np.zeros(1, dtype=array.dtype)).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


@given(lists_of_arrays)
def test_staged_arrays_are_the_arrays(arrays):
    staged = stage(arrays, is_pinned=False)
    assert len(staged.memory) == num_bytes(staged.forms)
    found = views(staged.memory, staged.forms)
    check(found, arrays)
    for tensor in found:
        assert (tensor.data_ptr() - staged.memory.data_ptr()) % 16 == 0
        assert tensor.is_contiguous()


@given(lists_of_arrays)
def test_uploaded_arrays_are_the_arrays(arrays):
    check(upload(arrays, device=torch.device("cpu")), arrays)
    check(stage(arrays, is_pinned=False).copy(torch.device("cpu")), arrays)


@given(lists_of_arrays, lists_of_arrays)
def test_what_comes_behind_moves_nothing(arrays, more):
    """A captured step reads a prefix of what is staged for it: the same forms are at the same places."""
    staged = stage([*arrays, *more], is_pinned=False)
    forms = staged.forms[: len(arrays)]
    check(views(staged.memory[: num_bytes(forms)], forms), arrays)


def test_arrays_that_are_not_contiguous():
    grid = np.arange(24, dtype=np.int32).reshape(4, 6)
    arrays = [grid[:, ::2], grid.T, grid[1:, 3]]
    check(views((staged := stage(arrays, is_pinned=False)).memory, staged.forms), arrays)
    check(upload(arrays, device=torch.device("cpu")), arrays)


def test_staged_arrays_are_copies():
    array = np.arange(3)
    staged = stage([array], is_pinned=False)
    array[:] = 9
    check(views(staged.memory, staged.forms), [np.arange(3)])


@pytest.mark.gpu
def test_uploaded_to_a_gpu():
    arrays = [np.arange(5), np.zeros((0, 3), dtype=np.int32), np.ones((2, 2), dtype=np.float32)]
    found = upload(arrays, device=torch.device("cuda"))
    check([tensor.cpu() for tensor in found], arrays)
