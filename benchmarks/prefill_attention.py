"""Attention of prompts on one GPU, sustained, with joules and clocks.

    python benchmarks/prefill_attention.py --output benchmarks/results/NAME.json

Random queries, keys and values in bfloat16, 32 heads over 8 KV heads of 128, blocks scattered over the
cache. Operations are those of the pairs that a causal mask leaves: 4 x 128 for each and each head. Rows of
every result are compared with float64. Beside it FlashInfer on the same cache, where it is installed, and
PyTorch's flash attention of contiguous keys and values, which are first repeated for each query head.
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
from nanoflow_compiler.kernels.paged_prefill import PromptTiling, attend_prompts, plan_prompts
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages, KVCache, LayerShape
from nanoflow_compiler.scoring import Scoring

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPES = ((8, 4096, 0), (2, 512, 0), (1, 2048, 6144), (64, 32, 0))
"""Requests, rows of each, and tokens before them."""
LARGE = PromptTiling(rows=128, num_warps=8, num_stages=3, ctas_per_sm=1)
SMALL = PromptTiling(rows=64, num_warps=4, num_stages=2, ctas_per_sm=2)
TILINGS = (
    LARGE,
    replace(LARGE, num_stages=4),
    replace(LARGE, holds_queries=True),
    replace(LARGE, lags=False),
    replace(SMALL, rows=128, lags=False),
    SMALL,
    replace(SMALL, holds_queries=True),
    replace(SMALL, lags=False),
)
SCORING = Scoring(DIM**-0.5)
NUM_CALLS = 20
"""In a graph."""
WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class Problem:
    """Requests of equal lengths."""

    query: Tensor
    pages: HeadPages
    layout: StepLayout
    num_requests: int
    rows: int
    context: int

    @classmethod
    def random(cls, num_requests: int, rows: int, context: int) -> "Problem":
        each = -(-(rows + context) // BLOCK_SIZE)
        layer = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16)
        cache = KVCache.allocate([layer], num_blocks=num_requests * each + 1, device="cuda")
        for pool in (*cache.keys, *cache.values):
            pool.normal_()
        order = np.random.default_rng(0).permutation(num_requests * each) + 1
        layout = StepLayout.pack(
            query_lens=np.full(num_requests, rows),
            context_lens=np.full(num_requests, context),
            block_tables=order.reshape(num_requests, each),
        )
        (pages,) = cache.tables
        assert isinstance(pages, HeadPages)
        query = torch.randn(num_requests * rows, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        return cls(query, pages, layout, num_requests, rows, context)

    @property
    def num_flops(self) -> int:
        pairs = self.rows * self.context + self.rows * (self.rows + 1) // 2
        return 4 * DIM * HEADS * self.num_requests * pairs

    def tokens(self, request: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request, ``[KV heads, tokens, dim]``."""
        blocks = torch.from_numpy(self.layout.block_tables[request]).cuda()
        length = self.rows + self.context
        keys, values = (
            pool[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            for pool in (self.pages.keys, self.pages.values)
        )
        return keys, values

    def relative_error(self, out: Tensor) -> float:
        """Of a few rows of the first and the last request, against float64."""
        found, expected = [], []
        for request in (0, self.num_requests - 1):
            keys, values = (tokens.double() for tokens in self.tokens(request))
            for row in (0, 1, self.rows // 2, self.rows - 1):
                end = self.context + row + 1
                at = request * self.rows + row
                heads = self.query[at].double().unflatten(0, (KV_HEADS, -1))
                scores = heads @ keys[:, :end].transpose(1, 2) * SCORING.scale
                expected.append((scores.softmax(-1) @ values[:, :end]).flatten(0, 1))
                found.append(out[at].double())
        difference = torch.stack(found) - torch.stack(expected)
        return float(difference.norm() / torch.stack(expected).norm())


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--flashinfer", nargs="*", default=["fa2", "fa3"], help="its backends")
    options = parser.parse_args()
    results = []
    for shape in SHAPES:
        problem = Problem.random(*shape)
        for name, make in contenders(problem, backends=options.flashinfer):
            row = {"requests": shape[0], "rows": shape[1], "context": shape[2], "name": name}
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
    if find_spec("flashinfer"):
        for backend in backends:
            yield f"flashinfer {backend}", partial(flashinfer, problem, backend=backend)
    if not problem.context:
        yield "torch flash", partial(flash_of_torch, problem)


def ours(problem: Problem, *, tiling: PromptTiling) -> Contender:
    """Planned once."""
    requests = Requests.of(problem.layout.part(0, len(problem.query), device="cuda"))
    tiles = plan_prompts(
        requests, problem.pages, num_heads=HEADS, visibility=Visibility(), tiling=tiling
    )
    assert tiles
    out = torch.full_like(problem.query, torch.nan)
    call = partial(attend_prompts, problem.query, problem.pages, tiles=tiles, scoring=SCORING)
    return Contender(partial(call, out=out), out)


def flashinfer(problem: Problem, *, backend: str) -> Contender:
    """Its kernel of paged prompts, planned once."""
    layout = problem.layout
    each = layout.block_tables.shape[1]
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    wrapper = import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(
        workspace, kv_layout="HND", backend=backend
    )
    length = problem.rows + problem.context
    wrapper.plan(
        _int32s(layout.query_starts),
        _int32s(np.arange(problem.num_requests + 1) * each),
        _int32s(layout.block_tables.ravel()),
        _int32s(np.full(problem.num_requests, (length - 1) % BLOCK_SIZE + 1)),
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
    batch = problem.query.unflatten(0, (problem.num_requests, -1)).transpose(1, 2).contiguous()
    tokens = [problem.tokens(request) for request in range(problem.num_requests)]
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
    what = f"{row['requests']:>3} x {row['rows']:<4} after {row['context']:<4} {row['name']:<40}"
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
