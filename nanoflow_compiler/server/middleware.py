"""Layers around the app, in plain ASGI so that they never buffer a stream."""

import hashlib
import secrets
import uuid
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoflow_compiler.server.errors import ApiError, error_body
from nanoflow_compiler.server.request_ids import GOOD_ID

__all__ = ["ApiKeyMiddleware", "RequestIdMiddleware", "SizeLimitMiddleware"]

OPEN_PATHS = frozenset({"/health", "/load", "/metrics", "/ping", "/version"})
MOST_DRAINED = 4
"""A body up to this many times the limit is read and dropped: a client that is still sending when the
connection closes would see a broken pipe instead of the answer."""


class RequestIdMiddleware:
    """Takes the caller's ``x-request-id``, or makes one, and returns it with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeyMiddleware:
    """Asks for ``Authorization: Bearer KEY``, except where monitors look."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_open(scope) or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await _answer(error)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        # A browser asks with OPTIONS, and without a key, whether it may ask at all.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["method"] == "OPTIONS" or path in OPEN_PATHS

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Headers are Latin-1 on the wire; a key may be any text.
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class SizeLimitMiddleware:
    """Refuses a body above the limit, whether its length was announced or is counted."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            await self._drop_body(receive)
            await _answer(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                if message.get("more_body", False):
                    await self._drop_body(receive)
                raise self._too_large()
            return message

        return receive_counted

    async def _drop_body(self, receive: Receive) -> None:
        num_bytes, more = 0, True
        while more and num_bytes <= MOST_DRAINED * self._max_bytes:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)

    def _too_large(self) -> ApiError:
        return ApiError(
            f"the body is larger than {self._max_bytes} bytes; send less, or raise max_request_bytes",
            status=413,
            code="request_too_large",
            headers={"connection": "close"},
        )


def _answer(error: ApiError) -> Response:
    return Response(
        msgspec.json.encode(error_body(error)),
        status_code=error.status_code,
        headers=error.headers,
        media_type="application/json",
    )
