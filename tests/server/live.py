"""A server of its own on a free port, in a thread, for clients that need a network."""

import asyncio
import signal
import threading
import time
from contextlib import contextmanager

import httpx

from nanoflow_compiler.server.run import Server
from nanoflow_compiler.server.settings import ServerSettings


class Live:
    """What a test may ask of a running server."""

    def __init__(self, engine, settings):
        self.engine = engine
        self.server = Server(engine, settings)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self.thread.start()
        wait_until(lambda: self.server.started)
        (self.port,) = {
            sock.getsockname()[1] for one in self.server.servers for sock in one.sockets
        }
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def admission(self):
        return self.server.context.admission

    def get(self, path):
        return httpx.get(f"{self.url}{path}")

    def signal(self, number=signal.SIGTERM):
        self.server.handle_exit(number, None)

    def is_idle(self):
        return not self.engine.active and not self.admission.num_open


@contextmanager
def serving(engine, **settings):
    """The server must be idle, and end by itself, when the test is over."""
    live = Live(engine, ServerSettings(port=0, **{"shutdown_timeout": 5.0} | settings))
    try:
        yield live
        wait_until(live.is_idle)
    finally:
        live.signal()
        live.thread.join(10)
        assert not live.thread.is_alive()


async def until(condition, *, seconds=10):
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


def wait_until(condition, *, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
