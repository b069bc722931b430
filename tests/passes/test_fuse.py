"""fuse: linears of one input become one GEMM, known patterns get names, and numbers stay."""

from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from captures import NUM_LAYERS, packed_llama
from nanoflow_compiler.graphs import call_nodes, is_tensor, size_hint
from nanoflow_compiler.passes.fuse import fuse
from nanoflow_compiler.passes.normalize import normalize
from nanoflow_compiler.stepper import Stepper
from random_functions import functions
from traces import Trace, calls, trace


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def fused(function, *, merge=True, **inputs):
    """The trace with linears merged; parameters are those whose name begins with w or b."""
    weights = tuple(name for name in inputs if name[0] in "wb")
    traced = trace(function, inputs, tokens={"x": 0}, weights=weights)
    before = traced.run()
    step = Stepper()
    step(fuse, step(normalize, traced.module), weights=traced.weights, merge=merge)
    for actual, expected in zip(traced.run(), before, strict=True):
        torch.testing.assert_close(actual, expected)
    return traced


def kinds(traced: Trace):
    return [fusion.kind for fusion in traced.module.meta["fusions"]]


def two_linears(x, w0, w1):
    return (x @ w0.t()).relu() + x @ w1.t()


TWO = {"x": random(6, 4), "w0": random(3, 4, seed=1), "w1": random(3, 4, seed=2)}


def test_before_and_after():
    traced = fused(two_linears, **TWO)
    assert calls(traced.module) == [
        *("merge_rows", "t", "mm", "split_with_sizes", "getitem", "getitem", "relu", "add")
    ]
    assert traced.module.meta["notes"] == ["gemm: mm, mm_1 -> mm_default"]
    assert traced.module.meta["misses"] == []


def test_linears_with_biases_are_merged_with_them():
    def function(x, w0, w1, b0, b1):
        return functional.linear(x, w0, b0).relu(), functional.linear(x, w1, b1).sin()

    wide = {"w0": random(3, 4), "w1": random(5, 4), "b0": random(3), "b1": random(5)}
    traced = fused(function, x=random(6, 4), **wide)
    found = calls(traced.module)
    assert found.count("addmm") == 1
    assert found.count("merge_rows") == 2
    assert kinds(traced) == ["gemm"]


def test_merging_can_be_switched_off():
    traced = fused(two_linears, merge=False, **TWO)
    assert "merge_rows" not in calls(traced.module)
    assert kinds(traced) == []


def bias_on_one(x, w0, w1, b0):
    return functional.linear(x, w0, b0) + functional.linear(x, w1)


def test_linears_with_and_without_a_bias_stay_apart():
    traced = fused(bias_on_one, b0=random(3), **TWO)
    assert traced.module.meta["misses"] == ["addmm, mm: some have a bias and some do not"]
    assert traced.module.meta["notes"] == [
        "not merged, addmm, mm: some have a bias and some do not"
    ]
    assert kinds(traced) == []


def test_a_weight_that_is_used_twice_stays_apart():
    def function(x, w0, b0, b1):
        return functional.linear(x, w0, b0).relu() + functional.linear(x, w0, b1)

    traced = fused(function, x=TWO["x"], w0=TWO["w0"], b0=random(3), b1=random(3, seed=1))
    assert traced.module.meta["misses"] == ["addmm, addmm_1: two use the same weight"]


def test_weights_of_different_types_stay_apart():
    """One dtype cannot multiply two, so the second weight is cast: then it is no parameter."""

    def function(x, w0, w1):
        return x @ w0.t() + x @ w1.to(x.dtype).t()

    traced = fused(function, x=TWO["x"], w0=TWO["w0"], w1=TWO["w1"].float())
    assert kinds(traced) == []


