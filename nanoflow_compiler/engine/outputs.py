"""What the engine returns; names are vLLM's."""

from dataclasses import dataclass, field

from nanoflow_compiler.engine.messages import FinishReason, RequestTimes, TokenLogprobs

__all__ = ["CompletionOutput", "RequestOutput"]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt, so far."""

    index: int
    text: str
    """Its end may still be cut at a stop string while ``finish_reason`` is None."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """None until it ends."""
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for an end token of the model."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Of each token, if they were asked for."""
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None
    """``None`` where the prompt was given as tokens."""
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = True
    num_cached_tokens: int = 0
    """Prompt tokens that the first completion found in the prefix cache."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """Of each prompt token but the first, if they were asked for."""
    times: RequestTimes | None = field(default=None, compare=False)
    """Of the first completion, once its first token is known."""
