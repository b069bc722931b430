"""normalize: each rewrite before and after, what must stay, and that no bit of an output changes."""

import pytest
import torch
from hypothesis import Phase, given, settings

from nanoflow_compiler import ops
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.passes.normalize import normalize
from nanoflow_compiler.stepper import Stepper
from random_functions import functions
from traces import calls, trace

SPECIAL = [0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan"), 1e-40]


def random(*shape, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    values.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: values.numel()]
    return values.to(dtype)


def bits(tensor):
    """Comparable bit by bit, whatever the type."""
    flat = tensor.detach().contiguous().reshape(-1)
    return (tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).tolist())


def normalized(function, **inputs):
    """The names of the operations afterwards; what they compute is what the function does."""
    traced = trace(function, inputs, tokens={"x": 0})
    before = traced.run()
    Stepper()(normalize, traced.module)
    assert [bits(item) for item in traced.run()] == [bits(item) for item in before]
    return calls(traced.module)


X = random(6, 4)
WHOLE = torch.arange(12).reshape(6, 2)
SINE = ["sin"]

GONE = {
    "detach": lambda x: x.detach().sin(),
    "alias": lambda x: torch.ops.aten.alias(x).sin(),
    "clone": lambda x: x.clone().sin(),
    "clone to the layout that it has": lambda x: x.clone(
        memory_format=torch.contiguous_format
    ).sin(),
    "cast to the same type": lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32).sin(),
    "view as the same shape": lambda x: x.view(x.shape[0], 4).sin(),
    "expand to the same shape": lambda x: torch.ops.aten.expand(x, [x.shape[0], 4]).sin(),
    "slice of all": lambda x: torch.ops.aten.slice(x, 1, 0, 4).sin(),
    "slice to the largest number": lambda x: torch.ops.aten.slice(x, 1, 0, 2**63 - 1).sin(),
    "product with one": lambda x: (x * 1.0).sin(),
    "product with an integer one": lambda x: (x * 1).sin(),
    "permutation of nothing": lambda x: x.permute(0, 1).sin(),
    "squeeze of what is not one": lambda x: torch.ops.aten.squeeze.dim(x, 1).sin(),
    "overwritten": lambda x: torch.ops.aten.copy(torch.ones_like(x), x).sin(),
    "piece of a cat that is empty": lambda x: torch.cat([torch.empty(0), x]).sin(),
}


@pytest.mark.parametrize("name", GONE)
def test_what_does_no_work_is_gone(name):
    assert normalized(GONE[name], x=X) == SINE


