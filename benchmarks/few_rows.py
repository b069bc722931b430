"""Kernels of few rows on one GPU: each alone, and chains of whole layers with and without PDL.

    python benchmarks/few_rows.py --output benchmarks/results/NAME.json

The layers are those of Llama-3-8B in bfloat16 with random weights. Alone, a kernel goes through more
memory than caches hold. A chain is 32 layers, each with its own weights and 64 tokens of context for every
row, in one captured graph: norm, QKV, rotation and append, attention, O, norm, gate and up, down. Beside
the tilings that were fastest alone the same with cuBLAS, where gates and sums are computed apart. Results
of a chain are compared with those of cuBLAS: errors of some percent are what 32 layers make of roundings.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from nanoflow_compiler.attention_plan import Requests, Visibility
from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.sustained import measure_sustained
from nanoflow_compiler.kernels.few_rows import (
    MOST_ADDED_ROWS,
    TILINGS,
    FewRowsTiling,
    multiply,
    multiply_gated,
)
from nanoflow_compiler.kernels.gated import gate_rows
from nanoflow_compiler.kernels.norm import RmsNorm, rms_norm
from nanoflow_compiler.kernels.paged_decode import PageReads, attend_pages, plan_pages
from nanoflow_compiler.kernels.rotary_append import Rotary, rotate_and_append
from nanoflow_compiler.kv_cache import BLOCK_SIZE, HeadPages, KVCache, LayerShape
from nanoflow_compiler.scoring import Scoring

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 4096, 14336, 32, 8, 128
QKV = (HEADS + 2 * KV_HEADS) * DIM
SHAPES = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
HEAD = (128256, HIDDEN)
NUM_LAYERS = 32
MANY_ROWS = 2048
ROTATED_BYTES = 200 << 20
"""Four times what the second-level cache holds."""
PREFETCHES = (0, 512, 1024, 2048, 4096)
SCORING = Scoring(DIM**-0.5)

Tilings = dict[str, FewRowsTiling]


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--scan", action="store_true", help="also chains with one tiling for all")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    layers = [Layer.random() for _ in range(NUM_LAYERS)]
    results = list(measure_others(seconds=options.seconds))
    for num_rows in options.rows:
        alone = list(measure_products(num_rows, layers, seconds=options.seconds))
        chain = Chain(num_rows, layers)
        compared = list(ways(alone, num_rows))
        compared += with_one_tiling(num_rows) if options.scan else []
        results += alone + list(measure_chains(chain, compared, seconds=options.seconds))
    if options.output:
        report = {**environment(), "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Layer:
    """Its weights."""

    weights: dict[str, Tensor]
    norms: tuple[RmsNorm, RmsNorm]

    @classmethod
    def random(cls) -> "Layer":
        weights = {name: random(*shape).mul_(shape[1] ** -0.5) for name, shape in SHAPES.items()}
        first, second = (RmsNorm(random(HIDDEN), 1e-5) for _ in range(2))
        return cls(weights, (first, second))


def measure(kind: str, calls: Sequence[Callable[[], Any]], **row: Any) -> dict[str, Any]:
    """One row of the table; ``seconds`` and ``num_bytes`` of a call are taken from it."""
    seconds, num_bytes = row.pop("seconds"), row.pop("num_bytes", 0)
    time = measure_sustained(calls, seconds=seconds, warmup_seconds=seconds / 2)
    found = {"kind": kind, **row, "us": time.us, "tb_per_s": num_bytes / time.us / 1e6}
    print_row(found)
    return found


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    rest = " ".join(f"{key}={value}" for key, value in row.items() if key != "us")
    print(f"{row['us']:9.2f} us {rest}", flush=True)


def measure_others(*, seconds: float) -> Iterator[dict[str, Any]]:
    """Kernels that are no products, for one token and for many."""
    for num_rows in (1, MANY_ROWS):
        for name, (option, values), num_bytes, make in others(num_rows):
            given = {"name": name, "rows": num_rows, "seconds": seconds, "num_bytes": num_bytes}
            runs = [make() for _ in range(min(max(2, ROTATED_BYTES // num_bytes), 64))]
            for value in values:
                calls = [partial(run, **{option: value}) for run in runs]
                yield measure("alone", calls, **{option: value}, **given)


Option = tuple[str, tuple[int, ...]]
"""What may be tuned, and the values to try."""


def others(num_rows: int) -> Iterator[tuple[str, Option, int, Callable[[], Callable[..., Any]]]]:
    """A name, an option, the bytes read and written, and what makes a call on memory of its own."""
    norm = RmsNorm(random(HIDDEN), 1e-5)

    def make_norm() -> Callable[..., Any]:
        x, residual = random(num_rows, HIDDEN), random(num_rows, HIDDEN)
        return partial(rms_norm, x, norm, residual=residual)

    def make_gate() -> Callable[..., Any]:
        return partial(gate_rows, random(num_rows, 2 * INNER), activation="silu")

    def make_rotation() -> Callable[..., Any]:
        step = Chain(num_rows, [])
        return partial(step.rotate, random(num_rows, QKV), step.cache.tables[0])

    yield "norm with residual", ("num_warps", (4, 8, 16)), 8 * num_rows * HIDDEN, make_norm
    yield "gate", ("block", (1024, 2048, 4096)), 6 * num_rows * INNER, make_gate
    yield "rotate and append", ("block", (4, 8, 16)), 4 * num_rows * QKV, make_rotation


def measure_products(
    num_rows: int, layers: Sequence[Layer], *, seconds: float
) -> Iterator[dict[str, Any]]:
    """Each product by cuBLAS and with all tilings."""
    for name, (columns, depth) in {**SHAPES, "head": HEAD}.items():
        x, residual = random(num_rows, depth), random(num_rows, columns)
        weights = [layer.weights[name] for layer in layers] if name in SHAPES else [random(*HEAD)]
        weights = weights[: 1 + ROTATED_BYTES // weights[0].nbytes]
        given = {"name": name, "rows": num_rows, "seconds": seconds, "num_bytes": weights[0].nbytes}
        yield measure(
            "alone", [partial(linear, x, weight) for weight in weights], way="cublas", **given
        )
        for at, tiling in enumerate(TILINGS):
            if tiling.uses_dot or num_rows <= MOST_ADDED_ROWS:
                ours = partial(product, name, x, residual=residual, tiling=tiling)
                calls = [partial(ours, weight=weight) for weight in weights]
                yield measure("alone", calls, way=str(tiling), tiling=at, **given)


def product(name: str, x: Tensor, *, weight: Tensor, residual: Tensor, **given: Any) -> Tensor:
    """As a layer computes it."""
    if name == "gate_up":
        return multiply_gated(x, weight, activation="silu", **given)
    added = residual if name in ("o", "down") else None
    return multiply(x, weight, residual=added, **given)


@dataclass(frozen=True)
class Way:
    """How a chain runs: with cuBLAS if there are no tilings."""

    name: str
    tilings: Tilings | None = None
    pdl: bool = False
    has_norms: bool = False
    """Whether products compute the norms of their rows."""


class Chain:
    """Whole layers of a step of as many requests as rows, each with 64 tokens."""

    def __init__(self, num_rows: int, layers: Sequence[Layer]) -> None:
        self.layers, self.num_rows = layers, num_rows
        self.x = random(num_rows, HIDDEN)
        shape = LayerShape(KV_HEADS, DIM, DIM, torch.bfloat16)
        shapes = [shape] * max(1, len(layers))
        self.cache = KVCache.allocate(shapes, num_blocks=num_rows + 1, device="cuda")
        for pool in (*self.cache.keys, *self.cache.values):
            pool.normal_()
        blocks = np.arange(1, num_rows + 1)
        self.slots = torch.from_numpy(blocks * BLOCK_SIZE + BLOCK_SIZE - 1).cuda()
        self.rotary = Rotary(random(num_rows, DIM), random(num_rows, DIM))
        self.reads = self._plan(blocks[:, None]) if layers else None

    def _plan(self, tables: np.ndarray) -> PageReads | None:
        layout = StepLayout.pack(
            query_lens=np.ones(self.num_rows, dtype=np.int64),
            context_lens=np.full(self.num_rows, BLOCK_SIZE - 1),
            block_tables=tables,
        )
        requests = Requests.of(layout.part(0, self.num_rows, device="cuda"))
        pages = self.cache.tables[0]
        assert isinstance(pages, HeadPages)
        return plan_pages(requests, pages, visibility=Visibility())

    def rotate(self, qkv: Tensor, pages: Any, **options: Any) -> Tensor:
        sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        query, key, value = (rows.unflatten(1, (-1, DIM)) for rows in qkv.split(sizes, dim=1))
        given: dict[str, Any] = {"rotary": self.rotary, "pages": pages, "slots": self.slots}
        return rotate_and_append(query, key, value, **given, **options)

    def attend(self, qkv: Tensor, at: int, *, pdl: bool) -> Tensor:
        """Rotation, append and attention."""
        pages: Any = self.cache.tables[at]
        assert self.reads
        query = self.rotate(qkv, pages, pdl=pdl)
        out = torch.empty_like(query)
        attend_pages(query, pages, reads=self.reads, scoring=SCORING, out=out, pdl=pdl)
        return out.flatten(1)

    def run(self, way: Way) -> Tensor:
        total = self.x
        if way.tilings is None:
            added: Tensor | None = None
            for at, layer in enumerate(self.layers):
                total, added = self._with_cublas(layer, total, added, at=at)
            return total if added is None else total + added
        for at, layer in enumerate(self.layers):
            total = self._with_ours(layer, total, at=at, way=way)
        return total

    def _with_cublas(
        self, layer: Layer, total: Tensor, added: Tensor | None, *, at: int
    ) -> tuple[Tensor, Tensor]:
        if added is None:
            x, total = rms_norm(total, layer.norms[0])
        else:
            x, total = rms_norm(added, layer.norms[0], residual=total)
        attended = self.attend(linear(x, layer.weights["qkv"]), at, pdl=False)
        added = linear(attended, layer.weights["o"])
        x, total = rms_norm(added, layer.norms[1], residual=total)
        inner = gate_rows(linear(x, layer.weights["gate_up"]), activation="silu")
        return total, linear(inner, layer.weights["down"])

    def _with_ours(self, layer: Layer, total: Tensor, *, at: int, way: Way) -> Tensor:
        assert way.tilings

        def run(name: str, x: Tensor, *, norm: RmsNorm | None = None) -> Tensor:
            assert way.tilings
            if norm and not way.has_norms:
                x, norm = rms_norm(x, norm, pdl=way.pdl)[0], None
            given: dict[str, Any] = {"tiling": way.tilings[name], "norm": norm, "pdl": way.pdl}
            return product(name, x, weight=layer.weights[name], residual=total, **given)

        attended = self.attend(run("qkv", total, norm=layer.norms[0]), at, pdl=way.pdl)
        total = run("o", attended)
        return run("down", run("gate_up", total, norm=layer.norms[1]))


def measure_chains(
    chain: Chain, compared: Sequence[Way], *, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row for each way; times are of a layer."""
    expected = chain.run(Way("cublas")).double()
    num_bytes = sum(weight.nbytes for weight in chain.layers[0].weights.values())
    for way in compared:
        out = torch.full_like(chain.x, torch.nan)

        def call(way: Way = way, out: Tensor = out) -> None:
            out.copy_(chain.run(way))

        time = measure_sustained([call], seconds=3 * seconds, warmup_seconds=seconds)
        error = float((out.double() - expected).norm() / expected.norm())
        row: dict[str, Any] = {"kind": "chain", "way": way.name, "rows": chain.num_rows}
        us = time.us / len(chain.layers)
        row |= {"us": us, "tb_per_s": num_bytes / us / 1e6, "difference": error}
        row["tilings"] = {name: str(tiling) for name, tiling in (way.tilings or {}).items()}
        print_row({key: value for key, value in row.items() if key != "tilings"})
        yield row


