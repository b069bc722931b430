"""HTTP/1.1 as a load generator needs it: little work for each piece of a stream.

One connection for each request, made before its clock starts. A client that does more for each chunk
would measure itself: at thousands of tokens a second it is what limits.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanoflow_compiler.errors import ConfigError

__all__ = ["Connection", "HttpClient", "HttpError", "Response"]

CONNECT_TIMEOUT_S = 60.0
LONGEST_LINE = 2**24
"""Bytes; a line of a stream may hold the log-probabilities of a whole answer."""


class HttpError(Exception):
    """A server that cannot be reached, or that does not answer as it should."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        """``status`` is that of an answer that came, but was not wanted."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Response:
    """Its body is read piece by piece."""

    status: int
    pieces: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces])

    async def lines(self) -> AsyncIterator[bytes]:
        """Lines of the body, as soon as each is complete; without their ends."""
        rest = b""
        async for piece in self.pieces:
            *complete, rest = (rest + piece).split(b"\n")
            for line in complete:
                yield line.rstrip(b"\r")
        if rest:
            yield rest


class HttpClient:
    """Where a server is, and what every request to it carries."""

    def __init__(self, base_url: str, *, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{base_url} is no address of a server; pass http://HOST:PORT")
        self.base_url = base_url.rstrip("/")
        self._host, self._port = (
            parts.hostname,
            parts.port or {"http": 80, "https": 443}[parts.scheme],
        )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        host = parts.netloc.rpartition("@")[2]
        self._headers = {"host": host, "accept": "*/*", "connection": "close", **headers}

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["Connection"]:
        """A connection for one request; :class:`HttpError` if there is nobody."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, ssl=self._tls, limit=LONGEST_LINE
                )
        except (OSError, TimeoutError) as error:
            why = str(error) or "no answer"
            raise HttpError(f"{self.base_url} cannot be reached: {why}") from error
        try:
            yield Connection(reader, writer, prefix=self._prefix, headers=self._headers)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def get_json(self, path: str) -> Any:
        """The body of an answer with status 200."""
        async with self.connect() as connection:
            response = await connection.request("GET", path)
            body = await response.read()
        if response.status != 200:
            raise HttpError(
                f"GET {path}: status {response.status}: {body[:200]!r}", status=response.status
            )
        try:
            return json.loads(body)
        except ValueError as error:
            raise HttpError(f"GET {path}: the answer is not JSON", status=200) from error


@dataclass(frozen=True, slots=True)
class Connection:
    """One request and its answer."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    prefix: str
    headers: Mapping[str, str]

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Send it; returns when the head of the answer is there. ``body`` is sent as JSON."""
        content = b"" if body is None else json.dumps(body).encode()
        fields = {**self.headers, **(headers or {}), "content-length": str(len(content))}
        if content:
            fields["content-type"] = "application/json"
        head = [f"{method} {self.prefix}{path} HTTP/1.1"]
        head += [f"{name}: {value}" for name, value in fields.items()]
        try:
            self.writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + content)
            await self.writer.drain()
            return await self._read_head()
        except (OSError, EOFError, ValueError) as error:
            raise HttpError(f"the connection broke before an answer: {error!r}") from error

    async def _read_head(self) -> Response:
        status_line = await self.reader.readline()
        _, status, *_ = status_line.split(None, 2)
        fields = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        return Response(int(status), self._pieces(fields))

    async def _pieces(self, fields: Mapping[bytes, bytes]) -> AsyncIterator[bytes]:
        try:
            if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
                while size := int((await self.reader.readline()).partition(b";")[0], 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
            elif b"content-length" in fields:
                yield await self.reader.readexactly(int(fields[b"content-length"]))
            else:
                while piece := await self.reader.read(2**16):
                    yield piece
        except (OSError, EOFError, ValueError) as error:
            raise HttpError("the connection broke before the end of the answer") from error
