"""How one request's tokens are chosen and when it ends; names and defaults are vLLM's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanoflow_compiler.engine.structured import StructuredOutputsParams
from nanoflow_compiler.errors import ConfigError, RequestError

__all__ = ["MAX_COMPLETIONS", "MAX_LOGPROBS", "SamplingParams"]

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 20
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Raises :class:`ConfigError` on construction when a value cannot be used."""

    n: int = 1
    """Completions per prompt."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the output holds already."""
    frequency_penalty: float = 0.0
    """Taken off as often as the output holds the token."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt or output, and multiplies the negative ones."""
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
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Token id to what is added to its logit."""
    allowed_token_ids: Sequence[int] | None = None
    """No other token is chosen; ``None`` allows all."""
    logprobs: int | None = None
    """This many most likely tokens beside each chosen one; 0 is the chosen one alone."""
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled, and keep copies of sequences and mappings."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}) or None)
        if self.allowed_token_ids is not None:
            unique = tuple(dict.fromkeys(self.allowed_token_ids))
            object.__setattr__(self, "allowed_token_ids", unique)
        self._check_draw()
        self._check_penalties()
        self._check_allowed()
        self._check_lengths()
        self._check_logprobs()
        _check(all(stop), "stop holds an empty string, which every text contains")

    def _check_draw(self) -> None:
        _check(1 <= self.n <= MAX_COMPLETIONS, f"n must be 1 to {MAX_COMPLETIONS}, not {self.n}")
        _check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be 0 (greedy) or more, not {self.temperature}",
        )
        _check(self.top_k >= -1, f"top_k must be -1 or 0 (all), or a count, not {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        _check(0 <= self.min_p <= 1, f"min_p must be from 0 to 1, not {self.min_p}")

    def _check_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(-2 <= value <= 2, f"{name} must be from -2 to 2, not {value}")
        repetition = self.repetition_penalty
        _check(
            math.isfinite(repetition) and repetition > 0,
            f"repetition_penalty must be above 0 (1 is none), not {repetition}",
        )
        for token, bias in (self.logit_bias or {}).items():
            _check(
                type(token) is int and token >= 0,
                f"logit_bias maps token ids (integers) to numbers; {token!r} is no token id",
            )
            _check(
                -MAX_BIAS <= bias <= MAX_BIAS,
                f"logit_bias of token {token} must be from -100 to 100, not {bias}",
            )

    def _check_allowed(self) -> None:
        allowed = self.allowed_token_ids
        _check(
            allowed is None or len(allowed) > 0,
            "allowed_token_ids is empty, which allows no token; leave it out to allow all",
        )
        bad = [token for token in allowed or () if type(token) is not int or token < 0]
        _check(not bad, f"allowed_token_ids holds {bad[:1]}, which is no token id")

    def _check_lengths(self) -> None:
        most = self.max_tokens
        _check(most is None or most >= 1, f"max_tokens must be at least 1, not {most}")
        _check(
            0 <= self.min_tokens <= (math.inf if most is None else most),
            f"min_tokens must be from 0 to max_tokens ({most}), not {self.min_tokens}",
        )
        _check(
            not (self.min_tokens and self.structured_outputs),
            "min_tokens and structured_outputs exclude each other: the grammar says where to end",
        )

    def _check_logprobs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(
                value is None or 0 <= value <= MAX_LOGPROBS,
                f"{name} must be 0 to {MAX_LOGPROBS}, or None, not {value}",
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse tokens that the model does not have."""
        for name in ("logit_bias", "allowed_token_ids"):
            unknown = [token for token in getattr(self, name) or () if token >= vocab_size]
            if unknown:
                raise RequestError(
                    f"{name} names token {unknown[0]}, but the model's tokens are 0 to "
                    f"{vocab_size - 1}; use the ids of the model's own tokenizer"
                )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen before change the logits."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties)


def _check(is_good: bool, message: str) -> None:
    if not is_good:
        raise ConfigError(message)
