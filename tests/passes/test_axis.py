"""axis: what it says of whole graphs; that its rules are sound is in test_axis_rules."""

import pytest
import torch
from hypothesis import Phase, given, settings

from captures import packed_llama
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.passes.axis import axis, joins
from nanoflow_compiler.passes.normalize import normalize
from random_functions import TOKENS, functions
from rows_of_nodes import Case, Operand, check_rows, run_nodes
from rows_of_nodes import trace as trace_call
from traces import Trace, trace

aten = torch.ops.aten


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def annotate(traced: Trace):
    return axis(normalize(traced.module), seeds=traced.captured.seeds)


def marks(module):
    return [f"{node.name}: {node.meta['axis']}" for node in call_nodes(module)]


def block(x, weight, table):
    heads = (x @ weight.t()).view(x.shape[0], 2, 3).transpose(0, 1)
    centered = heads - heads.mean(1, keepdim=True)
    scaled = torch.relu(centered) * table.exp()
    return scaled.sum(0), scaled.shape[1] + 1


def test_before_and_after():
    inputs = {"x": random(7, 4), "weight": random(6, 4), "table": random(1, 3)}
    traced = trace(block, inputs, tokens={"x": 0})
    before = traced.run()[0]
    module = annotate(traced)
    assert marks(module) == [
        "t: shared",
        "mm: token dim 0",
        "sym_size_int: size",
        "view: token dim 0",
        "transpose: token dim 1",
        "mean: join: mean: reduces over the tokens",
        "sub: token dim 1",
        "relu: token dim 1",
        "exp: shared",
        "mul: token dim 1",
        "sum_1: token dim 0",
        "add: size",
    ]
    (view,) = module.graph.find_nodes(op="call_function", target=aten.reshape.default)
    assert view.args[1] == [-1, 2, 3]
    torch.testing.assert_close(traced.run()[0], before)
    assert module.meta["notes"] == ["join mean: mean: reduces over the tokens"]
    assert joins(module) == [("mean", "mean: reduces over the tokens")]


def test_a_view_in_terms_of_the_tokens_is_right_for_any_number_of_them():
    traced = trace(
        block, {"x": random(7, 4), "weight": random(6, 4), "table": random(1, 3)}, tokens={"x": 0}
    )
    annotate(traced)
    shorter = random(3, 4)
    actual = traced.run(x=shorter)[0]
    expected = block(shorter, traced.inputs["weight"], traced.inputs["table"])[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.unfold(1, 2, 1), "unfold: no rule for this operation"),
        (lambda x: torch.linalg.svd(x)[1], "_linalg_svd: no rule for this operation"),
        (lambda x: x.sum(), "sum: reduces over the tokens"),
        (lambda x: x.amax(0), "amax: reduces over the tokens"),
        (lambda x: x.softmax(0), "_softmax: works along the tokens"),
        (lambda x: x.cumsum(-2), "cumsum: works along the tokens"),
        (lambda x: x[2:4], "slice: works along the tokens"),
        (lambda x: x[-1], "select: picks one token"),
        (lambda x: x.t() @ x, "mm: multiplies tokens with tokens"),
        (lambda x: x + x.t(), "add: tokens meet on different axes: dim 0, dim 1"),
        (lambda x: torch.cat([x, x]), "cat: joins pieces along the tokens"),
        (lambda x: x.repeat(2, 1), "repeat: repeats the tokens"),
        (lambda x: x.reshape(2, -1), "moves tokens across dimensions"),
        (lambda x: x[torch.tensor([1, 0])], "index: picks tokens by index"),
    ],
)
def test_what_mixes_tokens_is_a_join_with_a_reason(function, reason):
    size = 6 if "different axes" in reason else 8
    traced = trace(function, {"x": random(size, 6)}, tokens={"x": 0})
    axis(traced.module, seeds=traced.captured.seeds)
    assert any(why.endswith(reason) for _, why in joins(traced.module))


