"""The body of ``/v1/chat/completions``."""

from typing import Annotated, Any, Literal

from pydantic import Field

from nanoflow_compiler.server.protocol import ApiModel, Count, GenerationRequest

__all__ = ["ChatMessage", "ChatRequest", "ContentPart", "Messages", "Tool", "ToolChoice"]


class ContentPart(ApiModel):
    """A piece of a message; only text is understood."""

    type: str
    text: str = ""


class FunctionCall(ApiModel):
    """A call that the assistant made earlier; ``arguments`` is JSON in a string."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(ApiModel):
    """A call with the id that its answer names."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ApiModel):
    """One turn of a conversation."""

    role: str
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] = ""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None


Messages = Annotated[list[ChatMessage], Field(fail_fast=True)]


class Function(ApiModel):
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tool(ApiModel):
    """A tool; only functions are understood."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(ApiModel):
    """The function that must be called."""

    name: str


class ToolChoice(ApiModel):
    """``{"type": "function", "function": {"name": ...}}``: this one must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``; ``max_completion_tokens`` is the newer ``max_tokens``."""

    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=1000)] = 0

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool = True

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
