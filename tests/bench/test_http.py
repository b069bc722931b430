"""The load generator's HTTP, against servers that say just what a test wants."""

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest

from nanoflow_compiler.bench.http import HttpClient, HttpError
from nanoflow_compiler.errors import ConfigError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@asynccontextmanager
async def answering(*pieces):
    """A client of a server that sends these bytes; the requests that it got."""
    got, running = [], []

    async def serve(reader, writer):
        running.append(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        got.append(head + await reader.readexactly(length))
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield HttpClient(f"http://127.0.0.1:{port}/base", headers={"x-a": "b"}), got
        await asyncio.gather(*running)


async def lines(client):
    async with client.connect() as connection:
        response = await connection.request("POST", "/path", body={"a": 1})
        return response.status, [line async for line in response.lines()]


async def test_request_as_it_is_sent():
    async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}") as (client, got):
        assert await client.get_json("/v1/models") == {}
        await lines(client)
    assert got[0].startswith(b"GET /base/v1/models HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nx-a: b\r\n" in got[0]
    assert got[1].startswith(b"POST /base/path HTTP/1.1\r\n")
    assert got[1].endswith(b'content-length: 8\r\ncontent-type: application/json\r\n\r\n{"a": 1}')


@pytest.mark.parametrize(
    "pieces",
    [
        [b"content-length: 6\r\n\r\n", b"ab\nc\r", b"\n"],
        [b"transfer-encoding: chunked\r\n\r\n", b"3\r\nab\n\r\n3;x=y\r\n", b"c\r\n\r\n0\r\n\r\n"],
        [b"\r\n", b"a", b"b\nc"],
    ],
    ids=["length", "chunked", "until the end"],
)
async def test_lines_however_they_are_cut(pieces):
    async with answering(b"HTTP/1.1 200 OK\r\n", *pieces) as (client, _):
        assert await lines(client) == (200, [b"ab", b"c"])


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"nonsense\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab"],
        [b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"],
    ],
)
async def test_broken_answers(pieces):
    async with answering(*pieces) as (client, _):
        with pytest.raises(HttpError, match="connection broke"):
            await lines(client)


async def test_answers_that_are_not_wanted():
    async with answering(b"HTTP/1.1 404 No\r\ncontent-length: 2\r\n\r\nno") as (client, _):
        with pytest.raises(HttpError, match="status 404") as caught:
            await client.get_json("/")
    assert caught.value.status == 404
    async with answering(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno") as (client, _):
        with pytest.raises(HttpError, match="not JSON"):
            await client.get_json("/")


async def test_nobody_is_there():
    client = HttpClient("http://127.0.0.1:1", headers={})
    with pytest.raises(HttpError, match="cannot be reached") as caught:
        await client.get_json("/")
    assert caught.value.status is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://"])
async def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError, match="no address"):
        HttpClient(url, headers={})
