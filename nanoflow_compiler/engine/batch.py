"""The tokens of one step as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.batcher import Entry
from nanoflow_compiler.engine.request import Request

__all__ = ["Batch"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """``T`` packed tokens of ``R`` requests, of which ``S`` get their next token."""

    token_ids: Ints  # [T]
    positions: Ints  # [T]
    query_lens: Ints  # [R]
    context_lens: Ints  # [R], tokens of each request before its first one here
    block_tables: Ints  # [R, most blocks], padded with the scratch block 0
    rows: Ints  # [S], the last token of each sampled request
    sampled: tuple[Request, ...]

    @classmethod
    def pack(cls, entries: Sequence[Entry]) -> "Batch":
        query_lens = np.array([entry.num_tokens for entry in entries], dtype=np.int64)
        context_lens = np.array([entry.start for entry in entries], dtype=np.int64)
        ends = np.cumsum(query_lens)
        shifts = np.repeat(context_lens - ends + query_lens, query_lens)
        return cls(
            token_ids=_token_ids(entries),
            positions=np.arange(len(shifts)) + shifts,
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=_block_tables(entries),
            rows=(ends - 1)[[entry.is_sampled for entry in entries]],
            sampled=tuple(entry.request for entry in entries if entry.is_sampled),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def _token_ids(entries: Sequence[Entry]) -> Ints:
    ids: list[int] = []
    for entry in entries:
        ids += entry.request.token_ids[entry.start : entry.start + entry.num_tokens]
    return np.array(ids, dtype=np.int64)


def _block_tables(entries: Sequence[Entry]) -> Ints:
    tables = np.zeros(
        (len(entries), max(len(entry.request.blocks) for entry in entries)), dtype=np.int64
    )
    for row, entry in enumerate(entries):
        tables[row, : len(entry.request.blocks)] = entry.request.blocks
    return tables
