"""The official client against a live server."""

import json

import openai
import pytest

from server.fake_engine import FakeEngine
from server.live import serving, wait_until

pytestmark = pytest.mark.anyio

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live():
    with serving(FakeEngine(), api_keys=("secret",)) as live:
        yield live


@pytest.fixture(scope="module")
def slow():
    with serving(FakeEngine(delay_s=0.02)) as live:
        yield live


@pytest.fixture(scope="module")
def calling():
    with serving(FakeEngine(script=lambda _: CALL)) as live:
        yield live


def client(live, kind=openai.OpenAI, **options):
    options = {"api_key": "secret", "max_retries": 0} | options
    return kind(base_url=f"{live.url}/v1", **options)


def test_completions(live):
    with client(live) as api:
        answer = api.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].logprobs.tokens == list(answer.choices[0].text)
        assert answer.usage.total_tokens == answer.usage.completion_tokens + 2
        extra = {"top_k": 3, "ignore_eos": True, "min_tokens": 2}
        api.completions.create(model="tiny", prompt="x", extra_body=extra)
        assert api.models.list().data[0].id == "tiny"
        assert api.models.retrieve("tiny").object == "model"


def test_chat_and_its_stream(live):
    with client(live) as api:
        body = {"model": "tiny", "messages": USER, "max_completion_tokens": 9, "logprobs": True}
        whole = api.chat.completions.create(**body, top_logprobs=2)
        options = {"include_usage": True}
        with api.chat.completions.create(**body, stream=True, stream_options=options) as stream:
            chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == 9
        assert len(whole.choices[0].logprobs.content) == 9


async def test_asynchronous(live):
    async with client(live, openai.AsyncOpenAI) as api:
        answer = await api.completions.create(model="tiny", prompt="x", max_tokens=5)
        stream = await api.completions.create(model="tiny", prompt="x", max_tokens=5, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
        assert len(pieces) == 5
        assert "".join(pieces) == answer.choices[0].text


def test_raw_response(live):
    with client(live) as api:
        headers = {"x-request-id": "mine"}
        raw = api.completions.with_raw_response.create(
            model="tiny", prompt="x", extra_headers=headers
        )
        assert raw.headers["x-request-id"] == "mine"
        assert raw.parse().id == "cmpl-mine"


def test_tools(calling):
    with client(calling) as api:
        body = {"model": "tiny", "messages": USER, "tools": TOOLS}
        (choice,) = api.chat.completions.create(**body).choices
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert json.loads(call.function.arguments) == {"city": "Bonn"}
        with api.chat.completions.stream(**body) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.tool_calls[0].function.name == "weather"
        turns = [
            choice.message.model_dump(),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        api.chat.completions.create(**body | {"messages": USER + turns})


def test_structured_output(live):
    with client(live) as api:
        schema = {"name": "answer", "schema": {"type": "object"}}
        wanted = {"type": "json_schema", "json_schema": schema}
        api.chat.completions.create(
            model="tiny", messages=USER, response_format=wanted, max_tokens=5
        )
        assert live.engine.seen[-1][2].structured_outputs.kind == "json"


def test_errors(live):
    with client(live) as api:
        with pytest.raises(openai.NotFoundError) as missing:
            api.completions.create(model="gpt-4", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            api.completions.create(model="tiny", prompt="x", suffix="y")
        assert bad.value.param == "suffix"
    with client(live, api_key="wrong") as api, pytest.raises(openai.AuthenticationError):
        api.models.list()


def test_a_client_that_does_not_wait_cancels_its_request(slow):
    with client(slow, timeout=0.2) as api, pytest.raises(openai.APITimeoutError):
        api.completions.create(model="tiny", prompt="x", max_tokens=2000)
    wait_until(slow.is_idle)


def test_a_stream_that_is_left_early_cancels_its_request(slow):
    with client(slow) as api:
        stream = api.completions.create(model="tiny", prompt="x", max_tokens=2000, stream=True)
        next(iter(stream))
        assert len(slow.engine.active) == 1
        stream.close()
        wait_until(slow.is_idle)
