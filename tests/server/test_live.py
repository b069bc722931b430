"""Clients that hang up, read slowly or come in crowds, and the end of the server."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from nanoflow_compiler import ConfigError
from nanoflow_compiler.server.run import bind
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine
from server.live import serving, wait_until

pytestmark = pytest.mark.anyio

FOREVER = {"prompt": "x", "max_tokens": 2000}


def hung_up(live, *, stream, num_bytes):
    """Sends a request by hand, reads so much of the answer, and closes the connection."""
    body = b'{"prompt": "x", "max_tokens": 2000, "stream": %s}' % (b"true" if stream else b"false")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: live.engine.active)
        while num_bytes > 0:
            num_bytes -= len(connection.recv(num_bytes))


@pytest.mark.parametrize(("stream", "num_bytes"), [(False, 0), (True, 0), (True, 500)])
def test_hanging_up_cancels(stream, num_bytes):
    with serving(FakeEngine(delay_s=0.005)) as live:
        hung_up(live, stream=stream, num_bytes=num_bytes)
        wait_until(live.is_idle)
        assert httpx.get(f"{live.url}/health").status_code == 200


async def test_half_of_the_clients_hang_up_mid_stream():
    with serving(FakeEngine(delay_s=0.005)) as live:
        async with httpx.AsyncClient(base_url=live.url, timeout=30) as http:
            lengths = await asyncio.gather(*(stream_some(http, i) for i in range(40)))
        wait_until(live.is_idle)
    assert lengths == [3 if i % 2 else 20 for i in range(40)]


async def stream_some(http, number):
    """Odd ones leave after three chunks."""
    body = {"prompt": f"{number}", "max_tokens": 20, "stream": True}
    num_chunks = 0
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            num_chunks += line.startswith("data: {")
            if number % 2 and num_chunks == 3:
                break
    return num_chunks


async def test_slow_readers_hold_up_no_one():
    with serving(FakeEngine(max_model_len=3000)) as live:
        async with httpx.AsyncClient(base_url=live.url, timeout=30, limits=MANY) as http:
            readers = [asyncio.create_task(read_slowly(http)) for _ in range(50)]
            await asyncio.sleep(0.3)
            start = time.monotonic()
            quick = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 5})
            assert quick.status_code == 200
            assert time.monotonic() - start < 5
            texts = await asyncio.gather(*readers)
    assert len(set(texts)) == 1


MANY = httpx.Limits(max_connections=100)


async def read_slowly(http):
    text = b""
    async with http.stream("POST", "/v1/completions", json=SLOW) as answer:
        await asyncio.sleep(1)
        async for piece in answer.aiter_bytes():
            text += piece
    assert text.endswith(b"data: [DONE]\n\n")
    return text.count(b"data: ")


SLOW = {"prompt": "x", "max_tokens": 100, "stream": True}


async def test_ten_times_more_requests_than_the_queue_holds():
    with serving(FakeEngine(delay_s=0.01), max_open_requests=5) as live:
        async with httpx.AsyncClient(base_url=live.url, timeout=30, limits=MANY) as http:
            body = {"prompt": "x", "max_tokens": 30}
            answers = await asyncio.gather(
                *(http.post("/v1/completions", json=body) for _ in range(50))
            )
        counts = {code: [a.status_code for a in answers].count(code) for code in (200, 503)}
        assert sum(counts.values()) == 50
        assert counts[200] >= 5
        assert all(a.headers["retry-after"] for a in answers if a.status_code == 503)


def test_ten_megabytes_get_an_answer_and_the_server_lives():
    with serving(FakeEngine()) as live:
        body = {"prompt": "x " * 5_000_000}
        assert httpx.post(f"{live.url}/v1/completions", json=body, timeout=30).status_code == 413
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_path_that_a_proxy_adds():
    with serving(FakeEngine(), root_path="/llm", api_keys=("key",)) as live:
        assert httpx.get(f"{live.url}/health").status_code == 200
        assert httpx.get(f"{live.url}/v1/models").status_code == 401
        headers = {"authorization": "Bearer key"}
        assert httpx.get(f"{live.url}/v1/models", headers=headers).status_code == 200


def test_a_signal_lets_open_requests_end_and_refuses_new_ones():
    with serving(FakeEngine(delay_s=0.01)) as live, ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=live.url, timeout=30))
        body = {"prompt": "x", "max_tokens": 50, "stream": True}
        answer = stack.enter_context(http.stream("POST", "/v1/completions", json=body))
        lines = answer.iter_lines()
        next(lines)
        live.signal()
        refused = httpx.post(f"{live.url}/v1/completions", json=FOREVER)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{live.url}/health").status_code == 503
        text = "\n".join(lines)
        assert '"finish_reason":"length"' in text
        assert text.rstrip().endswith("[DONE]")
        live.thread.join(10)
        assert not live.thread.is_alive()


def test_what_does_not_end_in_time_is_aborted():
    with serving(FakeEngine(delay_s=0.01), shutdown_timeout_s=0.2) as live:
        body = FOREVER | {"stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            live.signal()
            text = "\n".join(lines)
        assert '"finish_reason":"abort"' in text
        live.thread.join(5)
        assert not live.thread.is_alive()


def test_the_second_interrupt_exits_at_once():
    body = FOREVER | {"stream": True}
    with (
        serving(FakeEngine(delay_s=0.01)) as live,
        httpx.stream("POST", f"{live.url}/v1/completions", json=body) as answer,
    ):
        next(answer.iter_lines())
        live.signal(signal.SIGINT)
        live.signal(signal.SIGINT)
        live.thread.join(3)
        assert not live.thread.is_alive()


def test_a_process_ends_well_after_sigterm():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server.serve_nothing", str(port)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
        try:
            wait_until(lambda: answers(port), seconds=60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_port_that_is_taken_is_an_error_that_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*choose another"):
            bind(ServerSettings(port=port))
    with pytest.raises(ConfigError, match="choose another"):
        bind(ServerSettings(host="no.such.host.invalid"))
