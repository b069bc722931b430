"""Attention of prompts on one GPU, sustained, with joules and clocks.

    python benchmarks/prefill_attention.py --output benchmarks/results/NAME.json

Random queries, keys and values in bfloat16, 32 heads over 8 KV heads of 128, blocks scattered over the
cache. Operations are those of the pairs that a causal mask leaves: 4 x 128 for each and each head. Rows of
every result are compared with float64. Beside it, on the same cache and where it is installed, FlashInfer:
its kernel for Hopper as it is planned here, and by its own wrapper; and PyTorch's flash attention of
contiguous keys and values, which are first repeated for each query head.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.sustained import measure_sustained
from nanoflow_compiler.kernels import prompts
from nanoflow_compiler.kernels.flash_prefill import least_keys, plan_flash_prompts
from nanoflow_compiler.kernels.paged_prefill import PromptTiling, plan_prompts
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages, KVCache, LayerShape
from nanoflow_compiler.scoring import Scoring

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPES = {
    "8 x 4096": [(4096, 0)] * 8,
    "4 x 2048": [(2048, 0)] * 4,
    "2 x 512": [(512, 0)] * 2,
    "1 x 16384": [(16384, 0)],
    "2048 after 6144": [(2048, 6144)],
    "mixed": [(1024, 6144), (700, 0), (200, 1000), (90, 0), (34, 4000)],
}
"""Of each request its rows, and the tokens before them."""
LARGE = PromptTiling(rows=128, num_warps=8, num_stages=3, ctas_per_sm=1)
SMALL = PromptTiling(rows=64, num_warps=4, num_stages=2, ctas_per_sm=2)
TILINGS = (
    SMALL,
    replace(SMALL, num_stages=3),
    replace(SMALL, num_stages=3, lags=False),
    LARGE,
    replace(LARGE, lags=False),
)
SCORING = Scoring(DIM**-0.5)
NUM_CALLS = 20
"""In a graph."""
WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class Problem:
    """Prompts over a cache."""

    query: Tensor
    pages: HeadPages
    layout: StepLayout

    @classmethod
    def random(cls, requests: Sequence[tuple[int, int]]) -> "Problem":
        counts, contexts = np.array(requests).T
        num_blocks = -(-(counts + contexts) // BLOCK_SIZE)
        layer = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16)
        cache = KVCache.allocate([layer], num_blocks=int(num_blocks.sum()) + 1, device="cuda")
        for pool in (*cache.keys, *cache.values):
            pool.normal_()
        tables = np.zeros((len(counts), num_blocks.max()), dtype=np.int64)
        scattered = np.random.default_rng(0).permutation(num_blocks.sum()) + 1
        tables[np.arange(tables.shape[1]) < num_blocks[:, None]] = scattered
        layout = StepLayout.pack(query_lens=counts, context_lens=contexts, block_tables=tables)
        (pages,) = cache.tables
        assert isinstance(pages, HeadPages)
        query = torch.randn(counts.sum(), HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        return cls(query, pages, layout)

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.layout.query_starts)

    @property
    def lengths(self) -> np.ndarray:
        return self.layout.context_lens + self.counts

    @property
    def requests(self) -> Requests:
        return Requests.of(self.layout.part(0, len(self.query), device="cuda"))

    @property
    def num_flops(self) -> int:
        pairs = self.counts * self.layout.context_lens + self.counts * (self.counts + 1) // 2
        return int(4 * DIM * HEADS * pairs.sum())

    def tokens(self, request: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request, ``[KV heads, tokens, dim]``."""
        blocks = torch.from_numpy(self.layout.block_tables[request]).cuda()
        length = self.lengths[request]
        keys, values = (
            pool[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            for pool in (self.pages.keys, self.pages.values)
        )
        return keys, values

    def relative_error(self, out: Tensor) -> float:
        """Of a few rows of the first and the last request, against float64."""
        found, expected = [], []
        for request in (0, len(self.counts) - 1):
            keys, values = (tokens.double() for tokens in self.tokens(request))
            count = int(self.counts[request])
            for row in (0, 1, count // 2, count - 1):
                end = int(self.layout.context_lens[request]) + row + 1
                at = int(self.layout.query_starts[request]) + row
                heads = self.query[at].double().unflatten(0, (KV_HEADS, -1))
                scores = heads @ keys[:, :end].transpose(1, 2) * SCORING.scale
                expected.append((scores.softmax(-1) @ values[:, :end]).flatten(0, 1))
                found.append(out[at].double())
        difference = torch.stack(found) - torch.stack(expected)
        return float(difference.norm() / torch.stack(expected).norm())


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.8, help="for each kernel and shape")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--flashinfer", nargs="*", default=["fa3"], help="its backends: fa2, fa3")
    options = parser.parse_args()
    results = []
    for shape in options.shapes:
        problem = Problem.random(SHAPES[shape])
        for name, make in contenders(problem, backends=options.flashinfer):
            row = {"shape": shape, "mean_keys": problem.requests.mean_keys, "name": name}
            results.append(row | measure(problem, make, seconds=options.seconds))
            print_row(results[-1])
    if options.output:
        report = {**environment(), "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class Contender:
    """A call, and what it writes."""

    call: Callable[[], Any]
    out: Tensor | None


def measure(problem: Problem, make: Callable[[], Contender], *, seconds: float) -> dict[str, Any]:
    """Time, energy and rate, and the error of what is written; or why there is none of this."""
    try:
        contender = make()
        time = measure_sustained([contender.call] * NUM_CALLS, seconds=seconds)
    except Exception as error:  # what does not fit or is not built should not cost the rest
        return {"failed": repr(error)}
    relative = None if contender.out is None else problem.relative_error(contender.out)
    rate = problem.num_flops / time.us / 1e6
    return {**asdict(time), "tflop_per_s": rate, "relative_error": relative}


def contenders(
    problem: Problem, *, backends: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Our kernel by tiling, then the others."""
    for tiling in TILINGS:
        yield _text(tiling), partial(ours, problem, tiling=tiling)
    if least_keys(problem.pages, visibility=Visibility()) is not None:
        yield "flashinfer, planned by us", partial(planned_by_us, problem)
    if find_spec("flashinfer"):
        for backend in backends:
            yield f"flashinfer {backend}", partial(flashinfer, problem, backend=backend)
    if not problem.layout.context_lens.any():
        yield "torch flash", partial(flash_of_torch, problem)


def ours(problem: Problem, *, tiling: PromptTiling) -> Contender:
    """Planned once."""
    tiles = plan_prompts(
        problem.requests, problem.pages, num_heads=HEADS, visibility=Visibility(), tiling=tiling
    )
    assert tiles
    return _contender(problem, tiles)


def planned_by_us(problem: Problem) -> Contender:
    """FlashInfer's kernel as the engine calls it."""
    return _contender(problem, plan_flash_prompts(problem.requests, problem.pages, num_heads=HEADS))


def _contender(problem: Problem, tiles: prompts.Tiles) -> Contender:
    out = torch.full_like(problem.query, torch.nan)
    call = partial(prompts.attend, problem.query, problem.pages, tiles=tiles, scoring=SCORING)
    return Contender(partial(call, out=out), out)


def flashinfer(problem: Problem, *, backend: str) -> Contender:
    """Its kernel of paged prompts, planned once."""
    layout = problem.layout
    num_blocks = -(-problem.lengths // BLOCK_SIZE)
    is_block = np.arange(layout.block_tables.shape[1]) < num_blocks[:, None]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(
        workspace, kv_layout="HND", backend=backend
    )
    wrapper.plan(
        _int32s(layout.query_starts),
        _int32s(np.concatenate([[0], np.cumsum(num_blocks)])),
        _int32s(layout.block_tables[is_block]),
        _int32s((problem.lengths - 1) % BLOCK_SIZE + 1),
        HEADS,
        KV_HEADS,
        DIM,
        BLOCK_SIZE,
        causal=True,
        sm_scale=SCORING.scale,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    out = torch.full_like(problem.query, torch.nan)
    pages = (problem.pages.keys, problem.pages.values)
    return Contender(partial(wrapper.run, problem.query, pages, out=out), out)


def flash_of_torch(problem: Problem) -> Contender:
    """On keys and values as it likes them best; nothing is gathered in the call."""
    num_requests = len(problem.counts)
    batch = problem.query.unflatten(0, (num_requests, -1)).transpose(1, 2).contiguous()
    tokens = [problem.tokens(request) for request in range(num_requests)]
    keys, values = (
        torch.stack(pool).repeat_interleave(HEADS // KV_HEADS, dim=1)
        for pool in zip(*tokens, strict=True)
    )

    def call() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            functional.scaled_dot_product_attention(
                batch, keys, values, is_causal=True, scale=SCORING.scale
            )

    return Contender(call, None)


def _int32s(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int32)).cuda()


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    what = f"{row['shape']:<16} {row['name']:<36}"
    if "failed" in row:
        print(f"{what} {row['failed']:.200}", flush=True)
        return
    error = "" if row["relative_error"] is None else f", error {row['relative_error']:.1e}"
    print(
        f"{what} {row['us']:8.1f} us {row['tflop_per_s']:5.0f} TFLOP/s {row['joules']:6.3f} J "
        f"{row['watts']:4.0f} W {row['sm_mhz']:5.0f} MHz{error}",
        flush=True,
    )


def _text(tiling: PromptTiling) -> str:
    size = f"{tiling.rows} rows, {tiling.num_warps} warps x {tiling.ctas_per_sm}"
    marks = [mark for mark, on in (("lags", tiling.lags), ("holds", tiling.holds_queries)) if on]
    return " ".join([size, f"{tiling.num_stages} stages", *marks])


if __name__ == "__main__":
    main()
