"""Prompts of a request as token ids."""

import asyncio
from dataclasses import dataclass
from typing import cast

from nanoflow_compiler.server.chat_prompt import ChatPrompt, render
from nanoflow_compiler.server.context import ServerContext
from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.protocol import CompletionRequest, GenerationRequest

__all__ = ["TokenizedPrompt", "chat_tokens", "listed_prompts", "tokenize_prompt", "truncated"]


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """What the model reads, and the text that ``echo`` repeats."""

    tokens: list[int]
    text: str = ""


async def chat_tokens(
    context: ServerContext, prompt: ChatPrompt, *, add_special_tokens: bool
) -> list[int]:
    """The template writes special tokens itself, so none are added unless asked for."""
    codec, template = context.codec, context.chat_template
    text = await codec.run(
        lambda: render(prompt, codec.tokenizer, template=template), size=prompt.size
    )
    return await codec.encode(text, add_special_tokens=add_special_tokens)


def truncated(
    tokens: list[int], body: GenerationRequest, *, max_tokens: int | None, most: int
) -> list[int]:
    """The first or last tokens; -1 keeps as many as the model holds beside the answer."""
    kept = body.truncate_prompt_tokens
    if kept is None:
        return tokens
    if kept == -1:
        answer = max_tokens or 1
        kept = most - (answer if answer < most else 1)
    return (
        tokens[:kept] if body.truncation_side == "right" else tokens[max(0, len(tokens) - kept) :]
    )


def listed_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """One by one; a flat list of numbers is a single prompt."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise ApiError("prompt is an empty list; send at least one", param="prompt")
    return cast("list[str | list[int]]", prompt)


async def tokenize_prompt(
    context: ServerContext, body: CompletionRequest, prompt: str | list[int]
) -> TokenizedPrompt:
    """Lets others run before it starts, since there may be thousands of short prompts."""
    await asyncio.sleep(0)
    codec, most = context.codec, context.engine.max_model_len
    given = prompt
    if isinstance(prompt, str):
        prompt = await codec.encode(
            prompt,
            add_special_tokens=body.add_special_tokens,
            is_cut=body.truncate_prompt_tokens is not None,
        )
    tokens = truncated(prompt, body, max_tokens=body.max_tokens, most=most)
    if not body.echo:
        return TokenizedPrompt(tokens)
    is_whole = isinstance(given, str) and len(tokens) == len(prompt)
    return TokenizedPrompt(tokens, str(given) if is_whole else await codec.decode(tokens))
