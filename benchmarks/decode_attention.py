"""Decode attention on one GPU, sustained, with joules and clocks.

    python benchmarks/decode_attention.py --output benchmarks/results/NAME.json

Random keys and values in bfloat16, 32 heads over 8 KV heads of 128, blocks scattered over the cache.
Bytes are those of keys and values, each read once. Every result is compared with float64 first.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.sustained import measure_sustained
from nanoflow_compiler.kernels.paged_decode import PageReads, Tiling, attend_pages, plan_pages
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages, KVCache, LayerShape
from nanoflow_compiler.scoring import Scoring

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPES = ((1024, 768), (64, 8192), (1, 100_000))
"""Requests, and tokens of each."""
TILINGS = (Tiling(3, 4, 2), Tiling(3, 2, 2), Tiling(2, 4, 3), Tiling(1, 4, 6))
SCORING = Scoring(DIM**-0.5)
NUM_CALLS = 20
"""In a graph; at least 400 MB each, eight times what the second-level cache holds."""


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for num_requests, length in SHAPES:
        for row in measure(num_requests, length, seconds=options.seconds):
            results.append({"requests": num_requests, "tokens": length, **row})
            print_row(results[-1])
    if options.output:
        report = {**environment(), "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def measure(num_requests: int, length: int, *, seconds: float) -> list[dict[str, Any]]:
    """One row for each tiling."""
    tables, pages = make_cache(num_requests, length)
    query = torch.randn(num_requests, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    layout = StepLayout.pack(
        query_lens=np.ones(num_requests, dtype=np.int64),
        context_lens=np.full(num_requests, length - 1),
        block_tables=tables,
    )
    requests = Requests.of(layout.part(0, num_requests, device="cuda"))
    num_bytes = 2 * num_requests * length * KV_HEADS * DIM * query.element_size()
    rows = []
    for tiling in TILINGS:
        reads = plan_pages(requests, pages, visibility=Visibility(), tiling=tiling)
        out = torch.full_like(query, torch.nan)

        def call(reads: PageReads | None = reads, out: torch.Tensor = out) -> None:
            assert reads
            attend_pages(query, pages, reads=reads, scoring=SCORING, out=out)

        time = measure_sustained([call] * NUM_CALLS, seconds=seconds)
        error = relative_error(out, query=query, pages=pages, tables=tables, length=length)
        rate = {"tb_per_s": num_bytes / time.us / 1e6, "relative_error": error}
        rows.append({"tiling": asdict(tiling), **asdict(time), **rate})
    return rows


def make_cache(num_requests: int, length: int) -> tuple[np.ndarray, HeadPages]:
    """Block tables, and the pages of one layer."""
    each = -(-length // BLOCK_SIZE)
    layer = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16)
    cache = KVCache.allocate([layer], num_blocks=num_requests * each + 1, device="cuda")
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    order = np.random.default_rng(0).permutation(num_requests * each) + 1
    (pages,) = cache.tables
    assert isinstance(pages, HeadPages)
    return order.reshape(num_requests, each), pages


def relative_error(
    out: torch.Tensor, *, query: torch.Tensor, pages: HeadPages, tables: np.ndarray, length: int
) -> float:
    """Of the first and the last request, against float64."""
    found, expected = [], []
    for row in (0, len(query) - 1):
        blocks = torch.from_numpy(tables[row]).cuda()
        keys, values = (
            pool[blocks].transpose(0, 1).flatten(1, 2)[:, :length].double()
            for pool in (pages.keys, pages.values)
        )
        heads = query[row].double().unflatten(0, (KV_HEADS, -1))
        weights = (heads @ keys.transpose(1, 2) * SCORING.scale).softmax(-1)
        expected.append((weights @ values).flatten(0, 1))
        found.append(out[row].double())
    difference = torch.stack(found) - torch.stack(expected)
    return float(difference.norm() / torch.stack(expected).norm())


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{row['requests']:>5} x {row['tokens']:<7} {_text(row['tiling'].values())} {row['us']:8.1f} us "
        f"{row['tb_per_s']:5.2f} TB/s {row['joules']:6.3f} J {row['watts']:4.0f} W "
        f"{row['sm_mhz']:5.0f} MHz, error {row['relative_error']:.1e}",
        flush=True,
    )


def _text(tiling: Sequence[int]) -> str:
    return "CTAs {} warps {} stages {}".format(*tiling)


if __name__ == "__main__":
    main()
