"""Run as a program: serves a fake engine until a signal, and prints where."""

import asyncio
import socket
import sys

from nanoflow_compiler.server.run import serve
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine


async def main():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    task = asyncio.create_task(serve(FakeEngine(), ServerSettings(port=port)))
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        writer.close()
        break
    sys.stdout.write(f"http://127.0.0.1:{port}\n")
    sys.stdout.flush()
    await task


asyncio.run(main())
