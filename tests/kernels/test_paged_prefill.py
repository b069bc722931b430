"""Attention of prompts on a GPU against float64, with memory around it that would show."""

from dataclasses import replace

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
REQUESTS = (
    [(0, 2)],
    [(0, 64), (64, 65), (63, 2), (1, 1), (128, 63)],
    [(700, 3), (3, 300), (64, 129), (0, 1), (127, 130)],
    [(5000, 40), (0, 1000)],
    [(0, 33)] * 200,
)
"""As (tokens before, rows); those with one row are not this kernel's."""


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


class Prompts:
    """Rows of requests over scattered blocks; what no row sees is NaN, as is what is not written."""

    def __init__(
        self,
        requests,
        *,
        heads=8,
        kv_heads=2,
        dim=128,
        v_dim=None,
        dtype=torch.bfloat16,
        num_before=0,
    ):
        """``num_before``: blocks of the pool in front of all that are used."""
        generator = torch.Generator("cuda").manual_seed(len(requests))

        def random(*shape):
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        self.contexts, self.counts = np.array(requests).T
        totals = self.contexts + self.counts
        num_blocks = -(-totals // BLOCK_SIZE)
        # Rows and heads with others between them, as slices of a fused projection have.
        self.query = random(self.counts.sum(), heads + 3, dim)[:, :heads]
        layer = LayerShape(kv_heads, dim, v_dim or dim, dtype)
        self.cache = KVCache.allocate(
            [layer], num_blocks=num_before + int(num_blocks.sum()) + 1, device="cuda"
        )
        self.tables = np.zeros((len(requests), num_blocks.max()), dtype=np.int64)
        order = np.random.default_rng(0).permutation(int(num_blocks.sum())) + num_before + 1
        for row, end in enumerate(np.cumsum(num_blocks)):
            self.tables[row, : num_blocks[row]] = order[end - num_blocks[row] : end]
        self.cache.keys[0].fill_(torch.nan)
        self.cache.values[0].fill_(torch.nan)
        self.keys, self.values = [], []
        for row, total in enumerate(totals.tolist()):
            tokens = torch.arange(total, device="cuda")
            blocks = torch.from_numpy(self.tables[row]).cuda()[tokens // BLOCK_SIZE]
            key, value = random(total, kv_heads, dim), random(total, kv_heads, v_dim or dim)
            self.cache.append(key, value, layer=0, places=(blocks, tokens % BLOCK_SIZE))
            self.keys.append(key)
            self.values.append(value)

    def plan(self, *, visibility, tiling=None):
        from nanoflow_compiler.kernels.paged_prefill import plan_prompts

        layout = StepLayout.pack(
            query_lens=self.counts, context_lens=self.contexts, block_tables=self.tables
        )
        requests = Requests.of(layout.part(0, len(self.query), device="cuda"))
        (pages,) = self.cache.tables
        num_heads = self.query.shape[1]
        return plan_prompts(
            requests, pages, num_heads=num_heads, visibility=visibility, tiling=tiling
        )

    def plan_flash(self):
        """The same by FlashInfer's kernel, whatever is faster."""
        from nanoflow_compiler.kernels import flash_prefill

        layout = StepLayout.pack(
            query_lens=self.counts, context_lens=self.contexts, block_tables=self.tables
        )
        requests = Requests.of(layout.part(0, len(self.query), device="cuda"))
        (pages,) = self.cache.tables
        if flash_prefill.least_keys(pages, visibility=Visibility()) is None:
            pytest.skip("FlashInfer's kernel is not there")
        return flash_prefill.plan_flash_prompts(requests, pages, num_heads=self.query.shape[1])

    def empty(self):
        shape = (*self.query.shape[:2], self.cache.values[0].shape[-1])
        return self.query.new_full(shape, torch.nan)

    def attend(self, tiles, *, scoring, out):
        from nanoflow_compiler.kernels import prompts

        (pages,) = self.cache.tables
        prompts.attend(self.query, pages, tiles=tiles, scoring=scoring, out=out)

    def run(self, *, visibility, scoring, tiling=None):
        out = self.empty()
        tiles = self.plan(visibility=visibility, tiling=tiling)
        self.attend(tiles, scoring=scoring, out=out)
        return out

    def expected(self, *, visibility, scoring):
        """In float64; NaN for the rows that are not ours."""
        results = []
        queries = self.query.double().split(self.counts.tolist())
        contexts = self.contexts.tolist()
        for query, key, value, context in zip(
            queries, self.keys, self.values, contexts, strict=True
        ):
            positions = context + np.arange(len(query))
            seen = visibility.mask(positions, keys=np.arange(len(key)))
            grouped = query.unflatten(1, (key.shape[1], -1))
            scores = torch.einsum("thgd,nhd->hgtn", grouped, key.double()) * scoring.scale
            scores = scoring.cap(scores).masked_fill(~torch.from_numpy(seen).cuda(), -torch.inf)
            weights = scoring.weigh(scores.flatten(0, 1), heads=(query.shape[1], 1))
            weights = weights.view(scores.shape)
            result = torch.einsum("hgtn,nhd->thgd", weights, value.double()).flatten(1, 2)
            results.append(result if len(query) > 1 else result * torch.nan)
        return torch.cat(results)

    def check(self, found, *, visibility, scoring, tolerance=1e-2):
        expected = self.expected(visibility=visibility, scoring=scoring)
        is_ours = ~expected.isnan()
        assert torch.equal(is_ours, ~found.isnan())
        assert relative_error(found[is_ours], expected[is_ours]) < tolerance


PLAIN = {"visibility": Visibility(), "scoring": Scoring(0.1)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("requests", REQUESTS, ids=lambda drawn: f"{len(drawn)}x{drawn[0]}")
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (8, 1), (96, 4)])
def test_lengths_and_heads(requests, heads, kv_heads, dtype):
    prompts = Prompts(requests, heads=heads, kv_heads=kv_heads, dtype=dtype)
    prompts.check(prompts.run(**PLAIN), **PLAIN, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("requests", REQUESTS, ids=lambda drawn: f"{len(drawn)}x{drawn[0]}")
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (8, 1), (96, 4)])
def test_flashinfer_is_as_near(requests, heads, kv_heads):
    """As our kernel to float64, the rows of others and of decodes left alone."""
    prompts = Prompts(requests, heads=heads, kv_heads=kv_heads)
    found = prompts.empty()
    prompts.attend(prompts.plan_flash(), scoring=PLAIN["scoring"], out=found)
    prompts.check(found, **PLAIN)
    expected = prompts.expected(**PLAIN)
    is_ours = ~expected.isnan()
    ours = relative_error(prompts.run(**PLAIN)[is_ours], expected[is_ours])
    assert relative_error(found[is_ours], expected[is_ours]) < 1.2 * ours


