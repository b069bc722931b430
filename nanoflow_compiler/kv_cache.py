"""The paged KV cache: per layer one pool of 64-token blocks for keys and one for values.

Layers may differ in heads, head sizes and dtype; they share block numbers, so one block table serves all.
Block 0 is scratch: rows that pad a step write there and nothing reads it, hence it is never handed out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

__all__ = ["BLOCK_SIZE", "SCRATCH_BLOCK", "KVCache", "LayerShape"]

BLOCK_SIZE = 64
SCRATCH_BLOCK = 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention call site stores per token."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys ``[blocks, 64, heads, head_dim]`` and values ``[blocks, 64, heads, v_head_dim]`` by layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def allocate(
        cls, layers: Sequence[LayerShape], *, num_blocks: int, device: torch.device | str = "cpu"
    ) -> "KVCache":
        """Zeroed, not empty: a masked key weighs zero, and zero times an uninitialised NaN is NaN."""

        def pool(layer: LayerShape, dim: int) -> Tensor:
            shape = (num_blocks, BLOCK_SIZE, layer.num_kv_heads, dim)
            return _zeros(shape, dtype=layer.dtype, device=torch.device(device))

        return cls(
            keys=tuple(pool(layer, layer.head_dim) for layer in layers),
            values=tuple(pool(layer, layer.v_head_dim) for layer in layers),
        )

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def append(self, key: Tensor, value: Tensor, *, layer: int, slots: Tensor) -> None:
        """Write one token per slot; a slot is ``block * 64 + offset``."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)


_ALIGNMENT = 64


def _zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, pages that the system makes zero when they are first touched, as numpy asks for them.

    ``torch.zeros`` writes them all, which takes seconds, and memory that may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = prod(shape) * dtype.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype).view(*shape)
