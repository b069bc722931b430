"""A few lines of torch as the graph that the passes get: ATen, with a symbol for the tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.graphs import call_nodes, map_nodes
from nanoflow_compiler.ir import OpGraph
from nanoflow_compiler.passes.lift import bound_nodes
from nanoflow_compiler.pipeline import CapturedGraph, analyse
from nanoflow_compiler.stepper import Stepper


@dataclass
class Trace:
    """A traced function with the tensors that it was traced for."""

    function: Callable[..., Any]
    inputs: dict[str, Tensor]
    captured: CapturedGraph

    @property
    def module(self) -> fx.GraphModule:
        return self.captured.module

    @property
    def weights(self) -> frozenset[str]:
        return frozenset(self.captured.weights)

    def run(self, **changes: Tensor) -> list[Tensor]:
        """What the module returns for the inputs; they are copied, so writes to them are not seen."""
        given = (self.inputs | changes).values()
        result = self.module(*(tensor.clone() for tensor in given))
        return list(result) if isinstance(result, list | tuple) else [result]

    def analyse(self, **options: Any) -> OpGraph:
        """The op graph; annotates and rewrites the module."""
        return analyse(self.captured, config=CompileConfig(**options), step=Stepper())

    def bind(self, ops: OpGraph, **changes: Tensor) -> list[Any]:
        """Values for the inputs of the op graph."""
        graph = self.module.graph
        names = [node.name for node in graph.find_nodes(op="placeholder")]
        given = dict(zip(names, (self.inputs | changes).values(), strict=True))
        for node in graph.find_nodes(op="get_attr"):
            given[node.name] = getattr(self.module, node.target)
        for node in bound_nodes(self.module, self.weights):
            args, kwargs = map_nodes((node.args, node.kwargs), lambda arg: given[arg.name])
            given[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [given[name] for name in ops.inputs]


def trace(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    *,
    tokens: Mapping[str, int],
    weights: tuple[str, ...] = (),
) -> Trace:
    """Trace ``function(**inputs)``; ``tokens`` names inputs and their dimension of that size.

    Other sizes are numbers, as they are where Dynamo has seen one model.
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    count = next(inputs[name].shape[dim] for name, dim in tokens.items())
    size = _symbol(shapes, count)
    fakes = {name: _fake(tensor, tokens.get(name), size, mode) for name, tensor in inputs.items()}
    names = list(inputs)
    with torch.no_grad(), mode, enable_python_dispatcher():
        module = make_fx(lambda *args: function(**dict(zip(names, args, strict=True))))(
            *fakes.values()
        )
    found = dict(zip(names, module.graph.find_nodes(op="placeholder"), strict=True))
    for name, node in found.items():
        node._rename(name)  # make_fx numbers them
    module.recompile()
    seeds = tuple(tokens.items())
    return Trace(function, dict(inputs), CapturedGraph(module, weights, seeds, count))


def _symbol(shapes: ShapeEnv, count: int) -> torch.SymInt:
    source = ConstantSource("tokens")
    symbol = shapes.create_symbol(count, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    size = shapes.create_symintnode(symbol, hint=count, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def _fake(tensor: Tensor, dim: int | None, size: torch.SymInt, mode: FakeTensorMode) -> Tensor:
    if dim is None:
        with mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
    assert tensor.is_contiguous()
    shape: list[Any] = list(tensor.shape)
    shape[dim] = size
    with mode:
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def calls(module: fx.GraphModule) -> list[str]:
    """The names of the operations of a graph, in order."""
    return [
        getattr(node.target, "_opname", None) or node.target.__name__ for node in call_nodes(module)
    ]
