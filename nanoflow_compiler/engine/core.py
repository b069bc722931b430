"""The engine's loop, one step at a time: form a batch, run it, sample, and see who is done."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.batcher import Batcher
from nanoflow_compiler.engine.detokenizer import Detokenizer
from nanoflow_compiler.engine.outputs import TokenDelta
from nanoflow_compiler.engine.request import FinishReason, Request
from nanoflow_compiler.engine.runner import ModelRunner
from nanoflow_compiler.engine.sampler import sample_requests
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import (
    ConfigError,
    EmptyPromptError,
    PromptTooLongError,
    RequestError,
)

__all__ = ["EngineCore"]


class EngineCore:
    """Requests join and leave between steps (continuous batching)."""

    def __init__(  # noqa: PLR0913 - what an engine is made of
        self,
        runner: ModelRunner,
        *,
        batcher: Batcher,
        tokenizer: PreTrainedTokenizerBase | None,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        self.runner = runner
        self.batcher = batcher
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.seed = seed
        self._num_requests = 0
        self._requests: dict[int, Request] = {}
        self._detokenizers: dict[int, Detokenizer] = {}

    @property
    def has_requests(self) -> bool:
        return self.batcher.has_requests

    def make_request(self, prompt_token_ids: Sequence[int], *, params: SamplingParams) -> Request:
        """A request that is checked but not yet added."""
        num_prompt_tokens = len(prompt_token_ids)
        if not num_prompt_tokens:
            raise EmptyPromptError("the prompt has no tokens, so there is nothing to continue")
        room = self.max_model_len - num_prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {num_prompt_tokens} tokens, and max_model_len={self.max_model_len} "
                "must hold it and at least one more: shorten the prompt or raise max_model_len"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer; use stop_token_ids or pass one")
        token_ids = _checked(prompt_token_ids, vocab_size=self.vocab_size)
        self._num_requests += 1
        request = Request(
            request_id=self._num_requests,
            prompt_token_ids=token_ids,
            params=params,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            # Without a seed of its own, a request still repeats with the engine's and its number.
            seed=(self.seed << 32) + self._num_requests if params.seed is None else params.seed,
        )
        self.batcher.check(request)
        return request

    def add(self, request: Request) -> None:
        self.batcher.add(request)
        self._requests[request.request_id] = request
        if self.tokenizer is not None:
            self._detokenizers[request.request_id] = Detokenizer(
                self.tokenizer, prompt_token_ids=request.prompt_token_ids, params=request.params
            )

    def abort(self, request_id: int) -> None:
        """End a request early; one that has ended already is left alone."""
        if request_id in self._requests:
            self._finish(self._requests[request_id], reason="abort")

    def step(self) -> list[TokenDelta]:
        """Advance the requests of one batch."""
        entries = self.batcher.next_batch()
        if not entries:
            return []
        batch = Batch.pack(entries)
        logits = self.runner.run(self.runner.prepare(batch))
        if not batch.sampled:
            return []
        tokens = sample_requests(logits, batch.sampled, eos_token_ids=self.eos_token_ids).tolist()
        return [self._append(*pair) for pair in zip(batch.sampled, tokens, strict=True)]

    def _append(self, request: Request, token: int) -> TokenDelta:
        request.token_ids.append(token)
        reason = self._end_reason(request, token)
        detokenizer = self._detokenizers.get(request.request_id)
        if detokenizer:
            is_hidden = reason == "stop" and not request.params.include_stop_str_in_output
            if detokenizer.append(token, is_hidden=is_hidden):
                reason = "stop"
            elif reason:
                detokenizer.finish()
        if reason:
            self._finish(request, reason=reason)
        text = detokenizer.text if detokenizer else ""
        return TokenDelta(request.request_id, token, text, reason)

    def _end_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if token in (params.stop_token_ids or ()):
            return "stop"
        if token in self.eos_token_ids and not params.ignore_eos:
            return "stop"
        return "length" if request.num_output_tokens >= request.max_tokens else None

    def _finish(self, request: Request, *, reason: FinishReason) -> None:
        self.batcher.finish(request, reason=reason)
        del self._requests[request.request_id]
        self._detokenizers.pop(request.request_id, None)


def _checked(token_ids: Sequence[int], *, vocab_size: int) -> tuple[int, ...]:
    """The ids as plain integers; one that the model has no embedding for would end the whole step."""
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise RequestError("prompt_token_ids must be a list of integers")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            f"prompt_token_ids holds {low if low < 0 else high}, but the model's tokens are 0 to "
            f"{vocab_size - 1}; use the model's own tokenizer"
        )
    return tuple(ids.tolist())
