"""What crosses the border between who serves requests and who runs the model: plain data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanoflow_compiler.engine.sampling_params import SamplingParams

__all__ = [
    "NO_TOKEN",
    "STEP_TOKEN_BUCKETS",
    "Command",
    "EngineRequest",
    "EngineStats",
    "Event",
    "FinishReason",
    "RequestTimes",
    "StepOutput",
    "TokenLogprobs",
]

FinishReason = Literal["stop", "length", "abort", "error"]

NO_TOKEN = -1
"""In :attr:`StepOutput.tokens`, of a request that ended without one."""


STEP_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of :attr:`EngineStats.step_tokens`; one more bucket is for larger steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One completion of one prompt."""

    key: int
    """Given by the client, ascending in order of arrival, never used twice."""
    request_id: str
    """What people see in logs and answers."""
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    """``n`` is 1: the client makes a request of every completion, all in one group."""
    group: int
    """Key of the first completion of the same prompt; they share its blocks."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one position: the token that is there, then the most likely ones."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Of the token that is there; the most likely one has rank 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """How long a request took to its first token."""

    queued_s: float
    """Until its first tokens were in a step."""
    prefill_s: float
    """From then until the first token was known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Requests that got a token in one step, or ended; the rest is sparse, by key."""

    keys: list[int]
    tokens: list[int]
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    """Of those that ended."""
    stop_reasons: dict[int, int] = field(default_factory=dict)
    """The entry of ``stop_token_ids`` that ended a request."""
    num_cached_tokens: dict[int, int] = field(default_factory=dict)
    """Prompt tokens that were not computed, told with the first token."""
    times: dict[int, RequestTimes] = field(default_factory=dict)
    """Told with the first token."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs | None]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    """One line each, of those that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counts since the start unless they are of this moment."""

    num_running: int
    """Now."""
    num_waiting: int
    """Now."""
    num_blocks: int
    num_used_blocks: int
    """Now; blocks that are only cached count as free."""
    num_preemptions: int
    num_cache_queries: int
    """Prompt tokens that were looked up in the prefix cache."""
    num_cache_hits: int
    """Prompt tokens that were found there."""
    num_steps: int
    num_batched_tokens: int = 0
    """Tokens of all steps."""
    step_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKEN_BUCKETS) + 1)
    """Steps by their number of tokens: each bucket counts those up to its bound and above the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a client wants done before the next step: first requests to add, then keys to abort."""

    add: Sequence[EngineRequest] = ()
    abort: Sequence[int] = ()
    close: bool = False
    """The last command: the engine ends, and with it what it still runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What an engine tells after a step."""

    stats: EngineStats | None = None
    output: StepOutput | None = None
    error: str | None = None
    """The last event of an engine that failed: one line."""
