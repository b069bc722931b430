"""What attention reads beside its inputs: the KV cache, and the packed metadata of a step by part.

A step packs the tokens of many requests on one axis. Part 0 is the whole step; the other parts are the
token ranges in which a compiled program runs it, and may begin or end inside a request. The operators
find the state of the running step through :func:`attention_state`, because it is never a graph input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache, Places
from nanoflow_compiler.upload import upload

__all__ = ["AttentionPart", "AttentionState", "StepLayout", "attention_state", "current_state"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """The requests of one token range; requests without a token in the range are absent.

    ``context_lens`` counts the tokens that a request has before its first token of this range, wherever
    they were computed: an earlier step, or an earlier part of the same step. All but ``slots`` stays on
    the host, where kernels are planned.
    """

    query_starts: Ints  # [R + 1], first row of each request, then the number of rows
    context_lens: Ints  # [R]
    block_tables: npt.NDArray[np.integer]  # [R, most blocks]
    slots: Tensor  # [T] int64 on the device, where each token's key and value go
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a kernel derives from the metadata: made by the first layer that needs it, read by all."""

    @property
    def num_tokens(self) -> int:
        return self.slots.shape[0]

    @property
    def places(self) -> Places:
        """The slots as block and offset."""
        if "places" not in self.plans:
            self.plans["places"] = (self.slots // BLOCK_SIZE, self.slots % BLOCK_SIZE)
        places: Places = self.plans["places"]
        return places


@dataclass(frozen=True, slots=True)
class AttentionState:
    """The cache and the parts of one step."""

    cache: KVCache
    parts: tuple[AttentionPart, ...]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Which request each packed token belongs to, and where its key and value are stored."""

    query_starts: Ints  # [R + 1]
    context_lens: Ints  # [R]
    block_tables: npt.NDArray[np.integer]  # [R, most blocks]
    slots: Ints  # [T]

    @classmethod
    def pack(
        cls, *, query_lens: Ints, context_lens: Ints, block_tables: npt.NDArray[np.integer]
    ) -> "StepLayout":
        query_starts = np.concatenate([[0], np.cumsum(query_lens)])
        rows = np.repeat(np.arange(len(query_lens)), query_lens)
        positions = np.arange(query_starts[-1]) + (context_lens - query_starts[:-1])[rows]
        blocks = block_tables[rows, positions // BLOCK_SIZE].astype(np.int64)
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        return cls(query_starts, context_lens, block_tables, slots)

    def part(
        self,
        start: int,
        end: int,
        *,
        device: torch.device | str = "cpu",
        slots: Tensor | None = None,
    ) -> AttentionPart:
        """The tokens in ``[start, end)`` of the step; each request has at least one in the step.

        ``slots`` are those of the whole step where they are on the device already.
        """
        first = int(np.searchsorted(self.query_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.query_starts, end)) if start < end else first
        query_starts = np.clip(self.query_starts[first : last + 1], start, end) - start
        # Only the first request may have begun before this range.
        context_lens = self.context_lens[first:last].copy()
        context_lens[:1] += start - self.query_starts[first]

        if slots is None:
            (own,) = upload([self.slots[start:end]], device=torch.device(device))
        else:
            own = slots[start:end]
        return AttentionPart(query_starts, context_lens, self.block_tables[first:last], own)


_STATE: ContextVar[AttentionState | None] = ContextVar("nanoflow_attention_state", default=None)


@contextmanager
def attention_state(state: AttentionState) -> Iterator[None]:
    """Make ``state`` the one that attention reads, in this thread or task."""
    token = _STATE.set(state)
    try:
        yield
    finally:
        _STATE.reset(token)


def current_state() -> AttentionState:
    state = _STATE.get()
    if state is None:
        raise InvalidProgramError(
            "attention ran without a KV cache; call the model inside `with attention_state(state):`",
            where="run",
        )
    return state
