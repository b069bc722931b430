"""What the compiler makes of a model: operations, fusions, what splits and what does not, and why."""

from collections import Counter
from dataclasses import dataclass

from nanoflow_compiler.capture import capture_step
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.ir import OpGraph, OpKind
from nanoflow_compiler.models.decoder import Decoder
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.passes.axis import joins
from nanoflow_compiler.pipeline import analyse
from nanoflow_compiler.stepper import Stepper

__all__ = ["Report", "inspect"]


@dataclass(frozen=True, slots=True)
class Report:
    """The graph of one packed step of a model, in numbers and reasons."""

    model: str
    num_layers: int
    ops: tuple[tuple[str, int, int], ...]
    """Kind, how many, and how many of them can run in parts."""
    fusions: tuple[tuple[str, int], ...]
    """What was merged or recognised, and how often."""
    misses: tuple[str, ...]
    """Linears that share an input and were not merged, with the reason."""
    joins: tuple[tuple[str, str], ...]
    """Nodes that mix tokens, with the reason."""

    @property
    def split_gemms(self) -> tuple[int, int]:
        """GEMMs that can run in parts, and all GEMMs."""
        return next(((split, n) for kind, n, split in self.ops if kind == "gemm"), (0, 0))

    def __str__(self) -> str:
        split, total = self.split_gemms
        lines = [f"{self.model}: {self.num_layers} repeated layers, {split} of {total} GEMMs split"]
        lines += [f"  {kind:<12} {n:5d}  in parts {parts:5d}" for kind, n, parts in self.ops]
        lines += [f"  fused        {n:5d}  {kind}" for kind, n in self.fusions]
        lines += [f"  not merged: {miss}" for miss in self.misses]
        lines += [f"  join: {node}: {reason}" for node, reason in self.joins]
        return "\n".join(
            lines if self.joins else [*lines, "  no joins: every token-wise node splits"]
        )


def inspect(decoder: Decoder) -> Report:
    """Capture and analyse the packed step of ``decoder``; nothing is compiled or run."""
    packed = PackedDecoder(decoder.model, max_length=decoder.max_model_len)
    captured = capture_step(packed)
    graph = analyse(captured, config=CompileConfig(), step=Stepper())
    fusions = Counter(fusion.kind for fusion in captured.module.meta["fusions"])
    return Report(
        model=decoder.name,
        num_layers=graph.num_layers,
        ops=_count_ops(graph),
        fusions=tuple(fusions.items()),
        misses=tuple(captured.module.meta["misses"]),
        joins=tuple(joins(captured.module)),
    )


def _count_ops(graph: OpGraph) -> tuple[tuple[str, int, int], ...]:
    of_kind = {kind: [op for op in graph.ops if op.kind is kind] for kind in OpKind}
    return tuple(
        (str(k), len(ops), sum(op.splits for op in ops)) for k, ops in of_kind.items() if ops
    )
