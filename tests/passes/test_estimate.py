"""estimate: rooflines worked out by hand, and what any roofline obeys."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import (
    Axis,
    Cost,
    Op,
    OpGraph,
    OpKind,
    Read,
    Resource,
    Value,
    ValueKind,
    Work,
)
from nanoflow_compiler.ir.verify import verify
from nanoflow_compiler.passes.estimate import estimate, roofline
from strategies import device_specs, op_graphs, works

H200 = DEVICE_SPECS["h200-sxm"]
TOKENS = 2048

# gate and up of Llama-3-8B: [2048, 4096] @ [4096, 28672] in bfloat16.
GEMM = Work(
    flops_per_token=2 * 4096 * 28672,
    bytes_per_token=2 * (4096 + 28672),
    bytes_fixed=2 * 4096 * 28672,
    dtype="bfloat16",
)
# Decode of one layer of Llama-3-8B: 1024 requests of 1024 tokens, 8 KV heads of 128 in bfloat16.
KV_BYTES_PER_TOKEN = 2 * 8 * 128 * 2
ATTENTION = Work(
    flops_per_token=4 * 1024 * 32 * 128,
    bytes_per_token=1024 * KV_BYTES_PER_TOKEN,
    dtype="bfloat16",
)


def test_a_gemm_is_bound_by_compute():
    cost = roofline(GEMM, kind=OpKind.GEMM, tokens=TOKENS, device=H200)
    flops = 2 * TOKENS * 4096 * 28672  # 481 GFLOP at 670 TFLOP/s
    assert cost.bound is Resource.COMPUTE
    assert cost.time_us == pytest.approx(flops / 670e12 * 1e6 + 2)
    assert cost.time_us == pytest.approx(720, abs=1)
    moved = 2 * (4096 * 28672 + TOKENS * (4096 + 28672))
    assert cost.joules == pytest.approx(flops * 0.86e-12 + moved * 0.125e-9)


def test_a_decode_attention_is_bound_by_memory():
    cost = roofline(ATTENTION, kind=OpKind.ATTENTION, tokens=1024, device=H200)
    moved = 1024 * 1024 * 4096  # 4.3 GB at 4.4 TB/s
    assert cost.bound is Resource.MEMORY
    assert cost.time_us == pytest.approx(moved / 4.4e12 * 1e6 + 2)
    assert cost.time_us == pytest.approx(978, abs=1)


def test_a_share_of_the_sms_slows_compute_at_once_and_memory_late():
    """A third of the SMs saturates memory; a sixth has half of its rate."""

    def time_us(work, kind, share):
        return roofline(work, kind=kind, tokens=1024, device=H200, share=share).time_us - 2

    gemm = time_us(GEMM, OpKind.GEMM, 1.0)
    assert time_us(GEMM, OpKind.GEMM, 0.5) == pytest.approx(2 * gemm)
    attention = time_us(ATTENTION, OpKind.ATTENTION, 1.0)
    assert time_us(ATTENTION, OpKind.ATTENTION, 0.34) == pytest.approx(attention)
    assert time_us(ATTENTION, OpKind.ATTENTION, 0.17) == pytest.approx(2 * attention)


def test_a_collective_is_bound_by_the_links_whatever_its_share():
    work = Work(bytes_per_token=8192, link_bytes_per_token=8192, dtype="bfloat16")
    for share in (1.0, 0.1):
        cost = roofline(work, kind=OpKind.COLLECTIVE, tokens=TOKENS, device=H200, share=share)
        assert cost.bound is Resource.NETWORK
        assert cost.time_us == pytest.approx(TOKENS * 8192 / 900e9 * 1e6 + 2)


@pytest.mark.parametrize("kind", [OpKind.VIEW, OpKind.SIZES])
def test_what_has_no_kernel_is_free(kind):
    assert roofline(GEMM, kind=kind, tokens=TOKENS, device=H200) == Cost(0.0, 0.0, Resource.HOST)


def test_an_unknown_type_counts_as_float32():
    work = replace(GEMM, dtype="complex64")
    cost = roofline(work, kind=OpKind.GEMM, tokens=TOKENS, device=H200)
    assert cost.time_us == pytest.approx(2 * TOKENS * 4096 * 28672 / 60e12 * 1e6 + 2)


kinds = st.sampled_from([kind for kind in OpKind if kind not in (OpKind.VIEW, OpKind.SIZES)])
shares = st.floats(0.01, 1.0)


@settings(max_examples=50, deadline=None)
@given(works(), kinds, st.integers(0, 4096), st.integers(0, 4096), shares, device_specs())
def test_more_tokens_or_fewer_sms_never_cost_less(work, kind, tokens, more, share, device):
    alone = roofline(work, kind=kind, tokens=tokens, device=device)
    larger = roofline(work, kind=kind, tokens=tokens + more, device=device)
    shared = roofline(work, kind=kind, tokens=tokens, device=device, share=share)
    assert device.launch_us <= alone.time_us <= min(larger.time_us, shared.time_us * (1 + 1e-12))
    assert 0 <= alone.joules <= larger.joules
    assert alone.joules == shared.joules


@settings(max_examples=50, deadline=None)
@given(works(), kinds, st.lists(st.integers(0, 4096), min_size=1, max_size=5), device_specs())
def test_parts_never_cost_less_than_the_whole(work, kind, cells, device):
    whole = roofline(work, kind=kind, tokens=sum(cells), device=device)
    parts = [roofline(work, kind=kind, tokens=cell, device=device) for cell in cells]
    total = sum(part.time_us for part in parts)
    assert total > whole.time_us or math.isclose(total, whole.time_us)


@settings(max_examples=15, deadline=None)
@given(op_graphs(), device_specs())
def test_only_the_costs_of_a_graph_change(graph, device):
    before = str(graph)
    costed = estimate(graph, device=device)
    verify(costed, where="test")
    assert all(op.cost is not None for op in costed.ops)
    cleared = tuple(replace(op, cost=None) for op in costed.ops)
    assert str(replace(costed, ops=cleared)) == before
    assert replace(costed, ops=cleared) == graph


def test_before_and_after():
    graph = estimate(graph_of_a_gemm(), device=H200)
    assert str(graph).splitlines()[-2:] == [
        "  gemm_0 = gemm parts compute 720.0us/compute (x@0) -> y",
        "  out y",
    ]


def graph_of_a_gemm():
    rows = Axis(0)
    op = Op(
        "gemm_0", OpKind.GEMM, Resource.COMPUTE, (), (Read("x", rows),), ("y",), True, work=GEMM
    )
    x = Value("x", ValueKind.DATA, ("s0", "4096"), "bfloat16")
    y = Value("y", ValueKind.DATA, ("s0", "28672"), "bfloat16", rows)
    return OpGraph((op,), (x, y), ("x",), ("y",), tokens=TOKENS)
