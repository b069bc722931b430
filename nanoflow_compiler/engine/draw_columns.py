"""How every row of a step is drawn, as columns that a device holds; no row is treated apart."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.engine.noise import row_keys
from nanoflow_compiler.engine.sampling_batch import SamplingBatch

__all__ = ["DrawColumns", "draw_columns"]

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class DrawColumns:
    """The fields of :class:`~nanoflow_compiler.engine.draw.Draw` over all ``S`` rows, on the host."""

    temperature: Floats
    """0 is greedy."""
    least: Floats
    """The logarithm of ``min_p``: -inf without one."""
    limit: npt.NDArray[np.int64]
    """Of tokens: the size of the vocabulary without one, and 1 is greedy."""
    top_p: npt.NDArray[np.float64]
    """In float64, because it is multiplied by an exact sum of weights."""
    key_low: Halves
    key_high: Halves

    def padded(self, num_rows: int) -> "DrawColumns":
        """With greedy rows behind."""
        num_new = num_rows - len(self.temperature)
        behind = _greedy(num_new).arrays
        pairs = zip(self.arrays, behind, strict=True)
        return DrawColumns(*(np.concatenate(pair) for pair in pairs))

    @classmethod
    def none(cls) -> "DrawColumns":
        """Of no row."""
        return _greedy(0)

    @property
    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """In the order of the fields, to be uploaded together."""
        return (
            self.temperature,
            self.least,
            self.limit,
            self.top_p,
            self.key_low,
            self.key_high,
        )


def _greedy(num_rows: int) -> DrawColumns:
    return DrawColumns(
        temperature=np.zeros(num_rows, dtype=np.float32),
        least=np.full(num_rows, -np.inf, dtype=np.float32),
        limit=np.ones(num_rows, dtype=np.int64),
        top_p=np.ones(num_rows, dtype=np.float64),
        key_low=np.zeros(num_rows, dtype=np.int32),
        key_high=np.zeros(num_rows, dtype=np.int32),
    )


def draw_columns(batch: SamplingBatch, num_tokens: int) -> DrawColumns:
    """For logits of ``num_tokens``."""
    with np.errstate(divide="ignore"):
        least = np.log(batch.min_p)
    limit = np.where(batch.top_k > 0, np.minimum(batch.top_k, num_tokens), num_tokens)
    key_low, key_high = row_keys(batch.seeds, batch.counters)
    return DrawColumns(
        temperature=batch.temperature,
        least=least,
        limit=limit,
        top_p=batch.top_p.astype(np.float64),
        key_low=key_low,
        key_high=key_high,
    )
