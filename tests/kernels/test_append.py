"""The append kernel writes what indexing would, and nothing else."""

import numpy as np
import pytest
import torch

from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape

pytestmark = pytest.mark.gpu

SHAPES = [(8, 128, 128), (1, 64, 64), (3, 96, 80), (16, 256, 256)]


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
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


@pytest.mark.parametrize("seed", range(10))
def test_random_shapes_beside_poison(seed):
    from nanoflow_compiler.kernels.append import append_pages

    rng = np.random.default_rng(seed)
    heads, dim, v_dim = int(rng.integers(1, 20)), *(8 * int(rng.integers(1, 33)) for _ in "kv")
    layer = LayerShape(heads, dim, v_dim, torch.bfloat16)
    cache = KVCache.allocate([layer], num_blocks=12, device="cuda")
    for pool in (*cache.keys, *cache.values):
        pool.fill_(torch.nan)
    count = int(rng.choice([1, 2, 63, 64, 65, 500]))
    slots = torch.from_numpy(rng.permutation(12 * BLOCK_SIZE)[:count]).cuda()
    key, value = (random(count, heads, n, dtype=torch.bfloat16) for n in (dim, v_dim))
    append_pages(key, value, cache.tables[0], slots=slots)
    places = (slots // BLOCK_SIZE, slots % BLOCK_SIZE)
    for pool, given in ((cache.keys[0], key), (cache.values[0], value)):
        assert torch.equal(pool[places], given)
        assert int((~pool.isnan()).any(-1).any(-1).sum()) == count


def test_a_pool_of_more_than_two_to_the_31_values():
    from nanoflow_compiler.kernels.append import append_pages

    layer = LayerShape(8, 128, 128, torch.bfloat16)
    num_blocks = 2**31 // (8 * 128 * BLOCK_SIZE) + 5
    cache = KVCache.allocate([layer], num_blocks=num_blocks, device="cuda")
    assert cache.keys[0].numel() > 2**31
    slots = num_blocks * BLOCK_SIZE - 1 - torch.arange(0, 200, 7, device="cuda")
    key, value = (random(len(slots), 8, 128, dtype=torch.bfloat16) for _ in "kv")
    append_pages(key, value, cache.tables[0], slots=slots)
    places = (slots // BLOCK_SIZE, slots % BLOCK_SIZE)
    assert torch.equal(cache.keys[0][places], key)
    assert torch.equal(cache.values[0][places], value)
    assert not cache.keys[0][:9].any()
