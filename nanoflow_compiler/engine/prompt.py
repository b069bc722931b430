"""What may be asked: text, or tokens."""

from collections.abc import Sequence
from typing import TypedDict

__all__ = ["Prompt", "TokensPrompt"]


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: Sequence[int]


Prompt = str | TokensPrompt
