"""Endpoints around generation: models, tokens, health and metrics."""

import asyncio

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

import nanoflow_compiler
from nanoflow_compiler.errors import EngineDeadError
from nanoflow_compiler.server.chat_prompt import ChatPrompt
from nanoflow_compiler.server.context import ServerContext, context_of
from nanoflow_compiler.server.errors import ApiError
from nanoflow_compiler.server.fields import refuse_unsupported
from nanoflow_compiler.server.json_body import JsonRoute
from nanoflow_compiler.server.prompts import chat_tokens
from nanoflow_compiler.server.protocol_tokens import DetokenizeRequest, TokenizeRequest

__all__ = ["router"]

STATS_TIMEOUT_S = 5.0

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/models", summary="The model that is served")
async def models(request: Request) -> Response:
    context = context_of(request)
    data = [_card(context, name) for name in context.model_names]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{name:path}", summary="One model")
async def model(name: str, request: Request) -> Response:
    context = context_of(request)
    return JSONResponse(_card(context, context.check_model(name)))


@router.get("/health", summary="200 while requests can be answered")
@router.head("/health", include_in_schema=False)
@router.api_route("/ping", methods=["GET", "HEAD", "POST"], include_in_schema=False)
async def health(request: Request) -> Response:
    context = context_of(request)
    if context.admission.is_draining:
        raise ApiError("this server is shutting down", status=503, code="shutting_down")
    if context.engine.errored:
        raise ApiError("the engine is dead; restart it", status=503, code="engine_dead")
    return Response(status_code=200)


@router.get("/load", summary="How much is open")
async def load(request: Request) -> Response:
    return JSONResponse({"server_load": context_of(request).admission.num_open})


@router.get("/version", summary="The version of the server")
async def version() -> Response:
    return JSONResponse({"version": nanoflow_compiler.__version__})


@router.get("/metrics", summary="For Prometheus")
async def metrics(request: Request) -> Response:
    context = context_of(request)
    try:
        async with asyncio.timeout(STATS_TIMEOUT_S):
            stats = await context.engine.stats()
    except (EngineDeadError, TimeoutError):
        # What the server itself counted is worth the more when the engine is silent.
        stats = None
    text = context.metrics.exposition(stats, num_rejected=context.admission.num_rejected)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.post("/tokenize", summary="Text, or a chat, to tokens")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    context = context_of(request)
    refuse_unsupported(body.model_extra)
    context.check_model(body.model)
    tokens = await _tokens(context, body)
    names = [context.codec.piece(token) for token in tokens] if body.return_token_strs else None
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": context.engine.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }
    )


@router.post("/detokenize", summary="Tokens to text")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    context = context_of(request)
    context.check_model(body.model)
    return JSONResponse({"prompt": await context.codec.decode(body.tokens)})


def _card(context: ServerContext, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": context.started,
        "owned_by": "nanoflow",
        "root": context.engine.model_name,
        "parent": None,
        "max_model_len": context.engine.max_model_len,
        "permission": [],
    }


async def _tokens(context: ServerContext, body: TokenizeRequest) -> list[int]:
    if body.messages:
        prompt = ChatPrompt(
            messages=body.messages,
            tools=body.tools or (),
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )
        wanted = bool(body.add_special_tokens)
        return await chat_tokens(context, prompt, add_special_tokens=wanted)
    if body.prompt is None:
        raise ApiError("send a prompt or messages", param="prompt")
    wanted = body.add_special_tokens is not False
    return await context.codec.encode(body.prompt, add_special_tokens=wanted)
