"""Weights in oneDNN's own layout, and GEMMs on them.

ATen's ``mm`` reads a weight as the checkpoint has it. oneDNN reorders it once into the blocks that its
kernels load; that pays most for the few rows of a decode step, where reading weights is all of the time.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["can_pack", "num_writes", "pack", "packed_addmm", "packed_mm"]


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
