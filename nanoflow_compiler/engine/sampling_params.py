"""How one request's tokens are chosen and when it ends; names and defaults are vLLM's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nanoflow_compiler.errors import ConfigError

__all__ = ["SamplingParams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Raises :class:`ConfigError` on construction when a value cannot be used."""

    n: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens up to this probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch."""
    max_tokens: int | None = 16
    """``None``: as many as the model's context holds."""
    min_tokens: int = 0
    """Neither an end token nor a stop string ends the request before this many."""
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, and store the sequences as tuples."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _check(
            self.n == 1, f"n={self.n}: only one completion per prompt; repeat the prompt instead"
        )
        _check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or more, not {self.temperature}",
        )
        _check(self.top_k >= -1, f"top_k must be -1 or 0 (all), or a count, not {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        _check(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, not {self.min_p}")
        self._check_lengths()
        _check(all(stop), "stop holds an empty string, which every text contains")

    def _check_lengths(self) -> None:
        most = self.max_tokens
        _check(most is None or most >= 1, f"max_tokens must be at least 1, not {most}")
        _check(
            0 <= self.min_tokens <= (math.inf if most is None else most),
            f"min_tokens must be from 0 to max_tokens ({most}), not {self.min_tokens}",
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise ConfigError(message)