APART = {
    "of different inputs": lambda x, w0, w1: x.sin() @ w0.t() + x.cos() @ w1.t(),
    "of what is no parameter": lambda x, w0, w1: (x @ w0.t()) * (x @ x[:3].t()) * w1[0, 0],
    "not transposed": lambda x, w0, w1: x @ w0.t() @ (w0 @ w1.t()),
    "of a scaled weight": lambda x, w0, w1: x @ (w0 * 2).t() + x @ (w1 * 2).t(),
}


@pytest.mark.parametrize("name", APART)
def test_other_products_stay_apart(name):
    assert kinds(fused(APART[name], **TWO)) == []


def test_a_bias_that_broadcasts_is_no_bias_of_a_linear():
    """Of one element for all outputs: merged with others it would shift theirs."""

    def function(x, w0, w1, b0, b1):
        return torch.addmm(b0, x, w0.t()).relu() + torch.addmm(b1, x, w1.t())

    traced = fused(function, b0=random(1), b1=random(3), **TWO)
    assert kinds(traced) == []


def test_shapes_behind_a_merged_gemm_are_those_that_it_makes():
    """The pieces are strided, and so is what is made of them: kernels are compiled for that."""

    def function(x, w0, w1):
        first, second = x @ w0.t(), x @ w1.t()
        low, high = first.view(x.shape[0], 2, 2).chunk(2, 1)
        return low.transpose(0, 1) + 1, high * 2, second.unbind(1)[0] * 3

    traced = fused(function, x=random(6, 4), w0=random(4, 4, seed=1), w1=random(4, 4, seed=2))
    assert kinds(traced) == ["gemm"]
    check_layouts(traced)


def check_layouts(traced):
    """Every fake value has the shape and strides of the real one."""
    names = [node.name for node in traced.module.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, traced.inputs.values(), strict=True))
    for node in traced.module.graph.nodes:
        if node.op == "get_attr":
            values[node.name] = getattr(traced.module, node.target)
        if node.op != "call_function":
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda arg: values[arg.name])
        values[node.name] = made = node.target(*args, **kwargs)
        if is_tensor(node):
            fake = node.meta["val"]
            assert tuple(map(size_hint, fake.shape)) == tuple(made.shape), node.format_node()
            assert tuple(map(size_hint, fake.stride())) == made.stride(), node.format_node()


def rms_norm(x, w0):
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w0 * normed.to(x.dtype)


def layer_norm(x, w0):
    return functional.layer_norm(x, (4,), w0, w0)


def rotary(x, w0):
    turned = torch.cat((-x[..., 2:], x[..., :2]), -1)
    return x * w0.cos() + turned * w0.sin()


def rotary_the_other_way_round(x, w0):
    turned = torch.cat((-x[..., 2:], x[..., :2]), -1)
    return turned * w0.sin() + x * w0.cos()


PATTERNS = {
    "rms_norm": [rms_norm],
    "layer_norm": [layer_norm],
    "rotary": [rotary, rotary_the_other_way_round],
    "gated_activation": [
        lambda x, w0: functional.silu(x) * w0,
        lambda x, w0: functional.gelu(x * w0) * x,
    ],
    "router": [
        lambda x, w0: (x * w0).softmax(-1).topk(2, -1).values,
        lambda x, w0: (x * w0).sigmoid().float().topk(2, -1).indices,
    ],
}


@pytest.mark.parametrize(
    ("kind", "function"), [(kind, each) for kind, several in PATTERNS.items() for each in several]
)
def test_patterns_of_decoders_are_recognised(kind, function):
    traced = fused(function, x=random(6, 4, dtype=torch.float32), w0=random(4, dtype=torch.float32))
    (fusion,) = traced.module.meta["fusions"]
    assert fusion.kind == kind
    marked = {node.name: node.meta.get("pattern") for node in call_nodes(traced.module)}
    assert {marked[name] for name in fusion.nodes} == {f"{kind}:0"}
    assert fusion.result == fusion.nodes[-1]


