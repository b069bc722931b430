"""How plain PyTorch serves the packed rows of a part: groups that one dense attention call can compute.

Decodes of similar length go together, their blocks gathered and padded; each longer request goes alone,
in tiles whose keys are trimmed to what window and chunk leave visible.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow_compiler.attention_state import AttentionPart
from nanoflow_compiler.kv_cache import BLOCK_SIZE
from nanoflow_compiler.upload import upload

__all__ = ["Bools", "Group", "Ints", "Requests", "Visibility", "plan_decodes", "plan_tiles"]

# Bounds the mask of a tile, which has a row per query and a column per visible key.
TILE_ROWS = 512

TILE_OF_ONE_HEAD = 128
"""Rows, of a kernel for long prompts."""
_LEAST_FILL = 0.9
"""A kernel that gains a tenth loses it with a tenth of its rows."""

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


@dataclass(frozen=True, slots=True)
class Requests:
    """The metadata of a part on the host, as its planners read it."""

    starts: Ints  # [R + 1]
    contexts: Ints  # [R]
    tables: Ints  # [R, most blocks]
    device: torch.device

    @classmethod
    def of(cls, part: AttentionPart) -> "Requests":
        """Of any integers."""
        arrays = (part.query_starts, part.context_lens, part.block_tables)
        starts, contexts, tables = (array.astype(np.int64) for array in arrays)
        return cls(starts, contexts, tables, part.slots.device)

    @property
    def decodes(self) -> Ints:
        """Requests with a single row."""
        return np.flatnonzero(np.diff(self.starts) == 1)

    @property
    def prompts(self) -> Ints:
        """Requests with several rows."""
        return np.flatnonzero(np.diff(self.starts) > 1)

    @property
    def mean_keys(self) -> float:
        """How many keys a row of a prompt sees on average, whatever window and chunk leave of them."""
        counts = np.diff(self.starts)[self.prompts]
        pairs = counts * (2 * self.contexts[self.prompts] + counts + 1)
        return float(pairs.sum() / max(1, 2 * counts.sum()))

    def are_long(self, least_keys: float) -> bool:
        """Whether rows of prompts see so many keys on average, and fill tiles that are not shared."""
        counts = np.diff(self.starts)[self.prompts]
        num_rows = TILE_OF_ONE_HEAD * (-(-counts // TILE_OF_ONE_HEAD)).sum()
        return bool(self.mean_keys >= least_keys and counts.sum() > _LEAST_FILL * num_rows)

    def blocks_of(self, requests: Ints, *, columns: Ints) -> Ints:
        """Block numbers ``[R, columns]``; past the end of the tables, any."""
        blocks: Ints = self.tables[requests[:, None], np.minimum(columns, self.tables.shape[1] - 1)]
        return blocks

    def tensor(self, values: Ints | Bools) -> Tensor:
        """On the device of the part."""
        return self.tensors([values])[0]

    def tensors(self, values: Sequence[npt.NDArray[np.generic]]) -> list[Tensor]:
        """All of them in one copy."""
        return upload(values, device=self.device)

    def index(self, values: Ints) -> slice | Tensor:
        """Consecutive numbers as a slice: a view instead of a gather, the common case of one request."""
        if (np.diff(values) == 1).all():
            return slice(int(values[0]), int(values[-1]) + 1)
        return self.tensor(values)


def plan_decodes(requests: Requests, *, visibility: Visibility) -> Iterator[Group]:
    """Groups of equal exponents of blocks: no request is padded to twice its blocks or more."""
    decodes = requests.decodes
    positions = requests.contexts[decodes]
    num_blocks = positions // BLOCK_SIZE - visibility.first_key(positions) // BLOCK_SIZE + 1
    exponents = np.frexp(num_blocks)[1]
    for exponent in np.unique(exponents):
        yield _decodes(requests, decodes[exponents == exponent], visibility=visibility)


def _decodes(requests: Requests, chosen: Ints, *, visibility: Visibility) -> Group:
    positions = requests.contexts[chosen]
    first_keys = visibility.first_key(positions)
    first_blocks = first_keys // BLOCK_SIZE
    num_blocks = int((positions // BLOCK_SIZE - first_blocks).max()) + 1
    blocks = requests.blocks_of(chosen, columns=first_blocks[:, None] + np.arange(num_blocks))
    # Columns left and right of what every request sees are dropped, the rest is masked.
    origins = first_blocks * BLOCK_SIZE
    keys = slice(int((first_keys - origins).min()), int((positions - origins).max()) + 1)
    key_positions = origins[:, None] + np.arange(keys.start, keys.stop)
    visible = visibility.mask(positions, keys=key_positions)
    return Group(
        rows=requests.index(requests.starts[chosen]),
        is_decode=True,
        num_requests=len(chosen),
        blocks=requests.index(blocks.ravel()),
        keys=keys,
        mask=None if visible.all() else requests.tensor(visible)[:, None, None],
    )


def plan_tiles(requests: Requests, *, visibility: Visibility) -> Iterator[Group]:
    """Tiles of the requests with several rows."""
    lengths = np.diff(requests.starts)
    for request in np.flatnonzero(lengths > 1).tolist():
        length = int(lengths[request])
        last = requests.contexts[request] + length - 1
        alone = requests.contexts[request] == 0 == visibility.first_key(np.array([last]))[0]
        rows = length if alone else TILE_ROWS
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            yield _tile(requests, request, start=start, stop=stop, visibility=visibility)


def _tile(
    requests: Requests, request: int, *, start: int, stop: int, visibility: Visibility
) -> Group:
    positions = requests.contexts[request] + np.arange(start, stop)
    first_keys = visibility.first_key(positions)
    first_block = first_keys[0] // BLOCK_SIZE
    origin = first_block * BLOCK_SIZE
    key_positions = np.arange(first_keys[0], positions[-1] + 1)
    is_causal = first_keys[0] == first_keys[-1] == positions[0]
    visible = visibility.mask(positions, keys=key_positions)
    row = int(requests.starts[request])
    blocks = requests.tables[request, first_block : positions[-1] // BLOCK_SIZE + 1]
    return Group(
        rows=slice(row + start, row + stop),
        is_decode=False,
        num_requests=1,
        blocks=requests.index(blocks),
        keys=slice(int(key_positions[0] - origin), int(key_positions[-1] - origin) + 1),
        mask=None if is_causal else requests.tensor(visible)[None, None],
        is_causal=bool(is_causal),
    )
