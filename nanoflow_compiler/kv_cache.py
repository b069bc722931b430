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

__all__ = [
    "BLOCK_SIZE",
    "SCRATCH_BLOCK",
    "HeadPages",
    "KVCache",
    "LayerShape",
    "Places",
    "RowTables",
]

BLOCK_SIZE = 64
SCRATCH_BLOCK = 0


Places = tuple[Tensor, Tensor]
"""Where tokens are stored: block, and offset in it."""


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
class RowTables:
    """The pools of a layer as tables of rows, for ``decode_attention``."""

    keys: Tensor
    """``[blocks * heads * head_dim, 64]``: one dimension of the keys of a block."""
    values: Tensor
    """``[blocks * 64 * heads, v_head_dim]``: the value of a token."""


@dataclass(frozen=True, slots=True)
class HeadPages:
    """The pools of a layer as pages of heads, for ``kernels``: ``[blocks, heads, 64, dim]``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys ``[blocks, 64, heads, head_dim]`` and values ``[blocks, 64, heads, v_head_dim]`` by layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tables: tuple[RowTables | HeadPages | None, ...]
    """The same memory as kernels read it, where there is one for the layer.

    The order in a block is the kernel's, and only strides say so. On a CPU a block of float32 keys is
    ``[heads, head_dim, 64]``; on a GPU, keys and values are ``[heads, 64, dim]``.
    """

    @classmethod
    def allocate(
        cls, layers: Sequence[LayerShape], *, num_blocks: int, device: torch.device | str = "cpu"
    ) -> "KVCache":
        """Zeroed, not empty: a masked key weighs zero, and zero times an uninitialised NaN is NaN."""
        pools = [_pools(layer, num_blocks, device=torch.device(device)) for layer in layers]
        keys, values, tables = zip(*pools, strict=True)
        return cls(keys, values, tables)

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.keys, *self.values))

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    def append(self, key: Tensor, value: Tensor, *, layer: int, places: Places) -> None:
        """Write one token per place."""
        self.keys[layer].index_put_(places, key)
        self.values[layer].index_put_(places, value)


def _pools(
    layer: LayerShape, num_blocks: int, *, device: torch.device
) -> tuple[Tensor, Tensor, RowTables | HeadPages | None]:
    def pool(*shape: int) -> Tensor:
        return _zeros((num_blocks, *shape), dtype=layer.dtype, device=device)

    num_heads, head_dim, v_head_dim = layer.num_kv_heads, layer.head_dim, layer.v_head_dim
    if device.type == "cuda":
        keys, values = (
            pool(num_heads, BLOCK_SIZE, head_dim),
            pool(num_heads, BLOCK_SIZE, v_head_dim),
        )
        pages = HeadPages(keys, values) if _has_tma(layer, device) else None
        return keys.transpose(1, 2), values.transpose(1, 2), pages
    values = pool(BLOCK_SIZE, num_heads, v_head_dim)
    if layer.dtype is not torch.float32:
        return pool(BLOCK_SIZE, num_heads, head_dim), values, None
    keys = pool(num_heads, head_dim, BLOCK_SIZE)
    tables = RowTables(keys.view(-1, BLOCK_SIZE), values.view(-1, v_head_dim))
    return keys.permute(0, 3, 1, 2), values, tables


_TMA_BYTES = 16
"""Rows that the copy engine of Hopper (compute capability 9.0) and later reads are multiples of this."""


def _has_tma(layer: LayerShape, device: torch.device) -> bool:
    sizes = (layer.head_dim, layer.v_head_dim)
    is_even = all(size * layer.dtype.itemsize % _TMA_BYTES == 0 for size in sizes)
    return is_even and torch.cuda.get_device_capability(device) >= (9, 0)


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
