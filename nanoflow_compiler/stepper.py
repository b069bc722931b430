"""Runs one step of the pipeline: time it, check its value, write its dump.

The passes know nothing of this; observing them is not their work.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import fx

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir import NanoGraph, OpGraph, Program, Schedule
from nanoflow_compiler.ir.verify import verify

__all__ = ["StepTime", "Stepper"]

Before = TypeVar("Before")
After = TypeVar("After")
Options = ParamSpec("Options")


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long one step took."""

    name: str
    seconds: float


@verify.register
def _(module: fx.GraphModule, *, where: str) -> None:
    """An FX graph lints, and every node that is used has a value that shapes are read from."""
    try:
        module.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise InvalidProgramError(f"the graph does not lint: {error}", where=where) from error
    for node in module.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            raise InvalidProgramError(f"{node.name} has no value to read shapes from", where=where)


@dataclass(slots=True)
class Stepper:
    """``step(run_pass, value, **options)`` is ``run_pass(value, **options)``, observed."""

    dump: Path | None = None
    times: list[StepTime] = field(default_factory=list)
    _counts: dict[type, Counter[str]] = field(default_factory=dict)
    _written: int = 0

    def __call__(
        self,
        run_pass: Callable[Concatenate[Before, Options], After],
        value: Before,
        *args: Options.args,
        **kwargs: Options.kwargs,
    ) -> After:
        """Run, verify and record one step; a broken value raises, naming the pass."""
        name = run_pass.__name__
        start = time.perf_counter()
        result = run_pass(value, *args, **kwargs)
        verify(result, where=name)
        seconds = time.perf_counter() - start
        self.times.append(StepTime(name, seconds))
        if self.dump is not None:
            difference = self._difference(type(result), _counts(result))
            self.note(name, _text(result), head=difference, seconds=seconds)
        return result

    def _difference(self, kind: type, counts: Counter[str]) -> list[str]:
        """Since the last value of its type: that is what one pass added and removed."""
        before = self._counts.get(kind)
        self._counts[kind] = counts
        return [] if before is None else _difference(before, counts)

    def note(self, name: str, text: str, *, head: Sequence[str] = (), seconds: float = 0.0) -> None:
        """Write one numbered file of the dump, headed by who made it and what changed."""
        if self.dump is None:
            return
        self.dump.mkdir(parents=True, exist_ok=True)
        path = self.dump / f"{self._written:02d}_{name}.txt"
        lines = [f"# {name}: {seconds * 1e3:.1f} ms", *head, text, ""]
        path.write_text("\n".join(lines), encoding="utf-8")
        self._written += 1


def _text(value: Any) -> str:
    if isinstance(value, fx.GraphModule):
        lines = [_node_line(node) for node in value.graph.nodes]
        notes = [f"# {note}" for note in value.meta.get("notes", ())]
        return "\n".join([*notes, *lines])
    return f"{value}\n\n{value.layer_chart()}" if isinstance(value, Schedule) else str(value)


def _node_line(node: fx.Node) -> str:
    axis = node.meta.get("axis")
    tail = f"  # {axis}" if axis else ""
    return f"{node.format_node()}{tail}"


def _counts(value: Any) -> Counter[str]:
    match value:
        case fx.GraphModule():
            return Counter(_target(n) for n in value.graph.nodes if n.op == "call_function")
        case OpGraph():
            return Counter(str(op.kind) for op in value.ops)
        case NanoGraph():
            return Counter(str(op.op.kind) for op in value.ops)
        case Schedule():
            return Counter(f"lane {slot.lane}" for slot in value.slots)
        case Program():
            return Counter(type(item).__name__.lower() for item in value.instructions)
    return Counter()


def _target(node: fx.Node) -> str:
    """The operator, without the address that a Python function prints."""
    operator = isinstance(node.target, torch._ops.OpOverload)
    return str(node.target) if operator else str(getattr(node.target, "__name__", node.target))


def _difference(before: Counter[str], after: Counter[str]) -> list[str]:
    """``+2 aten.mm`` lines for what the step added and removed, by name."""
    names = sorted(set(before) | set(after))
    changes = [(name, after[name] - before[name]) for name in names]
    return [f"# {change:+d} {name}" for name, change in changes if change]
