"""work: FLOPs and bytes counted by hand."""

import pytest
import torch
from torch.nn import functional

from captures import packed_llama
from nanoflow_compiler import ops
from nanoflow_compiler.ir import OpKind, Work
from tiny_models import COMMON
from traces import trace

TOKENS = 6


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def works(function, **inputs):
    """By kind of operation, of a function that has one of each."""
    weights = tuple(name for name in inputs if name[0] in "wb")
    graph = trace(function, inputs, tokens={"x": 0}, weights=weights).analyse()
    assert graph.tokens == TOKENS
    return {op.kind: op.work for op in graph.ops}


def test_a_gemm():
    """[6, 4] @ [4, 5] in bfloat16: rows in and out, and the weight."""
    bfloat16 = {"x": random(6, 4, dtype=torch.bfloat16), "w": random(5, 4, dtype=torch.bfloat16)}
    found = works(lambda x, w: x @ w.t(), **bfloat16)
    expected = Work(
        flops_per_token=2 * 4 * 5,
        bytes_per_token=2 * (4 + 5),
        bytes_fixed=2 * 4 * 5,
        dtype="bfloat16",
    )
    assert found == {OpKind.GEMM: expected}


def test_a_gemm_with_a_bias():
    inputs = {"x": random(6, 4), "w": random(5, 4), "b": random(5)}
    found = works(lambda x, w, b: functional.linear(x, w, b), **inputs)[OpKind.GEMM]
    assert found == Work(
        flops_per_token=2 * 4 * 5, bytes_per_token=4 * (4 + 5), bytes_fixed=4 * (4 * 5 + 5)
    )


def test_batched_products_count_every_batch():
    inputs = {"x": random(6, 3, 4), "y": random(6, 4, 5)}
    graph = trace(lambda x, y: torch.bmm(x, y), inputs, tokens={"x": 0, "y": 0}).analyse()
    (op,) = graph.ops
    assert op.work == Work(
        flops_per_token=2 * 3 * 4 * 5, bytes_per_token=4 * (3 * 4 + 4 * 5 + 3 * 5)
    )


def test_a_cluster_moves_what_it_reads_and_writes_once():
    """x is read twice and exp(x) stays inside."""
    found = works(lambda x, y: x.exp() * x + y, x=random(6, 4), y=random(4))
    assert found == {
        OpKind.CLUSTER: Work(flops_per_token=3 * 4, bytes_per_token=4 * (4 + 4), bytes_fixed=4 * 4)
    }


def test_a_join_is_fixed():
    """It runs once, for all tokens."""
    found = works(lambda x: x.cumsum(0), x=random(6, 4))
    assert found == {OpKind.CLUSTER: Work(flops_fixed=24, bytes_fixed=4 * (24 + 24))}


def test_views_and_sizes_are_free():
    found = works(lambda x: (x.t(), x.shape[0] * 2), x=random(6, 4))
    assert found == {OpKind.VIEW: Work(), OpKind.SIZES: Work()}


def test_attention_of_a_batch():
    """Two products of 3 queries with 5 keys of width 4, for each of 2 heads."""
    inputs = {"x": random(6, 2, 3, 4), "k": random(6, 2, 5, 4), "v": random(6, 2, 5, 4)}
    function = functional.scaled_dot_product_attention
    graph = trace(
        lambda x, k, v: function(x, k, v), inputs, tokens=dict.fromkeys(inputs, 0)
    ).analyse()
    (op,) = [op for op in graph.ops if op.kind is OpKind.ATTENTION]
    assert op.work.flops_per_token == 4 * 2 * 3 * 4 * 5
    assert op.work.bytes_per_token == 4 * 2 * 4 * (3 + 5 + 5 + 3)


def test_a_real_decoder():
    """Paged attention reads 512 tokens of context for each token, keys and values."""
    heads, kv_heads = COMMON["num_attention_heads"], COMMON["num_key_value_heads"]
    hidden, inner = COMMON["hidden_size"], COMMON["intermediate_size"]
    width = hidden // heads
    ops_of = {}
    for op in packed_llama().ops.ops:
        ops_of.setdefault(op.kind, []).append(op)
    attention = ops_of[OpKind.ATTENTION][0].work
    assert attention.flops_per_token == pytest.approx(4 * 512 * hidden)
    context = 512 * 2 * kv_heads * width * 4
    assert attention.bytes_per_token == pytest.approx(context + 2 * hidden * 4)
    flops = [op.work.flops_per_token for op in ops_of[OpKind.GEMM][:4]]
    qkv = hidden + 2 * kv_heads * width
    assert flops == [2 * hidden * n for n in (qkv, hidden, 2 * inner)] + [2 * inner * hidden]
    append = ops_of[OpKind.KV_APPEND][0].work
    assert append.bytes_per_token == 2 * kv_heads * width * 4


def test_experts_run_the_chosen_ones():
    """Two of three experts for each token: up [8, 4] and down [4, 4]."""

    def function(x, index, scores, w0, w1):
        return ops.moe_experts(x, index, scores, w0, w1, None, None, "silu", True, False)

    inputs = {
        "x": random(6, 4),
        "index": torch.zeros(6, 2, dtype=torch.int64),
        "scores": random(6, 2),
        "w0": random(3, 8, 4),
        "w1": random(3, 4, 4),
    }
    traced = trace(function, inputs, tokens={"x": 0, "index": 0, "scores": 0}, weights=("w0", "w1"))
    (op,) = traced.analyse().ops
    assert op.kind is OpKind.EXPERTS
    assert op.work.flops_per_token == 2 * 2 * (8 * 4 + 4 * 4)
    assert op.work.bytes_fixed == 4 * (3 * 8 * 4 + 3 * 4 * 4)
