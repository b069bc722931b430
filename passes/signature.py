"""Signatures: equal for groups of nodes that compute the same function of like inputs."""

import hashlib
from typing import Any

import torch
from torch import fx

from nanoflow_compiler.ir import Read
from nanoflow_compiler.passes.grouping import Group

__all__ = ["signature_of"]

_LAYER_ARGUMENT = {"kv_append": 2, "paged_attention": 2, "attention": 3, "rotary_append": 5}


def signature_of(group: Group, reads: tuple[Read, ...]) -> str:
    """A hash of targets, constants, wiring, and the layout of what is read; 12 hex digits.

    Nodes count by position and inputs by order of first use, so names play no part; nor does
    the layer number of attention, which only says whose cache it uses.
    """
    local: dict[fx.Node, str] = {node: f"n{at}" for at, node in enumerate(group.nodes)}
    inputs: dict[fx.Node, str] = {}
    lines = [str(group.kind), str(group.splits)]
    for node in group.nodes:
        for arg in node.all_input_nodes:
            if arg not in local and arg not in inputs:
                inputs[arg] = f"i{len(inputs)}:{_layout(arg)}"
        names = local | inputs
        lines.append(f"{node.target}{_arguments(node, names)}")
    lines.append(str([str(read.axis) for read in reads]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _arguments(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args = list(node.args)
    layer = _LAYER_ARGUMENT.get(getattr(node.target, "_opname", ""))
    if layer is not None and str(node.target).startswith("nanoflow"):
        args[layer] = None

    def shown(item: Any) -> Any:
        return names[item] if isinstance(item, fx.Node) else repr(item)

    return str(fx.node.map_aggregate((tuple(args), dict(node.kwargs)), shown))


def _layout(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(map(str, value.shape))}{tuple(map(str, value.stride()))}"
    return f"{type(value).__name__} {value}"
