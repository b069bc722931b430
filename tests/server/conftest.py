"""An app over a fake engine, and a client that calls it without a network."""

import json

import httpx
import pytest

from nanoflow_compiler.server.app import create_app
from nanoflow_compiler.server.settings import ServerSettings
from server.fake_engine import FakeEngine


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Api:
    """Calls an app, and reads what it answers."""

    def __init__(self, engine=None, **settings):
        self.engine = engine or FakeEngine()
        self.app = create_app(self.engine, ServerSettings(**settings))
        self.context = self.app.state.context
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def post(self, path, body, *, status=200, **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        answer = await self.http.post(path, content=content, headers=headers, **options)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def get(self, path, *, status=200, **options):
        answer = await self.http.get(path, **options)
        assert answer.status_code == status, answer.text
        return answer

    async def complete(self, prompt="hello", *, status=200, **fields):
        return await self.post("/v1/completions", {"prompt": prompt} | fields, status=status)

    async def chat(self, content="hello", *, status=200, **fields):
        body = {"messages": [{"role": "user", "content": content}]} | fields
        return await self.post("/v1/chat/completions", body, status=status)

    async def stream(self, path, body):
        """The chunks of a stream, which must end as OpenAI's do."""
        answer = await self.http.post(path, json=body | {"stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]


@pytest.fixture
def make_api():
    return Api


@pytest.fixture
def api():
    return Api()