@pytest.mark.parametrize("rows", range(1, 300, 13))
def test_numbers_of_rows(rows):
    prompts = Prompts([(rows, rows), (0, rows + 1), (64, 2)])
    prompts.check(prompts.run(**PLAIN), **PLAIN)


@pytest.mark.parametrize("rows", range(1, 300, 13))
def test_numbers_of_rows_by_flashinfer(rows):
    prompts = Prompts([(rows, rows), (0, rows + 1), (64, 2)])
    found = prompts.empty()
    prompts.attend(prompts.plan_flash(), scoring=PLAIN["scoring"], out=found)
    prompts.check(found, **PLAIN)


def test_a_graph_of_flashinfer_is_given_other_plans():
    """With room for more, as in a captured step: at first for nothing, then for other requests."""
    from nanoflow_compiler.kernels import flash_prefill

    prompts = Prompts([(300, 200), (0, 70), (64, 1), (5, 130)])
    prompts.plan_flash()  # or skip
    (pages,) = prompts.cache.tables
    num_heads = prompts.query.shape[1]
    tiles = flash_prefill.flash_with_room(
        pages, num_heads=num_heads, num_tokens=1000, num_prompts=9, num_pages=99
    )
    out = prompts.empty()
    prompts.attend(tiles, scoring=PLAIN["scoring"], out=out)
    assert out.isnan().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prompts.attend(tiles, scoring=PLAIN["scoring"], out=out)
    expected = prompts.expected(**PLAIN)
    for start, end in ((0, 4), (1, 3), (3, 4), (2, 3), (0, 4)):
        first, last = _rows(prompts.counts, start)[0], _rows(prompts.counts, end - 1)[1]
        layout = StepLayout.pack(
            query_lens=prompts.counts, context_lens=prompts.contexts, block_tables=prompts.tables
        )
        requests = Requests.of(layout.part(first, last))
        requests = replace(requests, starts=requests.starts + first)
        for there, array in zip(tiles.tensors, tiles.arrays(requests), strict=True):
            there[: len(array)].copy_(torch.from_numpy(array))
        out.fill_(torch.nan)
        graph.replay()
        is_ours = ~expected.isnan()
        is_ours[:first] = is_ours[last:] = False
        assert torch.equal(is_ours, ~out.isnan())
        if is_ours.any():
            assert relative_error(out[is_ours], expected[is_ours]) < 1e-2


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (96, 96), (128, 64), (192, 128), (256, 256)])
@pytest.mark.parametrize("limits", [(0, 0), (1, 0), (64, 0), (100, 0), (0, 96), (100, 128)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_sizes_and_scores(dim, v_dim, limits, softcap, has_sinks):
    prompts = Prompts([(300, 200), (17, 3), (1000, 100)], dim=dim, v_dim=v_dim)
    sinks = torch.randn(8, device="cuda") if has_sinks else None
    given = {"visibility": Visibility(*limits), "scoring": Scoring(0.1, softcap, sinks)}
    prompts.check(prompts.run(**given), **given)


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sizes_in_other_numbers(dim, dtype):
    prompts = Prompts([(300, 70), (17, 3)], dim=dim, dtype=dtype)
    given = {"visibility": Visibility(100), "scoring": Scoring(0.1, 2.0)}
    prompts.check(prompts.run(**given), **given, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("holds_queries", [False, True])
@pytest.mark.parametrize("lags", [False, True])
@pytest.mark.parametrize(
    ("rows", "num_warps", "num_stages", "ctas_per_sm"),
    [(128, 8, 3, 1), (128, 4, 2, 2), (64, 4, 2, 2), (64, 4, 4, 1), (128, 8, 1, 1)],
)
def test_tilings_find_the_same(rows, num_warps, num_stages, ctas_per_sm, lags, holds_queries):
    from nanoflow_compiler.kernels.paged_prefill import PromptTiling

    prompts = Prompts([(2000, 500), (1, 1), (0, 300)])
    given = {"visibility": Visibility(chunk=2100), "scoring": Scoring(0.1)}
    tiling = PromptTiling(rows, num_warps, num_stages, ctas_per_sm, lags, holds_queries)
    prompts.check(prompts.run(**given, tiling=tiling), **given)


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    drawn = random_attention(rng)
    contexts = rng.choice([0, 0, 1, 63, 64, 65, *rng.integers(1, 2000, 4)], rng.integers(1, 12))
    counts = rng.choice([1, 2, 3, 63, 64, 65, 128, *rng.integers(2, 400, 6)], len(contexts))
    prompts = Prompts(
        [*zip(contexts.tolist(), counts.tolist(), strict=True), (5, 2)], **drawn.sizes
    )
    sinks = torch.randn(drawn.sizes["heads"], device="cuda") if drawn.has_sinks else None
    given = {
        "visibility": Visibility(*drawn.limits),
        "scoring": Scoring(drawn.scale, drawn.softcap, sinks),
    }
    prompts.check(prompts.run(**given), **given, tolerance=2 * TOLERANCE[drawn.sizes["dtype"]])


@pytest.mark.parametrize("requests", [[(100_000, 40), (0, 65)], [(99_970, 2)], [(0, 4000)]])
def test_long_contexts(requests):
    prompts = Prompts(requests, heads=4, kv_heads=1)
    for window in (0, 5000):
        given = {"visibility": Visibility(window), "scoring": Scoring(0.1)}
        prompts.check(prompts.run(**given), **given)


def test_a_pool_of_more_than_two_to_the_31_values():
    prompts = Prompts([(700, 40), (0, 65), (64, 2)], kv_heads=8, heads=16, num_before=FAR)
    assert prompts.cache.keys[0].numel() > 2**31
    prompts.check(prompts.run(**PLAIN), **PLAIN)


def test_the_same_bits_every_time():
    prompts = Prompts([(300, 200), (0, 70)])
    first = prompts.run(**PLAIN)
    assert all(torch.equal(prompts.run(**PLAIN), first) for _ in range(20))


def test_a_graph_is_replayed_with_other_plans():
    prompts = Prompts([(300, 200), (0, 70), (64, 1), (5, 130)])
    whole = prompts.plan(visibility=Visibility())
    most = {name: torch.zeros_like(getattr(whole, name)) for name in ("tiles", "blocks", "sizes")}
    padded = replace(whole, **most)
    out = prompts.empty()
    prompts.attend(padded, scoring=PLAIN["scoring"], out=out)  # compiles, and computes nothing
    assert out.isnan().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prompts.attend(padded, scoring=PLAIN["scoring"], out=out)
    for chosen in ([0, 1, 2, 3], [3], [1, 2]):
        part = prompts.plan(visibility=Visibility())
        rows = {row for at in chosen for row in range(*_rows(prompts.counts, at))}
        is_kept = torch.tensor([int(tile[0]) in rows for tile in part.tiles.tolist()]).cuda()
        kept = part.tiles[is_kept]
        padded.tiles[: len(kept)] = kept
        padded.blocks.copy_(part.blocks)
        padded.sizes.fill_(len(kept))
        out.fill_(torch.nan)
        graph.replay()
        expected = prompts.expected(**PLAIN)
        is_ours = torch.tensor([row in rows for row in range(len(out))]).cuda()
        is_ours &= ~expected[:, 0, 0].isnan()
        assert out[~is_ours].isnan().all()
        assert relative_error(out[is_ours], expected[is_ours]) < 1e-2


def _rows(counts, at):
    ends = np.cumsum(counts)
    return int(ends[at] - counts[at]), int(ends[at])


@pytest.mark.parametrize("limits", [{}, {"window": 90}, {"chunk": 96}, {"softcap": 1.5}])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_operator_in_parts(limits, has_sinks):
    requests = [(70, 90), (0, 50), (130, 1), (5, 1), (64, 1), (9, 2), (62, 140)]
    case = Case(requests, head_dim=16, v_head_dim=32, has_sinks=has_sinks, **limits)
    step = Step(case, device="cuda")
    expected = step.expected().float()
    torch.testing.assert_close(step.run(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.run([3, 100, 141, 200]), expected, rtol=1e-4, atol=1e-5)
