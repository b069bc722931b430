"""Which GEMMs of a program run on packed weights on a CPU."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from nanoflow_compiler.backends.gemm_timing import GemmShape, time_packed
from nanoflow_compiler.backends.packing import can_pack
from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.config import GemmMode
from nanoflow_compiler.graphs import overload
from nanoflow_compiler.hardware import available_memory_bytes

__all__ = ["GemmChoice", "choose_packed"]

_LOG = logging.getLogger(__name__)
_aten = torch.ops.aten
_WEIGHT_AT = {_aten.mm: 1, _aten.addmm: 2}
_FEWEST_BYTES = 256 << 10
"""A weight that stays in the cache of a core is read fast in any layout."""


@dataclass(frozen=True, slots=True)
class GemmChoice:
    """How the GEMMs of a program run."""

    packed: frozenset[str] = frozenset()
    """Inputs that are to be bound packed."""
    measured: tuple[GemmShape, ...] = ()
    """What the choice was measured on."""


def choose_packed(unit: Unit, *, fixed: frozenset[str], mode: GemmMode) -> GemmChoice:
    """The inputs of a program that are to be bound packed.

    ``fixed`` are the inputs made of parameters alone. ``auto`` takes those that measured faster,
    and none where the copies would not fit into half of the memory that is free; so does ``measure``,
    whose own measurements are on a GPU.
    """
    if mode == "aten":
        return GemmChoice()
    found = {name: unit.nodes[name].meta["val"] for name in _candidates(unit, fixed)}
    if mode == "packed":
        return GemmChoice(frozenset(found))
    large = {name: value for name, value in found.items() if value.nbytes >= _FEWEST_BYTES}
    needed, free = sum(value.nbytes for value in large.values()), available_memory_bytes()
    if needed > free / 2:
        _LOG.info("GEMM weights stay as they are: %d bytes to pack, %d are free", needed, free)
        return GemmChoice()
    shapes = {name: GemmShape.of(value) for name, value in large.items()}
    packed = frozenset(name for name, shape in shapes.items() if time_packed(shape).is_worth_it)
    return GemmChoice(packed, tuple(dict.fromkeys(shapes.values())))


def _candidates(unit: Unit, fixed: frozenset[str]) -> Iterator[str]:
    """Inputs that nothing reads but GEMMs, as their right operand."""
    for name in unit.graph.inputs:
        node = unit.nodes[name]
        if name in fixed and node.users and all(_packs(user, node) for user in node.users):
            yield name


def _packs(user: fx.Node, weight: fx.Node) -> bool:
    position = _WEIGHT_AT.get(overload(user))
    if position is None or user.kwargs or user.args[position] is not weight:
        return False
    value = weight.meta["val"]
    plain = value.device.type == "cpu" and can_pack(value.dtype)
    fixed = all(isinstance(size, int) for size in value.shape)
    others = [arg for at, arg in enumerate(user.args) if at != position]
    return plain and fixed and weight not in others and (position == 1 or _is_row(user.args[0]))


def _is_row(bias: object) -> bool:
    return isinstance(bias, fx.Node) and bias.meta["val"].ndim == 1
