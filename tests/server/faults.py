"""What goes wrong in the world, done to whatever server is at a URL."""

import asyncio
import json
import re
import socket
from urllib.parse import urlsplit

import httpx
import openai

from server.live import wait_until
from server.server_process import is_idle, memory_of

MANY = httpx.Limits(max_connections=1000)
MEGABYTE = 1 << 20


def client(url):
    return httpx.AsyncClient(base_url=url, timeout=120, limits=MANY)


def asking(prompt, num_tokens, **fields):
    """As many tokens as that, whatever the model would say, and all of them told."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
    return body | {"return_token_ids": True} | fields


TOKEN_IDS = re.compile(r'"token_ids":\[([\d,]*)\]')


def count_tokens(text):
    """Of a stream: tokens that came faster than they were read share a chunk."""
    return sum(len(ids.split(",")) for ids in TOKEN_IDS.findall(text) if ids)


def open_streams(stack, url, *, num, num_tokens):
    """Their lines, after the first of each has come."""
    http = stack.enter_context(httpx.Client(base_url=url, timeout=60))
    body = asking("x", num_tokens, stream=True)
    streams = []
    for _ in range(num):
        answer = stack.enter_context(http.stream("POST", "/v1/completions", json=body))
        lines = answer.iter_lines()
        next(lines)
        streams.append(lines)
    return streams


async def half_hang_up(url, *, num, num_tokens):
    """Half of the clients leave early; the others miss nothing, and nothing goes on."""
    async with client(url) as http:
        counts = await asyncio.gather(
            *(_read(http, i, num_tokens, most=3 if i % 2 else num_tokens) for i in range(num))
        )
    assert set(counts[::2]) == {num_tokens}
    assert max(counts[1::2]) < num_tokens
    wait_until(lambda: is_idle(url), seconds=60)


async def _read(http, number, num_tokens, *, most):
    body = asking(f"{number}", num_tokens, stream=True)
    text = ""
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            text += line
            if count_tokens(text) >= most:
                break
    return count_tokens(text)


async def ten_times_too_many(url, *, holds, num_tokens):
    """Each gets an answer, or a 503 that says when to come back."""
    async with client(url) as http:
        body = asking("x", num_tokens)
        posts = (http.post("/v1/completions", json=body) for _ in range(10 * holds))
        answers = await asyncio.gather(*posts)
    refused = [answer for answer in answers if answer.status_code == 503]
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(refused) + len(served) == 10 * holds
    assert len(served) >= holds
    assert refused
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    wait_until(lambda: is_idle(url), seconds=60)


async def too_many_who_come_back(url, *, num, num_tokens):
    """The official client waits as long as it is told, and so all of them are served."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=50) as api:
        model = (await api.models.list()).data[0].id
        asked = {"model": model, "prompt": "x", "max_tokens": num_tokens}
        answers = await asyncio.gather(*(api.completions.create(**asked) for _ in range(num)))
    assert all(answer.usage.completion_tokens for answer in answers)


async def ten_megabytes(url):
    """A prompt of 10 MB, with its length announced and without, is refused and forgotten."""
    text = b"x " * (5 * MEGABYTE)
    body = b'{"prompt": "%s"}' % text
    headers = {"content-type": "application/json"}
    memory = memory_of(url)

    async def pieces():
        for start in range(0, len(body), MEGABYTE):
            yield body[start : start + MEGABYTE]

    async with client(url) as http:
        for content in [body, pieces(), body, pieces()]:
            answer = await http.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code in (400, 413)
        almost = b'{"prompt": "%s"}' % text[: 7 * MEGABYTE]
        answer = await http.post("/v1/completions", content=almost, headers=headers)
        assert answer.status_code == 400
    assert memory_of(url) < memory + 100 * MEGABYTE
    wait_until(lambda: is_idle(url))


BODIES = [
    b"",
    b"{",
    b"[]",
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "max_tokens": 1' + b"0" * 100_000 + b"}",
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": ' + b"[" * 1_000_000 + b"}",
    b'{"prompt":' * 100_000,
    b'{"prompt": "x", "logit_bias": {"1": Infinity}}',
]
REQUESTS = [
    b"\x00\x01\x02\x03\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
]


async def malformed(url):
    """JSON that is none is a 400; what is no HTTP does not disturb the server either."""
    headers = {"content-type": "application/json"}
    async with client(url) as http:
        for body in BODIES:
            answer = await http.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400, body[:50]
            assert answer.json()["error"]["message"]
        nul = await http.post("/v1/completions", json=asking("a\x00b", 1, echo=True))
        assert nul.json()["choices"][0]["text"].startswith("a\x00b")
        for request in REQUESTS:
            with socket.create_connection(_address(url)) as connection:
                connection.sendall(request)
        assert (await http.get("/health")).status_code == 200
    wait_until(lambda: is_idle(url))


async def slow_readers(url, *, num, num_tokens):
    """Who does not read holds up nobody else, and gets everything in the end."""
    memory = memory_of(url)
    streams = await asyncio.gather(*(_ask_and_wait(url, num_tokens) for _ in range(num)))
    async with client(url) as http:
        quick = await http.post("/v1/completions", json=asking("y", 3))
        assert quick.json()["usage"]["completion_tokens"] == 3
        assert (await http.get("/health")).status_code == 200
    assert memory_of(url) < memory + 300 * MEGABYTE
    answers = await asyncio.gather(*(_read_slowly(*stream) for stream in streams))
    assert {count_tokens(answer.decode()) for answer in answers} == {num_tokens}
    assert {answer.count(b"data: [DONE]") for answer in answers} == {1}
    wait_until(lambda: is_idle(url), seconds=60)
    assert memory_of(url) < memory + 100 * MEGABYTE


async def _ask_and_wait(url, num_tokens):
    connection = socket.socket()
    # The kernel takes little of the answer on behalf of a reader who takes nothing.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, _address(url))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    body = json.dumps(asking("x", num_tokens, stream=True, temperature=0)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    return reader, writer


async def _read_slowly(reader, writer):
    answer = b""
    while piece := await reader.read(8192):
        answer += piece
        await asyncio.sleep(0.01)
    writer.close()
    return answer


def _address(url):
    parts = urlsplit(url)
    return parts.hostname, parts.port
