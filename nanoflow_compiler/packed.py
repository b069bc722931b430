"""The packed path: one step of many requests as one compiled graph, for the engine."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nanoflow_compiler.compiler import device_of, stepper_for, trace_aten, weight_names
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import NanoflowError, UnsupportedGraphError
from nanoflow_compiler.graphs import is_size, size_expr
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.pipeline import CapturedGraph, CompiledGraph, compile_graph

__all__ = ["CapturedStep", "PackedStep", "capture_step", "compile_packed"]

PLANNED_TOKENS = 512
"""Tokens that plans are estimated for, where nothing else is said."""
_TRACED_ROWS = 64


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """The graph of one step, with what each of its placeholders gets."""

    graph: CapturedGraph
    values: tuple[Any, ...]
    """Parameters and buffers by position; None for what a call gives."""
    given: dict[str, int]
    """Positions of ``input_ids``, ``positions`` and ``rows``."""
    sizes: tuple[tuple[int, str], ...]
    """Positions of sizes, and the argument whose length each is."""


class PackedStep:
    """``(input_ids [T], positions [T], rows [R], cuts) -> logits [R, V]``, float32."""

    def __init__(self, captured: CapturedStep, compiled: CompiledGraph) -> None:
        self._captured = captured
        self.compiled = compiled
        compiled.binder(captured.values)  # merges weights once, outside of inference mode
        planned = compiled.executables[-1]
        self.num_cells = planned.num_cells
        self.attention_parts = planned.attention_parts
        self.source = planned.source

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        """Run one step; with an empty cell the unsplit program runs instead."""
        arguments = {"input_ids": input_ids, "positions": positions, "rows": rows}
        values = list(self._captured.values)
        for name, position in self._captured.given.items():
            values[position] = arguments[name]
        for position, name in self._captured.sizes:
            values[position] = arguments[name].shape[0]
        inputs = self.compiled.binder(values)
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
    parameters = [value for value in captured.values if value is not None]
    device = device_of(config, parameters)
    with torch.no_grad():
        compiled = compile_graph(captured.graph, config=config, device=device, step=step)
    return PackedStep(captured, compiled)


class _Captured(Exception):  # noqa: N818 - it carries the result out of Dynamo, and is no error
    """Ends the call that was made only to capture its graph."""


def capture_step(packed: PackedDecoder, *, tokens: int = PLANNED_TOKENS) -> CapturedStep:
    """Dynamo and AOTAutograd on one step of ``tokens`` tokens; nothing is computed."""
    found: list[CapturedStep] = []
    arguments = _example(packed, tokens)

    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        def keep(aten: fx.GraphModule, _: Sequence[Any]) -> Any:
            found.append(_captured(aten, example_inputs, arguments, tokens))
            return aten

        trace_aten(module, example_inputs, compiler=keep)
        return _stop

    try:
        with torch.no_grad():
            torch.compile(packed, backend=backend, fullgraph=True)(*arguments.values())
    except _Captured:
        return found[0]
    except NanoflowError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedGraphError(
            f"{type(packed.model).__name__} cannot be captured as one graph: {first}; "
            "enforce_eager=True runs it uncompiled"
        ) from error
    raise UnsupportedGraphError(f"{type(packed.model).__name__} has no graph: nothing was traced")


def _stop(*_: object) -> Any:
    raise _Captured


def _example(packed: PackedDecoder, tokens: int) -> dict[str, Tensor]:
    arange = torch.arange(tokens, device=packed.device)
    arguments = {
        "input_ids": torch.zeros_like(arange),
        "positions": arange.clone(),
        "rows": arange[:_TRACED_ROWS].clone(),
    }
    for tensor in arguments.values():
        torch._dynamo.mark_dynamic(tensor, 0)
    return arguments


def _captured(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    arguments: dict[str, Tensor],
    tokens: int,
) -> CapturedStep:
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(example_inputs):
        raise UnsupportedGraphError("AOTAutograd changed the inputs of the graph")
    given: dict[str, int] = {}
    values: list[Any] = []
    for position, item in enumerate(example_inputs):
        name = next((key for key, tensor in arguments.items() if tensor is item), None)
        if name is not None:
            given[name] = position
        fixed = isinstance(item, Tensor) and name is None
        values.append(item if fixed else None)
    lengths = {
        size_expr(placeholders[position].meta["val"].shape[0]): name
        for name, position in reversed(given.items())
    }
    sizes = tuple(
        (position, lengths[size_expr(node.meta["val"])])
        for position, node in enumerate(placeholders)
        if is_size(node)
    )
    seeds = tuple(
        (placeholders[given[name]].name, 0) for name in ("input_ids", "positions") if name in given
    )
    graph = CapturedGraph(module, weight_names(module, example_inputs), seeds, tokens)
    return CapturedStep(graph, tuple(values), given, sizes)
