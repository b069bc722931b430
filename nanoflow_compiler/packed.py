"""The packed path: one step of many requests as one compiled graph, for the engine."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nanoflow_compiler.capture import CapturedStep, capture_step, step_arguments
from nanoflow_compiler.compiler import device_of, stepper_for
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.pipeline import CompiledGraph, compile_graph

__all__ = ["PackedStep", "compile_packed"]


class PackedStep:
    """``(input_ids [T], positions [T], rows [R], cuts) -> logits [R, V]``, float32."""

    def __init__(self, captured: CapturedStep, compiled: CompiledGraph) -> None:
        self._weights = captured.weights
        self.compiled = compiled
        compiled.binder(
            [*[None] * 5, *self._weights]
        )  # merges weights once, outside of inference mode
        planned = compiled.executables[-1]
        self.num_cells = planned.num_cells
        self.attention_parts = planned.attention_parts
        self.source = planned.source

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        """Run one step; with an empty cell the unsplit program runs instead."""
        inputs = self.compiled.binder([*step_arguments(input_ids, positions, rows), *self._weights])
        if any(start == end for start, end in itertools.pairwise(cuts)):
            whole = (0, input_ids.shape[0])
            (logits,) = self.compiled.executables[0](inputs, whole)
        else:
            (logits,) = self.compiled.executables[-1](inputs, tuple(cuts))
        result: Tensor = logits
        return result

    def close(self) -> None:
        """Release the programs."""
        self.compiled.close()


def compile_packed(packed: PackedDecoder, config: CompileConfig) -> PackedStep:
    """The compiled step of a decoder; raises :class:`UnsupportedGraphError` if it breaks."""
    step = stepper_for(config)
    captured = capture_step(packed)
    device = device_of(config, captured.weights)
    with torch.no_grad():
        compiled = compile_graph(captured.graph, config=config, device=device, step=step)
    return PackedStep(captured, compiled)
