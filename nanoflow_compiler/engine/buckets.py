"""The sizes for which steps are captured: a batch is filled up to the next one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanoflow_compiler.engine.batch import Batch

__all__ = ["Bucket", "Buckets"]


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A captured size."""

    num_tokens: int
    num_rows: int
    """Of logits; all of them are sampled."""
    has_prompts: bool = False
    """Requests may have several tokens; else each has one."""

    def holds(self, batch: Batch) -> bool:
        """Whether the batch is of this kind, and not larger."""
        if len(batch.prompt_rows) or self.has_prompts == batch.is_decode:
            return False
        return batch.num_tokens <= self.num_tokens and len(batch.rows) <= self.num_rows

    def example(self) -> Batch:
        """A batch of this kind, in the scratch block: what it lacks in size is filled up."""
        none = Batch.empty()
        if not self.has_prompts:
            return none
        return replace(
            none,
            token_ids=np.zeros(2, dtype=np.int64),
            positions=np.arange(2),
            query_lens=np.array([2]),
            context_lens=np.zeros(1, dtype=np.int64),
            block_tables=np.zeros((1, 1), dtype=np.int32),
        )

    def fill(self, batch: Batch, *, spare_slot: int) -> Batch:
        """The batch with requests that nobody made, up to this size."""
        return batch.padded(
            num_tokens=self.num_tokens, num_rows=self.num_rows, spare_slot=spare_slot
        )


class Buckets:
    """Sizes in order."""

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self.all = tuple(sorted(buckets))

    def find(self, batch: Batch) -> Bucket | None:
        """The smallest that holds the batch; None for a batch that runs uncaptured."""
        return next((bucket for bucket in self.all if bucket.holds(batch)), None)

    @classmethod
    def of_sizes(cls, *, max_num_seqs: int, max_num_batched_tokens: int) -> "Buckets":
        """For up to ``max_num_seqs`` requests that decode, and steps with prompts up to the budget."""
        most_decodes = min(max_num_seqs, max_num_batched_tokens)
        decodes = [Bucket(size, size) for size in _decode_sizes(most_decodes)]
        mixed = (
            Bucket(size, min(size, rows, max_num_seqs), has_prompts=True)
            for size in _sizes(max_num_batched_tokens, _MIXED_STEPS)
            for rows in (_FEW_ROWS, max_num_seqs)
            if size > 1  # one token is a decode
        )
        return cls({*decodes, *mixed})


_STEPS: Sequence[tuple[int, int]] = ((16, 8), (128, 16), (256, 32), (1024, 64), (1 << 30, 256))
"""Up to a size, multiples of a step: a small share is filled up where a step is not short anyway."""
_MIXED_STEPS: Sequence[tuple[int, int]] = ((512, 128), (2048, 256), (8192, 1024), (1 << 30, 4096))
_FEW_ROWS = 128
"""Of logits, of a step that computes prompts for the most part."""


def _decode_sizes(most: int) -> Iterator[int]:
    yield from (size for size in (1, 2, 4) if size < most)
    yield from _sizes(most, _STEPS)


def _sizes(most: int, steps: Sequence[tuple[int, int]]) -> Iterator[int]:
    """In steps that grow, and then ``most``."""
    size = steps[0][1]
    for end, step in steps:
        while size < min(end, most):
            yield size
            size += step
    yield most
