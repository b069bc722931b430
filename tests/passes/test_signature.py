"""signature: equal for what computes the same, whatever its name; different for all else."""

import pytest
import torch

from captures import packed_llama
from nanoflow_compiler.passes.axis import axis
from nanoflow_compiler.passes.lift import lift
from rows_of_nodes import Case, Operand
from rows_of_nodes import trace as trace_call
from traces import trace


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def signatures(function, **inputs):
    weights = tuple(name for name in inputs if name.startswith("w"))
    tokens = {name: 0 for name, tensor in inputs.items() if len(tensor) == len(inputs["x"])}
    graph = trace(function, inputs, tokens=tokens, weights=weights).analyse(fuse=False)
    return [op.signature for op in graph.ops]


def one(function, **inputs):
    (signature,) = signatures(function, **inputs)
    return signature


X = {"x": random(6, 4)}
BASE = one(lambda x: x.relu() * 2, **X)


def test_it_is_twelve_hex_digits():
    assert len(BASE) == 12
    int(BASE, 16)


def test_names_play_no_part():
    """Two equal layers of one function."""
    weights = {"w0": random(4, 4), "w1": random(4, 4)}
    found = signatures(lambda x, w0, w1: ((x @ w0.t()).relu() @ w1.t()).relu(), **X, **weights)
    assert found[:2] == found[2:]


DIFFERENT = {
    "another operation": lambda x: x.sigmoid() * 2,
    "another constant": lambda x: x.relu() * 3,
    "a constant of another type": lambda x: x.relu() * 2.0,
    "another order": lambda x: (x * 2).relu(),
    "one node more": lambda x: x.relu() * 2 + 1,
    "whole instead of parts": lambda x: x[:3].relu() * 2,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_computes_something_else_has_another(name):
    assert BASE not in signatures(DIFFERENT[name], **X)


def test_wiring_counts():
    inputs = {"x": random(6, 4), "y": random(6, 4)}
    assert one(lambda x, y: x.relu() - y.sin(), **inputs) != one(
        lambda x, y: x.relu() - x.sin() + y * 0, **inputs
    )
    assert one(lambda x, y: x.relu() - y, **inputs) != one(lambda x, y: y - x.relu(), **inputs)


def test_layouts_of_inputs_count():
    assert one(lambda x: x.relu() * 2, x=random(6, 5)) != BASE
    assert one(lambda x: x.relu() * 2, x=random(6, 4).double()) != BASE
    of_one = one(lambda x, y: x + y, **X, y=random(4))
    assert of_one != one(lambda x, y: x + y, **X, y=random(1, 4))
    assert of_one != one(lambda x, y: x + y, **X, y=random(8)[::2])


def test_the_layer_of_a_cache_plays_no_part():
    """Appends and attention of all layers are one function; only whose cache they use differs."""
    ops = packed_llama().ops
    for kind in ("kv_append", "attention"):
        assert len({op.signature for op in ops.ops if op.kind == kind}) == 1


def test_layers_of_a_real_decoder_repeat():
    ops = packed_llama().ops
    layers = [
        [op.signature for op in ops.ops if op.layer == layer] for layer in range(ops.num_layers)
    ]
    assert layers[0] == layers[1]
    assert layers[2] == layers[0][: len(layers[2])]


def test_where_the_tokens_lie_counts():
    """A square, cut by rows or by columns: one kernel cannot serve both."""
    found = set()
    for dim in (0, 1):
        call = trace_call(
            Case(torch.ops.aten.relu.default, (Operand(random(6, 6), dim),), tokens=6)
        )
        axis(call.module, seeds=call.seeds)
        (op,) = lift(call.module, weights=frozenset(), tokens=6).ops
        assert str(op.reads[0]) == f"arg0@{dim}"
        found.add(op.signature)
    assert len(found) == 2
