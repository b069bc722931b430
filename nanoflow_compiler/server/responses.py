"""Bodies of answers; encoded by msgspec, because a busy server makes thousands of chunks a second."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatDelta",
    "ChatLogprob",
    "ChatLogprobs",
    "ChatMessageOut",
    "ChatResponse",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionResponse",
    "FunctionOut",
    "ToolCallOut",
    "Usage",
    "encode",
]

encode = msgspec.json.Encoder().encode


class Usage(Struct, frozen=True, kw_only=True):
    """How many tokens went in and came out."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: dict[str, int] | UnsetType = UNSET


class CompletionLogprobs(Struct, frozen=True):
    """One entry for each token; the first one of a text has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    """One completion, or the next piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Any] | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class CompletionResponse(Struct, frozen=True, kw_only=True):
    """A whole answer of ``/v1/completions``, and a chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class FunctionOut(Struct, frozen=True):
    """The function that the model calls."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallOut(Struct, frozen=True, kw_only=True):
    """A tool call; in a stream ``index`` says which one goes on."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionOut


class ChatLogprob(Struct, frozen=True):
    """A token and what else was likely in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list["ChatLogprob"] | UnsetType = UNSET


class ChatLogprobs(Struct, frozen=True):
    """One entry for each token."""

    content: list[ChatLogprob]


class ChatMessageOut(Struct, frozen=True, kw_only=True):
    """The answer of the assistant."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One completion of a chat."""

    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatResponse(Struct, frozen=True, kw_only=True):
    """A whole answer of ``/v1/chat/completions``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[Any] | None = None
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class ChatDelta(Struct, frozen=True, kw_only=True):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallOut] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """The next piece of one completion of a chat."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatChunk(Struct, frozen=True, kw_only=True):
    """A chunk of the stream of a chat."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
