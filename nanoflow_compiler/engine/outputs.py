"""What the engine returns; names are vLLM's."""

from dataclasses import dataclass

from nanoflow_compiler.engine.request import FinishReason

__all__ = ["CompletionOutput", "RequestOutput", "TokenDelta"]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """One more token of a request, after a step."""

    request_id: int
    token_id: int
    text: str
    """All text of the request so far; its end may still be cut at a stop string."""
    finish_reason: FinishReason | None
    """``None`` until the last token."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None
    """``None`` where the prompt was given as tokens."""
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
