"""Clusters as kernels: the nodes of an operation, compiled by Inductor for any number of tokens.

A cluster is traced anew on fake inputs of its own, in which the token axis is a fresh symbol, so
one kernel serves the whole and every part. What comes back takes a list of tensors (and may empty
it) to a tuple. Where Inductor assumed something about sizes, the kernel checks it in each call, and
where that does not hold, or nothing could be compiled, the nodes run as they are.
"""

import hashlib
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from nanoflow_compiler.backends.fakes import TOKENS, Fakes
from nanoflow_compiler.backends.layouts import BoundLayouts, Layout, bind_symbols, python_text
from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.graphs import is_size, shape_of, size_expr, size_hint, strides_of
from nanoflow_compiler.ir import Op, Read
from nanoflow_compiler.rows import NodeAxis, Rows

__all__ = ["Kernels", "cluster_module", "kernel_name", "load_kernel"]

Kernel = Callable[[list[Any]], tuple[Any, ...]]


@dataclass(slots=True)
class Kernels:
    """Compiled clusters by name; equal clusters of any layer or program compile once."""

    compiled: dict[str, Kernel] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    portable: set[str] = field(default_factory=set)
    """Kernels that are all in their source; see :func:`load_kernel`."""

    def get(self, op: Op, unit: Unit) -> Kernel:
        """The kernel of a cluster."""
        name = kernel_name(op, unit)
        if name not in self.compiled:
            with unset_fake_temporarily(), torch.no_grad():
                made = _make(op, unit)
            self.compiled[name], self.sources[name] = made.kernel, made.source
            if made.portable:
                self.portable.add(name)
        return self.compiled[name]


def load_kernel(source: str) -> Kernel:
    """A portable kernel from its source; its machine code comes from Inductor's cache if it can."""
    module: Any = PyCodeCache.load(source)
    kernel: Kernel = module.kernel
    return kernel


def kernel_name(op: Op, unit: Unit) -> str:
    """One name for clusters that compute the same and return the same of it.

    The last norm of a model is like all others, but nobody adds to its input any more.
    """
    returned = [op.nodes.index(name) for name in unit.data_writes(op)]
    digest = hashlib.sha256(f"{op.signature} {returned}".encode()).hexdigest()
    return f"cluster_{digest[:12]}"


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


@dataclass(frozen=True, slots=True)
class _Made:
    kernel: Kernel
    source: str
    portable: bool


def _make(op: Op, unit: Unit) -> _Made:
    module = cluster_module(op, unit)
    try:
        return _compile(module, op, unit)
    except (UnsupportedGraphError, InductorError) as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"{op.name} ({op.label}) runs uncompiled: {reason}", stacklevel=2)
        return _Made(_uncompiled(module), module.code, portable=False)


def _compile(module: fx.GraphModule, op: Op, unit: Unit) -> _Made:
    reads = unit.data_reads(op)
    values = [unit.nodes[read.value].meta["val"] for read in reads]
    wanted = [unit.nodes[name].meta["val"] for name in unit.data_writes(op)]
    bound = bind_symbols([_layout(unit.nodes[r.value], _rows(r, op, unit)) for r in reads])

    def as_planned(*args: Any) -> tuple[Any, ...]:
        return tuple(map(_laid_out_as, module(*args), wanted))

    fakes = Fakes(values, tokens=unit.graph.tokens)
    inputs = [fakes.like(v, layout) for v, layout in zip(values, bound.layouts, strict=True)]
    sizes = [fakes.size(symbol) for symbol in bound.places]
    with fakes.mode, tracing(TracingContext(fakes.mode)):
        traced = make_fx(as_planned, decomposition_table=select_decomp_table())(*inputs)
        _append_sizes(traced, sizes)
        output = traced.graph.output_node()
        returned: Any = output.args[0]
        output.meta["user_visible_output_idxs"] = list(range(len(returned)))
        compiled = compile_fx_inner(traced, [*inputs, *sizes])
    call = getattr(compiled, "current_callable", None) or compiled
    assumed = _assumed(bound, fakes)
    fallback = _uncompiled_source(module) if assumed else ""
    text = f"{fallback or ''}{_entry(bound, assumed)}"
    names = {"call": call, "uncompiled": _uncompiled(module)}
    exec(text, names)
    source = str(getattr(compiled, "source_code", ""))
    alone = source and fallback is not None and not getattr(compiled, "constants", None)
    return _Made(names["kernel"], f"{source}\n\n{text}", portable=bool(alone))


