"""Chains of kernels that begin before the one before them has ended: the same bits, every time."""

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape
from nanoflow_compiler.scoring import Scoring

pytestmark = pytest.mark.gpu

HIDDEN, INNER, HEADS, KV_HEADS, DIM, TOKENS = 256, 512, 4, 2, 64, 1000
NUM_LAYERS, NUM_REPLAYS = 8, 1000


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weight(columns, depth):
    return random(columns, depth) / depth**0.5


class Layer:
    def __init__(self):
        from nanoflow_compiler.kernels.norm import RmsNorm

        self.qkv = weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)
        self.o = weight(HIDDEN, HEADS * DIM)
        self.gate_up, self.down = weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER)
        self.norms = [RmsNorm(random(HIDDEN), 1e-5) for _ in range(2)]


class Step:
    """A small model over requests of 100 tokens and more; the last of each is new."""

    def __init__(self, rows):
        from nanoflow_compiler.kernels.rotary_append import Rotary

        torch.manual_seed(rows)
        self.x, self.rows = random(rows, HIDDEN), rows
        self.layers = [Layer() for _ in range(NUM_LAYERS)]
        self.head = weight(TOKENS, HIDDEN)
        self.rotary = Rotary(random(rows, DIM), random(rows, DIM))
        shape = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16)
        num_blocks = 2 * rows + 1
        self.cache = KVCache.allocate([shape] * NUM_LAYERS, num_blocks=num_blocks, device="cuda")
        for pool in (*self.cache.keys, *self.cache.values):
            pool.normal_()
        self._plan(1 + np.arange(2 * rows).reshape(rows, 2))
        zeros = torch.zeros(rows, device="cuda")
        ints = zeros.int()
        self.greedy = Draw(zeros, zeros, zeros.long() + 1, zeros.double() + 1, ints, ints)

    def _plan(self, tables):
        from nanoflow_compiler.kernels.paged_decode import plan_pages

        ends = 99 + np.arange(self.rows) % 20
        slots = tables[:, 1] * BLOCK_SIZE + ends - BLOCK_SIZE
        self.slots = torch.from_numpy(slots).cuda()
        layout = StepLayout.pack(
            query_lens=np.ones(self.rows, dtype=np.int64), context_lens=ends, block_tables=tables
        )
        requests = Requests.of(layout.part(0, self.rows, device="cuda"))
        self.reads = plan_pages(requests, self.cache.tables[0], visibility=Visibility())

    def attend(self, qkv, at, *, pdl):
        from nanoflow_compiler.kernels.paged_decode import attend_pages
        from nanoflow_compiler.kernels.rotary_append import rotate_and_append

        sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        parts = (rows.unflatten(1, (-1, DIM)) for rows in qkv.split(sizes, dim=1))
        pages = self.cache.tables[at]
        query = rotate_and_append(
            *parts, rotary=self.rotary, pages=pages, slots=self.slots, pdl=pdl
        )
        out = torch.empty_like(query)
        given = {"reads": self.reads, "scoring": Scoring(0.125)}
        attend_pages(query, pages, out=out, pdl=pdl, **given)
        return out.flatten(1)

    def run(self, *, pdl, mixes=False, has_norms=False):
        """``mixes``: some products by cuBLAS and a sum by PyTorch, between kernels with PDL."""
        from nanoflow_compiler.kernels.choose import choose_tokens
        from nanoflow_compiler.kernels.few_rows import multiply, multiply_gated
        from nanoflow_compiler.kernels.gated import gate_rows
        from nanoflow_compiler.kernels.norm import rms_norm

        x = self.x
        for at, layer in enumerate(self.layers):
            if has_norms:
                qkv = multiply(x, layer.qkv, norm=layer.norms[0], pdl=pdl)
            else:
                normed, _ = rms_norm(x, layer.norms[0], pdl=pdl)
                qkv = multiply(normed, layer.qkv, pdl=pdl)
            attended = self.attend(qkv, at, pdl=pdl)
            if mixes:
                added = linear(attended, layer.o)
                normed, x = rms_norm(added, layer.norms[1], residual=x, pdl=pdl)
                inner = gate_rows(linear(normed, layer.gate_up), activation="silu", pdl=pdl)
                x = x + multiply(inner, layer.down, pdl=pdl)
            else:
                x = multiply(attended, layer.o, residual=x, pdl=pdl)
                normed, _ = rms_norm(x, layer.norms[1], pdl=pdl)
                inner = multiply_gated(normed, layer.gate_up, activation="silu", pdl=pdl)
                x = multiply(inner, layer.down, residual=x, pdl=pdl)
        return x, choose_tokens(multiply(x, self.head, pdl=pdl), self.greedy, pdl=pdl)


