"""Log-probabilities on their way from the device to the requests that asked for them."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.logprobs import TopLogprobs
from nanoflow_compiler.engine.messages import TokenLogprobs
from nanoflow_compiler.engine.sampling_batch import SamplingBatch

__all__ = ["PromptLogprobs", "sampled_logprobs"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def sampled_logprobs(
    found: TopLogprobs | None, sampling: SamplingBatch, *, keys: Ints, alive: Bools
) -> dict[int, TokenLogprobs]:
    """By key, of the rows that ask for them and are alive."""
    rows = np.flatnonzero((sampling.num_logprobs >= 0) & alive)
    if found is None or not len(rows):
        return {}
    counts = sampling.num_logprobs[rows]
    return dict(zip(keys[rows].tolist(), _rows(found, rows, counts), strict=True))


class PromptLogprobs:
    """Those of prompts that are still being computed, by key; they arrive in pieces."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[TokenLogprobs | None]] = {}

    def add(self, found: TopLogprobs | None, batch: Batch) -> None:
        """What one step found."""
        if found is None:
            return
        rows = np.arange(len(batch.prompt_rows))
        values = _rows(found, rows, batch.prompt_counts)
        positions = batch.positions[batch.prompt_rows]
        for key, at, value in zip(
            batch.prompt_keys.tolist(), positions.tolist(), values, strict=True
        ):
            piece = self._pieces.setdefault(key, [None])
            # A request that was preempted computes its prompt again.
            if len(piece) == at + 1:
                piece.append(value)

    def take(self, key: int) -> list[TokenLogprobs | None]:
        """All of one prompt; of its first token there are none."""
        return self._pieces.pop(key, [None])

    def drop(self, keys: Iterable[int]) -> None:
        """Forget requests."""
        for key in keys:
            self._pieces.pop(key, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._pieces.clear()


def _rows(found: TopLogprobs, rows: Ints, counts: Ints) -> list[TokenLogprobs]:
    """Each with its token, and as many of the most likely ones as it asked for."""
    ids, values, ranks = (
        tensor.numpy()[rows].tolist() for tensor in (found.token_ids, found.logprobs, found.ranks)
    )
    return [
        TokenLogprobs(tokens[: count + 1], logprobs[: count + 1], rank)
        for tokens, logprobs, rank, count in zip(ids, values, ranks, counts.tolist(), strict=True)
    ]
