"""Reads JSON bodies strictly: what gets through can be encoded again, whatever it is."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import Response

from nanoflow_compiler.server.errors import ApiError

__all__ = ["JsonRoute"]


class JsonRoute(APIRoute):
    """A route whose body is parsed by pydantic's reader.

    Python's own reads halves of surrogate pairs, NaN and endless nesting, all of which would fail
    later, and it is slower.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_parsed(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_parsed


class _JsonRequest(Request):
    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(f"the body is not JSON: {error}") from error
