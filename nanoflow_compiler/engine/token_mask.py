"""Which tokens may come next, in the rows where not all of them may."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["TokenMask"]


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Bits as xgrammar writes them: that of a token which may come is 1."""

    rows: npt.NDArray[np.int64]
    """``[G]``, of the logits."""
    words: npt.NDArray[np.int32]
    """``[G, V / 32]``, one bit for each token."""
