"""What a step is given: the same arrays on the host and, by the same names, on the device."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import numpy as np

from nanoflow_compiler.attention_state import StepLayout
from nanoflow_compiler.engine.batch import Batch, Ints

__all__ = ["StepInputs", "layout_of", "pack_inputs"]

Array = TypeVar("Array")


@dataclass(frozen=True, slots=True)
class StepInputs(Generic[Array]):
    """All of int64; ``T`` tokens, ``R`` rows of logits, of which the first ``S`` are sampled."""

    input_ids: Array
    """``[T]``; where ``sources`` names one, whatever."""
    sources: Array
    """``[T]``: the slot whose last token this is, or -1 where the host knows the token."""
    positions: Array
    """``[T]``, in the requests."""
    kv_slots: Array
    """``[T]``, where keys and values are stored."""
    rows: Array
    """``[R]``, of which logits are computed: those that are sampled, then those of prompts, then any."""
    slots: Array
    """``[S]``, of the requests that are sampled."""
    targets: Array
    """``[P]``: the tokens of prompts whose likeliness is asked for, after the rows ``S`` to ``S + P``."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def of(cls, arrays: Iterable[Array]) -> Self:
        """From :attr:`arrays`."""
        return cls(*arrays)


def layout_of(batch: Batch) -> StepLayout:
    """Where the batch's tokens go, and what they see."""
    return StepLayout.pack(
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
    )


def pack_inputs(batch: Batch, layout: StepLayout, *, needs_rows: bool) -> StepInputs[Any]:
    """The arrays on the host. ``needs_rows``: a GPU's kernels cannot be launched for no row of logits."""
    sources = np.full(batch.num_tokens, -1, dtype=np.int64)
    sources[batch.unknown] = batch.unknown_slots
    rows: Ints = np.concatenate([batch.rows, batch.prompt_rows])
    if needs_rows and not len(rows):
        rows = np.zeros(1, dtype=np.int64)
    return StepInputs(
        input_ids=batch.token_ids,
        sources=sources,
        positions=batch.positions,
        kv_slots=layout.slots,
        rows=rows,
        slots=batch.slots,
        targets=batch.prompt_targets,
    )