NO_PATTERNS = {
    "a root of a cube": lambda x: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-6),
    "a root of another tensor": lambda x: (
        x * torch.rsqrt(x.sin().pow(2).mean(-1, keepdim=True) + 1.0)
    ),
    "halves that are not negated": lambda x: x * 2 + torch.cat((x[..., 2:], x[..., :2]), -1) * 3,
    "halves of another tensor": lambda x: (
        x * 2.0 + torch.cat((-x.sin()[..., 2:], x.sin()[..., :2]), -1) * 3.0
    ),
    "an activation alone": lambda x: functional.silu(x) + 1,
    "the best of raw scores": lambda x: x.topk(2, -1).values,
}


@pytest.mark.parametrize("name", NO_PATTERNS)
def test_what_only_looks_like_a_pattern_is_not(name):
    traced = fused(NO_PATTERNS[name], x=random(6, 4))
    assert kinds(traced) == []
    assert not any("pattern" in node.meta for node in call_nodes(traced.module))


def test_patterns_count_from_zero():
    def function(x, w0):
        return rms_norm(rms_norm(x, w0), w0)

    traced = fused(function, x=random(6, 4, dtype=torch.float32), w0=random(4, dtype=torch.float32))
    marked = [node.meta["pattern"] for node in call_nodes(traced.module) if "pattern" in node.meta]
    assert list(dict.fromkeys(marked)) == ["rms_norm:0", "rms_norm:1"]


def test_a_real_decoder_has_all_of_its_patterns():
    """q/k/v and gate/up of each layer; two norms each and a last one; queries and keys turned."""
    module = packed_llama().module
    found = Counter(fusion.kind for fusion in module.meta["fusions"])
    assert found == {
        "gemm": 2 * NUM_LAYERS,
        "rms_norm": 2 * NUM_LAYERS + 1,
        "rotary": 2 * NUM_LAYERS,
        "gated_activation": NUM_LAYERS,
    }
    sizes = [len(fusion.nodes) for fusion in module.meta["fusions"] if fusion.kind == "gemm"]
    assert sizes == [3, 2] * NUM_LAYERS
    assert module.meta["misses"] == []


linears = st.tuples(st.integers(1, 4), st.booleans())


@settings(max_examples=6, deadline=None, phases=set(Phase) - {Phase.explain})
@given(st.lists(linears, min_size=1, max_size=5), st.integers(1, 3))
def test_any_linears_of_one_input(shapes, layers):
    """Of several widths, with and without a bias, one layer after the other."""
    inputs = {"x": random(6, 4)}
    for layer in range(layers):
        for at, (width, has_bias) in enumerate(shapes):
            inputs[f"w{layer}_{at}"] = random(width, 4, seed=layer * 10 + at)
            if has_bias:
                inputs[f"b{layer}_{at}"] = random(width, seed=layer * 10 + at)

    def function(x, **weights):
        for layer in range(layers):
            total = x * 0.5
            for at in range(len(shapes)):
                made = functional.linear(
                    x, weights[f"w{layer}_{at}"], weights.get(f"b{layer}_{at}")
                )
                total = total + made.sum(-1, keepdim=True)
            x = torch.tanh(total)
        return x

    traced = fused(function, **inputs)
    merges = len(shapes) > 1 and len({has_bias for _, has_bias in shapes}) == 1
    assert kinds(traced).count("gemm") == (layers if merges else 0)
    misses = len(shapes) > 1 and not merges
    assert len(traced.module.meta["misses"]) == (layers if misses else 0)
    check_layouts(traced)


@settings(max_examples=8, deadline=None, phases=set(Phase) - {Phase.explain})
@given(functions())
def test_random_functions_keep_their_numbers(drawn):
    traced = drawn.trace()
    before = traced.run()
    step = Stepper()
    step(fuse, step(normalize, traced.module), weights=traced.weights)
    for actual, expected in zip(traced.run(), before, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    check_layouts(traced)
