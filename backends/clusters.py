"""Clusters as kernels: the nodes of an operation, compiled by Inductor for any number of tokens.

A cluster is traced anew on fake inputs of its own, in which the token axis is a fresh symbol, so
one kernel serves the whole and every part. What comes back is the ``call(args)`` of Inductor's
generated module: a list of tensors (emptied by the call) to a tuple.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.graphs import is_size, size_expr, size_hint, symbol_hint
from nanoflow_compiler.ir import Op, Read
from nanoflow_compiler.rows import NodeAxis, Rows

__all__ = ["Kernels", "cluster_module"]

Kernel = Callable[[list[Any]], tuple[Any, ...]]


@dataclass(slots=True)
class Kernels:
    """Compiled clusters by signature; equal clusters of any layer or program compile once."""

    compiled: dict[str, Kernel] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def get(self, op: Op, unit: Unit) -> Kernel:
        """The kernel of a cluster."""
        if op.signature not in self.compiled:
            with unset_fake_temporarily(), torch.no_grad():
                kernel, source = _compile(op, unit)
            self.compiled[op.signature] = kernel
            self.sources[op.signature] = source
        return self.compiled[op.signature]


def cluster_module(op: Op, unit: Unit) -> fx.GraphModule:
    """The nodes of an operation as a module from its data reads to its data writes."""
    graph = fx.Graph()
    env: dict[tuple[str, bool], fx.Node] = {}
    for at, read in enumerate(unit.data_reads(op)):
        env[read.value, read.axis is not None] = graph.placeholder(f"arg{at}_{read.value}")
    made: dict[fx.Node, fx.Node] = {}
    for node in unit.op_nodes(op):
        ways = node.meta["axis"].reads if op.splits else {}

        def seen(arg: fx.Node, ways: dict[str, Any] = ways) -> fx.Node:
            return made[arg] if arg in made else env[arg.name, ways.get(arg.name) is not None]

        made[node] = graph.node_copy(node, seen)
    graph.output(tuple(made[unit.nodes[name]] for name in unit.data_writes(op)))
    return fx.GraphModule(torch.nn.Module(), graph)


def _compile(op: Op, unit: Unit) -> tuple[Kernel, str]:
    module = cluster_module(op, unit)
    fakes = _Fakes(unit.graph.tokens)
    inputs = [
        fakes.input(unit.nodes[read.value], _rows(read, op, unit)) for read in unit.data_reads(op)
    ]
    with fakes.mode, tracing(TracingContext(fakes.mode)):
        traced = make_fx(module, decomposition_table=select_decomp_table())(*inputs)
        output = traced.graph.output_node()
        returned: Any = output.args[0]
        output.meta["user_visible_output_idxs"] = list(range(len(returned)))
        compiled = compile_fx_inner(traced, inputs)
    call = getattr(compiled, "current_callable", None) or compiled
    return call, str(getattr(compiled, "source_code", ""))


def _rows(read: Read, op: Op, unit: Unit) -> Rows | None:
    """Where the rows are in what an operation reads in parts."""
    if read.axis is None:
        return None
    axes: Iterator[NodeAxis] = (node.meta["axis"] for node in unit.op_nodes(op))
    found = (axis.reads.get(read.value) for axis in axes)
    return next(rows for rows in found if rows is not None)


class _Fakes:
    """Fake inputs in a shape environment of their own."""

    def __init__(self, tokens: int) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)
        self.symbols: dict[sympy.Symbol, torch.SymInt] = {}
        self.tokens = self._fresh("tokens", max(tokens, 2))

    def input(self, node: fx.Node, rows: Rows | None) -> Any:
        """A stand-in for what a cluster reads, whole or at ``rows``."""
        value = node.meta["val"]
        if is_size(node):
            return self.size(value)
        sizes = [self.size(size) for size in value.shape]
        strides = [self.size(stride) for stride in value.stride()]
        if rows is not None:
            sizes, strides = self._in_rows(value, rows, sizes, strides)
        with self.mode:
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    def size(self, size: Any) -> Any:
        """The same size over symbols of this environment; numbers stay numbers."""
        if not isinstance(size, torch.SymInt):
            return size
        for symbol in size_expr(size).free_symbols:
            if symbol not in self.symbols:
                self.symbols[symbol] = self._fresh(str(symbol), symbol_hint(size, symbol))
        return self._evaluate(size_expr(size))

    def _evaluate(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        return sympy_interp(PythonReferenceAnalysis, dict(self.symbols), expr)

    def _in_rows(
        self, value: torch.Tensor, rows: Rows, sizes: list[Any], strides: list[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Sizes and strides for any number of tokens, not just that of the trace.

        A stride beyond the token axis spans all of its rows, so it grows with them.
        """
        extent = value.shape[rows.dim]
        sizes[rows.dim] = self._evaluate(rows.multiple) * self.tokens
        inner = size_hint(value.stride(rows.dim))
        for dim, stride in enumerate(value.stride()):
            if dim != rows.dim and size_hint(stride) > inner:
                span = sympy.cancel(size_expr(stride) / size_expr(extent))
                strides[dim] = self._evaluate(span) * sizes[rows.dim]
        return sizes, strides

    def _fresh(self, name: str, hint: int) -> torch.SymInt:
        source = ConstantSource(f"nanoflow_{name}")
        symbol = self.shapes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        size = self.shapes.create_symintnode(symbol, hint=hint, source=source)
        assert isinstance(size, torch.SymInt)
        return size
