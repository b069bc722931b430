"""How long outputs become, guessed from those that ended lately."""

import numpy as np
import numpy.typing as npt

__all__ = ["OutputLengths", "peak_tokens"]

Ints = npt.NDArray[np.int64]

FIRST_GUESS = 256
"""Tokens of an output, before any has ended."""
_NUM_KEPT = 1024


class OutputLengths:
    """The lengths of the last outputs that ended by themselves."""

    def __init__(self) -> None:
        self._kept = np.zeros(0, dtype=np.int64)
        self._next = 0

    def add(self, lengths: Ints) -> None:
        """Outputs that ended."""
        room = _NUM_KEPT - len(self._kept)
        self._kept = np.concatenate([self._kept, lengths[:room]])
        for length in lengths[room:].tolist() if room < len(lengths) else ():
            self._kept[self._next] = length
            self._next = (self._next + 1) % _NUM_KEPT

    def expected(self, num_generated: Ints, *, most: Ints) -> Ints:
        """The mean length of outputs longer than ``num_generated``, but no more than ``most``.

        An output longer than all that ended is guessed to be half way.
        """
        if not len(self._kept):
            guess = np.maximum(FIRST_GUESS, 2 * num_generated)
            return np.minimum(guess, most)
        ordered = np.sort(self._kept)
        sums = np.append(np.cumsum(ordered[::-1])[::-1], 0)
        first = np.searchsorted(ordered, num_generated, side="right")
        num_longer = len(ordered) - first
        mean = -(-sums[first] // np.maximum(num_longer, 1))
        guess = np.where(num_longer > 0, mean, 2 * num_generated + 1)
        return np.minimum(guess, most)


def peak_tokens(stored: Ints, remaining: Ints, *, block_size: int) -> int:
    """The most tokens that requests will hold at once, if each ends after ``remaining`` more.

    When the one with ``remaining[i]`` ends, those that take longer are there still, and each has
    grown by as much. Blocks are half empty on average, which is counted in.
    """
    order = np.argsort(-remaining, kind="stable")
    held = np.cumsum(stored[order])
    alive = np.arange(1, len(order) + 1)
    return int((held + alive * (remaining[order] + block_size // 2)).max(initial=0))