def test_what_a_join_makes_is_cut_again_along_its_one_dimension_of_tokens():
    def function(x):
        sums = x.cumsum(0)
        pairs = torch.relu(sums @ sums.t())
        return torch.relu(sums), pairs

    module = annotate(trace(function, {"x": random(7, 4)}, tokens={"x": 0}))
    assert marks(module) == [
        "cumsum: join dim 0: cumsum: works along the tokens",
        "t: token dim 1",
        "mm: join: mm: multiplies tokens with tokens",
        "relu: shared",
        "relu_1: token dim 0",
    ]


def test_elements_of_a_join_are_cut_again():
    module = annotate(trace(lambda x: x.sort(0).values + 1, {"x": random(7, 4)}, tokens={"x": 0}))
    assert marks(module) == [
        "sort: join: sort: works along the tokens",
        "getitem: shared dim 0",
        "add: token dim 0",
    ]


def test_elements_of_a_tuple_have_the_rows_of_each():
    module = annotate(trace(lambda x: x.topk(2, -1), {"x": random(7, 4)}, tokens={"x": 0}))
    topk, values, indices = call_nodes(module)
    assert topk.meta["axis"].rows == (values.meta["axis"].rows, indices.meta["axis"].rows)
    assert marks(module)[1:] == ["getitem: token dim 0", "getitem_1: token dim 0"]


def test_what_lines_up_is_cut_along_and_what_broadcasts_is_not():
    def function(x, mask, bias):
        return x * mask + bias

    inputs = {"x": random(7, 4), "mask": random(7, 1), "bias": random(4)}
    traced = trace(function, inputs, tokens={"x": 0, "mask": 0})
    module = axis(normalize(traced.module), seeds=[("x", 0)])
    product, total = call_nodes(module)
    assert {name: str(rows) for name, rows in product.meta["axis"].reads.items()} == {
        "x": "dim 0",
        "mask": "dim 0",
    }
    assert total.meta["axis"].reads["bias"] is None


def test_one_operand_needed_both_whole_and_in_parts():
    """``x @ w`` needs all of w, and adding w to it only its own rows."""
    weight = Operand(random(7, 7))
    call = Case(aten.addmm.default, (weight, Operand(random(7, 7), 0), weight), tokens=7)
    traced = trace_call(call)
    axis(traced.module, seeds=traced.seeds)
    mark = traced.node.meta["axis"]
    assert mark.reason == "addmm: arg0 is needed both whole and in parts"


def test_without_seeds_nothing_depends_on_tokens():
    traced = trace(lambda x: x.relu(), {"x": random(7, 4)}, tokens={"x": 0})
    assert marks(axis(traced.module, seeds=())) == ["relu: shared"]


def test_seeds_must_agree():
    traced = trace(lambda x, y: x + y, {"x": random(7, 4), "y": random(7, 4)}, tokens={"x": 0})
    with pytest.raises(UnsupportedGraphError, match="several sizes"):
        axis(traced.module, seeds=[("x", 0), ("y", 1)])


def test_sizes_that_views_no_longer_need_are_gone():
    traced = trace(lambda x: x.view(x.shape[0], 2, 2) + 1, {"x": random(7, 4)}, tokens={"x": 0})
    targets = [node.target for node in call_nodes(annotate(traced))]
    assert targets == [aten.reshape.default, aten.add.Tensor]


def test_the_real_decoder_has_one_join():
    """The choice of rows for the head; everything before it runs in parts."""
    found = packed_llama()
    assert joins(found.module) == [("index", "index: picks tokens by index")]


@settings(max_examples=8, deadline=None, phases=set(Phase) - {Phase.explain})
@given(functions())
def test_nodes_of_random_functions_keep_rows(drawn):
    traced = drawn.trace()
    before = traced.run()
    module = annotate(traced)
    for actual, expected in zip(traced.run(), before, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    inputs = dict(zip(names, traced.inputs.values(), strict=True))
    constants = module.graph.find_nodes(op="get_attr")
    inputs |= {node.name: getattr(module, node.target) for node in constants}
    check_rows(module, run_nodes(module, inputs), tokens=TOKENS)
