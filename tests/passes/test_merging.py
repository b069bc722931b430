"""merge_rows: parameters become rows of one tensor, in one memory, and stay what they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nanoflow_compiler.merging import are_adjacent, merge_rows


def parameters(*rows, columns=(3,)):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(count, *columns, generator=generator)) for count in rows]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([(), (3,), (2, 3)]))
def test_it_is_cat_and_the_parameters_are_its_rows(rows, columns):
    given_parameters = parameters(*rows, columns=columns)
    before = [parameter.detach().clone() for parameter in given_parameters]
    merged = merge_rows(given_parameters)
    assert torch.equal(merged, torch.cat(before))
    assert merged.is_contiguous()
    assert not merged.requires_grad
    assert are_adjacent(given_parameters)
    for parameter, old in zip(given_parameters, before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.untyped_storage().data_ptr() == merged.untyped_storage().data_ptr()


def test_again_it_costs_a_view():
    given_parameters = parameters(2, 3)
    first, second = merge_rows(given_parameters), merge_rows(given_parameters)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, second)


def test_updates_in_place_are_seen():
    given_parameters = parameters(2, 3)
    merged = merge_rows(given_parameters)
    with torch.no_grad():
        given_parameters[1].zero_()
    assert torch.equal(merged[2:], torch.zeros(3, 3))
    assert merged[:2].abs().min() > 0


def test_in_another_order_they_are_merged_anew():
    given_parameters = parameters(2, 3)
    merge_rows(given_parameters)
    turned = merge_rows(given_parameters[::-1])
    assert torch.equal(turned, torch.cat([given_parameters[1].data, given_parameters[0].data]))


def test_parameters_that_share_memory_are_copied():
    """A tied weight is looked at from elsewhere: it must not move."""
    whole = torch.randn(6, 3)
    tied = nn.Parameter(whole[:2])
    other = nn.Parameter(torch.randn(2, 3))
    places = tied.data_ptr(), other.data_ptr()
    merged = merge_rows([tied, other])
    assert torch.equal(merged, torch.cat([tied.data, other.data]))
    assert (tied.data_ptr(), other.data_ptr()) == places
    assert not are_adjacent([tied, other])
    whole[:2] = 0
    assert torch.equal(tied.data, torch.zeros(2, 3))


def test_parameters_of_other_layouts_are_copied_row_by_row():
    turned = nn.Parameter(torch.randn(3, 2).t())
    plain = nn.Parameter(torch.randn(2, 3))
    expected = torch.cat([turned.data.clone(), plain.data.clone()])
    assert torch.equal(merge_rows([turned, plain]), expected)
    assert torch.equal(turned.data, expected[:2])


def test_subclasses_stay_where_they_are():
    class Quantized(torch.Tensor):
        pass

    special = torch.randn(2, 3).as_subclass(Quantized)
    place = special.data_ptr()
    merged = merge_rows([special, torch.randn(2, 3)])
    assert special.data_ptr() == place
    assert merged.data_ptr() != place


def test_fake_parameters_have_a_fake_merge():
    with FakeTensorMode():
        merged = merge_rows([torch.empty(2, 3), torch.empty(4, 3)])
    assert merged.shape == (6, 3)


@pytest.mark.parametrize("columns", [(3,), ()])
def test_one_parameter_is_itself(columns):
    (parameter,) = parameters(4, columns=columns)
    assert merge_rows([parameter]).data_ptr() == parameter.data_ptr()
