"""Values of a program's inputs, from what a call of the graph is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.graphs import map_nodes
from nanoflow_compiler.merging import merge_rows

__all__ = ["InputBinder"]


class InputBinder:
    """Turns the values of placeholders into those of ``inputs``.

    What depends on parameters alone (``bound``: views and merges) is evaluated for the first
    call, and again only when a parameter's memory is no longer where it was, or, where a merge
    had to copy, when a parameter was written to.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        *,
        inputs: Sequence[str],
        weights: Sequence[str],
        bound: Sequence[fx.Node],
    ) -> None:
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        self._positions = {name: at for at, name in enumerate(names)}
        self._weights = [self._positions[name] for name in weights]
        self._bound = list(bound)
        self._fixed = {
            node.name: getattr(module, str(node.target))
            for node in module.graph.find_nodes(op="get_attr")
        }
        self._inputs = list(inputs)
        self._key: tuple[int, ...] | None = None
        self._template: list[Any] = []
        self._live = [
            (at, self._positions[name])
            for at, name in enumerate(inputs)
            if name in self._positions and name not in set(weights)
        ]
        self._watched: list[int] = []

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """The inputs' values in order."""
        if self._state(values) != self._key:
            self._bind(values)
        result = self._template.copy()
        for at, position in self._live:
            result[at] = values[position]
        return result

    def _state(self, values: Sequence[Any]) -> tuple[int, ...]:
        places = tuple([values[at].data_ptr() for at in self._weights])
        return places + tuple([values[at]._version for at in self._watched])

    def _bind(self, values: Sequence[Any]) -> None:
        env = {name: values[at] for name, at in self._positions.items()} | self._fixed
        self._watched = []
        for node in self._bound:
            args, kwargs = map_nodes((node.args, node.kwargs), lambda arg: env[arg.name])
            with torch.no_grad():
                env[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
            if node.target is merge_rows and env[node.name].data_ptr() != args[0][0].data_ptr():
                self._watched += [self._positions[arg.name] for arg in node.all_input_nodes]
        self._template = [env[name] for name in self._inputs]
        self._key = self._state(values)
