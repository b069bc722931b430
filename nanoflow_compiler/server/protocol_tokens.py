"""Bodies of ``/tokenize`` and ``/detokenize``, which are vLLM's."""

from typing import Any

from nanoflow_compiler.server.protocol import ApiModel, TokenIds
from nanoflow_compiler.server.protocol_chat import Messages, Tool

__all__ = ["DetokenizeRequest", "TokenizeRequest"]


class TokenizeRequest(ApiModel):
    """Either a prompt or the messages of a chat."""

    model: str = ""
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(ApiModel):
    """Tokens to read as text."""

    model: str = ""
    tokens: TokenIds
