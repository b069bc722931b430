"""NanoGraph: which edges are required, what it prints, and each rule of ``verify``."""

import itertools
from dataclasses import replace

import pytest

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir import (
    Axis,
    Cost,
    Edge,
    NanoGraph,
    NanoOp,
    Op,
    OpGraph,
    OpKind,
    Read,
    Resource,
)
from nanoflow_compiler.ir.nano import required_edges
from nanoflow_compiler.ir.verify import verify

ROWS = Axis(0)
COST = Cost(1.0, 0.0, Resource.MEMORY)


def op(name, reads, writes):
    splits = not name.startswith("join")
    return Op(name, OpKind.CLUSTER, Resource.MEMORY, (), tuple(reads), tuple(writes), splits)


def parts(operation, *bounds):
    """The operation cut at these cells."""
    pairs = list(itertools.pairwise(bounds))
    return [
        NanoOp(operation, part, len(pairs), first, last, COST)
        for part, (first, last) in enumerate(pairs)
    ]


NORM = op("norm", [Read("x", ROWS)], ["h", "!kv"])
ATTEND = op("attend", [Read("h", ROWS), Read("!kv", prefix=True)], ["a"])
SCALE = op("scale", [Read("a")], ["b"])
JOIN = op("join", [Read("b")], ["y"])


def nano_of(*ops, cells=4):
    ops = tuple(part for each in ops for part in each)
    graph = OpGraph((), (), (), (), tokens=cells)
    return NanoGraph(graph, ops, tuple(required_edges(ops)), (1,) * cells)


GOOD = nano_of(
    parts(NORM, 0, 2, 4), parts(ATTEND, 0, 1, 2, 4), parts(SCALE, 0, 2, 4), parts(JOIN, 0, 4)
)


def edges_of(nano, target):
    return {(edge.source, edge.value) for edge in nano.edges if edge.target == target}


def test_parts_follow_the_writers_of_their_own_cells():
    assert {source for source, value in edges_of(GOOD, "attend.1") if value == "h"} == {"norm.0"}
    assert {source for source, value in edges_of(GOOD, "attend.2") if value == "h"} == {"norm.1"}


def test_a_prefix_follows_the_writers_of_every_cell_before_its_end():
    caches = {name: {s for s, v in edges_of(GOOD, name) if v == "!kv"} for name in GOOD.by_name()}
    assert caches["attend.0"] == {"norm.0"}
    assert caches["attend.1"] == {"norm.0"}
    assert caches["attend.2"] == {"norm.0", "norm.1"}


def test_what_is_read_whole_is_waited_for_whole():
    everything = {("attend.0", "a"), ("attend.1", "a"), ("attend.2", "a")}
    assert edges_of(GOOD, "scale.0") == edges_of(GOOD, "scale.1") == everything
    assert edges_of(GOOD, "join") == {("scale.0", "b"), ("scale.1", "b")}


def test_it_prints_parts_with_what_they_follow():
    assert str(GOOD).splitlines() == [
        "nano graph: 8 nano-ops, 15 edges",
        "  cells of 1, 1, 1, 1 tokens",
        "  norm.0 cells[0:2] memory 1.0us after ()",
        "  norm.1 cells[2:4] memory 1.0us after ()",
        "  attend.0 cells[0:1] memory 1.0us after (norm.0)",
        "  attend.1 cells[1:2] memory 1.0us after (norm.0)",
        "  attend.2 cells[2:4] memory 1.0us after (norm.1, norm.0)",
        "  scale.0 cells[0:2] memory 1.0us after (attend.0, attend.1, attend.2)",
        "  scale.1 cells[2:4] memory 1.0us after (attend.0, attend.1, attend.2)",
        "  join memory 1.0us after (scale.0, scale.1)",
    ]
    assert str(GOOD.edges[0]) == "norm.0 -> attend.0 (h)"


BACK = Edge("scale.0", "attend.0", "a")
BROKEN = {
    "nano-op norm.0 appears twice": replace(GOOD, ops=(GOOD.ops[0], *GOOD.ops)),
    "the parts of norm, [(0, 2)], do not tile 0..4": nano_of(parts(NORM, 0, 2, 4)[:1]),
    "the parts of norm, [(0, 2), (1, 4)], do not tile 0..4": nano_of(
        [parts(NORM, 0, 2, 4)[0], parts(NORM, 0, 1, 4)[1]]
    ),
    "the parts of norm, [(0, 2), (3, 4)], do not tile 0..4": nano_of(
        [parts(NORM, 0, 2, 4)[0], parts(NORM, 0, 3, 4)[1]]
    ),
    "the parts of norm, [(0, 0), (0, 4)], do not tile 0..4": nano_of(parts(NORM, 0, 0, 4)),
    "an edge names an unknown nano-op": replace(
        GOOD, edges=(*GOOD.edges, Edge("norm.0", "gone", "h"))
    ),
    "cycle [('attend.0', 'scale.0'), ('scale.0', 'attend.0')]": replace(
        GOOD, edges=(*GOOD.edges, BACK)
    ),
    "no edge norm.0 -> attend.0 (h)": replace(GOOD, edges=GOOD.edges[1:]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_graph_is_refused(message):
    verify(GOOD, where="nano_split")
    with pytest.raises(InvalidProgramError) as caught:
        verify(BROKEN[message], where="nano_split")
    assert str(caught.value) == f"nano_split: {message}"
    assert caught.value.where == "nano_split"
