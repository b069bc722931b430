"""Decode attention on a GPU against float64, with memory around it that would show."""

import numpy as np
import pytest
import torch

from attention_cases import Case, Step, random_attention
from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, LayerShape
from nanoflow_compiler.scoring import Scoring

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FAR = 2**31 // (8 * 128 * BLOCK_SIZE)
"""Blocks of 8 heads of 128 dimensions, whose pool has this many values."""
LENGTHS = ([1], [64], [65, 1, 130], [700, 3, 64, 129], [5000, 1, 2], [90] * 500)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


class Decodes:
    """Decodes over scattered blocks; what no request sees is NaN."""

    def __init__(
        self,
        lengths,
        *,
        heads=8,
        kv_heads=2,
        dim=128,
        v_dim=None,
        dtype=torch.bfloat16,
        num_before=0,
    ):
        """``num_before``: blocks of the pool in front of all that are used."""
        generator = torch.Generator("cuda").manual_seed(len(lengths))

        def random(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        counts = -(-np.array(lengths) // BLOCK_SIZE)
        self.lengths = lengths
        # Heads with others between them, as slices of a fused projection have.
        self.query = random(len(lengths), heads + 3, dim)[:, :heads]
        layer = LayerShape(kv_heads, dim, v_dim or dim, dtype)
        self.cache = KVCache.allocate(
            [layer], num_blocks=num_before + int(counts.sum()) + 1, device="cuda"
        )
        self.tables = np.zeros((len(lengths), counts.max()), dtype=np.int64)
        order = np.random.default_rng(0).permutation(int(counts.sum())) + num_before + 1
        for row, end in enumerate(np.cumsum(counts)):
            self.tables[row, : counts[row]] = order[end - counts[row] : end]
        self.cache.keys[0].fill_(torch.nan)
        self.cache.values[0].fill_(torch.nan)
        self.keys, self.values = [], []
        for row, length in enumerate(lengths):
            tokens = torch.arange(length, device="cuda")
            blocks = torch.from_numpy(self.tables[row]).cuda()[tokens // BLOCK_SIZE]
            key, value = random(length, kv_heads, dim), random(length, kv_heads, v_dim or dim)
            places = (blocks, tokens % BLOCK_SIZE)
            self.cache.append(key, value, layer=0, places=places)
            self.keys.append(key)
            self.values.append(value)

    def run(self, *, visibility, scoring, tiling=None):
        from nanoflow_compiler.kernels.paged_decode import attend_pages, plan_pages

        layout = StepLayout.pack(
            query_lens=np.ones(len(self.lengths), dtype=np.int64),
            context_lens=np.array(self.lengths) - 1,
            block_tables=self.tables,
        )
        part = layout.part(0, len(self.lengths), device="cuda")
        (pages,) = self.cache.tables
        reads = plan_pages(Requests.of(part), pages, visibility=visibility, tiling=tiling)
        shape = (*self.query.shape[:2], self.cache.values[0].shape[-1])
        out = self.query.new_full(shape, torch.nan)
        attend_pages(self.query, pages, reads=reads, scoring=scoring, out=out)
        return out

    def expected(self, *, visibility, scoring):
        rows = []
        for query, key, value in zip(self.query.double(), self.keys, self.values, strict=True):
            first = int(visibility.first_key(np.array([len(key) - 1]))[0])
            key, value = key[first:].double(), value[first:].double()
            grouped = query.unflatten(0, (key.shape[1], -1))
            scores = torch.einsum("hgd,nhd->hgn", grouped, key) * scoring.scale
            weights = scoring.weigh(scoring.cap(scores).flatten(0, 1), heads=(len(query),))
            weights = weights.view(scores.shape)
            rows.append(torch.einsum("hgn,nhd->hgd", weights, value).flatten(0, 1))
        return torch.stack(rows)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)}x{lengths[0]}")
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (8, 1), (96, 4)])
def test_lengths_and_heads(lengths, heads, kv_heads, dtype):
    decodes = Decodes(lengths, heads=heads, kv_heads=kv_heads, dtype=dtype)
    given = {"visibility": Visibility(), "scoring": Scoring(0.1)}
    assert relative_error(decodes.run(**given), decodes.expected(**given)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (96, 96), (128, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize("window", [0, 1, 64, 100])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_sizes_and_scores(dim, v_dim, window, softcap, has_sinks):
    decodes = Decodes([300, 17, 1000], dim=dim, v_dim=v_dim)
    sinks = torch.randn(8, device="cuda") if has_sinks else None
    given = {"visibility": Visibility(window), "scoring": Scoring(0.1, softcap, sinks)}
    assert relative_error(decodes.run(**given), decodes.expected(**given)) < 1e-2


@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
@pytest.mark.parametrize("ctas_per_sm", [1, 2, 3])
def test_tilings_find_the_same(ctas_per_sm, num_warps):
    from nanoflow_compiler.kernels.paged_decode import Tiling

    decodes = Decodes([4000, 1, 300])
    given = {"visibility": Visibility(chunk=2500), "scoring": Scoring(0.1)}
    tiling = Tiling(ctas_per_sm, num_warps)
    assert relative_error(decodes.run(**given, tiling=tiling), decodes.expected(**given)) < 1e-2


@pytest.mark.parametrize("length", [62, 63, 64, 65, 66, 127, 128, 129, 191, 192, 193])
def test_borders_of_blocks(length):
    decodes = Decodes([length, 1, length - 1])
    for window in (0, 1, 63, 64, 65):
        given = {"visibility": Visibility(window), "scoring": Scoring(0.1)}
        assert relative_error(decodes.run(**given), decodes.expected(**given)) < 1e-2


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    drawn = random_attention(rng)
    lengths = rng.choice([1, 2, 63, 64, 65, 128, *rng.integers(1, 3000, 6)], rng.integers(1, 40))
    decodes = Decodes(lengths.tolist(), **drawn.sizes)
    sinks = torch.randn(drawn.sizes["heads"], device="cuda") if drawn.has_sinks else None
    given = {
        "visibility": Visibility(*drawn.limits),
        "scoring": Scoring(drawn.scale, drawn.softcap, sinks),
    }
    found = decodes.run(**given)
    assert relative_error(found, decodes.expected(**given)) < 2 * TOLERANCE[found.dtype]


def test_a_pool_of_more_than_two_to_the_31_values():
    decodes = Decodes([700, 1, 64, 65], kv_heads=8, heads=16, num_before=FAR)
    assert decodes.cache.keys[0].numel() > 2**31
    given = {"visibility": Visibility(), "scoring": Scoring(0.1)}
    assert relative_error(decodes.run(**given), decodes.expected(**given)) < 1e-2


def test_a_hundred_thousand_tokens():
    decodes = Decodes([100_000, 5])
    given = {"visibility": Visibility(), "scoring": Scoring(0.1)}
    assert relative_error(decodes.run(**given), decodes.expected(**given)) < 1e-2


def test_the_same_bits_every_time():
    decodes = Decodes([3000, 70, 9])
    given = {"visibility": Visibility(), "scoring": Scoring(0.1)}
    first = decodes.run(**given)
    assert all(torch.equal(decodes.run(**given), first) for _ in range(20))


@pytest.mark.parametrize("limits", [{}, {"window": 90}, {"chunk": 96}, {"softcap": 1.5}])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_operator_on_decodes_beside_prompts(limits, has_sinks):
    requests = [(70, 90), (0, 50), (130, 1), (5, 1), (64, 1), (9, 2)]
    case = Case(requests, head_dim=16, v_head_dim=32, has_sinks=has_sinks, **limits)
    step = Step(case, device="cuda")
    expected = step.expected().float()
    torch.testing.assert_close(step.run(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.run([3, 100, 141]), expected, rtol=1e-4, atol=1e-5)
