"""The tokens of one step as arrays."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.batcher import Entries
from nanoflow_compiler.engine.table import EMPTY, RequestTable

__all__ = ["Batch", "Ints"]

Ints = npt.NDArray[np.int64]
_NO_ROWS: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """``T`` packed tokens of ``R`` requests, of which ``S`` get their next token."""

    token_ids: Ints  # [T]; of tokens that the host does not know yet, whatever
    unknown: Ints  # [U], which of them those are
    unknown_slots: Ints  # [U], whose last token they are
    positions: Ints  # [T]
    query_lens: Ints  # [R]
    context_lens: Ints  # [R], tokens of each request before its first one here
    block_tables: npt.NDArray[np.int32]  # [R, most blocks], padded with the scratch block 0
    rows: Ints  # [S], the last token of each sampled request
    slots: Ints  # [S]
    keys: Ints  # [S], which tell whether a slot still has the request that was sampled
    counters: Ints  # [S], the number of the token in the output
    prompt_rows: Ints  # [P], tokens of prompts after which the likeliness of the next is asked for
    prompt_targets: Ints  # [P], those next tokens
    prompt_keys: Ints  # [P]
    prompt_counts: Ints  # [P], of the most likely tokens beside them

    @classmethod
    def pack(cls, table: RequestTable, entries: Entries) -> "Batch":
        """The batch of entries that were just made."""
        slots, starts, counts = entries.slots, entries.starts, entries.counts
        ends = np.cumsum(counts)
        owners = np.repeat(slots, counts)
        positions = np.arange(len(owners)) + np.repeat(starts - ends + counts, counts)
        # At most the last token of a request is unknown, and a step that has it computes no other.
        is_unknown = starts >= table.num_known[slots]
        most = int(-(-(starts + counts).max(initial=0) // table.block_size))
        sampled = slots[entries.is_sampled]
        prompt_rows = _prompt_rows(table, slots, owners=owners, positions=positions)
        prompt_slots = owners[prompt_rows]
        targets = table.token_ids[prompt_slots, positions[prompt_rows] + 1]
        return cls(
            token_ids=table.token_ids[owners, positions].astype(np.int64),
            unknown=(ends - 1)[is_unknown],
            unknown_slots=slots[is_unknown],
            positions=positions,
            query_lens=counts,
            context_lens=starts,
            block_tables=table.block_tables[slots, :most],
            rows=(ends - 1)[entries.is_sampled],
            slots=sampled,
            keys=table.keys[sampled],
            counters=table.num_scheduled[sampled] - 1 - table.num_prompt[sampled],
            prompt_rows=prompt_rows,
            prompt_targets=targets.astype(np.int64),
            prompt_keys=table.keys[prompt_slots],
            prompt_counts=table.num_prompt_logprobs[prompt_slots],
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_decode(self) -> bool:
        """Every request has one token, and nobody asks about prompts."""
        return len(self.query_lens) == self.num_tokens and not len(self.prompt_rows)

    def padded(self, *, num_tokens: int, num_rows: int, spare_slot: int) -> "Batch":
        """Filled up with requests of one token, at the start of the scratch block, that nobody made.

        They are computed as all others are, so that what a kernel finds for them is a number.
        """
        num_new = num_tokens - self.num_tokens
        num_new_rows = num_rows - len(self.rows)
        tables = np.zeros((num_new, self.block_tables.shape[1]), dtype=self.block_tables.dtype)
        return replace(
            self,
            token_ids=_extended(self.token_ids, 0, num_new),
            positions=_extended(self.positions, 0, num_new),
            query_lens=_extended(self.query_lens, 1, num_new),
            context_lens=_extended(self.context_lens, 0, num_new),
            block_tables=np.concatenate([self.block_tables, tables]),
            rows=_extended(self.rows, 0, num_new_rows),
            slots=_extended(self.slots, spare_slot, num_new_rows),
            keys=_extended(self.keys, EMPTY, num_new_rows),
            counters=_extended(self.counters, 0, num_new_rows),
        )

    @classmethod
    def empty(cls) -> "Batch":
        """Of no request."""
        none, tables = _NO_ROWS, np.zeros((0, 1), dtype=np.int32)
        return cls(
            token_ids=none,
            unknown=none,
            unknown_slots=none,
            positions=none,
            query_lens=none,
            context_lens=none,
            block_tables=tables,
            rows=none,
            slots=none,
            keys=none,
            counters=none,
            prompt_rows=none,
            prompt_targets=none,
            prompt_keys=none,
            prompt_counts=none,
        )


def _extended(values: Ints, value: int, count: int) -> Ints:
    return np.concatenate([values, np.full(count, value, dtype=values.dtype)])


def _prompt_rows(table: RequestTable, slots: Ints, *, owners: Ints, positions: Ints) -> Ints:
    if (table.num_prompt_logprobs[slots] < 0).all():
        return _NO_ROWS
    is_asked = table.num_prompt_logprobs[owners] >= 0
    return np.flatnonzero(is_asked & (positions + 1 < table.num_prompt[owners]))
