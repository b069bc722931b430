"""nano_split: parts tile their cells, and edges are where brute force says that data meet."""

import itertools
from math import lcm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import Axis, Edge, Op, OpGraph, OpKind, Read, Resource, Value, ValueKind
from nanoflow_compiler.ir.verify import verify
from nanoflow_compiler.passes.estimate import estimate, roofline
from nanoflow_compiler.passes.nano_split import nano_split
from strategies import nano_graphs, op_graphs

H200 = DEVICE_SPECS["h200-sxm"]
ROWS = Axis(0)


def op(name, reads, writes, *, splits=True):
    return Op(name, OpKind.CLUSTER, Resource.MEMORY, (), tuple(reads), tuple(writes), splits)


def data(name, axis=ROWS):
    return Value(name, ValueKind.DATA, ("s0",), "float32", axis)


GRAPH = estimate(
    OpGraph(
        ops=(
            op("gemm", [Read("x", ROWS)], ["h"]),
            op("append", [Read("h", ROWS)], ["!kv"]),
            op("attend", [Read("h", ROWS), Read("!kv", prefix=True)], ["a"]),
            op("pick", [Read("a")], ["y"], splits=False),
        ),
        values=(data("x", None), data("h"), data("a"), data("y", None), Value("!kv", ValueKind.KV)),
        inputs=("x",),
        outputs=("y",),
        tokens=10,
    ),
    device=H200,
)


def lines(nano):
    return str(nano).splitlines()


def test_before_and_after_for_one_number_of_parts():
    assert lines(nano_split(GRAPH, parts=2, device=H200)) == [
        "nano graph: 7 nano-ops, 9 edges",
        "  cells of 5, 5 tokens",
        "  gemm.0 cells[0:1] memory 2.0us after ()",
        "  gemm.1 cells[1:2] memory 2.0us after ()",
        "  append.0 cells[0:1] memory 2.0us after (gemm.0)",
        "  append.1 cells[1:2] memory 2.0us after (gemm.1)",
        "  attend.0 cells[0:1] memory 2.0us after (gemm.0, append.0)",
        "  attend.1 cells[1:2] memory 2.0us after (gemm.1, append.0, append.1)",
        "  pick memory 2.0us after (attend.0, attend.1)",
    ]


def test_before_and_after_for_a_number_of_each_operation():
    """Two and three parts make six cells; what is not named stays whole."""
    assert lines(nano_split(GRAPH, parts={"gemm": 2, "attend": 3, "pick": 4}, device=H200)) == [
        "nano graph: 7 nano-ops, 12 edges",
        "  cells of 1, 2, 2, 1, 2, 2 tokens",
        "  gemm.0 cells[0:3] memory 2.0us after ()",
        "  gemm.1 cells[3:6] memory 2.0us after ()",
        "  append memory 2.0us after (gemm.0, gemm.1)",
        "  attend.0 cells[0:2] memory 2.0us after (gemm.0, append)",
        "  attend.1 cells[2:4] memory 2.0us after (gemm.0, gemm.1, append)",
        "  attend.2 cells[4:6] memory 2.0us after (gemm.1, append)",
        "  pick memory 2.0us after (attend.0, attend.1, attend.2)",
    ]


def test_one_part_is_the_graph_itself():
    nano = nano_split(GRAPH, parts=1, device=H200)
    assert [part.name for part in nano.ops] == [op.name for op in GRAPH.ops]
    assert nano.cell_tokens == (10,)


def cells_read(part, read, num_cells):
    if read.prefix:
        return set(range(part.last))
    return set(range(part.first, part.last)) if read.axis else set(range(num_cells))


def brute_force_edges(nano):
    """Cell by cell: who wrote a cell that a part reads?"""
    whole = set(range(nano.num_cells))
    found = set()
    for writer, reader in itertools.permutations(nano.ops, 2):
        for read in reader.op.reads:
            if read.value not in writer.op.writes:
                continue
            written = set(range(writer.first, writer.last)) & whole
            if written & cells_read(reader, read, nano.num_cells):
                found.add(Edge(writer.name, reader.name, read.value))
    return found


@settings(max_examples=20, deadline=None)
@given(nano_graphs(device=H200))
def test_edges_are_where_cells_meet(nano):
    verify(nano, where="test")
    assert set(nano.edges) == brute_force_edges(nano)
    assert len(nano.edges) == len(set(nano.edges))


@settings(max_examples=20, deadline=None)
@given(op_graphs(), st.data())
def test_parts_tile_and_cells_share_the_tokens(graph, data):
    numbers = {op.name: data.draw(st.integers(1, 4)) for op in graph.ops}
    nano = nano_split(estimate(graph, device=H200), parts=numbers, device=H200)
    assert nano.num_cells == lcm(*(numbers[op.name] for op in graph.ops if op.splits))
    assert sum(nano.cell_tokens) == graph.tokens
    assert max(nano.cell_tokens) - min(nano.cell_tokens) <= 1
    for original in graph.ops:
        parts = [part for part in nano.ops if part.op.name == original.name]
        assert len(parts) == (numbers[original.name] if original.splits else 1)
        covered = [cell for part in parts for cell in range(part.first, part.last)]
        assert covered == list(range(nano.num_cells))
        for part in parts:
            tokens = sum(nano.cell_tokens[part.first : part.last])
            kind, work = original.kind, original.work
            assert part.cost == roofline(work, kind=kind, tokens=tokens, device=H200)


def test_an_empty_graph_has_one_cell():
    empty = OpGraph((), (), (), (), tokens=5)
    assert nano_split(empty, parts=3, device=H200).cell_tokens == (5,)


@pytest.mark.parametrize("tokens", [1, 2])
def test_there_may_be_fewer_tokens_than_cells(tokens):
    graph = OpGraph(GRAPH.ops, GRAPH.values, GRAPH.inputs, GRAPH.outputs, tokens=tokens)
    nano = nano_split(graph, parts=3, device=H200)
    verify(nano, where="test")
    assert sum(nano.cell_tokens) == tokens
