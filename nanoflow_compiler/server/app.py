"""The ASGI application, for uvicorn or any other server."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import nanoflow_compiler
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.server import chat, completions, service
from nanoflow_compiler.server.admission import Admission
from nanoflow_compiler.server.context import ServerContext
from nanoflow_compiler.server.engine_client import EngineClient
from nanoflow_compiler.server.errors import add_handlers
from nanoflow_compiler.server.metrics import Metrics
from nanoflow_compiler.server.middleware import (
    ApiKeyMiddleware,
    RequestIdMiddleware,
    SizeLimitMiddleware,
)
from nanoflow_compiler.server.settings import ServerSettings
from nanoflow_compiler.server.stats_log import StatsLog
from nanoflow_compiler.server.text import TextCodec
from nanoflow_compiler.server.tool_calls import ToolParser, make_parser

__all__ = ["create_app"]

_LOG = logging.getLogger(__name__)


def create_app(engine: EngineClient, settings: ServerSettings) -> FastAPI:
    """``app.state.context`` is the :class:`ServerContext` of the app."""
    context = _context(engine, settings)
    app = FastAPI(
        title="nanoflow",
        version=nanoflow_compiler.__version__,
        openapi_url=None if settings.disable_fastapi_docs else "/openapi.json",
        lifespan=_lifespan(context),
    )
    app.state.context = context
    for module in (completions, chat, service):
        app.include_router(module.router)
    add_handlers(app)
    _add_middleware(app, settings)
    return app


def _context(engine: EngineClient, settings: ServerSettings) -> ServerContext:
    names = settings.served_model_names or (engine.model_name,)
    return ServerContext(
        engine=engine,
        settings=settings,
        codec=TextCodec(engine.tokenizer, max_model_len=engine.max_model_len),
        admission=Admission(
            max_reqs=settings.max_num_queued_reqs, max_tokens=settings.max_num_queued_tokens
        ),
        metrics=Metrics(
            model_name=names[0],
            max_model_len=engine.max_model_len,
            block_size=engine.block_size,
            prefix=settings.metrics_prefix,
        ),
        tool_parser=_tool_parser(engine, settings),
        chat_template=settings.read_chat_template(),
        sampling_defaults=_sampling_defaults(engine, settings),
    )


def _sampling_defaults(engine: EngineClient, settings: ServerSettings) -> Mapping[str, float]:
    if settings.generation_config == "vllm" or not engine.sampling_defaults:
        return {}
    listed = ", ".join(f"{name} {value:g}" for name, value in engine.sampling_defaults.items())
    _LOG.info("defaults of requests are those of the model: %s", listed)
    return engine.sampling_defaults


def _tool_parser(engine: EngineClient, settings: ServerSettings) -> ToolParser | None:
    if settings.enable_auto_tool_choice is False:
        return None
    template = settings.read_chat_template() or getattr(engine.tokenizer, "chat_template", None)
    # Some models have several templates, by name.
    text = str(template or "")
    parser = make_parser(settings.tool_call_parser, template=text)
    if parser is None and settings.enable_auto_tool_choice:
        raise ConfigError(
            "enable_auto_tool_choice needs to know how the model writes tool calls, and its chat "
            "template does not say so: give tool_call_parser hermes or llama3_json"
        )
    if parser is not None and "tools" not in text:
        _LOG.warning(
            "the chat template does not show tools to the model; chat_template sets another"
        )
    return parser


async def _log_stats(context: ServerContext) -> None:
    if not context.settings.disable_log_stats:
        await StatsLog(context.engine, context.metrics).run()


def _lifespan(
    context: ServerContext,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stats_log = asyncio.create_task(_log_stats(context))
        yield
        stats_log.cancel()
        context.codec.close()

    return lifespan


def _add_middleware(app: FastAPI, settings: ServerSettings) -> None:
    """The last one added sees a request first."""
    app.add_middleware(SizeLimitMiddleware, max_bytes=settings.max_request_bytes)
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=settings.api_keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestIdMiddleware)
