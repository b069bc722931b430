"""Runs batches: packs the inputs of the compiled step, fills what its attention reads, calls it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.engine.batch import Batch, Ints
from nanoflow_compiler.kv_cache import KVCache

__all__ = ["CutFn", "EagerStep", "ModelRunner", "PreparedStep", "StepFn", "even_cuts"]

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
        """Float32 logits ``[len(rows), V]``; cell ``i`` is the tokens ``cuts[i]`` up to ``cuts[i + 1]``."""

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


def even_cuts(num_tokens: int, num_cells: int) -> list[int]:
    """Cells that differ by at most one token."""
    return [num_tokens * cell // num_cells for cell in range(num_cells + 1)]


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """Everything that a step needs on the device; made while an earlier step may still be running."""

    input_ids: Tensor
    positions: Tensor
    rows: Tensor
    cuts: tuple[int, ...]
    state: AttentionState
    num_sampled: int


class ModelRunner:
    """Turns a :class:`Batch` into logits: ``run(prepare(batch))``."""

    def __init__(
        self, step: StepFn, *, cache: KVCache, cut: CutFn = even_cuts, min_rows: int = 1
    ) -> None:
        """``min_rows`` is the fewest tokens, and rows of logits, that ``step`` was compiled for."""
        self.step = step
        self.cache = cache
        self.cut = cut
        self.min_rows = min_rows

    def prepare(self, batch: Batch) -> PreparedStep:
        padding = max(self.min_rows - batch.num_tokens, 0)
        num_tokens = batch.num_tokens + padding
        cuts = tuple(self.cut(num_tokens, self.step.num_cells))
        layout = _layout(batch, padding=padding)
        device = self.cache.device
        parts = tuple(
            layout.part(cuts[first], cuts[last], device=device)
            for first, last in self.step.attention_parts
        )
        return PreparedStep(
            input_ids=_tensor(batch.token_ids, padding=padding, device=device),
            positions=_tensor(batch.positions, padding=padding, device=device),
            rows=_tensor(
                batch.rows, padding=max(self.min_rows - len(batch.rows), 0), device=device
            ),
            cuts=cuts,
            state=AttentionState(self.cache, parts),
            num_sampled=len(batch.rows),
        )

    @torch.inference_mode()
    def run(self, prepared: PreparedStep) -> Tensor:
        """Logits ``[S, V]`` of the sampled rows."""
        with attention_state(prepared.state):
            logits = self.step(prepared.input_ids, prepared.positions, prepared.rows, prepared.cuts)
        return logits[: prepared.num_sampled]


def _layout(batch: Batch, *, padding: int) -> StepLayout:
    """Each padding row is a request of one token whose blocks are the scratch block."""
    return StepLayout.pack(
        query_lens=np.pad(batch.query_lens, (0, padding), constant_values=1),
        context_lens=np.pad(batch.context_lens, (0, padding)),
        block_tables=np.pad(batch.block_tables, ((0, padding), (0, 0))),
    )


def _tensor(values: Ints, *, padding: int, device: torch.device) -> Tensor:
    return torch.from_numpy(np.pad(values, (0, padding))).to(device)
