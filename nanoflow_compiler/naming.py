"""Names for the placeholders of a graph: those that the model itself uses.

Dumps, programs and generated source show them; nothing is decided by them.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import fx

__all__ = ["input_names", "name_placeholders"]

_INTERNAL = {"L", "G", "self", "kwargs", "_modules", "_parameters", "_buffers"}
_WORD = re.compile(r"[A-Za-z_]\w*|\d+")


def input_names(module: fx.GraphModule) -> list[str]:
    """What Dynamo says of each placeholder of its graph, as a name: ``model_norm_weight``."""
    return [_name(node) for node in module.graph.find_nodes(op="placeholder")]


def name_placeholders(module: fx.GraphModule, names: Sequence[str]) -> list[str]:
    """Rename placeholders in order; what is taken or reserved gets a number. The names they got."""
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, names, strict=True):
        node._rename(name)
        node.target = node.name
    module.recompile()
    return [node.name for node in placeholders]


def _name(node: fx.Node) -> str:
    """``L['self']._modules['norm']._parameters['weight']`` is ``norm_weight``."""
    words = [word for word in _WORD.findall(_source(node)) if word not in _INTERNAL]
    return "_".join(words).strip("_") or node.name


def _source(node: fx.Node) -> str:
    """The expression with which Dynamo finds the value; empty if it keeps none."""
    name: Any = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)  # a method before torch 2.12
