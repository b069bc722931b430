"""rotary_append: rotation and append become one operator that computes, bit for bit, the same."""

import pytest
import torch

from nanoflow_compiler import ops
from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.graphs import call_nodes
from nanoflow_compiler.ir import OpKind
from nanoflow_compiler.kv_cache import KVCache, LayerShape
from nanoflow_compiler.passes.fuse import fuse
from nanoflow_compiler.passes.normalize import normalize
from nanoflow_compiler.passes.rotary_append import rotary_append
from nanoflow_compiler.stepper import Stepper
from traces import calls, trace

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, DIM = 6, 4, 2, 8
LIMITS = (0.5, 0, 0, 0.0, None, True, 0)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def inputs(*, width=DIM, dtype=torch.bfloat16):
    """Queries, keys and values beside each other, and angles."""
    sizes = {"x": (NUM_HEADS + 2 * NUM_KV_HEADS) * DIM, "cos": width, "sin": width}
    return {
        name: random(NUM_TOKENS, size, seed=at).to(dtype)
        for at, (name, size) in enumerate(sizes.items())
    }


def heads(x):
    """As models have them: ``[1, heads, tokens, dim]``."""
    counts = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    pieces = x.split([count * DIM for count in counts], 1)
    return [
        piece[None].unflatten(-1, (count, DIM)).transpose(1, 2)
        for piece, count in zip(pieces, counts, strict=True)
    ]


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def turned_in_halves(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def turned_in_part(x, cos, sin):
    width = cos.shape[-1]
    return torch.cat((turned(x[..., :width], cos, sin), x[..., width:]), -1)


def attend(query, key, value, layer=0):
    rows = (each[0].transpose(0, 1) for each in (query, key, value))
    return ops.attention(*rows, layer, *LIMITS).tanh()


def model(turn, num_layers=1):
    def function(x, cos, sin):
        cos, sin = cos[None, None], sin[None, None]
        out = x
        for layer in range(num_layers):
            query, key, value = heads(out)
            seen = attend(turn(query, cos, sin), turn(key, cos, sin), value, layer)
            out = torch.cat((seen.flatten(1), x[:, NUM_HEADS * DIM :]), 1)
        return seen

    return function


def run(module, given, num_layers, dtype):
    """What a graph returns, and the cache that it leaves."""
    layers = [LayerShape(NUM_KV_HEADS, DIM, DIM, dtype)] * num_layers
    cache = KVCache.allocate(layers, num_blocks=2)
    lengths = torch.tensor([NUM_TOKENS]).numpy()
    tables = torch.tensor([[1]]).numpy()
    layout = StepLayout.pack(query_lens=lengths, context_lens=0 * lengths, block_tables=tables)
    with attention_state(AttentionState(cache, (layout.part(0, NUM_TOKENS),))):
        return [module(*given.values()), *cache.keys, *cache.values]


def fused(function, *, serves=lambda *_: True, num_layers=1, dtype=torch.bfloat16, **settings):
    given = inputs(dtype=dtype, **settings)
    traced = trace(function, given, tokens={"x": 0, "cos": 0, "sin": 0})
    step = Stepper()
    graph = step(fuse, step(normalize, traced.module), weights=frozenset())
    before = run(traced.module, given, num_layers, dtype)
    step(rotary_append, graph, serves=serves)
    for actual, expected in zip(run(traced.module, given, num_layers, dtype), before, strict=True):
        assert torch.equal(actual, expected)
    return traced


def test_before_and_after():
    traced = fused(model(turned))
    found = calls(traced.module)
    assert not {"kv_append", "neg", "cat", "mul", "add"} & set(found)
    assert found[found.index("rotary_append") :] == [
        *("rotary_append", "getitem", "getitem", "paged_attention", "tanh")
    ]
    assert traced.module.meta["notes"] == [
        "rotary_append: add, add_1, kv_append_default -> rotary_append_default"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("turn", "width"), [(turned, DIM), (turned_in_halves, DIM // 2), (turned_in_part, DIM // 2)]
)
def test_patterns(turn, width, dtype):
    traced = fused(model(turn), width=width, dtype=dtype)
    assert calls(traced.module).count("rotary_append") == 1


def test_heads_are_read_where_the_product_has_them():
    """One reshape each in place of the views of a model."""
    traced = fused(model(turned))
    (node,) = (n for n in call_nodes(traced.module) if "rotary" in str(n.target))
    assert [arg.target for arg in node.args[:3]] == [torch.ops.aten.reshape.default] * 3


def test_layers_share_the_rows_of_angles():
    traced = fused(model(turned, num_layers=2), num_layers=2)
    nodes = [n for n in call_nodes(traced.module) if "rotary" in str(n.target)]
    assert [node.args[5] for node in nodes] == [0, 1]
    assert nodes[0].args[3:5] == nodes[1].args[3:5]


def test_parts_are_ordered_by_the_handle():
    traced = trace(model(turned), inputs(), tokens={"x": 0, "cos": 0, "sin": 0})
    graph = traced.analyse(kernels="own")
    (append,) = [op for op in graph.ops if op.kind is OpKind.KV_APPEND]
    (attention,) = [op for op in graph.ops if op.kind is OpKind.ATTENTION]
    data, handle = append.writes
    assert handle.startswith("!")
    assert [str(read) for read in attention.reads] == [f"{data}@0", f"{handle}[:]"]
    assert append.splits
    assert not append.reason
    assert attention.work.bytes_per_token > 512 * 2 * NUM_KV_HEADS * DIM * 2


def only_queries(x, cos, sin):
    query, key, value = heads(x)
    return attend(turned(query, cos[None, None], sin[None, None]), key, value)


def read_twice(x, cos, sin):
    query, key, value = heads(x)
    key = turned(key, cos[None, None], sin[None, None])
    query = turned(query, cos[None, None], sin[None, None])
    return attend(query, key, value) + key.sum()


def other_angles(x, cos, sin):
    query, key, value = heads(x)
    cos, sin = cos[None, None], sin[None, None]
    return attend(turned(query, cos, sin), turned(key, sin, cos), value)


def other_halves(x, cos, sin):
    query, key, value = heads(x)
    cos, sin = cos[None, None], sin[None, None]

    def turn(x):
        return x * cos + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin

    return attend(turn(query), turn(key), value)


def angles_of_heads(x, cos, sin):
    query, key, value = heads(x)
    cos = cos[None, None] * torch.ones(NUM_KV_HEADS, 1, 1, dtype=x.dtype)
    query = query[:, :NUM_KV_HEADS]
    sin = sin[None, None]
    return attend(turned(query, cos, sin), turned(key, cos, sin), value)


APART = {
    only_queries: "its keys are not rotated as one of the known patterns does",
    read_twice: "its rotated keys have other readers",
    other_angles: "queries and keys are rotated by different angles",
    other_halves: "its queries are not rotated as one of the known patterns does",
    angles_of_heads: "its angles differ between heads",
}


@pytest.mark.parametrize("function", APART, ids=lambda function: function.__name__)
def test_others_stay_apart(function):
    traced = fused(function)
    assert traced.module.meta["notes"] == [f"not fused, paged_attention_default: {APART[function]}"]
    assert "rotary_append" not in calls(traced.module)


def test_what_no_kernel_serves_stays():
    traced = fused(model(turned), serves=lambda *_: False)
    assert "rotary_append" not in calls(traced.module)
