"""``/v1/completions``."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from nanoflow_compiler.server.answering import EventStream, JsonAnswer, sse
from nanoflow_compiler.server.context import Job, ServerContext, context_of
from nanoflow_compiler.server.deltas import Delta, DeltaCursor
from nanoflow_compiler.server.engine_client import Completion, Output, TokenLogprobs
from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.fields import refuse_unsupported, refused
from nanoflow_compiler.server.json_body import JsonRoute
from nanoflow_compiler.server.logprobs import LogprobWriter
from nanoflow_compiler.server.prompts import listed_prompts, tokenize_prompt
from nanoflow_compiler.server.protocol import CompletionRequest, StreamOptions
from nanoflow_compiler.server.request_ids import make_id
from nanoflow_compiler.server.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    Usage,
)
from nanoflow_compiler.server.sampling import make_params
from nanoflow_compiler.server.usage import usage_of, usage_so_far

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/completions", summary="Continue prompts")
async def completions(body: CompletionRequest, request: Request) -> Response:
    context = context_of(request)
    _check(body)
    call = await _prepare(context, body, make_id("cmpl", request, body.request_id))
    timeout_s = context.settings.request_timeout
    if body.stream:
        return EventStream(_events(call), timeout_s=timeout_s)
    return JsonAnswer(_whole(call), timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class _Call:
    """A request that is ready to run."""

    context: ServerContext
    body: CompletionRequest
    model: str
    job: Job
    echoes: Sequence[str]
    """Text of the prompts, to stand before their completions; empty if not wanted."""
    writer: LogprobWriter

    def answer(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType = UNSET
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self.job.request_id,
            created=self.job.created,
            model=self.model,
            choices=choices,
            usage=usage,
        )


def _check(body: CompletionRequest) -> None:
    refuse_unsupported(body.model_extra)
    if body.suffix:
        raise refused("suffix")
    if body.best_of not in (None, 1, body.n):
        raise refused("best_of")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError("max_tokens must be at least 1, unless echo is set", param="max_tokens")


async def _prepare(context: ServerContext, body: CompletionRequest, request_id: str) -> _Call:
    model = context.check_model(body.model)
    echoed = body.logprobs if body.echo else None
    params = make_params(
        body,
        defaults=context.sampling_defaults,
        # To see a prompt's own log-probabilities, one token is generated and not shown.
        max_tokens=max(body.max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=echoed if body.prompt_logprobs is None else body.prompt_logprobs,
    )
    listed = listed_prompts(body)
    with context.admission.reserve(len(listed) * params.n):
        prompts = [await tokenize_prompt(context, body, prompt) for prompt in listed]
    return _Call(
        context,
        body,
        model,
        Job(request_id=request_id, prompts=[one.tokens for one in prompts], params=params),
        [one.text for one in prompts] if body.echo else [],
        LogprobWriter(
            context.codec,
            num_top=body.logprobs or 0,
            as_token_ids=body.return_tokens_as_token_ids,
        ),
    )


async def _whole(call: _Call) -> CompletionResponse:
    last = await call.context.last_outputs(call.job)
    choices = [
        choice
        for prompt, output in enumerate(last)
        for one in sorted(output.outputs, key=lambda one: one.index)
        if (choice := _ChoiceWriter(call, prompt).advance(output, one))
    ]
    return call.answer(choices, usage_of(last))


async def _events(call: _Call) -> AsyncGenerator[bytes, None]:
    options = call.body.stream_options or StreamOptions()
    writers = [_ChoiceWriter(call, index // call.job.params.n) for index in call.job.indices]
    last: dict[int, Output] = {}
    async with aclosing(call.context.outputs(call.job)) as outputs:
        async for prompt, output in outputs:
            last[prompt] = output
            for one in output.outputs:
                choice = writers[prompt * call.job.params.n + one.index].advance(output, one)
                if choice is not None:
                    usage = usage_so_far(output, one) if options.continuous_usage_stats else UNSET
                    yield sse(call.answer([choice], usage))
    if options.include_usage:
        yield sse(call.answer([], usage_of(last.values())))


class _ChoiceWriter:
    """Writes one completion, at once or in pieces."""

    def __init__(self, call: _Call, prompt: int) -> None:
        self._call = call
        self._prompt = prompt
        self._cursor = DeltaCursor(call.job.params, interval=call.context.interval(call.body))
        self._is_first = True
        self._offset = 0

    def advance(self, output: Output, completion: Completion) -> CompletionChoice | None:
        delta = self._cursor.advance(completion)
        if delta is None:
            return None
        body = self._call.body
        echo = self._call.echoes[self._prompt] if self._is_first and body.echo else ""
        choice = CompletionChoice(
            index=self._prompt * self._call.job.params.n + completion.index,
            text=echo + ("" if body.max_tokens == 0 else delta.text),
            logprobs=None if body.logprobs is None else self._logprobs(output, delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            prompt_logprobs=self._prompt_logprobs(output),
            token_ids=delta.token_ids if body.return_token_ids else UNSET,
            prompt_token_ids=(
                output.prompt_token_ids if body.return_token_ids and self._is_first else UNSET
            ),
        )
        self._is_first = False
        return choice

    def _logprobs(self, output: Output, delta: Delta) -> CompletionLogprobs:
        body = self._call.body
        tokens: list[int] = []
        found: list[TokenLogprobs | None] = []
        if self._is_first and body.echo:
            tokens += output.prompt_token_ids
            found += output.prompt_logprobs or [None] * len(tokens)
        if body.max_tokens:
            tokens += delta.token_ids
            found += delta.logprobs
        written = self._call.writer.completion(tokens, found, offset=self._offset)
        if tokens:
            self._offset = written.text_offset[-1] + len(written.tokens[-1])
        return written

    def _prompt_logprobs(self, output: Output) -> list[Any] | UnsetType:
        if self._call.body.prompt_logprobs is None or output.prompt_logprobs is None:
            return UNSET
        return self._call.writer.prompt(output.prompt_logprobs)
