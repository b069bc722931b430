"""Python text of a Program: which line computes what, under which name."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.backends.clusters import kernel_name
from nanoflow_compiler.backends.lifetimes import Line, find_deletions
from nanoflow_compiler.backends.packing import packed_addmm, packed_mm
from nanoflow_compiler.backends.unit import (
    Binding,
    Unit,
    attention_parts,
    may_overwrite,
    takes_part,
)
from nanoflow_compiler.graphs import is_handle, is_size, map_nodes, overload, size_hint
from nanoflow_compiler.ir import Launch, Merge, Op, OpKind, Program, Record, Span, Split, Wait
from nanoflow_compiler.ir.replay import is_order

__all__ = ["Function", "Verbatim", "call_text", "literal", "variable", "write_function"]

# Called often enough for the cheaper spelling to be worth a row.
_SHORT = {
    "aten.mm.default": "torch.mm",
    "aten.addmm.default": "torch.addmm",
    "aten.bmm.default": "torch.bmm",
    "aten.reshape.default": "torch.reshape",
    "aten.transpose.int": "torch.transpose",
    "aten.unsqueeze.default": "torch.unsqueeze",
}
_HANDLE = "NO_BYTES"
# What the generated functions call things themselves, as a model may call its arguments.
_TAKEN = {
    "bind",
    "cuts",
    "inputs",
    "lanes",
    "merge",
    "ops",
    "pack",
    "record",
    "run",
    "take",
    "take_dense",
    "torch",
    "use",
    "values",
    "wait",
}
_ALLOCATES = {"mm", "addmm", "bmm", "baddbmm"}
"""ATen calls whose results are in memory of their own, as those of our operators are."""


@dataclass(frozen=True, slots=True)
class Function:
    """Source of ``run(inputs, cuts)``, and what the names in it stand for beside torch."""

    source: str
    names: dict[str, Any]


@dataclass(slots=True)
class _Writer:
    program: Program
    unit: Unit
    kernel_of: Callable[[Op], Any] | None
    num_sms: int | None
    """Of the device, where lanes are streams; None where they are comments."""
    lines: list[Line] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None
    launched: set[fx.Node] = field(default_factory=set)
    lane: int = 0
    sms: dict[int, int] = field(default_factory=dict)
    """What each lane has now."""
    waits: dict[int, list[Wait]] = field(default_factory=dict)
    """To be written when their lane goes on: first it changes to the stream that it goes on with."""

    @property
    def is_sequence(self) -> bool:
        return self.program.num_cells == self.program.num_lanes == 1

    def comment(self, text: str) -> None:
        self.lines.append(Line(f"# {text}"))

    def add(
        self, text: str, *, makes: Sequence[str], uses: Sequence[str], is_fresh: bool = False
    ) -> None:
        lane = 0 if self.num_sms is None else self.lane
        self.lines.append(Line(text, tuple(makes), tuple(uses), lane, is_fresh))

    def event(self, instruction: Record | Wait) -> None:
        """Ordering between lanes."""
        if self.num_sms is None:
            self.comment(str(instruction))
        elif isinstance(instruction, Wait):
            self.waits.setdefault(instruction.lane, []).append(instruction)
        else:
            self.write_waits(instruction.lane)
            text = f"record(lane={instruction.lane}, event={instruction.event})"
            self.lines.append(Line(text, event=instruction))

    def enter(self, lane: int, *, sms: int | None = None) -> None:
        """What follows is on this lane, with so many SMs; None: with what it had before."""
        if self.num_sms is None:
            return
        before = self.sms.get(lane, self.num_sms)
        wanted = sms or before
        if lane != self.lane or wanted != before:
            share = f", sms={wanted}" if wanted < self.num_sms else ""
            self.lines.append(Line(f"use(lane={lane}{share})"))
        self.lane, self.sms[lane] = lane, wanted
        self.write_waits(lane)

    def write_waits(self, lane: int) -> None:
        for wait in self.waits.pop(lane, []):
            text = f"wait(lane={wait.lane}, event={wait.event})"
            self.lines.append(Line(text, event=wait))


def write_function(
    program: Program,
    *,
    unit: Unit,
    kernel_of: Callable[[Op], Any] | None,
    title: str,
    num_sms: int | None = None,
) -> Function:
    """The function of a program; clusters call ``kernel_of(op)``, or are spelled out if None.

    With ``num_sms``, those that the program was planned for, it runs lanes as streams: it is called
    as ``run(inputs, cuts, lanes)`` then.
    """
    writer = _Writer(program, unit, kernel_of, num_sms)
    for instruction in program.instructions:
        match instruction:
            case Launch():
                _launch(writer, instruction)
            case Split():
                _split(writer, instruction)
            case Merge():
                _merge(writer, instruction)
            case Record() | Wait():
                writer.event(instruction)
    writer.write_waits(0)
    return Function(_assemble(writer, title), writer.names)


def variable(name: str, span: Span | None = None) -> str:
    """A Python name for a value, or for some cells of it."""
    clean = re.sub(r"\W", "_", name)
    clean += "_" if clean in _TAKEN else ""
    return clean if span is None or span.dim is None else f"{clean}_c{span.first}_{span.last}"


def _launch(writer: _Writer, launch: Launch) -> None:
    op = writer.unit.ops[launch.op]
    writer.enter(launch.lane, sms=launch.sms)
    _announce(writer, launch, op)
    binding = Binding.of(launch, op)
    if op.kind is OpKind.CLUSTER and writer.kernel_of is not None:
        _cluster(writer, launch, op)
        return
    whole = (launch.first, launch.last) == (0, writer.program.num_cells)
    own = Span("", None if whole else 0, launch.first, launch.last)
    for node in writer.unit.op_nodes(op):
        _node(writer, node, binding, own, launch)


def _announce(writer: _Writer, launch: Launch, op: Op) -> None:
    if op.layer != writer.layer:
        writer.layer = op.layer
        writer.comment("")
        writer.comment(f"layer {op.layer}" if op.layer is not None else "outside the layers")
    cells = f" cells {launch.first}:{launch.last}" if writer.program.num_cells > 1 else ""
    lane = f" on lane {launch.lane}" if writer.program.num_lanes > 1 else ""
    label = f": {op.label}" if op.label else ""
    writer.comment(f"{op.name}{cells}{lane}{label}")


def _cluster(writer: _Writer, launch: Launch, op: Op) -> None:
    assert writer.kernel_of is not None
    kernel = kernel_name(op, writer.unit)
    writer.names[kernel] = writer.kernel_of(op)
    uses = [variable(span.value, span) for span in launch.reads if not is_order(span.value)]
    makes = [variable(span.value, span) for span in launch.writes if not is_order(span.value)]
    targets = ", ".join(makes) + ("," if len(makes) == 1 else "")
    writer.add(f"{targets} = {kernel}([{', '.join(uses)}])", makes=makes, uses=uses)


def _node(writer: _Writer, node: fx.Node, binding: Binding, own: Span, launch: Launch) -> None:
    uses: list[str] = []

    def shown(arg: fx.Node) -> "Verbatim":
        if is_handle(arg):
            return Verbatim(_HANDLE)
        span = binding.span(node, arg)
        name = variable(arg.name, span if span is not None else own)
        uses.append(name)
        return Verbatim(name)

    writer.launched.add(node)
    args, kwargs = map_nodes((node.args, node.kwargs), shown)
    if takes_part(node):
        parts = attention_parts(writer.program, writer.unit)
        args = (*args[:-1], parts.index((launch.first, launch.last)))
    result = variable(node.name, own)
    if any(arg.name in writer.unit.packed for arg in node.all_input_nodes):
        call = _packed_call(node, args, writer.names)
    else:
        call = call_text(node, args, kwargs, names=writer.names)
        if writer.is_sequence and may_overwrite(node, launched=writer.launched):
            call = call.replace("linear_add.default", "linear_add_.default", 1)
    if node.users:
        writer.add(f"{result} = {call}", makes=[result], uses=uses, is_fresh=_allocates(node))
    else:
        writer.add(call, makes=(), uses=uses)


def _allocates(node: fx.Node) -> bool:
    """Whether the result is in new memory for sure, but for sums in place, which only a sequence has."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace == "nanoflow" or target.overloadpacket.__name__ in _ALLOCATES


