"""Rotation and append in one launch, against eager PyTorch and indexing: the same bits."""

import pytest
import torch

from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape

pytestmark = pytest.mark.gpu

SHAPES = [
    (32, 8, 128, 128, 128),
    (4, 4, 64, 64, 32),
    (9, 3, 96, 80, 96),
    (6, 1, 80, 80, 20),
    (16, 16, 256, 256, 64),
]
"""Heads, KV heads, dimensions, those of a value, and those that are rotated."""


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotated(x, cos, sin):
    """As Llama has it, and models that rotate a part."""
    size = cos.shape[-1]
    some, rest = x[..., :size], x[..., size:]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((some * cos + rotate_half(some) * sin, rest), dim=-1)


class Heads:
    """Those of a step, as views of the output of a merged GEMM, and pages of which most stay."""

    def __init__(self, tokens, heads, kv_heads, dim, v_dim, rotary_dim, *, dtype):
        sizes = [heads * dim, kv_heads * dim, kv_heads * v_dim]
        rows = random(tokens, sum(sizes), dtype=dtype)
        query, key, value = rows.split(sizes, dim=1)
        self.query = query.unflatten(1, (heads, dim))
        self.key = key.unflatten(1, (kv_heads, dim))
        self.value = value.unflatten(1, (kv_heads, v_dim))
        # Both halves of a model's angles are the same; the kernel need not rely on it.
        self.cos, self.sin = (random(tokens, rotary_dim, dtype=dtype) for _ in range(2))
        layer = LayerShape(kv_heads, dim, v_dim, dtype)
        num_blocks = tokens // BLOCK_SIZE + 3
        self.found, self.expected = (
            KVCache.allocate([layer], num_blocks=num_blocks, device="cuda") for _ in range(2)
        )
        self.slots = torch.randperm(num_blocks * BLOCK_SIZE, device="cuda")[:tokens]

    def run(self, **given):
        from nanoflow_compiler.kernels.rotary_append import Rotary, can_rotate, rotate_and_append

        rotary = Rotary(self.cos, self.sin)
        parts = (self.query, self.key, self.value)
        assert can_rotate(*parts, rotary=rotary)
        pages = self.found.tables[0]
        return rotate_and_append(*parts, rotary=rotary, pages=pages, slots=self.slots, **given)

    def check(self, query):
        key = rotated(self.key, self.cos, self.sin)
        places = (self.slots // BLOCK_SIZE, self.slots % BLOCK_SIZE)
        self.expected.append(key, self.value, layer=0, places=places)
        compare(query, rotated(self.query, self.cos, self.sin))
        compare(self.found.keys[0], self.expected.keys[0])
        assert torch.equal(self.found.values[0], self.expected.values[0])


def compare(found, wanted):
    if found.dtype is torch.float32:
        # There a product and a sum may be one operation.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_equals_eager_and_indexing(tokens, shape, dtype):
    case = Heads(tokens, *shape, dtype=dtype)
    case.check(case.run())


@pytest.mark.parametrize("pdl", [False, True])
def test_writes_nothing_around_its_result(pdl):
    case = Heads(5, *SHAPES[2], dtype=torch.bfloat16)
    around = case.query.new_full((7, 10, 100), torch.nan)
    out = around[1:-1, :9, :96]
    assert case.run(out=out, pdl=pdl) is out
    case.check(out.clone())
    out.fill_(torch.nan)
    assert around.isnan().all()


def test_what_is_not_rotated():
    from nanoflow_compiler.kernels.rotary_append import Rotary, can_rotate

    case = Heads(5, *SHAPES[1], dtype=torch.bfloat16)
    parts = (case.query, case.key, case.value)
    cos, sin = case.cos, case.sin
    assert can_rotate(*parts, rotary=Rotary(cos, sin))
    assert not can_rotate(*parts, rotary=Rotary(cos.float(), sin.float()))
    assert not can_rotate(*parts, rotary=Rotary(cos[:4], sin[:4]))
    assert not can_rotate(*parts, rotary=Rotary(cos[:, :31], sin[:, :31]))
    assert not can_rotate(*parts, rotary=Rotary(cos.repeat(1, 3), sin.repeat(1, 3)))
    assert not can_rotate(*parts, rotary=Rotary(cos[None], sin[None]))
    assert not can_rotate(case.query.float(), *parts[1:], rotary=Rotary(cos, sin))
    assert not can_rotate(case.query.mT, *parts[1:], rotary=Rotary(cos, sin))
