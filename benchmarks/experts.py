"""Mixtures of experts on one GPU, sustained, with joules and clocks.

    python benchmarks/experts.py --output benchmarks/results/NAME.json

Random tokens and experts in bfloat16, gated by SiLU, with random routing. Bytes are the matrices of the
experts that some token chose, each read once; operations are those of all pairs of a token and an expert.
A result's first and last token are compared with float64. Beside every tiling the same with PyTorch's
grouped product of matrices, where it is there: ordering, gathering and adding up included.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.bench.environment import environment
from nanoflow_compiler.bench.sustained import measure_sustained
from nanoflow_compiler.experts import ExpertWeights, activate
from nanoflow_compiler.kernels.experts import run_experts
from nanoflow_compiler.kernels.grouped_gemm import TILINGS, Tiling

TOKENS = (1, 16, 256, 2048)
OTHER_TILINGS = (
    Tiling(16, 128, 64, 5, 4),
    Tiling(32, 128, 128, 3, 4),
    Tiling(64, 256, 64, 4, 8),
    Tiling(128, 128, 64, 3, 4),
    Tiling(128, 256, 64, 3, 8),
)
NUM_CALLS = 10
"""In a graph."""


@dataclass(frozen=True)
class Sizes:
    """Of a mixture."""

    hidden: int
    inner: int
    experts: int
    top_k: int


MODELS = {"mixtral-8x7b": Sizes(4096, 14336, 8, 2), "qwen3-30b-a3b": Sizes(2048, 768, 128, 8)}


@dataclass(frozen=True)
class Problem:
    """A step's tokens, where they go, and one layer."""

    hidden: Tensor
    index: Tensor
    scores: Tensor
    weights: ExpertWeights

    @property
    def num_bytes(self) -> int:
        """Of the matrices that are needed."""
        own = self.weights
        each = own.up[0].numel() + own.down[0].numel()
        return len(self.index.unique()) * each * own.up.element_size()

    @property
    def num_operations(self) -> int:
        return 2 * self.index.numel() * (self.weights.up[0].numel() + self.weights.down[0].numel())


def main() -> None:
    """Print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for model in options.models:
        weights = make_weights(MODELS[model])
        for tokens in TOKENS:
            problem = make_problem(tokens, MODELS[model], weights=weights)
            for row in measure(problem, seconds=options.seconds):
                results.append({"model": model, "tokens": tokens, **row})
                print_row(results[-1])
        del weights, problem
    if options.output:
        report = {**environment(), "results": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def make_weights(sizes: Sizes) -> ExpertWeights:
    """As a linear layer stores them."""

    def random(columns: int, depth: int) -> Tensor:
        shape = (sizes.experts, columns, depth)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(depth**-0.5)

    up, down = random(2 * sizes.inner, sizes.hidden), random(sizes.hidden, sizes.inner)
    return ExpertWeights(up, down, None, None, "silu", gated=True, transposed=False)


def make_problem(tokens: int, sizes: Sizes, *, weights: ExpertWeights) -> Problem:
    """The same routing in every run."""
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, sizes.hidden, device="cuda", dtype=torch.bfloat16)
    scores, index = torch.randn(tokens, sizes.experts, device="cuda").topk(sizes.top_k)
    return Problem(hidden, index, scores.softmax(-1).bfloat16(), weights)


def measure(problem: Problem, *, seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each way."""
    for name, run in ways(problem):
        out = torch.full_like(problem.hidden, torch.nan)

        def call(run: Callable[[], Tensor] = run, out: Tensor = out) -> None:
            out.copy_(run())

        time = measure_sustained([call] * NUM_CALLS, seconds=seconds)
        rates = {
            "tb_per_s": problem.num_bytes / time.us / 1e6,
            "tflop_per_s": problem.num_operations / time.us / 1e6,
        }
        yield {"way": name, **asdict(time), **rates, "relative_error": relative_error(out, problem)}


def ways(problem: Problem) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """By name; the first is what a model runs."""
    given: dict[str, Any] = {"top_k_index": problem.index, "top_k_weights": problem.scores}
    ours = partial(run_experts, problem.hidden, weights=problem.weights, **given)
    yield "chosen", ours
    for tiling in (*TILINGS, *OTHER_TILINGS):
        yield "x".join(map(str, asdict(tiling).values())), partial(ours, tiling=tiling)
    if hasattr(torch, "_grouped_mm"):
        yield "torch._grouped_mm", partial(run_with_torch, problem)


def run_with_torch(problem: Problem) -> Tensor:
    """Nothing is read by the host here either."""
    own, chosen = problem.weights, problem.index.flatten()
    order = chosen.argsort(stable=True)
    experts = torch.arange(len(own.up), device="cuda")
    ends = (chosen[:, None] == experts).sum(0).cumsum(0).int()
    rows = problem.hidden[order // problem.index.shape[1]]
    inner = activate(
        torch._grouped_mm(rows, own.up.mT, offs=ends), name=own.activation, gated=own.gated
    )
    results = torch.empty_like(rows)
    results[order] = torch._grouped_mm(inner, own.down.mT, offs=ends)
    return torch.einsum("tkh,tk->th", results.view(*problem.index.shape, -1), problem.scores)


def relative_error(out: Tensor, problem: Problem) -> float:
    """Of the first and the last token, against float64."""
    own = problem.weights
    found, expected = [], []
    for token in {0, len(out) - 1}:
        total = torch.zeros_like(out[token], dtype=torch.float64)
        for expert, score in zip(problem.index[token], problem.scores[token], strict=True):
            inner = own.up[expert].double() @ problem.hidden[token].double()
            inner = activate(inner, name=own.activation, gated=own.gated)
            total += score.double() * (own.down[expert].double() @ inner)
        found.append(out[token].double())
        expected.append(total)
    difference = torch.stack(found) - torch.stack(expected)
    return float(difference.norm() / torch.stack(expected).norm())


def print_row(row: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{row['model']:14} {row['tokens']:>5} {row['way']:18} {row['us']:8.1f} us "
        f"{row['tb_per_s']:5.2f} TB/s {row['tflop_per_s']:6.1f} TFLOP/s {row['joules']:7.4f} J "
        f"{row['watts']:4.0f} W {row['sm_mhz']:5.0f} MHz, error {row['relative_error']:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
