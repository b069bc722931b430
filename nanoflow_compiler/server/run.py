"""Serves an engine over HTTP until a signal; then drains."""

import asyncio
import logging
import signal
import socket
from types import FrameType

import uvicorn

from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.server.app import create_app
from nanoflow_compiler.server.engine_client import EngineClient
from nanoflow_compiler.server.settings import ServerSettings

__all__ = ["Server", "bind", "serve"]

_LOG = logging.getLogger(__name__)

BACKLOG = 4096
LAST_ANSWERS_S = 3
"""After the abort, for the last events to reach their readers."""


async def serve(
    engine: EngineClient, settings: ServerSettings, bound: socket.socket | None = None
) -> None:
    """Returns after SIGTERM or SIGINT, when open requests ended or their deadline passed.

    The engine stays open: who made it closes it. ``bound`` is what :func:`bind` returned, by default
    called here. ConfigError if the address cannot be had.
    """
    with bound or bind(settings) as listening:
        await Server(engine, settings).serve([listening])


def bind(settings: ServerSettings) -> socket.socket:
    """Before anything is started, so that a port that is taken costs no time.

    Connections are refused until the server listens.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((settings.host, settings.port))
        return bound
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            "choose another host or port"
        ) from error


class Server(uvicorn.Server):
    """uvicorn, except that the first signal lets open requests end while new ones get a 503."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        app = create_app(engine, settings)
        self.context = app.state.context
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                root_path=settings.root_path,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=LAST_ANSWERS_S,
                backlog=BACKLOG,
                server_header=False,
                log_level=settings.uvicorn_log_level,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                ssl_ca_certs=settings.ssl_ca_certs,
                ssl_cert_reqs=settings.ssl_cert_reqs,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.context.metrics.set_started()
        for listening in sockets or ():
            host, port = listening.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            _LOG.info("serving %s at %s://%s:%d", self.context.model_names[0], scheme, host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            # uvicorn leaves it out; without it, the app is cancelled and says so in a traceback.
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains; SIGINT after it exits at once."""
        if self._loop is None:
            super().handle_exit(sig, frame)
        elif self.context.admission.is_draining:
            self.should_exit = self.force_exit = self.force_exit or sig == signal.SIGINT
        else:
            self.context.admission.is_draining = True
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain = asyncio.create_task(self._drain_then_exit())

    async def _drain_then_exit(self) -> None:
        admission = self.context.admission
        limit = self.context.settings.shutdown_timeout
        _LOG.info("shutting down: %d open, waiting at most %g s", admission.num_open, limit)
        try:
            async with asyncio.timeout(limit):
                await admission.empty()
        except TimeoutError:
            await self._abort_all()
        self.should_exit = True

    async def _abort_all(self) -> None:
        """The clients see the finish reason ``abort``."""
        open_ids = self.context.admission.open_ids
        _LOG.warning(
            "%d requests did not end in time and are aborted; shutdown_timeout gives them longer",
            len(open_ids),
        )
        for request_id in open_ids:
            await self.context.engine.abort(request_id)
