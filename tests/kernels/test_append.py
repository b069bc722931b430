"""The append kernel writes what indexing would, and nothing else."""

import pytest
import torch

from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape

pytestmark = pytest.mark.gpu

SHAPES = [(8, 128, 128), (1, 64, 64), (3, 96, 80), (16, 256, 256)]


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim", "v_dim"), SHAPES)
@pytest.mark.parametrize("is_slice", [False, True])
def test_equals_indexing(heads, dim, v_dim, dtype, is_slice):
    from nanoflow_compiler.kernels.append import append_pages

    layer = LayerShape(heads, dim, v_dim, dtype)
    expected, found = (KVCache.allocate([layer], num_blocks=9, device="cuda") for _ in range(2))
    slots = torch.randperm(9 * BLOCK_SIZE, device="cuda")[:100]
    if is_slice:  # as views of the output of a merged GEMM
        rows = random(100, heads * (dim + v_dim), dtype=dtype)
        key, value = rows.split([heads * dim, heads * v_dim], dim=1)
        key, value = key.unflatten(1, (heads, dim)), value.unflatten(1, (heads, v_dim))
    else:
        key = random(heads, 100, dim, dtype=dtype).transpose(0, 1)
        value = random(100, v_dim, heads, dtype=dtype).transpose(1, 2)
    expected.append(key, value, layer=0, places=(slots // BLOCK_SIZE, slots % BLOCK_SIZE))
    append_pages(key, value, found.tables[0], slots=slots)
    assert torch.equal(found.keys[0], expected.keys[0])
    assert torch.equal(found.values[0], expected.values[0])
