"""The answers by themselves, against a client that is only ``send`` and ``receive``."""

import asyncio

import pytest

from nanoflow_compiler.server import answering
from nanoflow_compiler.server.answering import EventStream, JsonAnswer
from nanoflow_compiler.server.merging import merge

pytestmark = pytest.mark.anyio


class Client:
    """Takes so many messages, then blocks; may hang up."""

    def __init__(self, *, most=10**9):
        self.messages = []
        self.most = most
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if len(self.messages) >= self.most:
            await asyncio.Event().wait()
        self.messages.append(message)

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages)


class Source:
    """Counts what is pulled from it, and whether it was closed."""

    def __init__(self):
        self.num, self.is_closed = 0, False

    async def events(self):
        try:
            while True:
                self.num += 1
                yield b"data: {}\n\n"
                await asyncio.sleep(0)
        finally:
            self.is_closed = True


async def test_a_reader_that_stops_reading_stops_the_source():
    client, source = Client(most=5), Source()
    task = asyncio.create_task(
        EventStream(source.events(), timeout_s=None)({}, client.receive, client.send)
    )
    await asyncio.sleep(0.05)
    assert source.num == 5
    client.gone.set()
    await task
    assert source.is_closed


async def test_a_reader_that_never_reads_again_is_given_up(monkeypatch):
    monkeypatch.setattr(answering, "LAST_WORDS_S", 0.01)
    client, source = Client(most=5), Source()
    await EventStream(source.events(), timeout_s=0.02)({}, client.receive, client.send)
    assert source.is_closed


async def test_work_is_cancelled_with_the_task_that_answers():
    is_cancelled = asyncio.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    client = Client()
    task = asyncio.create_task(JsonAnswer(work(), timeout_s=None)({}, client.receive, client.send))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_cancelled.is_set()


async def test_an_error_before_the_first_event_is_raised():
    async def events():
        raise ValueError("early")
        yield

    client = Client()
    with pytest.raises(ValueError, match="early"):
        await EventStream(events(), timeout_s=None)({}, client.receive, client.send)
    assert client.messages == []


async def test_merged_streams_are_read_no_faster_than_their_reader():
    sources = [Source() for _ in range(3)]
    merged = merge([source.events() for source in sources])
    assert await anext(merged) == (0, b"data: {}\n\n")
    await asyncio.sleep(0.01)
    assert max(source.num for source in sources) <= 4
    await merged.aclose()
    assert all(source.is_closed for source in sources)
