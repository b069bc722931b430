"""Matrix products of a model's linear layers on one GPU, sustained, with joules and clocks.

    python benchmarks/gemm.py --output benchmarks/results/NAME.json
    python benchmarks/gemm.py --quick --only 'llama.*gated' --tilings 's4w8'

Random bfloat16, ``--rows`` tokens; each call has another weight, until none is left in the cache. A plain
product is compared with cuBLAS; one that adds the residual with cuBLAS and an addition, and with the sum of
cuBLAS that rounds once; a gated one with cuBLAS and what Inductor makes of the gate. Every result is compared
with float64 first. Operations are those of the product, whatever follows it.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.sustained import measure_sustained
from nanoflow_compiler.kernels.gemm import (
    SHARED_BYTES,
    GemmTiling,
    interleave,
    multiply,
    multiply_gated,
)

CACHE_BYTES = 256 << 20
"""All weights of a problem have more."""
WORKERS = 8
TILING = GemmTiling()
TILINGS = (
    TILING,
    replace(TILING, group=8),
    replace(TILING, num_stages=3, store_columns=256),
    replace(TILING, flatten=False),
    replace(TILING, flatten=False, persistent=False),
    replace(TILING, depth=128, num_stages=2),
    replace(TILING, rows=256, columns=128, store_columns=64),
    replace(TILING, rows=64, num_warps=4, group=32),
    replace(TILING, columns=128, num_stages=3, num_warps=4, store_columns=64, ctas_per_sm=2),
    replace(TILING, columns=128, depth=128, num_stages=3),
)
READS = (
    replace(TILING, store_columns=64),
    replace(TILING, num_stages=3),
    replace(TILING, columns=128, num_stages=5),
)
"""With shared memory left for a piece of the residual."""


@dataclass(frozen=True)
class Layer:
    """A linear layer, and what follows it in a step."""

    model: str
    name: str
    depth: int
    columns: int
    follows: str


LAYERS = (
    Layer("llama-3-8b", "qkv", 4096, 6144, ""),
    Layer("llama-3-8b", "o", 4096, 4096, "residual"),
    Layer("llama-3-8b", "gate_up", 4096, 28672, "gated"),
    Layer("llama-3-8b", "down", 14336, 4096, "residual"),
    Layer("bench-1b", "qkv", 2048, 4096, ""),
    Layer("bench-1b", "o", 2048, 2048, "residual"),
    Layer("bench-1b", "gate_up", 2048, 16384, "gated"),
    Layer("bench-1b", "down", 8192, 2048, "residual"),
)


@dataclass(frozen=True)
class Problem:
    """A layer alone (``plain``) or with what follows it."""

    layer: Layer
    kind: str
    rows: int

    def __str__(self) -> str:
        """What ``--only`` looks at."""
        return f"{self.layer.model} {self.layer.name} {self.kind}"

    @cached_property
    def x(self) -> Tensor:
        return random(self.rows, self.layer.depth)

    @cached_property
    def residual(self) -> Tensor:
        return random(self.rows, self.layer.columns)

    @cached_property
    def weights(self) -> list[Tensor]:
        """``[K, N]``, of linear layers."""
        shape = (self.layer.columns, self.layer.depth)
        num_bytes = 2 * shape[0] * shape[1]
        scale = self.layer.depth**-0.5
        return [random(*shape).mul_(scale).t() for _ in range(1 + -(-CACHE_BYTES // num_bytes))]

    @cached_property
    def expected(self) -> Tensor:
        """With the first weight, in float64, rounded nowhere."""
        product = self.x.double() @ self.weights[0].double()
        if self.kind == "residual":
            return product + self.residual.double()
        return gated(product) if self.kind == "gated" else product

    @property
    def num_operations(self) -> int:
        return 2 * self.rows * self.layer.depth * self.layer.columns


@dataclass(frozen=True)
class Contender:
    """A way: ``run(weight, out)`` writes the result, with the residual in ``out`` where it adds to it."""

    name: str
    run: Callable[[Tensor, Tensor], Any]
    prepare: Callable[[Tensor], Tensor] = lambda weight: weight
    adds: bool = False


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def gated(product: Tensor) -> Tensor:
    gate, up = product.chunk(2, dim=1)
    return functional.silu(gate) * up


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--only", default="", help="of problems, such as 'llama.*residual'")
    parser.add_argument("--tilings", default="", help="of ways, such as 'cublas|x256x64s4'")
    parser.add_argument("--num-sms", type=int, help="multiprocessors for our kernels")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--quick", action="store_true", help="0.3 seconds for each")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seconds = 0.3 if options.quick else options.seconds
    results = []
    for problem in problems(options.rows, only=options.only):
        chosen = [
            way for way in ways(problem, options.num_sms) if re.search(options.tilings, way.name)
        ]
        compile_all(problem, chosen)
        for way in chosen:
            results.append(row := {"problem": str(problem), "rows": options.rows, "way": way.name})
            row |= measure(problem, way, seconds=seconds)
            print_row(row)
        if options.output:
            report = {**environment(), "results": results}
            options.output.write_text(json.dumps(report, indent=1) + "\n")


def problems(rows: int, *, only: str) -> Iterator[Problem]:
    """One at a time, since each has gigabytes."""
    for layer in LAYERS:
        for kind in ("plain", layer.follows):
            problem = Problem(layer, kind, rows)
            if kind and re.search(only, str(problem)):
                yield problem


def ways(problem: Problem, num_sms: int | None) -> Iterator[Contender]:
    """Those of others first."""
    given = {"num_sms": num_sms}
    if problem.kind == "plain":
        yield Contender("cublas", lambda weight, out: torch.mm(problem.x, weight, out=out))
        for tiling in fitting(*TILINGS):
            yield plain(problem, tiling=tiling, **given)
    elif problem.kind == "residual":
        yield from residual_ways(problem, given)
    else:
        yield from gated_ways(problem, given)


def fitting(*tilings: GemmTiling, **kind: bool) -> Iterator[GemmTiling]:
    return (tiling for tiling in tilings if tiling.shared_bytes(**kind) <= SHARED_BYTES)


def plain(problem: Problem, **given: Any) -> Contender:
    def run(weight: Tensor, out: Tensor) -> None:
        multiply(problem.x, weight, out=out, **given)

    return Contender(str(given["tiling"]), run)


def residual_ways(problem: Problem, given: dict[str, Any]) -> Iterator[Contender]:
    x, residual = problem.x, problem.residual
    product = torch.empty_like(residual)

    def separate(weight: Tensor, out: Tensor) -> None:
        torch.add(torch.mm(x, weight, out=product), residual, out=out)

    def read(weight: Tensor, out: Tensor, *, tiling: GemmTiling) -> None:
        multiply(x, weight, residual=residual, out=out, tiling=tiling, **given)

    def in_place(weight: Tensor, out: Tensor, *, tiling: GemmTiling) -> None:
        multiply(x, weight, residual=out, out=out, tiling=tiling, **given)

    yield Contender("cublas, add", separate)
    yield Contender("cublas addmm_", lambda weight, out: out.addmm_(x, weight), adds=True)
    for tiling in fitting(*READS, reads_residual=True):
        yield Contender(f"reads {tiling}", partial(read, tiling=tiling))
    for tiling in fitting(*TILINGS):
        yield Contender(f"in place {tiling}", partial(in_place, tiling=tiling), adds=True)


def gated_ways(problem: Problem, given: dict[str, Any]) -> Iterator[Contender]:
    x = problem.x
    both = torch.empty(problem.rows, problem.layer.columns, device="cuda", dtype=x.dtype)
    compiled: Any = torch.compile(lambda product, out: out.copy_(gated(product)), dynamic=False)

    def separate(weight: Tensor, out: Tensor) -> None:
        compiled(torch.mm(x, weight, out=both), out)

    def fused(weight: Tensor, out: Tensor, *, tiling: GemmTiling, block: int | None = None) -> None:
        multiply_gated(x, weight, activation="silu", block=block, out=out, tiling=tiling, **given)

    yield Contender("cublas, inductor", separate)
    for tiling in fitting(*TILINGS, gated=True):
        yield Contender(f"stacked {tiling}", partial(fused, tiling=tiling))
    pairs = replace(TILING, pairs=True)
    yield Contender(f"pairs {pairs}", partial(fused, tiling=pairs))
    for block in (64, 128):
        run = partial(fused, tiling=TILING, block=block)
        yield Contender(f"interleaved {block} {TILING}", run, partial(interleave, block=block))


def compile_all(problem: Problem, chosen: list[Contender]) -> None:
    """Several at a time; what fails here fails again where it is measured."""
    ours = [way for way in chosen if "cublas" not in way.name]

    def call(way: Contender) -> None:
        torch.cuda.set_device(0)
        with suppress(Exception):
            relative_error(problem, way, weight=way.prepare(problem.weights[0]))

    # The first one alone: threads should find Triton, and what the problem keeps, as it is later.
    for way in ours[:1]:
        call(way)
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(call, ours[1:]))
    torch.cuda.synchronize()


def measure(problem: Problem, way: Contender, *, seconds: float) -> dict[str, Any]:
    """Time, energy and rate, and the error of what is written; or why there is none of this."""
    try:
        weights = [way.prepare(weight) for weight in problem.weights]
        relative = relative_error(problem, way, weight=weights[0])
        out = torch.zeros_like(problem.expected, dtype=problem.x.dtype)
        calls = [partial(way.run, weight, out) for weight in weights]
        time = measure_sustained(calls, seconds=seconds, warmup_seconds=seconds / 2)
    except Exception as error:  # what does not fit or is not built should not cost the rest
        return {"failed": repr(error)}
    rate = problem.num_operations / time.us / 1e6
    return {**asdict(time), "tflop_per_s": rate, "relative_error": relative}


def relative_error(problem: Problem, way: Contender, *, weight: Tensor) -> float:
    """Of a whole result, in memory that was not a number."""
    out = torch.full_like(problem.expected, torch.nan, dtype=problem.x.dtype)
    if way.adds:
        out.copy_(problem.residual)
    way.run(weight, out)
    return float((out.double() - problem.expected).norm() / problem.expected.norm())


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    what = f"{row['problem']:<30} {row['way']:<42}"
    if "failed" in row:
        print(f"{what} {row['failed']:.200}", flush=True)
        return
    print(
        f"{what} {row['us']:8.1f} us {row['joules']:7.4f} J {row['tflop_per_s']:5.0f} TFLOP/s "
        f"{row['watts']:4.0f} W {row['sm_mhz']:5.0f} MHz, error {row['relative_error']:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
