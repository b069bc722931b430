"""How plain PyTorch serves the packed rows of a part: groups that one dense attention call can compute.

Decodes of similar length go together, their blocks gathered and padded; each longer request goes alone,
in tiles whose keys are trimmed to what window and chunk leave visible. A plan depends on the part, the
window and the chunk size only, so the layers that share those share its index tensors and masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow_compiler.attention_state import AttentionPart
from nanoflow_compiler.kv_cache import BLOCK_SIZE

__all__ = ["Bools", "Group", "Ints", "Visibility", "plan_of"]

# Bounds the mask of a tile, which has a row per query and a column per visible key.
TILE_ROWS = 512

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which keys a query sees: itself and those before it, within the window and the chunk (0: no limit)."""

    window: int = 0
    chunk: int = 0

    def first_key(self, position: Ints) -> Ints:
        """The lowest visible key; every key from there to ``position`` is visible."""
        first = np.zeros_like(position)
        if self.window:
            first = np.maximum(first, position - self.window + 1)
        if self.chunk:
            first = np.maximum(first, position // self.chunk * self.chunk)
        return first

    def mask(self, position: Ints, *, keys: Ints) -> Bools:
        """True where visible, a column per key beside the dimensions of ``position``."""
        position = position[..., None]
        return (keys >= self.first_key(position)) & (keys <= position)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows served by one dense attention: the single rows of requests, or many rows of one request."""

    rows: slice | Tensor
    is_decode: bool
    num_requests: int
    blocks: slice | Tensor  # the blocks of the first request, then those of the second ...
    keys: slice  # what is kept of the tokens in each request's blocks
    mask: Tensor | None  # [requests, 1, 1, keys] of decodes, [1, 1, rows, keys] otherwise
    is_causal: bool = False


def plan_of(part: AttentionPart, *, visibility: Visibility) -> tuple[Group, ...]:
    """The groups of ``part``; made when first asked for."""
    key = (visibility.window, visibility.chunk)
    if key not in part.plans:
        part.plans[key] = tuple(_Planner(part, visibility=visibility).groups())
    plan: tuple[Group, ...] = part.plans[key]
    return plan


class _Planner:
    def __init__(self, part: AttentionPart, *, visibility: Visibility) -> None:
        self.starts, self.contexts, self.tables = (
            tensor.cpu().numpy().astype(np.int64)
            for tensor in (part.query_starts, part.context_lens, part.block_tables)
        )
        self.visibility = visibility
        self.device = part.slots.device

    def groups(self) -> Iterator[Group]:
        lengths = np.diff(self.starts)
        decodes = np.flatnonzero(lengths == 1)
        positions = self.contexts[decodes]
        num_blocks = (
            positions // BLOCK_SIZE - self.visibility.first_key(positions) // BLOCK_SIZE + 1
        )
        # Equal exponents: no request is padded to twice its blocks or more.
        exponents = np.frexp(num_blocks)[1]
        for exponent in np.unique(exponents):
            yield self._decodes(decodes[exponents == exponent])
        for request in np.flatnonzero(lengths > 1).tolist():
            yield from self._tiles(request, length=int(lengths[request]))

    def _decodes(self, requests: Ints) -> Group:
        positions = self.contexts[requests]
        first_keys = self.visibility.first_key(positions)
        first_blocks = first_keys // BLOCK_SIZE
        num_blocks = int((positions // BLOCK_SIZE - first_blocks).max()) + 1
        columns = first_blocks[:, None] + np.arange(num_blocks)
        blocks = self.tables[requests[:, None], np.minimum(columns, self.tables.shape[1] - 1)]
        # Columns left and right of what every request sees are dropped, the rest is masked.
        origins = first_blocks * BLOCK_SIZE
        keys = slice(int((first_keys - origins).min()), int((positions - origins).max()) + 1)
        key_positions = origins[:, None] + np.arange(keys.start, keys.stop)
        visible = self.visibility.mask(positions, keys=key_positions)
        return Group(
            rows=self._index(self.starts[requests]),
            is_decode=True,
            num_requests=len(requests),
            blocks=self._index(blocks.ravel()),
            keys=keys,
            mask=None if visible.all() else self._tensor(visible)[:, None, None],
        )

    def _tiles(self, request: int, *, length: int) -> Iterator[Group]:
        context = int(self.contexts[request])
        last_first_key = self.visibility.first_key(np.array([context + length - 1]))[0]
        if last_first_key == 0 == context:
            yield self._tile(request, start=0, stop=length)
            return
        for start in range(0, length, TILE_ROWS):
            yield self._tile(request, start=start, stop=min(start + TILE_ROWS, length))

    def _tile(self, request: int, *, start: int, stop: int) -> Group:
        positions = self.contexts[request] + np.arange(start, stop)
        first_keys = self.visibility.first_key(positions)
        first_block = first_keys[0] // BLOCK_SIZE
        origin = first_block * BLOCK_SIZE
        key_positions = np.arange(first_keys[0], positions[-1] + 1)
        is_causal = first_keys[0] == first_keys[-1] == positions[0]
        visible = self.visibility.mask(positions, keys=key_positions)
        row = int(self.starts[request])
        return Group(
            rows=slice(row + start, row + stop),
            is_decode=False,
            num_requests=1,
            blocks=self._index(self.tables[request, first_block : positions[-1] // BLOCK_SIZE + 1]),
            keys=slice(int(key_positions[0] - origin), int(key_positions[-1] - origin) + 1),
            mask=None if is_causal else self._tensor(visible)[None, None],
            is_causal=bool(is_causal),
        )

    def _index(self, values: Ints) -> slice | Tensor:
        """Consecutive numbers as a slice: a view instead of a gather, the common case of one request."""
        if (np.diff(values) == 1).all():
            return slice(int(values[0]), int(values[-1]) + 1)
        return self._tensor(values)

    def _tensor(self, values: Ints | Bools) -> Tensor:
        return torch.from_numpy(values).to(self.device)
