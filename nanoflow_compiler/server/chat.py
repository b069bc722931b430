"""``/v1/chat/completions``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from msgspec import UNSET
from starlette.responses import Response

from nanoflow_compiler.server.answering import EventStream, JsonAnswer, sse
from nanoflow_compiler.server.chat_call import ChatCall, prepare
from nanoflow_compiler.server.chat_choices import ChatChoiceWriter
from nanoflow_compiler.server.context import context_of
from nanoflow_compiler.server.json_body import JsonRoute
from nanoflow_compiler.server.protocol import StreamOptions
from nanoflow_compiler.server.protocol_chat import ChatRequest
from nanoflow_compiler.server.request_ids import make_id
from nanoflow_compiler.server.responses import ChatResponse
from nanoflow_compiler.server.usage import usage_of, usage_so_far

if TYPE_CHECKING:
    from nanoflow_compiler.server.engine_client import Output

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", summary="Answer a conversation")
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    context = context_of(request)
    call = await prepare(context, body, make_id("chatcmpl", request, body.request_id))
    timeout_s = context.settings.request_timeout
    if body.stream:
        return EventStream(_events(call), timeout_s=timeout_s)
    return JsonAnswer(_whole(call), timeout_s=timeout_s)


async def _whole(call: ChatCall) -> ChatResponse:
    last = await call.context.last_outputs(call.job)
    (output,) = last
    prompt_logprobs = output.prompt_logprobs if call.body.prompt_logprobs is not None else None
    return ChatResponse(
        id=call.job.request_id,
        created=call.job.created,
        model=call.model,
        choices=[
            ChatChoiceWriter(call).whole(one)
            for one in sorted(output.outputs, key=lambda one: one.index)
        ],
        usage=usage_of(last),
        prompt_logprobs=call.writer.prompt(prompt_logprobs) if prompt_logprobs else None,
        prompt_token_ids=output.prompt_token_ids if call.body.return_token_ids else UNSET,
    )


async def _events(call: ChatCall) -> AsyncGenerator[bytes, None]:
    options = call.body.stream_options or StreamOptions()
    writers = [ChatChoiceWriter(call) for _ in call.job.indices]
    last: dict[int, Output] = {}
    async with aclosing(call.context.outputs(call.job)) as outputs:
        async for prompt, output in outputs:
            if not last:
                for index in call.job.indices:
                    yield sse(call.first_chunk(writers[index].first(index)))
            last[prompt] = output
            for one in output.outputs:
                choice = writers[one.index].advance(one)
                if choice is not None:
                    usage = usage_so_far(output, one) if options.continuous_usage_stats else UNSET
                    yield sse(call.chunk([choice], usage))
    if options.include_usage:
        yield sse(call.chunk([], usage_of(last.values())))
