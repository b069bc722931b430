"""Brings small arrays of the host to a device, all in one copy that the host does not wait for."""

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["upload"]

_ALIGNMENT = 16


def upload(arrays: Sequence[npt.NDArray[np.generic]], *, device: torch.device) -> list[Tensor]:
    """The arrays as tensors of the device; they share memory with each other, or with the host's."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts = np.cumsum([0, *(_padded(array.nbytes) for array in arrays)]).tolist()
    # From memory that is not pinned, the copy would wait for all work before it.
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    bytes_of_host = staged.numpy()
    for array, start in zip(arrays, starts, strict=False):
        part = bytes_of_host[start : start + array.nbytes]
        part.view(array.dtype).reshape(array.shape)[...] = array
    there = staged.to(device, non_blocking=True)
    return [_view(there, array, start) for array, start in zip(arrays, starts, strict=False)]


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _view(there: Tensor, array: npt.NDArray[np.generic], start: int) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
    num_bytes = prod(array.shape) * array.itemsize
    return there[start : start + num_bytes].view(dtype).view(array.shape)
