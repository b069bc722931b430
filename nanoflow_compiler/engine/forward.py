"""One step of the model, from its inputs on the device to logits: no value is read by the host."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanoflow_compiler.attention_state import (
    AttentionPart,
    AttentionState,
    StepLayout,
    attention_state,
)
from nanoflow_compiler.engine.step_inputs import StepInputs
from nanoflow_compiler.kv_cache import BLOCK_SIZE, KVCache

__all__ = ["CutFn", "EagerStep", "Forward", "StepFn"]

CutFn = Callable[[int, int], Sequence[int]]
"""Number of tokens and of cells to the cells' offsets: 0, ..., number of tokens."""


class StepFn(Protocol):
    """A model step, whole or as a program over cells: token ranges whose offsets are given per call."""

    @property
    def attention_parts(self) -> Sequence[tuple[int, int]]:
        """The cells ``first`` up to ``last`` (exclusive) that each attention part covers; part 0 is all."""

    @property
    def num_cells(self) -> int:
        """How many cells there are."""

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        """Logits ``[len(rows), V]`` in the dtype of the model; cell ``i`` is the tokens ``cuts[i]`` up to
        ``cuts[i + 1]``."""

    def close(self) -> None:
        """Release what the step holds; it is not called again."""


class EagerStep:
    """A model called as it is: one cell, and nothing to cut."""

    attention_parts = ((0, 1),)
    num_cells = 1

    def __init__(self, model: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.model = model

    def __call__(
        self, input_ids: Tensor, positions: Tensor, rows: Tensor, cuts: Sequence[int]
    ) -> Tensor:
        del cuts
        return self.model(input_ids, positions, rows)

    def close(self) -> None:
        del self.model


class Forward:
    """The step, and the tokens that stay on the device between steps."""

    def __init__(self, step: StepFn, *, cache: KVCache, num_slots: int) -> None:
        self.step = step
        self.cache = cache
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=cache.device)
        """What each slot sampled last; behind them, a place for rows that only fill a step up."""
        self.token_store = torch.zeros(
            cache.num_blocks * BLOCK_SIZE, dtype=torch.int64, device=cache.device
        )
        """The token behind each stored key and value: what penalties look back at."""

    @property
    def spare_slot(self) -> int:
        """Of rows that nobody asked for."""
        return len(self.last_tokens) - 1

    def parts(
        self, layout: StepLayout, *, cuts: Sequence[int], slots: Tensor
    ) -> tuple[AttentionPart, ...]:
        """Those that the step attends in, of a layout whose KV slots are on the device already."""
        return tuple(
            layout.part(cuts[first], cuts[last], slots=slots)
            for first, last in self.step.attention_parts
        )

    @torch.inference_mode()
    def __call__(
        self, inputs: StepInputs[Tensor], *, state: AttentionState, cuts: Sequence[int]
    ) -> Tensor:
        """Logits of all rows."""
        sampled = self.last_tokens[inputs.sources.clamp(min=0)]
        ids = torch.where(inputs.sources < 0, inputs.input_ids, sampled)
        self.token_store[inputs.kv_slots] = ids
        with attention_state(state):
            return self.step(ids, inputs.positions, inputs.rows, cuts)

    def close(self) -> None:
        """Release the step."""
        self.step.close()
