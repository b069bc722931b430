"""Single nodes on which ``axis`` is tried: built, annotated, and run on any range of their rows.

A :class:`Case` is one call of an operator. Its operands say where the tokens are; :func:`trace` makes
an fx graph of it, and :func:`check_rows` compares every TOKEN node of an annotated graph, run on each
range of rows with operands cut as the node says, with the same rows of what it computes on the whole.
"""

import itertools
import operator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_map_only

from nanoflow_compiler.graphs import call_nodes, is_size, map_nodes
from nanoflow_compiler.rows import Rows, Status

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """A tensor; ``dim``, where it is not None, has ``multiple`` entries for each token."""

    value: torch.Tensor
    dim: int | None = None
    multiple: int = 1
    is_seed: bool = True
    """Whether the graph is told so; a mask of that size is cut without having been a seed."""


@dataclass(frozen=True)
class Size:
    """``multiple`` times the tokens, as an argument: a number, or a node where sizes are symbols."""

    multiple: int = 1


@dataclass
class Case:
    """One call; ``mixes`` says that its rows depend on each other, so that it must be a join."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tokens: int = 2
    mixes: bool = False


@dataclass
class Traced:
    module: fx.GraphModule
    seeds: list[tuple[str, int]]
    inputs: dict[str, Any]
    node: fx.Node
    """The call itself."""


class _Tracer:
    def __init__(self, case: Case, *, symbolic: bool) -> None:
        self.case = case
        shapes = ShapeEnv() if symbolic else None
        # With numbers for sizes the real tensors say all that a fake one would, and faster.
        self.mode = FakeTensorMode(shape_env=shapes) if symbolic else nullcontext()
        self.tokens: Any = case.tokens if shapes is None else _symbol(shapes, case.tokens)
        self.symbolic = symbolic
        self.graph = fx.Graph()
        self.seeds: list[tuple[str, int]] = []
        self.inputs: dict[str, Any] = {}
        self.made: dict[int, fx.Node] = {}

    def input(self, value: Any, fake: Any) -> fx.Node:
        node = self.graph.placeholder(f"arg{len(self.inputs)}")
        node.meta["val"] = fake
        self.inputs[node.name] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        fakes = map_nodes((node.args, node.kwargs), lambda arg: arg.meta["val"])
        with self.mode, enable_python_dispatcher() if self.symbolic else nullcontext():
            node.meta["val"] = target(*fakes[0], **fakes[1])
        return node

    def tensor(self, given: Operand) -> fx.Node:
        """A placeholder; with a multiple, one with the tokens in a dimension of their own, folded."""
        value, dim = given.value, given.dim
        shape: list[Any] = list(value.shape)
        if dim is None:
            return self.input(value, self._fake(shape, value))
        shape[dim : dim + 1] = [self.tokens, given.multiple][: 1 + (given.multiple > 1)]
        actual = [self.case.tokens if size is self.tokens else size for size in shape]
        node = self.input(value.reshape(actual), self._fake(shape, value))
        if given.is_seed:
            self.seeds.append((node.name, dim))
        if given.multiple == 1:
            return node
        folded: list[Any] = list(value.shape)
        folded[dim] = self.size(Size(given.multiple), source=(node, dim))
        return self.call(aten.reshape.default, node, folded)

    def size(self, size: Size, *, source: tuple[fx.Node, int] | None = None) -> Any:
        if not self.symbolic:
            return self.case.tokens * size.multiple
        holder, dim = source or self._holder()
        node = self.call(aten.sym_size.int, holder, dim)
        return node if size.multiple == 1 else self.call(operator.mul, node, size.multiple)

    def _holder(self) -> tuple[fx.Node, int]:
        name, dim = self.seeds[0]
        return next(node for node in self.graph.nodes if node.name == name), dim

    def _fake(self, shape: list[Any], like: torch.Tensor) -> torch.Tensor:
        if not self.symbolic:
            return like.reshape(shape)
        with self.mode:
            return torch.empty(shape, dtype=like.dtype)

    def argument(self, item: Any) -> Any:
        match item:
            case Operand():  # given twice it is the same node
                if id(item) not in self.made:
                    self.made[id(item)] = self.tensor(item)
                return self.made[id(item)]
            case Size():
                return self.size(item)
            case list() | tuple():
                return type(item)(map(self.argument, item))
        return item


def _symbol(shapes: ShapeEnv, hint: int) -> torch.SymInt:
    source = ConstantSource("tokens")
    symbol = shapes.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    size = shapes.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def trace(case: Case, *, symbolic: bool = False) -> Traced:
    """The graph of one call, its seeds and its inputs; all sizes but the tokens are numbers."""
    tracer = _Tracer(case, symbolic=symbolic)
    args = tracer.argument(case.args)
    kwargs = {name: tracer.argument(item) for name, item in case.kwargs.items()}
    node = tracer.call(case.target, *args, **kwargs)
    tracer.graph.output((node,))
    module = fx.GraphModule(torch.nn.Module(), tracer.graph)
    return Traced(module, tracer.seeds, tracer.inputs, node)


def run_nodes(module: fx.GraphModule, inputs: dict[str, Any]) -> dict[str, Any]:
    """The value of every node; what is written in place is a copy."""
    env = dict(inputs)
    for node in call_nodes(module):
        env[node.name] = _call(node, lambda arg: env[arg.name])
    return env


def _call(node: fx.Node, value: Any) -> Any:
    args, kwargs = map_nodes((node.args, node.kwargs), value)
    args = tree_map_only(torch.Tensor, torch.clone, args)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def cut(value: Any, rows: Any, tokens: int, start: int, end: int) -> Any:
    """The rows of some tokens, of a tensor or of each in a tuple; without rows the whole."""
    if isinstance(value, list | tuple):
        each = rows if isinstance(rows, tuple) else [None] * len(value)
        return [cut(item, at, tokens, start, end) for item, at in zip(value, each, strict=True)]
    if rows is None:
        return value
    multiple, rest = divmod(value.shape[rows.dim], tokens)
    assert rest == 0
    return value.narrow(rows.dim, start * multiple, (end - start) * multiple)


def check_rows(
    module: fx.GraphModule,
    env: dict[str, Any],
    *,
    tokens: int,
    most: int = 8,
    tolerance: float = 1e-9,
) -> int:
    """Compare ranges of rows of every TOKEN node with the whole; the number of nodes compared."""
    ranges = list(itertools.combinations(range(tokens + 1), 2))
    kept = ranges[:: -(-len(ranges) // most)]
    count = 0
    for node in call_nodes(module):
        mark = node.meta["axis"]
        if mark.status is not Status.TOKEN:
            continue
        count += 1
        for start, end in kept:
            _check_range(node, env, (tokens, start, end), tolerance)
    return count


def _check_range(
    node: fx.Node, env: dict[str, Any], span: tuple[int, int, int], tolerance: float
) -> None:
    tokens, start, end = span
    mark = node.meta["axis"]

    def part(arg: fx.Node) -> Any:
        if is_size(arg):
            return env[arg.name]
        rows = mark.reads[arg.name]
        if isinstance(env[arg.name], list | tuple):
            rows = arg.meta["axis"].rows  # elements are cut where they were made
        return cut(env[arg.name], rows, tokens, start, end)

    actual = _call(node, part)
    expected = cut(env[node.name], mark.rows, tokens, start, end)
    for made, wanted in _pairs(actual, expected, mark.rows):
        if made.dtype == wanted.dtype and torch.equal(made, wanted):
            continue  # the common case; what follows is slow and speaks
        torch.testing.assert_close(
            made,
            wanted,
            rtol=max(tolerance, 1e-5 if wanted.dtype is torch.float32 else 0.0),
            atol=tolerance,
            equal_nan=True,
            msg=lambda text: f"{node.format_node()} {mark}, tokens {start}:{end}\n{text}",
        )


def _pairs(actual: Any, expected: Any, rows: Any) -> list[tuple[Any, Any]]:
    """What has rows; an element without them (a random state) is never compared."""
    if isinstance(actual, list | tuple):
        found = zip(actual, expected, rows, strict=True)
        return [(made, wanted) for made, wanted, at in found if at is not None]
    return [(actual, expected)] if isinstance(rows, Rows) else []
