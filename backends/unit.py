"""What a program's names mean: the operations, and the graph whose nodes they are."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import fx

from nanoflow_compiler.graphs import is_ours
from nanoflow_compiler.ir import Launch, Op, OpGraph, OpKind, Program, Read, Span
from nanoflow_compiler.ir.replay import is_order

__all__ = ["Binding", "Unit", "attention_parts", "device_of", "may_overwrite", "takes_part"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A module and its operations; one unit serves every program made of them."""

    graph: OpGraph
    module: fx.GraphModule
    ops: dict[str, Op]
    nodes: dict[str, fx.Node]
    packed: frozenset[str] = frozenset()
    """Inputs that are bound packed for oneDNN; see ``gemms``."""
    fixed: frozenset[str] = frozenset()
    """Inputs that are parameters, or computed of them alone."""
    buffers: frozenset[str] = frozenset()
    """Inputs that belong to the model beside them, such as a static KV cache."""

    @classmethod
    def of(cls, graph: OpGraph, module: fx.GraphModule) -> "Unit":
        """The unit of a lifted module."""
        nodes = {node.name: node for node in module.graph.nodes}
        return cls(graph, module, graph.by_name(), nodes)

    def op_nodes(self, op: Op) -> list[fx.Node]:
        """The operation's nodes in graph order."""
        return [self.nodes[name] for name in op.nodes]

    def data_reads(self, op: Op) -> list[Read]:
        """What the operation reads, without what only orders it."""
        return [read for read in op.reads if not is_order(read.value)]

    def data_writes(self, op: Op) -> list[str]:
        """The tensors and sizes that the operation makes for others."""
        return [name for name in op.writes if not is_order(name)]


@dataclass(frozen=True, slots=True)
class Binding:
    """Which span each read of one launch stands for."""

    spans: dict[tuple[str, bool], Span]
    splits: bool

    @classmethod
    def of(cls, launch: Launch, op: Op) -> "Binding":
        """Reads of the operation and spans of the launch correspond one to one."""
        pairs = zip(op.reads, launch.reads, strict=True)
        return cls({(read.value, read.axis is not None): span for read, span in pairs}, op.splits)

    def span(self, node: fx.Node, arg: fx.Node) -> Span | None:
        """The span that ``node`` sees as ``arg``; None for what the operation makes itself."""
        in_parts = self.splits and node.meta["axis"].reads.get(arg.name) is not None
        return self.spans.get((arg.name, in_parts))


def device_of(unit: Unit) -> torch.device:
    """The GPU that its inputs are on; else the CPU."""
    values = (unit.nodes[name].meta.get("val") for name in unit.graph.inputs)
    places = {value.device for value in values if isinstance(value, torch.Tensor)}
    found = sorted((place for place in places if place.type == "cuda"), key=str)
    return found[0] if found else torch.device("cpu")


def attention_parts(program: Program, unit: Unit) -> tuple[tuple[int, int], ...]:
    """The distinct cell ranges of attention and appends; the whole comes first."""
    kinds = (OpKind.ATTENTION, OpKind.KV_APPEND)
    launches = _launches(program)
    ranges = [(item.first, item.last) for item in launches if unit.ops[item.op].kind in kinds]
    return tuple(dict.fromkeys([(0, program.num_cells), *ranges]))


def _launches(program: Program) -> Iterator[Launch]:
    return (item for item in program.instructions if isinstance(item, Launch))


def takes_part(node: fx.Node) -> bool:
    """Whether the last argument of a node is the part of the step that it works on."""
    return is_ours(node, ("kv_append", "rotary_append", "paged_attention", "attention"))


_SUM = "linear_add"
_NEW = (_SUM, "linear", "gated_linear", "rms_norm")
"""Operators that keep no view of what they read."""


def may_overwrite(node: fx.Node, *, launched: AbstractSet[fx.Node]) -> bool:
    """Whether a sum may take its residual's place in a sequence, behind the nodes that are ``launched``.

    So it is where the residual is a sum as well, and whatever else reads it was launched and keeps no view.
    """
    if not is_ours(node, (_SUM,)):
        return False
    residual = node.args[0]
    assert isinstance(residual, fx.Node)
    others = [user for user in residual.users if user is not node]
    is_last = node.args.count(residual) == 1 and launched >= set(others)
    return is_ours(residual, (_SUM,)) and is_last and all(is_ours(u, _NEW) for u in others)
