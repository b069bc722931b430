"""From tokens to answers: text, stop strings, log-probabilities, one prompt's completions together."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from nanoflow_compiler.engine.detokenizer import Detokenizer
from nanoflow_compiler.engine.messages import (
    NO_TOKEN,
    EngineRequest,
    FinishReason,
    RequestTimes,
    StepOutput,
    TokenLogprobs,
)
from nanoflow_compiler.engine.outputs import CompletionOutput, RequestOutput
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import ConfigError, RequestError

__all__ = ["Answer", "OutputProcessor"]


@dataclass(slots=True, eq=False)
class _Completion:
    request: EngineRequest
    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def append(self, token: int, *, reason: FinishReason | None) -> None:
        """A token of a step; a stop string may end the completion before the engine does."""
        self.token_ids.append(token)
        self.finish_reason = reason
        if self.detokenizer is None:
            return
        hides = reason == "stop" and not self.request.params.include_stop_str_in_output
        if self.detokenizer.append(token, is_hidden=hides):
            self.finish_reason, self.stop_reason = "stop", self.detokenizer.stop_string
        elif reason:
            self.detokenizer.finish()

    def output(self) -> CompletionOutput:
        """As it is now."""
        wants = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs) if wants else None,
            cumulative_logprob=sum(p.logprobs[0] for p in self.logprobs) if wants else None,
        )


@dataclass(slots=True, eq=False)
class Answer:
    """The completions of one prompt while they grow."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    completions: tuple[_Completion, ...]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    times: RequestTimes | None = None
    error: str | None = None
    """Why it failed; it has no output then."""

    @property
    def requests(self) -> list[EngineRequest]:
        """What the engine is asked for."""
        return [completion.request for completion in self.completions]

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)

    def abort(self) -> None:
        """End what has not ended."""
        for completion in self.completions:
            completion.finish_reason = completion.finish_reason or "abort"

    def output(self) -> RequestOutput:
        """As it is now; :class:`RequestError` if it failed."""
        if self.error is not None:
            raise RequestError(self.error)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=tuple(completion.output() for completion in self.completions),
            finished=self.finished,
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
            times=self.times,
        )


class OutputProcessor:
    """Knows the answers that are under way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._keys = itertools.count(1)
        self._open: dict[int, tuple[Answer, _Completion]] = {}

    def answer(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        prompt: str | None = None,
    ) -> Answer:
        """A new answer, whose requests are yet to be added to the engine."""
        if params.stop_strings and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer; use stop_token_ids or pass one")
        token_ids = tuple(prompt_token_ids)
        requests = list(self._requests(token_ids, params, request_id=request_id))
        completions = tuple(
            _Completion(request, index, self._detokenizer(request))
            for index, request in enumerate(requests)
        )
        return Answer(request_id, prompt, token_ids, completions)

    def open(self, answer: Answer) -> None:
        """From now on steps are for this answer too."""
        for completion in answer.completions:
            self._open[completion.request.key] = (answer, completion)

    def close(self, answer: Answer) -> list[int]:
        """Keys of the completions that the engine may still be at work on."""
        keys = [request.key for request in answer.requests]
        return [key for key in keys if self._open.pop(key, None) is not None]

    def process(self, step: StepOutput) -> tuple[list[Answer], list[int]]:
        """The answers that grew, and the keys of requests that a stop string ended."""
        grown: dict[int, Answer] = {}
        stopped = []
        for key, token in zip(step.keys, step.tokens, strict=True):
            if key not in self._open:  # closed while the step ran
                continue
            answer, completion = self._open[key]
            grown[id(answer)] = answer
            reason = step.finish_reasons.get(key)
            self._add(answer, completion, key=key, token=token, step=step)
            if completion.finish_reason:
                del self._open[key]
                if reason is None:
                    stopped.append(key)
        return list(grown.values()), stopped

    def _add(
        self, answer: Answer, completion: _Completion, *, key: int, token: int, step: StepOutput
    ) -> None:
        reason = step.finish_reasons.get(key)
        completion.stop_reason = step.stop_reasons.get(key)
        if key in step.logprobs:
            completion.logprobs.append(step.logprobs[key])
        if completion.index == 0:
            answer.num_cached_tokens = step.num_cached_tokens.get(key, answer.num_cached_tokens)
            if key in step.prompt_logprobs:
                answer.prompt_logprobs = tuple(step.prompt_logprobs[key])
            answer.times = step.times.get(key, answer.times)
        if key in step.errors:
            answer.error = step.errors[key]
        if token == NO_TOKEN:
            completion.finish_reason = reason
        else:
            completion.append(token, reason=reason)

    def _requests(
        self, token_ids: tuple[int, ...], params: SamplingParams, *, request_id: str
    ) -> Iterator[EngineRequest]:
        group = None
        for index in range(params.n):
            key = next(self._keys)
            group = key if group is None else group
            # As wide as it counts, and as it can be sent.
            seed = None if params.seed is None else (params.seed + index) % 2**64
            yield EngineRequest(
                key=key,
                request_id=request_id if params.n == 1 else f"{request_id}-{index}",
                prompt_token_ids=token_ids,
                params=replace(params, n=1, seed=seed),
                group=group,
            )

    def _detokenizer(self, request: EngineRequest) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(
            self.tokenizer,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
        )