KEPT = {
    "clone to another layout": (
        lambda x: x.t().clone(memory_format=torch.contiguous_format).sin(),
        ["t", "clone", "sin"],
    ),
    "cast to another type": (lambda x: x.double().sin(), ["_to_copy", "sin"]),
    "product with one of another type": (
        lambda x: (x.int() * 1.0).sin(),
        ["_to_copy", "mul", "sin"],
    ),
    "sum with zero, for negative zeros": (lambda x: (x + 0).sin(), ["add", "sin"]),
    "sum with zero of complex numbers": (
        lambda x: torch.complex(x, x).add(0).abs(),
        ["complex", "add", "abs"],
    ),
    "slice of some": (lambda x: x[:, 1:].sin(), ["slice", "sin"]),
    "slice by steps": (lambda x: x[:, ::2].sin(), ["slice", "sin"]),
    "expand": (lambda x: x[:, :1].expand(x.shape[0], 3).sin(), ["slice", "expand", "sin"]),
    "view as another type": (lambda x: x.view(torch.int32) + 1, ["view", "add"]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_work_stays(name):
    function, expected = KEPT[name]
    assert [call for call in normalized(function, x=X) if call != "sym_size"] == expected


def test_sums_of_integers_with_zero_are_gone():
    assert normalized(lambda x: (x + 0) * 2, x=WHOLE) == ["mul"]


RESPELLED = {
    "view": (lambda x: x.view(x.shape[0], 2, 2).sin(), ["reshape", "sin"]),
    "_unsafe_view": (
        lambda x: torch.ops.aten._unsafe_view(x, [x.shape[0], 2, 2]).sin(),
        ["reshape", "sin"],
    ),
    "transpose": (lambda x: x.transpose(-1, 0).sin(), ["t", "sin"]),
    "permute": (lambda x: x.permute(1, 0).sin(), ["t", "sin"]),
    "transpose of three": (
        lambda x: x.unsqueeze(0).transpose(0, 1).sin(),
        ["unsqueeze", "transpose", "sin"],
    ),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze().sin(), ["unsqueeze", "squeeze", "sin"]),
    "new_ones": (lambda x: x.new_ones(4) * x, ["full", "mul"]),
    "new_zeros": (lambda x: x.new_zeros(4) * x, ["full", "mul"]),
    "new_full": (lambda x: x.new_full([4], 7) * x, ["full", "mul"]),
    "cat": (
        lambda x: torch.cat([torch.empty(0), x, x]).sin(),
        ["cat", "sin"],
    ),
}


@pytest.mark.parametrize("name", RESPELLED)
def test_one_spelling_of_each(name):
    function, expected = RESPELLED[name]
    found = [call for call in normalized(function, x=X) if call not in ("sym_size", "empty")]
    assert found == expected


def test_a_cat_that_is_returned_stays_a_copy():
    """The keys of a fresh cache: they must not be the memory of what they were made from."""
    traced = trace(lambda x: torch.cat([torch.empty(0), x]), {"x": X}, tokens={"x": 0})
    normalize(traced.module)
    assert [call for call in calls(traced.module) if call != "empty"] == ["clone"]
    given = X.nan_to_num()
    result = traced.module(given)
    assert torch.equal(result, given)
    assert result.data_ptr() != given.data_ptr()


def test_a_squeeze_names_the_dimensions_that_are_one():
    traced = trace(lambda x: x[None, :, None].squeeze() + 1, {"x": X}, tokens={"x": 0})
    normalize(traced.module)
    (squeeze,) = [n for n in call_nodes(traced.module) if "squeeze.dims" in str(n.target)]
    assert squeeze.args[1] == [0, 2]
    single = X[:1]
    assert traced.run(x=single)[0].shape == (1, 4)


def test_a_squeeze_of_a_number():
    assert normalized(lambda x: x.sum().squeeze(0) + 1, x=X) == ["sum", "add"]


def test_products_over_one_element_are_multiplications():
    """Up to the sign of a zero: a sum of one product begins with +0."""
    traced = trace(
        lambda x, y: torch.bmm(x[:, :, None], y[None, None].expand(x.shape[0], 1, 3)).sin(),
        {"x": torch.randn(6, 4), "y": torch.randn(3)},
        tokens={"x": 0},
    )
    before = traced.run()
    normalize(traced.module)
    assert "mul" in calls(traced.module)
    assert "bmm" not in calls(traced.module)
    assert torch.equal(traced.run()[0], before[0])


def test_slices_that_fill_an_empty_tensor_are_a_cat():
    def interleave(x):
        out = x.new_empty(x.shape[0], 8)
        out = torch.slice_scatter(out, x, 1, 0, 4)
        return torch.slice_scatter(out, x * 2, 1, 4, 8).sin()

    assert normalized(interleave, x=X) == ["mul", "cat", "sin"]


def test_of_slices_that_fill_twice_the_last_one_counts():
    def overwrite(x):
        out = x.new_empty(x.shape[0], 8)
        out = torch.slice_scatter(out, x, 1, 0, 4)
        out = torch.slice_scatter(out, x * 2, 1, 0, 4)
        return torch.slice_scatter(out, x * 3, 1, 4, 8).sin()

    assert normalized(overwrite, x=X) == ["mul", "mul", "cat", "sin"]


def test_slices_that_leave_a_gap_stay():
    def gap(x):
        out = x.new_zeros(x.shape[0], 8)
        return torch.slice_scatter(out, x, 1, 1, 5).sin()

    found = [call for call in normalized(gap, x=X) if call != "sym_size"]
    assert found == ["full", "slice_scatter", "sin"]


def test_common_subexpressions_are_computed_once():
    assert normalized(lambda x: (x.sin() * x.sin()) + x[:, :1].sin(), x=X) == [
        *("sin", "mul", "slice", "sin", "add")
    ]


@pytest.mark.parametrize(
    ("function", "twice"),
    [
        (lambda x: (x + 2) * (x + 3), "add"),
        (lambda x: x.eq(1).sum() + x.eq(True).sum(), "eq"),
        (lambda x: x.mul(2) + x.mul(2.0), "mul"),
        (lambda x: x.sum(0, keepdim=True) + x.sum(0, keepdim=False), "sum"),
        (lambda x: x.sum(0, dtype=torch.int64) + x.sum(0, dtype=torch.float32), "sum"),
    ],
)
def test_constants_that_differ_in_value_or_type_are_no_duplicates(function, twice):
    assert normalized(function, x=WHOLE).count(twice) == 2


def test_random_numbers_are_drawn_as_often_as_asked():
    traced = trace(lambda x: x + torch.rand_like(x) - torch.rand_like(x), {"x": X}, tokens={"x": 0})
    normalize(traced.module)
    assert calls(traced.module).count("rand_like") == 2


def test_what_no_one_reads_is_gone():
    def function(x):
        x.exp()
        return x.sin()

    assert normalized(function, x=X) == SINE


RETURNED = {
    "a copy": lambda x: x.clone(),
    "a view of a copy": lambda x: x.clone().view(-1),
    "a piece of a copy": lambda x: x.clone().split(2, 1)[1],
    "an element of a copy": lambda x: x.clone().unbind(1)[0],
    "a diagonal of a copy": lambda x: x.clone().diagonal(),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_callers_receive_is_theirs(name):
    """Writing to an output must not change an input."""
    traced = trace(RETURNED[name], {"x": random(6, 4)}, tokens={"x": 0})
    normalize(traced.module)
    given = random(6, 4)
    before = bits(given)
    result = traced.module(given)
    (result[0] if isinstance(result, tuple | list) else result).fill_(7.0)
    assert bits(given) == before


def test_two_outputs_are_two_tensors():
    """Even if they are equal: callers may write to one and keep the other."""
    traced = trace(lambda x: (x.sin(), x.sin()), {"x": X}, tokens={"x": 0})
    normalize(traced.module)
    first, second = traced.run()
    first.fill_(7.0)
    assert not torch.equal(first, second)


def write_and_read(x, state):
    new = state.index_copy(1, torch.tensor([2]), x[:, None])
    total = new.sum(1)
    state.copy_(new)
    return total


def test_an_indexed_write_that_ends_in_a_copy_is_done_in_place():
    inputs = {"x": random(6, 4), "state": torch.zeros(6, 3, 4)}
    traced = trace(write_and_read, inputs, tokens={"x": 0, "state": 0})
    before = traced.run()
    normalize(traced.module)
    found = calls(traced.module)
    assert "index_copy_" in found
    assert not {"index_copy", "copy_"} & set(found)
    state = torch.zeros(6, 3, 4)
    (result,) = [traced.module(inputs["x"], state)]
    assert bits(result) == bits(before[0])
    assert bits(state[:, 2]) == bits(inputs["x"])


def test_a_write_stays_a_copy_where_the_old_content_is_read():
    def function(x, state):
        new = state.index_copy(1, torch.tensor([2]), x[:, None])
        old = state.sum(1)
        state.copy_(new)
        return new.sum(1) + old

    inputs = {"x": random(6, 4), "state": torch.zeros(6, 3, 4)}
    traced = trace(function, inputs, tokens={"x": 0, "state": 0})
    normalize(traced.module)
    assert {"index_copy", "copy_"} <= set(calls(traced.module))


def test_packed_attention_becomes_append_and_attend():
    def attend(x, k, v):
        return ops.attention(x, k, v, 3, 0.5, 0, 0, 0.0, None, True, 0) * 2

    heads = {"x": torch.zeros(6, 4, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 5)}
    traced = trace(attend, heads, tokens=dict.fromkeys(heads, 0))
    Stepper()(normalize, traced.module)
    append, attention, _ = call_nodes(traced.module)
    assert (append.target, attention.target) == (
        torch.ops.nanoflow.kv_append.default,
        torch.ops.nanoflow.paged_attention.default,
    )
    k, v = traced.module.graph.find_nodes(op="placeholder")[1:]
    assert append.args == (k, v, 3, 0)
    assert attention.args[1:] == (append, 3, 5, 0.5, 0, 0, 0.0, None, True, 0)
    assert tuple(attention.meta["val"].shape[1:]) == (4, 5)


@settings(max_examples=8, deadline=None, phases=set(Phase) - {Phase.explain})
@given(functions())
def test_random_functions_keep_every_bit(drawn):
    traced = drawn.trace()
    before = traced.run()
    Stepper()(normalize, traced.module)
    assert [bits(item) for item in traced.run()] == [bits(item) for item in before]
    once = str(traced.module.graph)
    normalize(traced.module)
    assert str(traced.module.graph) == once
