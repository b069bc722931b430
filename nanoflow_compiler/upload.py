"""Brings small arrays of the host to a device, all in one copy that the host does not wait for."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Array", "Staged", "num_bytes", "stage", "upload", "views"]

_ALIGNMENT = 16

Array = npt.NDArray[np.generic]
Form = tuple[np.dtype[np.generic], tuple[int, ...]]
"""Of an array: what its elements are, and its shape."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Arrays one after the other, in memory of the host that a device copies from."""

    memory: Tensor
    forms: tuple[Form, ...]

    def copy(self, device: torch.device) -> list[Tensor]:
        """The arrays in new memory of the device, which they share."""
        return views(self.memory.to(device, non_blocking=True), self.forms)


def stage(arrays: Sequence[Array], *, is_pinned: bool) -> Staged:
    """Copies of the arrays. From memory that is not pinned, a GPU would copy after all work before it."""
    forms = tuple((array.dtype, array.shape) for array in arrays)
    memory = torch.empty(num_bytes(forms), dtype=torch.uint8, pin_memory=is_pinned)
    for place, array in zip(views(memory, forms), arrays, strict=True):
        place.numpy()[...] = array
    return Staged(memory, forms)


def upload(arrays: Sequence[Array], *, device: torch.device) -> list[Tensor]:
    """The arrays as tensors of the device; they share memory with each other, or with the host's."""
    if device.type == "cpu":
        return [torch.from_numpy(np.asarray(array, order="C")) for array in arrays]
    return stage(arrays, is_pinned=device.type == "cuda").copy(device)


def num_bytes(forms: Sequence[Form]) -> int:
    """What arrays of these forms take together."""
    return sum(_padded_bytes(form) for form in forms)


def views(memory: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """The tensors of these forms that ``memory [bytes]`` holds, in order."""
    found, start = [], 0
    for form in forms:
        dtype, shape = form
        end = start + dtype.itemsize * prod(shape)
        found.append(memory[start:end].view(_torch_dtype(dtype)).view(shape))
        start += _padded_bytes(form)
    return found


def _padded_bytes(form: Form) -> int:
    dtype, shape = form
    return -(-dtype.itemsize * prod(shape) // _ALIGNMENT) * _ALIGNMENT


def _torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
