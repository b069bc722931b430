"""GEMMs on a CPU: ATen's, or oneDNN's on weights that are packed once, whichever is faster here.

ATen's ``mm`` reads a weight as the checkpoint has it. oneDNN reorders it once into the blocks that its
kernels load; that pays most for the few rows of a decode step, where reading weights is all of the time.
How much depends on the machine, so ``auto`` measures both, once for each shape of weight.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

from nanoflow_compiler.backends.unit import Unit
from nanoflow_compiler.config import GemmMode
from nanoflow_compiler.graphs import overload
from nanoflow_compiler.hardware import available_memory_bytes

__all__ = ["can_pack", "choose_packed", "num_writes", "pack", "packed_addmm", "packed_mm"]

_LOG = logging.getLogger(__name__)
_aten = torch.ops.aten
_WEIGHT_AT = {_aten.mm: 1, _aten.addmm: 2}
_FEWEST_BYTES = 256 << 10
"""A weight that stays in the cache of a core is read fast in any layout."""
_COLD_BYTES = 64 << 20
"""Weights that a measurement walks through: more than the caches hold, as in a model."""
_MEASURED_COLUMNS = 8192
_MEASURED_ROWS = (1, 4, 16)
_WORTH = 0.95
"""Share of ATen's time below which packing is worth a copy of the weight."""


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and computes in ``dtype`` on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    bfloat16: bool = dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32 or bfloat16


_PACKED: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


def pack(weight: Tensor, *, made_of: Sequence[Tensor] = ()) -> Tensor:
    """The right operand ``[K, N]`` of a GEMM in oneDNN's own layout: opaque, for the calls below.

    The graphs of one model share a copy: ``made_of`` are the parameters that ``weight`` views or
    merges, and while those are the same and unwritten, so is the result.
    """
    key = (*map(_state, made_of), weight.shape, weight.stride())
    packed = _PACKED.get(key) if made_of else None
    if packed is None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().t().contiguous())
        if made_of:
            _PACKED[key] = packed
    return packed


def _state(tensor: Tensor) -> tuple[Any, ...]:
    # A weak reference keeps the address of a storage from being used again.
    storage = StorageWeakRef(tensor.untyped_storage())
    return storage, tensor.storage_offset(), tensor.dtype, tensor.shape, num_writes(tensor)


def num_writes(tensor: Tensor) -> int:
    """How often a tensor was written to; one of inference mode does not count that."""
    return 0 if tensor.is_inference() else int(tensor._version)


def packed_mm(x: Tensor, weight: Tensor) -> Tensor:
    """``x [M, K] @ w [K, N]``, where ``weight`` is ``pack(w)``."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def packed_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``bias [N] + x [M, K] @ w [K, N]``, where ``weight`` is ``pack(w)``."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def choose_packed(unit: Unit, *, fixed: frozenset[str], mode: GemmMode) -> frozenset[str]:
    """The inputs of a program that are to be bound packed.

    ``fixed`` are the inputs made of parameters alone. ``auto`` takes those that measured faster,
    and none where the copies would not fit into half of the memory that is free.
    """
    if mode == "aten":
        return frozenset()
    found = {name: unit.nodes[name].meta["val"] for name in _candidates(unit, fixed)}
    if mode == "packed":
        return frozenset(found)
    large = {name: value for name, value in found.items() if value.nbytes >= _FEWEST_BYTES}
    needed, free = sum(value.nbytes for value in large.values()), available_memory_bytes()
    if needed > free / 2:
        _LOG.info("GEMM weights stay as they are: %d bytes to pack, %d are free", needed, free)
        return frozenset()
    return frozenset(
        name for name, value in large.items() if _is_faster(*map(int, value.shape), value.dtype)
    )


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


@cache
def _is_faster(depth: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether packed weights ``[depth, columns]`` are read faster, for one row and for a few."""
    columns = min(columns, _MEASURED_COLUMNS)
    count = max(1, _COLD_BYTES // (depth * columns * dtype.itemsize))
    with unset_fake_temporarily(), torch.inference_mode():
        plain = [torch.randn(columns, depth).to(dtype).t() for _ in range(count)]
        packed = [pack(weight) for weight in plain]
        share = 0.0
        for rows in _MEASURED_ROWS:
            x = torch.randn(rows, depth).to(dtype)
            share += _seconds(packed_mm, x, packed) / _seconds(torch.mm, x, plain)
    return share < _WORTH * len(_MEASURED_ROWS)


def _seconds(gemm: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    """The best of three walks through the weights."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for weight in weights:
            gemm(x, weight)
        best = min(best, time.perf_counter() - start)
    return best
