"""Clients that hang up, and the end of the server, seen from its own process."""

import socket
from contextlib import ExitStack

import httpx
import pytest

from nanoflow_compiler import ConfigError
from nanoflow_compiler.server.run import bind
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine
from server.live import serving, wait_until

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


def test_a_port_that_is_taken_is_an_error_that_says_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*choose another"):
            bind(ServerSettings(port=port))
    with pytest.raises(ConfigError, match="choose another"):
        bind(ServerSettings(host="no.such.host.invalid"))