def ways(alone: Sequence[dict[str, Any]], num_rows: int) -> Iterator[Way]:
    """Those that are compared."""
    yield Way("cublas")
    best = fastest(alone, TILINGS)
    yield Way("ours", best)
    yield Way("ours, default tilings, PDL", defaults(num_rows), pdl=True)
    yield from with_pdl("ours", best)
    if num_rows <= MOST_ADDED_ROWS:
        added = fastest(alone, [tiling for tiling in TILINGS if not tiling.uses_dot])
        added |= {name: best[name] for name in ("o", "down")}
        yield Way("norms inside", added, has_norms=True)
        yield from with_pdl("norms inside", added, has_norms=True)


def with_pdl(name: str, tilings: Tilings, *, has_norms: bool = False) -> Iterator[Way]:
    """By what is asked for early, and by when the next kernel may begin."""
    for prefetch in PREFETCHES:
        for begins_early in (True, False):
            changes = {"prefetch": prefetch, "begins_early": begins_early}
            changed = {key: replace(tiling, **changes) for key, tiling in tilings.items()}
            when = "early" if begins_early else "late"
            yield Way(f"{name}, PDL {when}, prefetch {prefetch}", changed, True, has_norms)


def with_one_tiling(num_rows: int) -> Iterator[Way]:
    """For all products, since what is fastest alone need not chain best."""
    for at, tiling in enumerate(TILINGS):
        if tiling.uses_dot or num_rows <= MOST_ADDED_ROWS:
            yield Way(f"tiling {at}, PDL", dict.fromkeys(SHAPES, tiling), pdl=True)


def defaults(num_rows: int) -> Tilings:
    return {name: FewRowsTiling.of(num_rows, is_gated=name == "gate_up") for name in SHAPES}


def fastest(alone: Sequence[dict[str, Any]], tilings: Sequence[FewRowsTiling]) -> Tilings:
    """For each product, of these."""
    found: Tilings = {}
    for name in SHAPES:
        rows = [row for row in alone if row["name"] == name and "tiling" in row]
        rows = [row for row in rows if TILINGS[row["tiling"]] in tilings]
        found[name] = TILINGS[min(rows, key=lambda row: row["us"])["tiling"]]
    return found


if __name__ == "__main__":
    main()
