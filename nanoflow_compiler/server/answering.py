"""Runs the work of a request while its client listens, and sends what it yields."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanoflow_compiler.server.errors import as_api_error, error_body
from nanoflow_compiler.server.responses import encode

__all__ = ["EventStream", "JsonAnswer", "sse"]

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
LAST_WORDS_S = 5.0
"""A reader that does not take even the error event in this time is gone."""
EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx family would collect the events.
    (b"x-accel-buffering", b"no"),
]


def sse(item: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(item) + b"\n\n"


class JsonAnswer(Response):
    """Sends one object, computed while the client waits; a client that leaves cancels the work."""

    def __init__(self, work: Coroutine[Any, Any, object], *, timeout_s: float | None) -> None:
        super().__init__(media_type="application/json")
        self._work = work
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            item = await _while_connected(receive, self._within_timeout())
            self.body = encode(item)
            self.init_headers()
            await super().__call__(scope, receive, send)

    async def _within_timeout(self) -> object:
        async with asyncio.timeout(self._timeout_s):
            return await self._work


class EventStream(Response):
    """Sends events as they come; an error before the first one is answered with a status of its own."""

    def __init__(self, events: AsyncGenerator[bytes, None], *, timeout_s: float | None) -> None:
        super().__init__()
        self._events = events
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope.get("state", {}).get("request_id", "")
        with suppress(ClientDisconnect):
            await _while_connected(receive, self._send_all(send, request_id=request_id))

    async def _send_all(self, send: Send, *, request_id: str) -> None:
        has_started = False
        try:
            async with asyncio.timeout(self._timeout_s), aclosing(self._events) as events:
                async for event in events:
                    if not has_started:
                        await send(_start())
                        has_started = True
                    await send(_body(event))
        except Exception as error:
            if not has_started:
                raise
            answer = as_api_error(error)
            _LOG.warning("%s: the stream ended early: %s", request_id, answer.detail)
            await self._send_end(send, sse(error_body(answer)))
        else:
            await self._send_end(send, b"")

    async def _send_end(self, send: Send, event: bytes) -> None:
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await send(_body(event + DONE))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as error:  # TimeoutError is one
            raise ClientDisconnect from error


def _start() -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": list(EVENT_HEADERS)}


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work; ClientDisconnect, after cancelling it, if the client leaves first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        # Also when this task itself is cancelled: the engine must not go on for nobody.
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