def captured(run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("given", [{}, {"mixes": True}, {"has_norms": True}], ids=str)
def test_a_thousand_replays(rows, given):
    if rows > 4 and "has_norms" in given:
        pytest.skip("norms of so many rows are computed by themselves")
    step = Step(rows)
    inputs = [random(*step.x.shape) for _ in range(5)]
    expected = []
    for x in inputs:
        step.x.copy_(x)
        expected.append([out.clone() for out in step.run(pdl=False, **given)])
        torch.cuda.synchronize()
    graph, found = captured(lambda: step.run(pdl=True, **given))
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for turn in range(NUM_REPLAYS):
        step.x.copy_(inputs[turn % len(inputs)])
        graph.replay()
        for out, wanted in zip(found, expected[turn % len(inputs)], strict=True):
            differ += (out != wanted).sum()
    assert not int(differ)
    assert len({tuple(tokens.tolist()) for _, tokens in expected}) > 1


def test_launched_one_by_one():
    step = Step(4)
    expected = [out.clone() for out in step.run(pdl=False)]
    for _ in range(20):
        found = step.run(pdl=True)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("columns", [64, 4096])
def test_memory_that_is_overwritten_as_soon_as_it_was_read(columns):
    from nanoflow_compiler.kernels.norm import RmsNorm, rms_norm

    norms = [RmsNorm(1 + random(columns) / 4, 1e-5) for _ in range(100)]
    first, buffers = random(300, columns), [random(300, columns) for _ in range(2)]

    def run(*, pdl):
        buffers[0].copy_(first)
        for turn, norm in enumerate(norms):
            rms_norm(buffers[turn % 2], norm, out=buffers[1 - turn % 2], pdl=pdl)
        return buffers

    expected = [buffer.clone() for buffer in run(pdl=False)]
    graph, found = captured(lambda: run(pdl=True))
    for _ in range(100):
        graph.replay()
        assert all(map(torch.equal, found, expected))


def test_attention_without_requests_still_waits():
    from nanoflow_compiler.kernels.few_rows import multiply
    from nanoflow_compiler.kernels.norm import RmsNorm, rms_norm
    from nanoflow_compiler.kernels.paged_decode import attend_pages, reads_with_room

    layer = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16)
    pages = KVCache.allocate([layer], num_blocks=2, device="cuda").tables[0]
    reads = reads_with_room(pages, visibility=Visibility(), num_pages=1)
    query, matrix, norm = random(1, HEADS, DIM), weight(8192, 8192), RmsNorm(random(8192), 1e-5)
    x, product, out = random(1, 8192), random(1, 8192), torch.full_like(query, torch.nan)

    def run(*, pdl):
        multiply(x, matrix, out=product, pdl=pdl)
        attend_pages(query, pages, reads=reads, scoring=Scoring(0.1), out=out, pdl=pdl)
        return rms_norm(product, norm, pdl=pdl)[0]

    expected = run(pdl=False).clone()
    graph, found = captured(lambda: run(pdl=True))
    for _ in range(200):
        product.fill_(torch.nan)
        found.fill_(torch.nan)
        graph.replay()
        assert torch.equal(found, expected)
    assert out.isnan().all()


def test_hopper_has_it():
    from nanoflow_compiler.kernels.pdl import can_chain

    capability = torch.cuda.get_device_capability()
    assert can_chain(torch.device("cuda")) == (capability >= (9, 0))