def _packed_call(node: fx.Node, args: Any, names: dict[str, Any]) -> str:
    gemm = packed_mm if overload(node) is torch.ops.aten.mm else packed_addmm
    return f"{_callee(gemm, gemm.__name__, names)}({', '.join(map(literal, args))})"


class Verbatim(str):
    """Text that is a Python expression already, for :func:`literal` to leave as it is."""

    __slots__ = ()


_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}


def call_text(node: fx.Node, args: Any, kwargs: Any, *, names: dict[str, Any]) -> str:
    """The call of a node on arguments that are Python text; ``names`` gets what it needs beside torch."""
    target = node.target
    name = getattr(target, "__name__", str(target))
    if name == "getitem":
        return f"{literal(args[0])}[{literal(args[1])}]"
    if is_size(node) and name in _OPERATORS and len(args) == 2:
        return f"{literal(args[0])} {_OPERATORS[name]} {literal(args[1])}"
    shown = [literal(arg) for arg in args]
    shown += [f"{key}={literal(value)}" for key, value in kwargs.items()]
    return f"{_callee(target, name, names)}({', '.join(shown)})"


def _callee(target: Any, name: str, names: dict[str, Any]) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return _SHORT.get(str(target), f"ops.{target}")
    unique = f"fn_{name}"
    names[unique] = target
    return unique


