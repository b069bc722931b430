"""lift: every node in one operation, in an order that data and caches allow, with names and layers."""

import re
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from torch.nn import functional

from captures import NUM_LAYERS, packed_llama
from nanoflow_compiler import ops
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.ir import OpKind, Resource
from nanoflow_compiler.ir.verify import verify
from nanoflow_compiler.passes.grouping import anchor_kind, is_view
from nanoflow_compiler.passes.lift import bound_nodes
from random_functions import functions
from traces import trace


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def lifted(function, *, tokens=None, **inputs):
    weights = tuple(name for name in inputs if name[0] in "wb")
    seeds = dict.fromkeys(tokens or ("x",), 0)
    traced = trace(function, inputs, tokens=seeds, weights=weights)
    graph = traced.analyse()
    verify(graph, where="lift")
    check_nodes(traced.module, traced.weights, graph)
    return graph


def check_nodes(module, weights, graph):
    """Every call is in exactly one operation, or bound to parameters; each after what it reads."""
    names = Counter(name for op in graph.ops for name in op.nodes)
    bound = Counter(node.name for node in bound_nodes(module, weights))
    assert names + bound == Counter(node.name for node in call_nodes(module))
    nodes = {node.name: node for node in module.graph.nodes}
    done = {node.name for node in module.graph.nodes if node.op != "call_function"} | set(bound)
    for op in graph.ops:
        inside = set()
        for name in op.nodes:
            assert {arg.name for arg in nodes[name].all_input_nodes} <= done | inside
            inside.add(name)
        done |= inside
        read = {arg.name for name in op.nodes for arg in nodes[name].all_input_nodes} - inside
        assert {item.value.removeprefix("!") for item in op.reads} >= read


def block(x, w0, w1, w2):
    """Norm, a gated pair of products, the best two of their sum, and the mean over all tokens."""
    normed = functional.layer_norm(x, (4,))
    gate, up = normed @ w0.t(), normed @ w1.t()
    hidden = (functional.silu(gate) * up) @ w2.t() + x
    return hidden - hidden.mean(0, keepdim=True)


BLOCK = {"x": random(6, 4), "w0": random(8, 4), "w1": random(8, 4), "w2": random(4, 8)}


def test_before_and_after():
    text = re.sub(r"\bs\d+\b", "T", str(lifted(block, **BLOCK)))
    assert text.splitlines() == [
        "op graph: 7 ops, 0 layers, tokens=6",
        "  in x: float32[T, 4]",
        "  in t_default: float32[4, 16]",
        "  in t_2: float32[8, 4]",
        "  cluster_0 = cluster 'layer_norm' parts memory (x@0) -> getitem",
        "  gemm_0 = gemm 'mm [4, 16]' parts compute (getitem@0, t_default) -> mm_default",
        "  cluster_1 = cluster 'gated_activation' parts memory (mm_default@0) -> mul",
        "  gemm_1 = gemm 'mm [8, 4]' parts compute (mul@0, t_2) -> mm_2",
        "  cluster_2 = cluster 'add' parts memory (mm_2@0, x@0) -> add",
        "  cluster_3 = cluster 'mean' whole memory (add) -> mean  # join: mean: reduces over the tokens",
        "  cluster_4 = cluster 'sub' parts memory (add@0, mean) -> sub",
        "  out sub",
    ]


def test_kinds_have_their_resources():
    def function(x, heads):
        moved = ops.kv_append(heads, heads, 0, 0)
        seen = ops.paged_attention(heads, moved, 0, 4, 0.5, 0, 0, 0.0, None, True, 0)
        return (x @ x.t()).relu(), x.t(), x.shape[0] + 1, seen, x.nonzero()

    graph = lifted(function, tokens=("x", "heads"), x=random(6, 4), heads=random(6, 2, 4))
    resources = {op.kind: op.resource for op in graph.ops}
    assert resources == {
        OpKind.GEMM: Resource.COMPUTE,
        OpKind.ATTENTION: Resource.MEMORY,
        OpKind.KV_APPEND: Resource.MEMORY,
        OpKind.CLUSTER: Resource.MEMORY,
        OpKind.VIEW: Resource.HOST,
        OpKind.SIZES: Resource.HOST,
        OpKind.OTHER: Resource.COMPUTE,
    }


