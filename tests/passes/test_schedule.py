"""schedule: list scheduling on random DAGs keeps every rule, and what one would draw by hand."""

from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import (
    Axis,
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
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.schedule import schedule
from strategies import MOST_LANES, device_specs, nano_graphs

H200 = DEVICE_SPECS["h200-sxm"]
ROWS = Axis(0)

devices_and_graphs = device_specs().flatmap(
    lambda device: st.tuples(st.just(device), nano_graphs(device=device))
)
lane_counts = st.integers(1, MOST_LANES)


def critical_path_us(nano):
    """The longest path, each part with the whole device to itself."""
    graph = nx.DiGraph()
    costs = {op.name: op.cost.time_us for op in nano.ops}
    graph.add_nodes_from(costs)
    graph.add_edges_from((edge.source, edge.target) for edge in nano.edges)
    ends = {}
    for name in nx.topological_sort(graph):
        ends[name] = costs[name] + max((ends[n] for n in graph.predecessors(name)), default=0.0)
    return max(ends.values())


def end_us(plan):
    """Of the last slot; what the power cap allows is apart."""
    return max(slot.end_us for slot in plan.slots)


@settings(max_examples=20, deadline=None)
@given(devices_and_graphs, lane_counts)
def test_it_keeps_edges_lanes_and_budgets(drawn, lanes):
    device, nano = drawn
    plan = schedule(nano, device=device, lanes=lanes)
    verify(plan, where="test")
    slots = {slot.op: slot for slot in plan.slots}
    for edge in nano.edges:
        assert slots[edge.source].end_us <= slots[edge.target].start_us
    for before in plan.slots:
        for after in plan.slots:
            if before is not after and before.lane == after.lane:
                apart = before.end_us <= after.start_us or after.end_us <= before.start_us
                assert apart, (before, after)
    for slot in plan.slots:
        beside = [
            other.sms for other in plan.slots if other.start_us <= slot.start_us < other.end_us
        ]
        assert sum(beside) <= device.num_sms


@settings(max_examples=20, deadline=None)
@given(devices_and_graphs, lane_counts)
def test_slots_last_as_long_as_their_share_of_the_device_says(drawn, lanes):
    device, nano = drawn
    parts = nano.by_name()
    for slot in schedule(nano, device=device, lanes=lanes).slots:
        part = parts[slot.op]
        kind, work = part.op.kind, part.op.work
        if part.cost.time_us == 0:
            assert (slot.sms, slot.start_us) == (0, slot.end_us)
            continue
        tokens = sum(nano.cell_tokens[part.first : part.last])
        share = slot.sms / device.num_sms
        cost = roofline(work, kind=kind, tokens=tokens, device=device, share=share)
        assert slot.end_us - slot.start_us == pytest.approx(cost.time_us)


@settings(max_examples=20, deadline=None)
@given(devices_and_graphs, lane_counts)
def test_the_makespan_is_between_the_critical_path_and_the_sum(drawn, lanes):
    device, nano = drawn
    plan = schedule(nano, device=device, lanes=lanes)
    end = end_us(plan)
    busy = sum(slot.end_us - slot.start_us for slot in plan.slots)
    assert critical_path_us(nano) <= end * (1 + 1e-9)
    assert end <= busy * (1 + 1e-9)
    assert plan.makespan_us == max(end, plan.power_floor_us)


@settings(max_examples=20, deadline=None)
@given(devices_and_graphs)
def test_one_lane_is_the_sequence_in_the_order_of_the_graph(drawn):
    device, nano = drawn
    plan = schedule(nano, device=device, lanes=1)
    costs = [op.cost.time_us for op in nano.ops]
    assert end_us(plan) == pytest.approx(sum(costs))
    timed = [slot for slot in plan.slots if slot.sms]
    assert [slot.op for slot in timed] == [op.name for op in nano.ops if op.cost.time_us]
    assert {slot.sms for slot in timed} <= {device.num_sms}


@settings(max_examples=20, deadline=None)
@given(devices_and_graphs, lane_counts)
def test_the_same_graph_gives_the_same_schedule(drawn, lanes):
    device, nano = drawn
    again = replace(nano, ops=tuple(nano.ops), edges=tuple(nano.edges))
    assert schedule(nano, device=device, lanes=lanes) == schedule(again, device=device, lanes=lanes)


@settings(max_examples=20, deadline=None)
@given(devices_and_graphs)
def test_no_plan_is_faster_than_its_energy_allows(drawn):
    device, nano = drawn
    plan = schedule(nano, device=device, lanes=2)
    joules = sum(op.cost.joules for op in nano.ops)
    if device.power_cap_watts is None:
        assert plan.power_floor_us == 0
    else:
        watts = device.power_cap_watts - device.idle_watts
        assert plan.power_floor_us * 1e-6 * watts == pytest.approx(joules)


def op(name, resource, reads, writes, work):
    kind = OpKind.GEMM if resource is Resource.COMPUTE else OpKind.ATTENTION
    return Op(name, kind, resource, (), (Read(reads, ROWS),), (writes,), splits=True, work=work)


def decoder(layers=2):
    """Attention bound by memory and a GEMM bound by compute, in turn, of like time."""
    attention = Work(bytes_per_token=4.4e6, dtype="bfloat16")  # 1 us a token
    gemm = Work(flops_per_token=670e6, dtype="bfloat16")
    ops, values = [], [Value("x0", ValueKind.DATA, ("s0",), "bfloat16")]
    for at in range(layers):
        ops.append(op(f"attend{at}", Resource.MEMORY, f"x{at}", f"a{at}", attention))
        ops.append(op(f"gemm{at}", Resource.COMPUTE, f"a{at}", f"x{at + 1}", gemm))
        values += [
            Value(name, ValueKind.DATA, ("s0",), "bfloat16", ROWS)
            for name in ops[-2].writes + ops[-1].writes
        ]
    graph = OpGraph(tuple(ops), tuple(values), ("x0",), (f"x{layers}",), tokens=1000)
    return estimate(graph, device=H200)


def test_before_and_after():
    """Two parts: one part's GEMM runs beside the other's attention, which takes a third of the SMs."""
    nano = nano_split(decoder(), parts=2, device=H200)
    plan = schedule(nano, device=H200, lanes=2)
    assert str(plan).splitlines() == [
        "schedule for h200-sxm: 8 slots on 2 lanes, 3890.2 us",
        "  power floor 3890.2 us",
        "  [       0.0 ..      502.0] lane 1  132 SMs  attend0.0",
        "  [     502.0 ..     1065.0] lane 1   40 SMs  attend0.1",
        "  [     502.0 ..     1221.4] lane 0   92 SMs  gemm0.0",
        "  [    1221.4 ..     1784.4] lane 1   40 SMs  attend1.0",
        "  [    1221.4 ..     1940.8] lane 0   92 SMs  gemm0.1",
        "  [    1940.8 ..     2503.8] lane 1   40 SMs  attend1.1",
        "  [    1940.8 ..     2660.2] lane 0   92 SMs  gemm1.0",
        "  [    2660.2 ..     3162.2] lane 0  132 SMs  gemm1.1",
    ]


def test_parts_overlap_what_a_sequence_cannot():
    nano = nano_split(decoder(layers=6), parts=2, device=H200)
    one, two = (schedule(nano, device=H200, lanes=lanes) for lanes in (1, 2))
    assert end_us(two) < 0.85 * end_us(one)


def transformer(layers):
    """GEMMs with short memory-bound work between them, and attention a third as long as they are."""

    def gemm(tokens_us):
        return Work(flops_per_token=tokens_us * 670e6, dtype="bfloat16")

    def memory(tokens_us):
        return Work(bytes_per_token=tokens_us * 4.4e6, dtype="bfloat16")

    steps = [
        ("qkv", OpKind.GEMM, Resource.COMPUTE, gemm(0.1)),
        ("rotary", OpKind.CLUSTER, Resource.MEMORY, memory(0.01)),
        ("attend", OpKind.ATTENTION, Resource.MEMORY, memory(0.37)),
        ("out", OpKind.GEMM, Resource.COMPUTE, gemm(0.06)),
        ("norm", OpKind.CLUSTER, Resource.MEMORY, memory(0.01)),
        ("up", OpKind.GEMM, Resource.COMPUTE, gemm(0.33)),
        ("gate", OpKind.CLUSTER, Resource.MEMORY, memory(0.02)),
        ("down", OpKind.GEMM, Resource.COMPUTE, gemm(0.17)),
    ]
    ops, before = [], "x"
    for at in range(layers):
        for name, kind, resource, work in steps:
            reads, made = (Read(before, ROWS),), f"{name}{at}_"
            own = Op(f"{name}{at}", kind, resource, (), reads, (made,), True, layer=at, work=work)
            ops.append(own)
            before = made
    x = Value("x", ValueKind.DATA, ("s0",), "bfloat16")
    values = [Value(each.writes[0], ValueKind.DATA, ("s0",), "bfloat16", ROWS) for each in ops]
    graph = OpGraph(tuple(ops), (x, *values), ("x",), (before,), tokens=2048, num_layers=layers)
    return estimate(graph, device=H200)


def test_attention_of_one_part_lies_beside_gemms_of_the_other():
    """In the steady state the compute lane never waits: software pipelining across layers."""
    nano = nano_split(transformer(8), parts=2, device=H200)
    plan = schedule(nano, device=H200, lanes=2)
    middle = [slot for slot in plan.slots if 0.2 < slot.start_us / end_us(plan) < 0.8]
    compute = [slot for slot in middle if slot.lane == 0]
    busy = sum(slot.end_us - slot.start_us for slot in compute)
    assert busy > 0.97 * (compute[-1].end_us - compute[0].start_us)
    attention = [slot for slot in middle if slot.op.startswith("attend")]
    assert {slot.lane for slot in attention} == {1}
    assert {slot.sms for slot in attention} == {40}
    for slot in attention:
        part = slot.op.rpartition(".")[2]
        beside = [s for s in compute if s.start_us < slot.end_us and s.end_us > slot.start_us]
        assert sum(not s.op.endswith(f".{part}") for s in beside) >= len(beside) - 1


@pytest.mark.parametrize("memory_sms", [16, 40, 64])
def test_two_lanes_share_one_division(memory_sms):
    nano = nano_split(transformer(4), parts=2, device=H200)
    plan = schedule(nano, device=H200, lanes=2, memory_sms=memory_sms)
    assert {slot.sms for slot in plan.slots if slot.lane == 1} <= {memory_sms, 132}
    assert {slot.sms for slot in plan.slots if slot.lane == 0} <= {132 - memory_sms, 132}


def test_resources_go_to_their_lanes_and_share_the_last():
    names = {
        Resource.COMPUTE: 0,
        Resource.MEMORY: 1,
        Resource.NETWORK: 2,
        Resource.COPY: 3,
        Resource.HOST: 0,
    }
    work = Work(flops_per_token=1e6, dtype="bfloat16")
    ops = tuple(op(str(resource), resource, "x", f"y_{resource}", work) for resource in names)
    values = [Value(each.writes[0], ValueKind.DATA, ("s0",), "bfloat16", ROWS) for each in ops]
    x = Value("x", ValueKind.DATA, ("s0",), "bfloat16")
    graph = OpGraph(ops, (x, *values), ("x",), (), tokens=100)
    nano = nano_split(estimate(graph, device=H200), parts=1, device=H200)
    for lanes in (1, 2, 3, 4):
        plan = schedule(nano, device=H200, lanes=lanes)
        placed = {slot.op: slot.lane for slot in plan.slots}
        assert placed == {str(r): min(lane, lanes - 1) for r, lane in names.items()}


def test_a_collective_beside_others_takes_few_sms():
    network = Work(link_bytes_per_token=900e3, dtype="bfloat16")
    memory = Work(bytes_per_token=4.4e6, dtype="bfloat16")
    gemm = Work(flops_per_token=670e6, dtype="bfloat16")
    ops = (
        op("gemm", Resource.COMPUTE, "x", "a", gemm),
        op("attend", Resource.MEMORY, "x", "b", memory),
        op("reduce", Resource.NETWORK, "x", "c", network),
    )
    values = [Value(name, ValueKind.DATA, ("s0",), "bfloat16", ROWS) for name in "abc"]
    x = Value("x", ValueKind.DATA, ("s0",), "bfloat16")
    graph = estimate(OpGraph(ops, (x, *values), ("x",), (), tokens=1000), device=H200)
    plan = schedule(nano_split(graph, parts=1, device=H200), device=H200, lanes=3)
    assert {slot.op: slot.sms for slot in plan.slots} == {"reduce": 16, "attend": 40, "gemm": 76}
    assert {slot.start_us for slot in plan.slots} == {0.0}


def test_of_two_ready_parts_the_one_with_the_longer_path_goes_first():
    """Although the other comes first in the graph."""
    short = Work(flops_per_token=1e6, dtype="bfloat16")
    long = Work(bytes_per_token=4.4e6, dtype="bfloat16")
    ops = (
        op("alone", Resource.COMPUTE, "x", "a", short),
        op("leads", Resource.COMPUTE, "x", "b", short),
        op("follows", Resource.MEMORY, "b", "c", long),
    )
    values = [Value(name, ValueKind.DATA, ("s0",), "bfloat16", ROWS) for name in "abc"]
    x = Value("x", ValueKind.DATA, ("s0",), "bfloat16")
    graph = estimate(OpGraph(ops, (x, *values), ("x",), (), tokens=1000), device=H200)
    plan = schedule(nano_split(graph, parts=1, device=H200), device=H200, lanes=2)
    assert [slot.op for slot in plan.slots if slot.lane == 0] == ["leads", "alone"]
