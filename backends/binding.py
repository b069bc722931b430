"""Values of a program's inputs, from what a call of the graph is given.

What depends on parameters alone, views, merges and packed copies of them, is a function of its own:
readable Python as the program is, and run once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.backends.packing import num_writes, pack
from nanoflow_compiler.backends.source import Verbatim, call_text, variable
from nanoflow_compiler.graphs import map_nodes
from nanoflow_compiler.merging import are_adjacent, merge_rows

__all__ = ["InputBinder", "InputLayout", "write_binding"]


@dataclass(frozen=True, slots=True)
class InputLayout:
    """How the inputs of a program come from the placeholders of its graph; all by position."""

    source: str
    """``bind(values)``: the inputs, where ``values`` are those of all placeholders."""
    weights: tuple[int, ...]
    """Placeholders that are parameters."""
    merged: tuple[tuple[int, ...], ...]
    """Parameters that each merge joins."""
    packed: tuple[int, ...]
    """Parameters of which packed inputs are made."""
    live: tuple[tuple[int, int], ...]
    """Inputs, with their placeholders, that differ from call to call."""


def write_binding(
    module: fx.GraphModule,
    *,
    inputs: Sequence[str],
    weights: Sequence[str],
    bound: Sequence[fx.Node],
    packed: frozenset[str] = frozenset(),
) -> tuple[InputLayout, dict[str, Any]]:
    """The layout of ``inputs``, and what the names in its source stand for beside torch.

    Inputs in ``packed`` are bound in the layout of packed GEMMs.
    """
    placeholders = [node.name for node in module.graph.find_nodes(op="placeholder")]
    at = {name: position for position, name in enumerate(placeholders)}
    names = {
        variable(node.name): getattr(module, str(node.target))
        for node in module.graph.find_nodes(op="get_attr")
    }
    lines = [_line(node, names) for node in bound]
    if packed:
        names[pack.__name__] = pack
    merges = [node for node in bound if node.target is merge_rows]
    origins = {name: _origins(module, name) for name in inputs if name in packed}
    layout = InputLayout(
        source=_source(placeholders, lines, inputs, origins),
        weights=tuple(at[name] for name in weights),
        merged=tuple(tuple(at[arg.name] for arg in node.all_input_nodes) for node in merges),
        packed=tuple(sorted({at[name] for made_of in origins.values() for name in made_of})),
        live=tuple(
            (index, at[name])
            for index, name in enumerate(inputs)
            if name in at and name not in set(weights)
        ),
    )
    return layout, names


def _origins(module: fx.GraphModule, name: str) -> list[str]:
    """The placeholders that a node is made of."""
    found: list[str] = []
    pending = [node for node in module.graph.nodes if node.name == name]
    while pending:
        node = pending.pop()
        pending += node.all_input_nodes
        if node.op == "placeholder":
            found.append(node.name)
    return found


def _line(node: fx.Node, names: dict[str, Any]) -> str:
    def shown(arg: fx.Node) -> Verbatim:
        return Verbatim(variable(arg.name))

    args, kwargs = map_nodes((node.args, node.kwargs), shown)
    return f"{variable(node.name)} = {call_text(node, args, kwargs, names=names)}"


def _source(
    placeholders: Sequence[str],
    lines: Sequence[str],
    inputs: Sequence[str],
    packed: Mapping[str, Sequence[str]],
) -> str:
    """``packed`` says of which placeholders a packed input is made."""

    def shown(name: str) -> str:
        if name not in packed:
            return variable(name)
        made_of = ", ".join(map(variable, packed[name]))
        return f"pack({variable(name)}, made_of=[{made_of}])"

    given = [f"    ({', '.join(map(variable, placeholders))},) = values"] if placeholders else []
    body = [*given, *(f"    {line}" for line in lines)]
    head = '"""Inputs of a program: views, merges and packed copies of parameters, made once."""'
    result = f"    return [{', '.join(map(shown, inputs))}]"
    return "\n".join([head, "", "", "def bind(values):", *body, result, ""])


class InputBinder:
    """Turns the values of placeholders into those of a program's inputs.

    ``bind`` runs for the first call, and again only when a parameter's memory is no longer where
    it was, or, where it was copied to be merged or packed, when a parameter was written to.
    """

    def __init__(self, layout: InputLayout, names: dict[str, Any]) -> None:
        self.layout = layout
        self.names = names
        namespace: dict[str, Any] = {"torch": torch, "ops": torch.ops, **names}
        exec(compile(layout.source, "<nanoflow binding>", "exec"), namespace)
        self._bind = namespace["bind"]
        self._key: tuple[int, ...] | None = None
        self._template: list[Any] = []
        self._watched: list[int] = []

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """The inputs' values in order."""
        self.bind(values)
        return self.fill(values)

    def bind(self, values: Sequence[Any]) -> None:
        """View, merge and pack the parameters, unless that was done of just these."""
        if self._state(values) != self._key:
            self.rebind(values)

    def fill(self, values: Sequence[Any]) -> list[Any]:
        """As a call, for who knows that no parameter was written to or moved."""
        result = self._template.copy()
        for index, position in self.layout.live:
            result[index] = values[position]
        return result

    def rebind(self, values: Sequence[Any]) -> None:
        """View, merge and pack the parameters anew."""
        # What is made in inference mode could never be trained again.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._template = self._bind(values)
        copied = [m for m in self.layout.merged if not are_adjacent([values[at] for at in m])]
        self._watched = [*self.layout.packed, *(at for merge in copied for at in merge)]
        self._key = self._state(values)

    def _state(self, values: Sequence[Any]) -> tuple[int, ...]:
        places = tuple([values[at].data_ptr() for at in self.layout.weights])
        return places + tuple([num_writes(values[at]) for at in self._watched])
