"""What the server asks of an engine, so that it runs on any object of this shape."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from nanoflow_compiler.engine.sampling_params import SamplingParams

# The engine's own modules import torch, which nothing in the server needs.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanoflow_compiler.engine.prompt import TokensPrompt

__all__ = ["Completion", "EngineClient", "EngineStats", "Output", "RequestTimes", "TokenLogprobs"]


class TokenLogprobs(Protocol):
    """Of one position: the token that is there, then the most likely ones."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def logprobs(self) -> Sequence[float]: ...
    @property
    def rank(self) -> int:
        """Of the token that is there; the most likely one has rank 1."""


class RequestTimes(Protocol):
    """How long a request took to its first token."""

    @property
    def queued_s(self) -> float:
        """From its arrival in the engine until its first tokens were in a step."""

    @property
    def prefill_s(self) -> float:
        """From then until the first token."""


class EngineStats(Protocol):
    """The first four are of this moment, the rest counts since the start."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_used_blocks(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_cache_queries(self) -> int:
        """Prompt tokens that were looked up in the prefix cache."""

    @property
    def num_cache_hits(self) -> int:
        """Prompt tokens that were found there."""

    @property
    def num_batched_tokens(self) -> int:
        """Tokens of all steps."""

    @property
    def step_tokens(self) -> Sequence[int]:
        """Steps by their size: one count for each of ``STEP_TOKEN_BUCKETS``, one for larger ones."""


class Completion(Protocol):
    """One completion so far; everything is cumulative."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str:
        """May still be cut at a stop string, until it is finished."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> int | str | None:
        """The stop string, or the entry of ``stop_token_ids``, that ended it."""

    @property
    def logprobs(self) -> Sequence[TokenLogprobs] | None:
        """One for each token, where they were asked for."""


class Output(Protocol):
    """A prompt and its completions so far."""

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def outputs(self) -> Sequence[Completion]:
        """All ``n``, those without news included."""

    @property
    def num_cached_tokens(self) -> int | None: ...
    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprobs | None] | None: ...
    @property
    def times(self) -> RequestTimes | None:
        """Of the first completion, known with the first output that has a token."""


class EngineClient(Protocol):
    """An engine that was started; who made it also closes it."""

    @property
    def model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None": ...
    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache."""

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """What the model recommends for fields that a request leaves out."""

    @property
    def errored(self) -> bool:
        """Whether the engine is gone; asked often, so it is known without asking the engine."""

    def generate(
        self, prompt: "TokensPrompt", params: SamplingParams, *, request_id: str
    ) -> AsyncGenerator[Output, None]:
        """Closing it early aborts the request. Outputs that nobody fetched yet may be skipped.

        Raises OutOfBlocksError and ConfigError before the first output; RequestError, where only
        this request failed, and EngineDeadError at any time.
        """

    async def abort(self, request_id: str) -> None:
        """Ends the request with the finish reason ``abort``; an unknown one is left alone."""

    async def stats(self) -> EngineStats:
        """Raises EngineDeadError if the engine is gone."""
