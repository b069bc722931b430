"""The server in a process of its own, and everything that clients and signals can do to it."""

import json
import signal
import sys
from contextlib import ExitStack

import httpx
import pytest

from server import faults
from server.fake_engine import FakeEngine
from server.live import serving, wait_until
from server.server_process import ServerProcess, is_idle

pytestmark = pytest.mark.anyio


def fake_server(*, engine=None, **settings):
    arguments = json.dumps(engine or {}), json.dumps(settings)
    return ServerProcess(sys.executable, "-m", "server.serve_fake", *arguments)


@pytest.fixture(scope="module")
def url():
    with fake_server(max_num_queued_reqs=600) as server:
        yield server.url


@pytest.fixture(scope="module")
def narrow():
    """Holds five, for a while each."""
    with fake_server(engine={"delay_s": 0.02}, max_num_queued_reqs=5) as server:
        yield server.url


async def test_half_of_the_clients_hang_up(url):
    await faults.half_hang_up(url, num=40, num_tokens=100)


async def test_ten_times_too_many(narrow):
    await faults.ten_times_too_many(narrow, holds=5, num_tokens=20)


async def test_too_many_who_come_back(narrow):
    await faults.too_many_who_come_back(narrow, num=20, num_tokens=10)


async def test_ten_megabytes(url):
    await faults.ten_megabytes(url)


async def test_malformed(url):
    await faults.malformed(url)


async def test_slow_readers(url):
    await faults.slow_readers(url, num=500, num_tokens=60)


@pytest.mark.parametrize(("deadline_s", "reason"), [(30, "length"), (0.2, "abort"), (0, "abort")])
def test_sigterm_lets_streams_end_until_the_deadline(deadline_s, reason):
    settings = {"shutdown_timeout": deadline_s}
    with fake_server(engine={"delay_s": 0.02}, **settings) as server, ExitStack() as stack:
        num_tokens = 100 if reason == "length" else 5000
        streams = faults.open_streams(stack, server.url, num=3, num_tokens=num_tokens)
        server.process.send_signal(signal.SIGTERM)
        for lines in streams:
            text = "\n".join(lines)
            assert f'"finish_reason":"{reason}"' in text
            assert text.rstrip().endswith("data: [DONE]")
        assert server.process.wait(10) == 0
        assert "shutting down: 3 open" in server.log


def test_the_second_interrupt_does_not_wait():
    with fake_server(engine={"delay_s": 0.02}) as server, ExitStack() as stack:
        faults.open_streams(stack, server.url, num=3, num_tokens=5000)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: "shutting down" in server.log)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        server.process.wait(10)
        assert "Traceback" not in server.log


def test_an_interrupt_before_anything_is_open():
    with fake_server() as server:
        assert server.url
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


def test_when_the_engine_dies_every_stream_ends_with_an_error():
    with serving(FakeEngine(delay_s=0.01)) as live, ExitStack() as stack:
        streams = faults.open_streams(stack, live.url, num=10, num_tokens=5000)
        live.engine.errored = True
        for lines in streams:
            *_, error, done = filter(None, lines)
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
            assert done == "data: [DONE]"
        assert live.get("/health").status_code == 503
        refused = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        live.engine.errored = False
        wait_until(lambda: is_idle(live.url))
