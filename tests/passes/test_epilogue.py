"""epilogue: linears with what follows them become one operator, bit for bit the same."""

import pytest
import torch
from torch.nn import functional

from captures import NUM_LAYERS, packed_llama
from nanoflow_compiler.ir import OpKind
from nanoflow_compiler.passes.epilogue import epilogue
from nanoflow_compiler.passes.fuse import fuse
from nanoflow_compiler.passes.normalize import normalize
from nanoflow_compiler.stepper import Stepper
from traces import calls, trace


def random(*shape, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def fused(function, *, serves=lambda _: True, dtype=torch.bfloat16, **inputs):
    """The trace with epilogues fused; parameters are those whose name begins with w or b."""
    weights = tuple(name for name in inputs if name[0] in "wb")
    given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    traced = trace(function, given, tokens={"x": 0}, weights=weights)
    step = Stepper()
    graph = step(fuse, step(normalize, traced.module), weights=traced.weights)
    before = traced.run()
    step(epilogue, graph, weights=traced.weights, serves=serves)
    for actual, expected in zip(traced.run(), before, strict=True):
        assert torch.equal(actual, expected)
    return traced


def only(*names):
    """Kernels of these operators alone."""
    return lambda shape: shape.op in names


def mlp(x, w0, w1):
    return functional.silu(functional.linear(x, w0)) * functional.linear(x, w1)


TWO = {"x": random(6, 8), "w0": random(4, 8, seed=1), "w1": random(4, 8, seed=2)}


def test_a_gate_before_and_after():
    traced = fused(mlp, **TWO)
    assert calls(traced.module) == ["merge_rows", "t", "gated_linear"]
    assert traced.module.meta["notes"] == [
        "gated_linear: mm_default, silu, mul -> gated_linear_default"
    ]
    assert traced.module.meta["fusions"][-1].kind == "gated_linear"


def test_an_addition_before_and_after():
    def function(x, w0):
        return x + functional.linear(x.sin(), w0)

    traced = fused(function, x=TWO["x"], w0=random(8, 8))
    assert calls(traced.module) == ["sin", "t", "linear_add"]
    assert traced.module.meta["notes"] == ["linear_add: mm, add -> linear_add_default"]


def test_a_plain_linear_before_and_after():
    def function(x, w0, w1, b1):
        return functional.linear(x.sin(), w0), functional.linear(x, w1, b1)

    traced = fused(function, **TWO, b1=random(4))
    assert calls(traced.module) == ["sin", "t", "linear", "t", "linear"]


GATES = {
    "gelu": lambda x, w0, w1: functional.gelu(x @ w0.t()) * (x @ w1.t()),
    "gelu_tanh": lambda x, w0, w1: functional.gelu(x @ w0.t(), approximate="tanh") * (x @ w1.t()),
    "silu": lambda x, w0, w1: (x @ w1.t()) * functional.silu(x @ w0.t()),
}


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations(name, dtype):
    traced = fused(GATES[name], dtype=dtype, **TWO)
    (node,) = [n for n in traced.module.graph.nodes if "gated_linear" in n.name]
    assert node.args[2] == name


def test_the_second_half_cannot_be_the_gate():
    traced = fused(GATES["silu"], serves=only("gated_linear"), **TWO)
    assert traced.module.meta["notes"] == ["not fused, silu: the gate is not the first half"]


def linear(hidden, weight):
    """As models have it: of a sequence, ``[1, tokens, depth]``."""
    return (hidden.reshape(-1, hidden.shape[-1]) @ weight.t()).reshape(1, -1, weight.shape[0])


def test_reshapes_between_are_gone():
    def function(x, w0, w1, w2, w3):
        hidden = x[None]
        gate, up = linear(hidden, w0), linear(hidden, w1)
        hidden = hidden + linear(functional.silu(gate) * up, w2)
        return hidden + linear(hidden.tanh(), w3)

    traced = fused(function, **TWO, w2=random(8, 4, seed=3), w3=random(8, 8, seed=4))
    found = calls(traced.module)
    assert found.count("linear_add") == 2
    graph = traced.module.graph
    ours = [node for node in graph.nodes if str(node.target).startswith("nanoflow")]
    gated, first, second = ours
    assert first.args[1] is gated
    assert second.args[0] is first


APART = {
    "the gate has a bias": (
        lambda x, w0, w1, b0, b1: (
            functional.silu(functional.linear(x, w0, b0)) * functional.linear(x, w1, b1)
        ),
        {"b0": random(4), "b1": random(4)},
        ["not fused, silu: the linear has a bias"],
    ),
    "the activation is read elsewhere": (
        lambda x, w0, w1: (lambda act: act * (x @ w1.t()) + act)(functional.silu(x @ w0.t())),
        {},
        [],
    ),
    "a half is read elsewhere": (
        lambda x, w0, w1: (lambda made: functional.silu(made) * (x @ w1.t()) * made)(x @ w0.t()),
        {},
        ["not fused, silu: getitem has other readers"],
    ),
    "the product is read elsewhere": (
        lambda x, w0, w1: (lambda made: (x[:, :4] + made) * made.sin())(x @ w0.t()) * w1[0, 0],
        {},
        ["not fused, add: mm has other readers"],
    ),
    "it broadcasts": (
        lambda x, w0, w1: x[:, :1] + x @ w0.t() + w1[0, 0],
        {},
        ["not fused, add: it broadcasts"],
    ),
    "the types differ": (
        lambda x, w0, w1: x.float()[:, :4] + x @ w0.t() * w1[0, 0].float(),
        {},
        [],
    ),
    "the sum is of another type": (
        lambda x, w0, w1: x.float()[:, :4] + x @ w0.t() + w1[0, 0],
        {},
        ["not fused, add: its types differ"],
    ),
    "the weight is no parameter": (lambda x, w0, w1: x[:, :4] + x @ (w0 + w1).t(), {}, []),
    "twice the product": (
        lambda x, w0, w1: torch.add(x[:, :4], x @ w0.t(), alpha=2) + w1[0, 0],
        {},
        [],
    ),
}


@pytest.mark.parametrize("name", APART)
def test_others_stay_apart(name):
    function, more, notes = APART[name]
    traced = fused(function, serves=only("linear_add", "gated_linear"), **TWO, **more)
    assert traced.module.meta["notes"] == notes
    assert not {"linear_add", "gated_linear"} & set(calls(traced.module))


def test_of_two_linears_the_later_is_fused():
    traced = fused(lambda x, w0, w1: x.sin() @ w0.t() + x.cos() @ w1.t(), **TWO)
    found = calls(traced.module)
    assert found == ["sin", "t", "linear", "cos", "t", "linear_add"]


def test_what_no_kernel_serves_stays():
    traced = fused(mlp, serves=lambda _: False, **TWO)
    assert "gated_linear" not in calls(traced.module)
    assert traced.module.meta["notes"] == [
        "not fused, silu: no kernel of gated_linear is faster on weights of 8 x 8"
    ]


def test_a_real_decoder():
    """Of each layer one product is plain, two add, one gates; and the LM head."""
    graph, plain = packed_llama(kernels="own").ops, packed_llama().ops
    labels = [op.label.partition(" ")[0] for op in graph.ops if op.kind is OpKind.GEMM]
    layer = ["linear", "linear_add", "gated_linear", "linear_add"]
    assert labels == [*layer * NUM_LAYERS, "linear"]
    assert all(op.splits for op in graph.ops if op.kind is OpKind.GEMM and op.layer is not None)
    assert graph.num_layers >= NUM_LAYERS - 1
    flops = [
        sum(op.work.flops(512) for op in each.ops if op.kind is OpKind.GEMM)
        for each in (graph, plain)
    ]
    assert flops[0] == flops[1]