def _assumed(bound: BoundLayouts, fakes: Fakes) -> list[str]:
    fresh = {fakes.size(symbol).node.expr: place for symbol, place in bound.places.items()}
    return [python_text(guard, fresh) for guard in fakes.guards]


def _entry(bound: BoundLayouts, assumed: list[str]) -> str:
    """Python that calls Inductor's ``call`` with the sizes that it takes, where its assumptions hold."""
    sizes = "".join(f", {place}" for place in bound.places.values())
    guards = [f"    if not ({guard}):\n        return uncompiled(args)\n" for guard in assumed]
    return f"def kernel(args):\n{''.join(guards)}    return call([*args{sizes}])\n"


def _uncompiled(module: fx.GraphModule) -> Kernel:
    return lambda args: module(*args)


_NAMED = frozenset({"torch", "device", "inf", "nan", "NoneType", "pytree", "fx_pytree"})
"""What fx offers the code of any module; the first four are what nodes on flat arguments use."""


def _uncompiled_source(module: fx.GraphModule) -> str | None:
    """The same as text, a function ``uncompiled``; None for nodes that are more than their text."""
    code = module.graph.python_code("self")
    if module.graph.find_nodes(op="get_attr") or not code.globals.keys() <= _NAMED:
        return None
    imports = "import torch\nfrom math import inf, nan\nfrom torch import device\n"
    body = textwrap.indent(f"{imports}\n{code.src.strip()}\n\nreturn forward", "    ")
    return (
        f"def _make():\n{body}\n\n\n_forward = _make()\n\n\n"
        "def uncompiled(args):\n    return _forward(None, *args)\n\n\n"
    )


def _laid_out_as(made: Any, wanted: Any) -> Any:
    """What a cluster makes, in the memory layout that its readers were planned for.

    Decompositions may keep another one than the operation itself does.
    """
    if not isinstance(wanted, torch.Tensor):
        return made
    strides = [size_hint(stride) for stride in wanted.stride()]
    matter = [dim for dim, size in enumerate(wanted.shape) if size_hint(size) != 1]
    if all(size_hint(made.stride(dim)) == strides[dim] for dim in matter):
        return made
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    back = sorted(range(len(order)), key=order.__getitem__)
    return made.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def _append_sizes(module: fx.GraphModule, sizes: list[Any]) -> None:
    """Placeholders for sizes: with them Inductor keeps in its cache what it assumed of each."""
    graph = module.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for at, size in enumerate(sizes):
            graph.placeholder(f"size{at}").meta["val"] = size
    module.recompile()


def _rows(read: Read, op: Op, unit: Unit) -> Rows | None:
    """Where the rows are in what an operation reads in parts."""
    if read.axis is None:
        return None
    axes: Iterator[NodeAxis] = (node.meta["axis"] for node in unit.op_nodes(op))
    found = (axis.reads.get(read.value) for axis in axes)
    return next(rows for rows in found if rows is not None)


def _layout(node: fx.Node, rows: Rows | None) -> Layout:
    """What a cluster reads, whole or at ``rows``: then for any number of tokens.

    A stride beyond the token axis spans all of its rows, so it grows with them. That of a single
    entry means nothing: it is what a contiguous tensor has, and tells no one a size.
    """
    value = node.meta["val"]
    if is_size(node):
        return Layout((size_expr(value),), None)
    sizes, strides = list(shape_of(node)), list(strides_of(node))
    if rows is not None:
        extent = sizes[rows.dim]
        span = size_hint(value.stride(rows.dim)) * size_hint(value.shape[rows.dim])
        sizes[rows.dim] = rows.multiple * TOKENS
        for dim, stride in enumerate(strides):
            if dim != rows.dim and sizes[dim] != 1 and 0 < span <= size_hint(value.stride(dim)):
                strides[dim] = stride / extent * sizes[rows.dim]
    for dim in reversed(range(len(sizes))):
        if sizes[dim] == 1:
            last = dim + 1 == len(sizes)
            strides[dim] = sizes[dim] if last else sizes[dim + 1] * strides[dim + 1]
    return Layout(tuple(sizes), tuple(strides))
