"""What one request may ask of an engine: known to whoever sends requests, checked before any is sent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoflow_compiler.engine.messages import EngineRequest
from nanoflow_compiler.errors import (
    EmptyPromptError,
    OutOfBlocksError,
    PromptTooLongError,
    RequestError,
)

__all__ = ["RequestLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The sizes of an engine, as far as a single request can exceed them."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    """Usable blocks of the KV cache."""

    def check(self, request: EngineRequest) -> int:
        """The tokens at which the request ends for its length, its prompt included.

        One that could never run is refused with a :class:`RequestError` or :class:`OutOfBlocksError`.
        """
        num_prompt = self._check_tokens(request.prompt_token_ids)
        request.params.check_vocabulary(self.vocab_size)
        room = self.max_model_len - num_prompt
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} tokens, and max_model_len={self.max_model_len} "
                "must hold it and at least one more: shorten the prompt or raise max_model_len"
            )
        most = request.params.max_tokens
        limit = num_prompt + (room if most is None else min(room, most))
        self._check_blocks(num_prompt=num_prompt, limit=limit)
        return limit

    def _check_tokens(self, token_ids: Sequence[int]) -> int:
        """Their number; one that the model has no embedding for would end the whole step."""
        ids = np.asarray(token_ids)
        if not ids.size:
            raise EmptyPromptError("the prompt has no tokens, so there is nothing to continue")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("prompt_token_ids must be a list of integers")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise RequestError(
                f"prompt_token_ids holds {low if low < 0 else high}, but the model's tokens are 0 "
                f"to {self.vocab_size - 1}; use the model's own tokenizer"
            )
        return len(ids)

    def _check_blocks(self, *, num_prompt: int, limit: int) -> None:
        """Whether the request would fit alone; the last token that is sampled is never stored."""
        needed = -(-(limit - 1) // self.block_size)
        if needed > self.num_blocks:
            raise OutOfBlocksError(
                f"a prompt of {num_prompt} tokens and {limit - num_prompt} more need {needed} KV "
                f"blocks of {self.block_size} tokens, and there are {self.num_blocks}: raise "
                "num_kv_blocks (or kv_cache_memory_bytes), or lower max_tokens"
            )
