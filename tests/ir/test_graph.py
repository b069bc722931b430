"""OpGraph: what it prints, and each rule of ``verify``."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir import Axis, Op, OpGraph, OpKind, Read, Resource, Value, ValueKind, Work
from nanoflow_compiler.ir.verify import verify
from strategies import op_graphs

ROWS = Axis(0)


def op(name, reads=(), writes=(), *, splits=True, kind=OpKind.CLUSTER, **rest):
    return Op(name, kind, Resource.MEMORY, (), tuple(reads), tuple(writes), splits, **rest)


def data(name, axis=None):
    return Value(name, ValueKind.DATA, ("s0", "4"), "float32", axis)


def graph_of(*ops, values=(), inputs=("x",), outputs=()):
    return OpGraph(ops, (data("x"), *values), inputs, outputs, tokens=8)


GOOD = graph_of(
    op("norm", [Read("x", ROWS)], ["h"], layer=0),
    op("append", [Read("h", ROWS)], ["!kv"], kind=OpKind.KV_APPEND, layer=0),
    op("attend", [Read("h", ROWS), Read("!kv", prefix=True)], ["a"], kind=OpKind.ATTENTION),
    op("pick", [Read("a")], ["last"], splits=False, reason="index: picks tokens by index"),
    values=(data("h", ROWS), data("a", ROWS), data("last"), Value("!kv", ValueKind.KV)),
    outputs=("last",),
)


def test_it_prints_operations_by_layer():
    assert str(replace(GOOD, num_layers=1)).splitlines() == [
        "op graph: 4 ops, 1 layers, tokens=8",
        "  in x: float32[s0, 4]",
        "  # layer 0",
        "  norm = cluster parts memory (x@0) -> h",
        "  append = kv_append parts memory (h@0) -> !kv",
        "  # outside the layers",
        "  attend = attention parts memory (h@0, !kv[:]) -> a",
        "  pick = cluster whole memory (a) -> last  # join: index: picks tokens by index",
        "  out last",
    ]


def test_a_folded_axis_prints_its_multiple():
    assert str(data("q", Axis(1, "8"))) == "q: float32[s0, 4] tokens@1*8"
    assert str(Value("s0", ValueKind.SIZE)) == "s0: size"


def test_work_is_linear_in_the_tokens():
    work = Work(2.0, 10.0, 3.0, 20.0, 4.0)
    assert (work.flops(5), work.bytes(5), work.link_bytes(5)) == (20.0, 35.0, 20.0)


@settings(max_examples=50, deadline=None)
@given(op_graphs())
def test_random_graphs_verify(graph):
    verify(graph, where="test")
    assert set(graph.by_name()) == {item.name for item in graph.ops}


BROKEN = {
    "operation norm appears twice": replace(GOOD, ops=(GOOD.ops[0], GOOD.ops[0])),
    "value h appears twice": replace(GOOD, values=(*GOOD.values, data("h", ROWS))),
    "norm reads h before it is written": graph_of(
        op("norm", [Read("h", ROWS)], ["h"]), values=(data("h", ROWS),)
    ),
    "h has two writers, one is again": graph_of(
        op("norm", [Read("x", ROWS)], ["h"]),
        op("again", [Read("x", ROWS)], ["h"]),
        values=(data("h", ROWS),),
    ),
    "x has two writers, one is norm": graph_of(op("norm", [], ["x"])),
    "norm writes h, which is no value": graph_of(op("norm", [Read("x", ROWS)], ["h"])),
    "outputs ['h'] are never written": graph_of(outputs=("x", "h"), values=(data("h"),)),
    "inputs ['y'] are no values": graph_of(inputs=("x", "y")),
    "kv: kv: what only orders has a name with '!'": graph_of(
        op("append", [], ["kv"]), values=(Value("kv", ValueKind.KV),)
    ),
    "!h: float32[s0, 4] tokens@0: what only orders": graph_of(
        op("norm", [], ["!h"]), values=(data("!h", ROWS),)
    ),
    "norm runs whole but reads a part": graph_of(op("norm", [Read("x", ROWS)], splits=False)),
    "attend runs whole but reads a part": graph_of(
        op("append", [Read("x", ROWS)], ["!kv"]),
        op("attend", [Read("!kv", prefix=True)], splits=False),
        values=(Value("!kv", ValueKind.KV),),
    ),
    "norm runs in parts but h has no token axis": graph_of(
        op("norm", [Read("x", ROWS)], ["h"]), values=(data("h"),)
    ),
    "norm runs in parts but n has no token axis": graph_of(
        op("norm", [Read("x", ROWS)], ["n"]), values=(Value("n", ValueKind.SIZE),)
    ),
    "norm reads x[:], but only a KV cache": graph_of(op("norm", [Read("x", prefix=True)])),
    "turn reads h@1, but its parts lie along 0": graph_of(
        op("norm", [Read("x", ROWS)], ["h"]),
        op("turn", [Read("h", Axis(1))]),
        values=(data("h", ROWS),),
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_graph_is_refused(message):
    verify(GOOD, where="lift")
    with pytest.raises(InvalidProgramError) as caught:
        verify(BROKEN[message], where="lift")
    assert f"lift: {message}" in str(caught.value)
    assert caught.value.where == "lift"


def test_other_values_are_not_verified():
    with pytest.raises(InvalidProgramError, match="step: nothing is known of a list"):
        verify([], where="step")
