"""Errors as HTTP answers, in the shape that clients of OpenAI expect."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TypedDict

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nanoflow_compiler.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    NanoflowError,
    OutOfBlocksError,
    PromptTooLongError,
    RequestError,
)

__all__ = ["ApiError", "add_handlers", "as_api_error", "error_body"]

_LOG = logging.getLogger(__name__)

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

ANSWERS: Sequence[tuple[type[Exception], "_Answer"]] = (
    (EngineDeadError, {"status": 503, "code": "engine_dead"}),
    (EngineClosedError, {"status": 503, "code": "engine_dead"}),
    (PromptTooLongError, {"code": "context_length_exceeded", "param": "prompt"}),
    (OutOfBlocksError, {}),
    (RequestError, {}),
    (ConfigError, {}),
    (NanoflowError, {"status": 500}),
    (TimeoutError, {"status": 504, "code": "timeout"}),
)
"""The first one that fits."""
EXPECTED = {
    "prompt": "a text, a list of token ids, or a list of either",
    "stop": "a text, or a list of at most 128",
    "tool_choice": (
        '"none", "auto", "required", or {"type": "function", "function": {"name": ...}}'
    ),
}
"""Of fields that may be one of several things: what each of them failed on says little."""
TIMED_OUT = "the request took longer than this server allows; ask for fewer tokens"


class _Answer(TypedDict, total=False):
    status: int
    param: str
    code: str


class ApiError(HTTPException):
    """One request is answered with this status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=headers)
        self.param = param
        self.code = code


def error_body(error: HTTPException) -> dict[str, object]:
    """``{"error": {...}}``, also what an event of a stream holds."""
    status = error.status_code
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": error.detail,
            "type": kind,
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def as_api_error(error: Exception) -> HTTPException:
    """What a client is told of any error; only unexpected ones are logged with a traceback."""
    if isinstance(error, HTTPException):
        return error
    if isinstance(error, RequestValidationError):
        return _refused_body(error)
    for kind, answer in ANSWERS:
        if isinstance(error, kind):
            return ApiError(_one_line(error), **answer)
    _LOG.error("a request failed unexpectedly", exc_info=error)
    return ApiError("internal error; the log of the server has the details", status=500)


def add_handlers(app: FastAPI) -> None:
    """Answer every error of the app, those of routing and validation included, in one shape."""
    for kind in (HTTPException, RequestValidationError, NanoflowError, TimeoutError, Exception):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    if answer.status_code >= 500 and not isinstance(error, asyncio.CancelledError):
        request_id = request.scope.get("state", {}).get("request_id", "")
        _LOG.warning(
            "%s: %s %d %s", request_id, request.url.path, answer.status_code, answer.detail
        )
    return Response(
        msgspec.json.encode(error_body(answer)),
        status_code=answer.status_code,
        headers=answer.headers,
        media_type="application/json",
    )


def _refused_body(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {first['ctx']['error']} at character {place[0]}")
    if not place:
        return ApiError("the body must be a JSON object, with content-type application/json")
    if place[0] in EXPECTED and first["type"] != "missing":
        return ApiError(f"{place[0]} must be {EXPECTED[place[0]]}", param=place[0])
    return ApiError(f"{'.'.join(place)}: {first['msg']}", param=place[0])


def _one_line(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return TIMED_OUT
    return " ".join(str(error).split()) or type(error).__name__
