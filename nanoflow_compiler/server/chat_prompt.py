"""The messages of a chat as the text that the model reads."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.protocol_chat import ChatMessage, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatPrompt", "render"]

RESERVED = frozenset(
    {"chat_template", "conversation", "documents", "messages", "tokenize", "tools"}
    | {"add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"}
    | {"max_length", "padding", "truncation", "tokenizer_kwargs", "return_assistant_tokens_mask"}
)
"""Not for ``chat_template_kwargs``: a request may choose neither the template nor how it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """What a chat template is given."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = ()
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """Characters, about."""
        return sum(len(_text(message)) for message in self.messages) + 500 * len(self.tools)


def render(
    prompt: ChatPrompt, tokenizer: "PreTrainedTokenizerBase", *, template: str | None
) -> str:
    """400 where the template cannot be applied: it is a program that runs on what users send."""
    if template is None and not tokenizer.chat_template:
        raise ApiError(
            "the model has no chat template: use /v1/completions, or start with a chat template"
        )
    extra = dict(prompt.template_kwargs or {})
    if reserved := sorted(extra.keys() & RESERVED):
        raise ApiError(
            f"chat_template_kwargs must not hold {reserved[0]}", param="chat_template_kwargs"
        )
    final = prompt.continue_final_message
    try:
        text = tokenizer.apply_chat_template(
            [_plain(message) for message in prompt.messages],
            tools=[
                tool.model_dump(exclude_defaults=True) | {"type": "function"}
                for tool in prompt.tools
            ]
            or None,
            documents=[dict(document) for document in prompt.documents or ()] or None,
            chat_template=template,
            add_generation_prompt=prompt.add_generation_prompt and not final,
            continue_final_message=final,
            tokenize=False,
            **extra,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:500]
        raise ApiError(f"the chat template refused: {reason}", param="messages") from error
    assert isinstance(text, str)
    return text


def _plain(message: ChatMessage) -> dict[str, Any]:
    """As templates expect it: text in one string, and the arguments of calls as objects."""
    plain = message.model_dump(exclude={"content", "tool_calls"})
    # Templates written before the role ``developer`` know it by its old name.
    plain["role"] = "system" if message.role == "developer" else message.role
    plain["content"] = _text(message)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type not in ("text", "input_text", "refusal"):
            raise ApiError(
                f"content of type {part.type!r} is not supported: this model reads text",
                param="messages",
            )
    return "\n".join(part.text for part in message.content)


def _arguments(given: str | dict[str, Any]) -> Any:
    if isinstance(given, dict):
        return given
    try:
        return json.loads(given or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError("arguments of a tool call are not JSON", param="messages") from error
