"""How scores of keys become weights of values."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scoring"]


@dataclass(frozen=True, slots=True)
class Scoring:
    """``softmax(softcap * tanh(scale * q.k / softcap))``, sinks beside them."""

    scale: float
    softcap: float = 0.0  # 0: none
    sinks: Tensor | None = None  # one logit per head, which takes weight and has no value

    @property
    def is_plain(self) -> bool:
        """Whether the weights are the softmax of scaled products."""
        return not self.softcap and self.sinks is None

    def cap(self, scores: Tensor) -> Tensor:
        """Scaled scores as they enter the softmax."""
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def weigh(self, scores: Tensor, *, heads: tuple[int, ...]) -> Tensor:
        """Their softmax over the last dimension; ``heads`` is how the heads lie in those before it."""
        if self.sinks is None:
            return scores.softmax(-1)
        logits = self.sinks.float().view(*heads, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]