def test_an_append_orders_its_attention():
    graph = packed_llama().ops
    appends = [op for op in graph.ops if op.kind is OpKind.KV_APPEND]
    attentions = [op for op in graph.ops if op.kind is OpKind.ATTENTION]
    for append, attention in zip(appends, attentions, strict=True):
        (handle,) = append.writes
        assert [str(read) for read in attention.reads if read.prefix] == [f"{handle}[:]"]


def test_a_write_to_an_input_waits_for_its_readers():
    """The sum needs the old state, so the copy waits for it and for nothing else."""

    def function(x, state):
        old = state.sum(1)
        state.copy_(state * 0.5 + x)
        return old

    graph = lifted(function, tokens=("x", "state"), x=random(6, 4), state=random(6, 4))
    (copy,) = [op for op in graph.ops if op.kind is OpKind.OTHER]
    before = graph.ops[: graph.ops.index(copy)]
    assert [read.value for read in copy.reads if read.value.startswith("!")] == [
        f"!{op.name}" for op in before
    ]


def test_views_and_merges_of_parameters_are_bound():
    graph = lifted(block, **BLOCK)
    assert not set(graph.inputs) & {"w0", "w1", "w2"}
    assert [name for name in graph.inputs if name != "x"] == ["t_default", "t_2"]
    assert [op.kind for op in graph.ops].count(OpKind.GEMM) == 2


def test_what_is_computed_of_parameters_alone_is_an_operation():
    graph = lifted(lambda x, w0: x * w0.exp(), x=random(6, 4), w0=random(4))
    assert [(op.label, op.splits) for op in graph.ops] == [("exp", False), ("mul", True)]


def test_elements_of_a_tuple_belong_to_who_made_it():
    graph = lifted(lambda x: x.sort(0).values + x.sort(0).indices, x=random(6, 4))
    assert [(op.nodes, op.splits) for op in graph.ops] == [
        (("sort", "getitem", "getitem_1"), False),
        (("add",), True),
    ]


def test_reasons_of_joins_are_kept():
    graph = lifted(lambda x: x.cumsum(0).flip(0), x=random(6, 4))
    (op,) = graph.ops
    assert op.reason == "cumsum: works along the tokens; flip: works along the tokens"


LABELS = {
    "relu": lambda x: x.relu(),
    "relu + sin": lambda x: x.relu().sin().relu(),
    "exp + sin + cos + ...": lambda x: x.exp().sin().cos().neg(),
    "rms_norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "mm [4, 4]": lambda x: x @ torch.ops.aten.mm(x.t(), x).detach(),
}


@pytest.mark.parametrize("label", LABELS)
def test_labels(label):
    graph = lifted(LABELS[label], x=random(6, 4))
    assert graph.ops[-1].label == label


def test_layers_of_a_real_decoder():
    graph = packed_llama().ops
    assert graph.num_layers == NUM_LAYERS
    kinds = [
        Counter(op.kind for op in graph.ops if op.layer == layer) for layer in range(NUM_LAYERS)
    ]
    for counts in kinds:
        assert counts[OpKind.ATTENTION] == counts[OpKind.KV_APPEND] == 1
    assert kinds[0] == kinds[1]
    attentions = [op.layer for op in graph.ops if op.kind is OpKind.ATTENTION]
    assert attentions == list(range(NUM_LAYERS))


def test_a_real_decoder_is_lifted_whole():
    found = packed_llama()
    verify(found.ops, where="lift")
    check_nodes(found.module, frozenset(found.captured.weights), found.ops)
    whole = [op.label for op in found.ops.ops if not op.splits and op.kind is not OpKind.VIEW]
    assert whole == ["index", "mm [32, 128]", "_unsafe_view"]


def test_clusters_have_no_anchors_and_views_no_kernels():
    nodes = {node.name: node for node in packed_llama().module.graph.nodes}
    for op in packed_llama().ops.ops:
        members = [nodes[name] for name in op.nodes]
        if op.kind is OpKind.CLUSTER:
            assert not any(map(anchor_kind, members))
            assert not all(map(is_view, members))
        elif op.kind is OpKind.VIEW:
            assert all(map(is_view, members))
        elif op.kind is not OpKind.SIZES:
            assert anchor_kind(members[0]) is op.kind


@settings(max_examples=6, deadline=None, phases=set(Phase) - {Phase.explain})
@given(functions())
def test_nodes_of_random_functions_are_in_one_operation_each(drawn):
    traced = drawn.trace()
    graph = traced.analyse()
    verify(graph, where="lift")
    check_nodes(traced.module, traced.weights, graph)
