"""Tokenization that never holds up the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from nanoflow_compiler.server.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextCodec"]

T = TypeVar("T")

NUM_THREADS = 2
SHORT_CHARACTERS = 2000
"""Text up to this length is tokenized at once: handing it to a thread would take longer."""

SLACK = 4
"""Some tokenizers drop characters, such as repeated spaces, before they look for tokens."""


class TextCodec:
    """The tokenizer, with its slow work in threads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", *, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._threads: ThreadPoolExecutor | None = None
        self._pieces: dict[int, str] = {}
        self._longest: int | None = None

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """400 where the model has none: prompts may still be sent as token ids."""
        if self._tokenizer is None:
            raise ApiError("the model has no tokenizer: send prompts as token ids", param="prompt")
        return self._tokenizer

    async def encode(
        self, text: str, *, add_special_tokens: bool, is_cut: bool = False
    ) -> list[int]:
        """400 for a text that is too long to fit, without trying; unless it is cut afterwards."""
        tokenizer = self.tokenizer
        if not is_cut and len(text) > self._max_model_len * self._longest_token() * SLACK:
            raise ApiError(
                f"the prompt has {len(text)} characters, more than fit into the "
                f"{self._max_model_len} tokens of the model: shorten it",
                param="prompt",
                code="context_length_exceeded",
            )

        def encode() -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return ids

        return await self.run(encode, size=len(text))

    async def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        tokenizer, ids = self.tokenizer, list(tokens)

        def decode() -> str:
            text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            assert isinstance(text, str)
            return text

        try:
            return await self.run(decode, size=len(ids))
        except (OverflowError, TypeError, IndexError) as error:
            raise ApiError(
                "tokens holds an id that the vocabulary lacks", param="tokens"
            ) from error

    def piece(self, token: int) -> str:
        """The text of one token by itself, special tokens shown; remembered."""
        found = self._pieces.get(token)
        if found is None:
            text = self._tokenizer.decode([token]) if self._tokenizer else ""
            found = self._pieces[token] = str(text)
        return found

    async def run(self, work: Callable[[], T], *, size: int) -> T:
        """Run work of so many characters or tokens here if it is short, else in a thread."""
        if size <= SHORT_CHARACTERS:
            return work()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Let the threads go; an application that starts again gets new ones."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _longest_token(self) -> int:
        """Characters; pieces of byte-level vocabularies are at least as long as their text."""
        if self._longest is None:
            vocabulary: dict[str, Any] = self.tokenizer.get_vocab()
            self._longest = max(map(len, vocabulary), default=1)
        return self._longest