def literal(item: Any) -> str:
    """A Python expression for a constant of a graph."""
    if isinstance(item, Verbatim):
        return str(item)
    if isinstance(item, float):
        return repr(item) if isfinite(item) else f'float("{item}")'
    if isinstance(item, list | tuple):
        return _sequence(item)
    if isinstance(item, torch.device):
        return f"torch.device({str(item)!r})"
    if isinstance(item, slice):
        return f"slice({literal(item.start)}, {literal(item.stop)}, {literal(item.step)})"
    return repr(item)


def _sequence(items: list[Any] | tuple[Any, ...]) -> str:
    inner = ", ".join(map(literal, items))
    if isinstance(items, list):
        return f"[{inner}]"
    return f"({inner},)" if len(items) == 1 else f"({inner})"


def _split(writer: _Writer, split: Split) -> None:
    writer.enter(split.lane)
    source, target = split.source, split.target
    cells = (0, writer.program.num_cells) if source.dim is None else (source.first, source.last)
    take = "take_dense" if _needs_copy(writer.unit, target) else "take"
    made, used = variable(target.value, target), variable(source.value, source)
    text = f"{made} = {take}({used}, {target.dim}, cuts, {cells}, {(target.first, target.last)})"
    writer.add(text, makes=[made], uses=[used])


def _needs_copy(unit: Unit, span: Span) -> bool:
    """Rows of a tensor whose tokens are not outermost lie apart, which no kernel was compiled for.

    What is written in place must stay a view.
    """
    readers = [op for op in unit.graph.ops if any(r.value == span.value for r in op.reads)]
    if any(op.kind is OpKind.KV_APPEND for op in readers):
        return False
    value = unit.nodes[span.value].meta["val"]
    own = size_hint(value.stride(span.dim))
    strides = map(size_hint, value.stride())
    outer = [size for size, stride in zip(value.shape, strides, strict=True) if stride > own]
    return any(not isinstance(size, int) or size != 1 for size in outer)


def _merge(writer: _Writer, merge: Merge) -> None:
    writer.enter(merge.lane)
    made = variable(merge.target.value, merge.target)
    used = [variable(span.value, span) for span in merge.sources]
    writer.add(f"{made} = merge([{', '.join(used)}], {merge.dim})", makes=[made], uses=used)


def _assemble(writer: _Writer, title: str) -> str:
    """The function's text, with a ``del`` where what it made is no longer needed by any lane."""
    inputs = [variable(name) for name in writer.program.inputs]
    returned, kept = _returned(writer.unit)
    has_lanes = writer.num_sms is not None
    num_lanes = writer.program.num_lanes if has_lanes else 1
    dead = find_deletions(writer.lines, inputs=inputs, kept=kept, num_lanes=num_lanes)
    unpack = f"    ({', '.join(inputs)},) = inputs" if inputs else "    del inputs"
    head = [f'"""{title}."""', "", ""]
    if has_lanes:
        head += ["def run(inputs, cuts, lanes):", f"    {_LANES}"]
    else:
        head += ["def run(inputs, cuts):"]
    body = _body(writer.lines, dead)
    return "\n".join([*head, unpack, *body, f"    return {returned}", ""])


_LANES = "use, record, wait = lanes.use, lanes.record, lanes.wait"


def _body(lines: Sequence[Line], dead: dict[int, list[str]]) -> Iterator[str]:
    for at, line in enumerate(lines):
        yield "" if line.text == "# " else f"    {line.text}"
        if at in dead:
            yield f"    del {', '.join(dead[at])}"


def _returned(unit: Unit) -> tuple[str, set[str]]:
    kept: set[str] = set()

    def shown(node: fx.Node) -> Verbatim:
        kept.add(variable(node.name))
        return Verbatim(variable(node.name))

    (outputs,) = map_nodes(unit.module.graph.output_node().args, shown)
    return literal(list(outputs)), kept
