"""What a step needs to know of its requests to choose their tokens, without the logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.sampling_columns import Floats, Ints, SamplingColumns

__all__ = ["SamplingBatch"]

NO_INTS: Ints = np.zeros(0, dtype=np.int64)
NO_FLOATS: Floats = np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """Columns over the ``S`` rows of logits of a step, and lists of what only few rows have."""

    temperature: Floats
    """0 is greedy."""
    top_k: Ints
    top_p: Floats
    min_p: Floats
    repetition: Floats
    presence: Floats
    frequency: Floats
    seeds: npt.NDArray[np.uint64]
    counters: npt.NDArray[np.uint64]
    """The number of the token in the output, from 0."""
    num_logprobs: Ints
    """-1 is none."""
    barred_rows: Ints
    barred_tokens: Ints
    """Would end a row before its ``min_tokens``; one beyond the vocabulary has no effect."""
    allowed_rows: Ints
    allowed_tokens: Ints
    """The only ones that these rows may choose."""
    bias_rows: Ints
    bias_tokens: Ints
    bias_values: Floats
    penalty_rows: Ints
    history_tables: npt.NDArray[np.int32]
    """Of these rows ``[P, most blocks]``: where the token store of the device holds prompt and output."""
    history_lens: Ints
    """Tokens of prompt and output together."""
    history_prompt_lens: Ints
    """How many of them are the prompt's."""
    block_size: int

    @property
    def num_rows(self) -> int:
        return len(self.temperature)

    @property
    def is_greedy(self) -> npt.NDArray[np.bool_]:
        """Rows that take the most likely token, whatever their seed."""
        greedy: npt.NDArray[np.bool_] = (self.temperature == 0) | (self.top_k == 1)
        return greedy

    @classmethod
    def gather(
        cls,
        columns: SamplingColumns,
        *,
        slots: Ints,
        num_prompt_tokens: Ints,
        num_output_tokens: Ints,
        block_tables: npt.NDArray[np.int32],
        block_size: int,
    ) -> Self:
        """The rows of ``slots``.

        ``num_prompt_tokens`` and ``num_output_tokens`` are per row; the latter counts the tokens
        before the one to be sampled. ``block_tables`` is indexed by slot.
        """
        barred_rows, barred_tokens = _barred(columns, slots, num_output_tokens)
        allowed_rows, allowed_tokens = _allowed(columns, slots)
        bias_rows, bias_tokens, bias_values = _bias(columns, slots)
        penalty_rows = np.flatnonzero(columns.has_penalties[slots])
        lens = num_prompt_tokens + num_output_tokens
        most_blocks = -(-int(lens[penalty_rows].max(initial=0)) // block_size)
        return cls(
            temperature=columns.temperature[slots],
            top_k=columns.top_k[slots],
            top_p=columns.top_p[slots],
            min_p=columns.min_p[slots],
            repetition=columns.repetition[slots],
            presence=columns.presence[slots],
            frequency=columns.frequency[slots],
            seeds=columns.seeds[slots],
            counters=num_output_tokens.astype(np.uint64),
            num_logprobs=columns.num_logprobs[slots],
            barred_rows=barred_rows,
            barred_tokens=barred_tokens,
            allowed_rows=allowed_rows,
            allowed_tokens=allowed_tokens,
            bias_rows=bias_rows,
            bias_tokens=bias_tokens,
            bias_values=bias_values,
            penalty_rows=penalty_rows,
            history_tables=block_tables[slots[penalty_rows], :most_blocks],
            history_lens=lens[penalty_rows],
            history_prompt_lens=num_prompt_tokens[penalty_rows],
            block_size=block_size,
        )


def _barred(columns: SamplingColumns, slots: Ints, num_output_tokens: Ints) -> tuple[Ints, Ints]:
    rows = np.flatnonzero(num_output_tokens < columns.min_tokens[slots])
    tokens = [columns.ends[slot] for slot in slots[rows].tolist()]
    return _repeated(rows, tokens), np.concatenate([NO_INTS, *tokens])


def _allowed(columns: SamplingColumns, slots: Ints) -> tuple[Ints, Ints]:
    rows = np.flatnonzero(columns.has_allowed[slots])
    tokens = [columns.allowed[slot] for slot in slots[rows].tolist()]
    return _repeated(rows, tokens), np.concatenate([NO_INTS, *tokens])


def _bias(columns: SamplingColumns, slots: Ints) -> tuple[Ints, Ints, Floats]:
    rows = np.flatnonzero(columns.has_bias[slots])
    biases = [columns.bias[slot] for slot in slots[rows].tolist()]
    tokens = [tokens for tokens, _ in biases]
    values = np.concatenate([NO_FLOATS, *(values for _, values in biases)])
    return _repeated(rows, tokens), np.concatenate([NO_INTS, *tokens]), values


def _repeated(rows: Ints, lists: Sequence[Ints]) -> Ints:
    return np.repeat(rows, np.array([len(one) for one in lists], dtype=np.int64))
