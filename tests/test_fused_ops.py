"""Operators that stand for several: on a CPU the very bits of the ATen calls, on a GPU close to them."""

import pytest
import torch
from torch.nn import functional

from attention_cases import Case, Step
from nanoflow_compiler import fused_ops, kernel_choice, ops
from nanoflow_compiler.attention_state import AttentionState, attention_state
from nanoflow_compiler.kernel_choice import Choice, ChoiceTable, LinearShape, Measured
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def linear_inputs(dtype, *, rows=5, depth=16, columns=24, **place):
    """Input, transposed weight and bias."""
    x = random(rows, depth, dtype=dtype, **place)
    weight = random(columns, depth, seed=1, dtype=dtype, **place) * depth**-0.5
    return x, weight.t(), random(columns, seed=2, dtype=dtype, **place)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_linear_is_what_models_compute(name, dtype):
    x, weight_t, _ = linear_inputs(dtype)
    gate, up = (x @ weight_t).split(12, 1)
    assert torch.equal(fused_ops.gated_linear(x, weight_t, name), ACTIVATIONS[name](gate) * up)


@pytest.mark.parametrize("dtype", TYPES)
def test_linears(dtype):
    x, weight_t, bias = linear_inputs(dtype)
    residual = random(5, 24, seed=3, dtype=dtype)
    product = x @ weight_t
    assert torch.equal(fused_ops.linear(x, weight_t, None), product)
    assert torch.equal(fused_ops.linear(x, weight_t, bias), torch.addmm(bias, x, weight_t))
    total = residual + product
    assert torch.equal(fused_ops.linear_add(residual, x, weight_t), total)
    assert torch.equal(fused_ops.linear_add_(residual, x, weight_t), total)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rounds_last", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_norm(rounds_last, dtype, device):
    x = random(5, 64, dtype=dtype, device=device)
    weight = random(64, seed=1, dtype=dtype, device=device)
    scaled = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-3)
    normed = fused_ops.rms_norm(x, weight, 1e-3, rounds_last)
    assert normed.dtype is dtype
    close(normed, scaled * weight.double())


def test_schemas_and_fakes_agree_with_the_implementations():
    checks = ("test_schema", "test_faketensor")
    x, weight_t, bias = linear_inputs(torch.float32)
    step = Step(Case(requests=[(3, 2)], v_head_dim=6))
    layout = step.layout([2], [3], step.tables)
    query, key, value = step.queries[0], step.keys[0][3:], step.values[0][3:]
    angles = (random(2, 4), random(2, 4, seed=1))
    calls = {
        fused_ops.linear: (x, weight_t, bias),
        fused_ops.linear_add: (random(5, 24), x, weight_t),
        fused_ops.linear_add_: (random(5, 24), x, weight_t),
        fused_ops.gated_linear: (x, weight_t, "silu"),
        fused_ops.rms_norm: (x, random(16), 1e-6, True),
        fused_ops.rotary_append: (query, key, value, *angles, 0, 0),
    }
    with attention_state(AttentionState(step.cache, (layout.part(0, 2),))):
        for operator, arguments in calls.items():
            torch.library.opcheck(operator, arguments, test_utils=checks)


def by_hand(x, cos, sin):
    """Heads, of which the first entries are rotated."""
    width = cos.shape[-1]
    half = width // 2
    cos, sin = cos[:, None], sin[:, None]
    given = x[..., :width]
    turned = torch.cat((-given[..., half:], given[..., :half]), -1)
    return torch.cat((given * cos + turned * sin, x[..., width:]), -1)


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("dtype", TYPES)
def test_rotation_and_append(width, dtype):
    step = Step(Case(requests=[(3, 2)]), dtype=dtype)
    layout = step.layout([2], [3], step.tables)
    query, key, value = step.queries[0], step.keys[0][3:], step.values[0][3:]
    angles = (random(2, width, dtype=dtype), random(2, width, seed=1, dtype=dtype))
    state = AttentionState(step.cache, (layout.part(0, 2),))
    with attention_state(state):
        ops.kv_append(by_hand(key, *angles), value, 0, 0)
        expected = [pool.clone() for pool in (step.cache.keys[0], step.cache.values[0])]
        ops.kv_append(0 * key, 0 * value, 0, 0)
        rotated, handle = fused_ops.rotary_append(query, key, value, *angles, 0, 0)
    assert torch.equal(rotated, by_hand(query, *angles))
    assert rotated.is_contiguous()
    assert handle.numel() == 0
    assert torch.equal(step.cache.keys[0], expected[0])
    assert torch.equal(step.cache.values[0], expected[1])


CHOICES = [Choice("aten"), Choice("persistent"), Choice("few_rows"), Choice("unheard_of")]


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.implementation)
@pytest.mark.parametrize("rows", [1, 3, 16, 200])
def test_implementations_on_a_gpu(choice, rows, monkeypatch):
    """Each is close to ATen, also for rows that it leaves to ATen."""
    dtype = torch.bfloat16
    x, weight_t, bias = linear_inputs(dtype, rows=rows, depth=256, columns=512, device="cuda")
    residual = random(rows, 512, seed=3, dtype=dtype, device="cuda")
    shapes = [
        LinearShape(op, "bfloat16", 256, 512) for op in ("linear", "linear_add", "gated_linear")
    ]
    table = ChoiceTable.of([Measured(shape, 1, 999, choice) for shape in shapes])
    monkeypatch.setattr(kernel_choice, "table_of", lambda _: table)
    kernel_choice._choose.cache_clear()
    product = x.double() @ weight_t.double()
    close(fused_ops.linear(x, weight_t, None), product)
    close(fused_ops.linear(x, weight_t, bias), product + bias)
    total = residual + product
    close(fused_ops.linear_add(residual, x, weight_t), total)
    assert fused_ops.linear_add_(residual, x, weight_t).data_ptr() == residual.data_ptr()
    close(residual, total)
    for name, activation in ACTIVATIONS.items():
        gate, up = product.chunk(2, 1)
        close(fused_ops.gated_linear(x, weight_t, name), activation(gate) * up)
    kernel_choice._choose.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 64])
def test_rotation_and_append_on_a_gpu(width):
    """Queries, keys and values beside each other, as a merged product has them."""
    tokens, dtype = 100, torch.bfloat16
    caches = [
        KVCache.allocate([LayerShape(2, 64, 64, dtype)], num_blocks=3, device="cuda")
        for _ in range(2)
    ]
    slots = torch.arange(tokens, device="cuda") + BLOCK_SIZE
    rows = random(tokens, 8 * 64, dtype=dtype, device="cuda").unflatten(1, (8, 64))
    query, key, value = rows.split([4, 2, 2], 1)
    angles = [random(tokens, width, seed=at, dtype=dtype, device="cuda") for at in (1, 2)]
    step = Step(Case(requests=[(3, 1)]))
    part = step.layout([1], [3], step.tables).part(0, 1)
    found = []
    for cache, turn in zip(caches, (True, False), strict=True):
        own = type(part)(part.query_starts, part.context_lens, part.block_tables, slots)
        with attention_state(AttentionState(cache, (own,))):
            if turn:
                found.append(fused_ops.rotary_append(query, key, value, *angles, 0, 0)[0])
            else:
                ops.kv_append(by_hand(key, *angles), value, 0, 0)
                found.append(by_hand(query, *angles))
    assert torch.equal(found[0], found[1])
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])
    assert torch.equal(caches[0].values[0], caches[1].values[0])
