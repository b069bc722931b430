"""``nanoflow serve`` with a real model, in processes of its own, for the official client."""

import asyncio
import json
import os
import signal
import sys
from contextlib import ExitStack

import httpx
import openai
import pytest

from server import faults
from server.live import wait_until
from server.server_process import ServerProcess, is_alive, is_idle, metrics_of

pytestmark = pytest.mark.anyio

MODEL = "smollm2-135m"
# One thread: with two, a test that runs beside this one would make each step wait for its own.
ALONE = {"OMP_NUM_THREADS": "1"}
USER = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {"type": "string", "enum": ["Bonn", "Rome"]}
SCHEMA = {
    "type": "object",
    "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
HERMES = r'<tool_call>\{"name": "weather", "arguments": \{"city": "[A-Z][a-z]{2,6}"\}\}</tool_call>'


def nanoflow(*flags):
    command = "from nanoflow_compiler.cli import main; main()"
    flags = ["--port", "0", "--max-model-len", "512", *flags]
    return ServerProcess(sys.executable, "-c", command, "serve", MODEL, *flags, **ALONE)


@pytest.fixture(scope="module")
def url():
    with nanoflow("--tool-call-parser", "hermes", "--chat-template", TEMPLATE) as server:
        yield server.url


# The model's own template knows no tools.
TEMPLATE = """{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture
def api(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as api:
        yield api


def test_completions(api):
    assert [model.id for model in api.models.list()] == [MODEL]
    asked = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
    answer = api.completions.create(**asked, max_tokens=8, logprobs=2)
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)
    assert "".join(choice.logprobs.tokens) == choice.text
    likely = [max(top.values()) for top in choice.logprobs.top_logprobs]
    assert choice.logprobs.token_logprobs == pytest.approx(likely)
    with api.completions.create(**asked, max_tokens=8, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_several_prompts_completions_stops_and_echo(api):
    answer = api.completions.create(
        model=MODEL, prompt=["One, two,", "A, B,"], n=2, seed=1, max_tokens=12, echo=True, stop="\n"
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(c.text.startswith("One, two,") for c in answer.choices[:2])
    assert all(c.text.startswith("A, B,") and "\n" not in c.text for c in answer.choices[2:])


def test_allowed_tokens(api, url):
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": " yes no"}).json()["tokens"]
    extra = {"allowed_token_ids": tokens, "ignore_eos": True}
    answer = api.completions.create(model=MODEL, prompt="Is it?", max_tokens=8, extra_body=extra)
    assert set(answer.choices[0].text.split()) <= {"yes", "no"}
    extra = {"allowed_token_ids": [10**6]}
    with pytest.raises(openai.BadRequestError, match="allowed_token_ids names token"):
        api.completions.create(model=MODEL, prompt="x", extra_body=extra)


def test_logprobs_of_a_prompt_alone(api):
    prompt = "The capital of France is Paris"
    answer = api.completions.create(model=MODEL, prompt=prompt, echo=True, max_tokens=0, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text == prompt
    assert logprobs.token_logprobs[0] is None
    assert all(-20 < one < 0 for one in logprobs.token_logprobs[1:])
    assert max(logprobs.top_logprobs[-1], key=logprobs.top_logprobs[-1].get) == " Paris"


def test_chat_and_its_stream(api):
    asked = {"model": MODEL, "messages": USER, "temperature": 0, "max_completion_tokens": 24}
    whole = api.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert "Paris" in text
    options = {"include_usage": True}
    with api.chat.completions.create(**asked, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_many_at_once_say_what_each_says_alone(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x") as api:

        async def ask(seed):
            answer = await api.completions.create(
                model=MODEL, prompt="Once upon a time", max_tokens=16, seed=seed
            )
            return answer.choices[0].text

        together = await asyncio.gather(*(ask(seed % 4) for seed in range(12)))
        alone = [await ask(seed) for seed in range(4)]
    assert together == alone * 3
    assert len(set(alone)) > 1


def test_errors(api):
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError) as error:
        api.completions.create(model=MODEL, prompt="word " * 600)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        api.completions.create(model=MODEL, prompt="x", extra_body={"use_beam_search": True})
    assert error.value.param == "use_beam_search"


def test_a_client_that_does_not_wait(api, url):
    with pytest.raises(openai.APITimeoutError):
        api.with_options(timeout=0.3).completions.create(
            model=MODEL, prompt="x", max_tokens=500, extra_body={"ignore_eos": True}
        )
    wait_until(lambda: is_idle(url), seconds=60)


def test_structured_output(api):
    pytest.importorskip("xgrammar")
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
    compact = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
    for fields in ({"response_format": wanted}, {"extra_body": compact}):
        answer = api.chat.completions.create(
            model=MODEL, messages=USER, temperature=0, max_tokens=60, **fields
        )
        found = json.loads(answer.choices[0].message.content)
        assert found["city"] in CITY["enum"]
        assert 1 <= found["days"] <= 9
    with pytest.raises(openai.BadRequestError) as error:
        api.completions.create(
            model=MODEL, prompt="x", extra_body={"structured_outputs": {"regex": "(("}}
        )
    assert "regex" in error.value.message


def test_a_tool_that_the_model_calls_in_the_format_of_hermes(api):
    pytest.importorskip("xgrammar")
    # So small a model calls nothing by itself; the text is its own, in the form of a call.
    asked = {
        "model": MODEL,
        "messages": USER,
        "tools": [WEATHER],
        "max_tokens": 60,
        "extra_body": {"structured_outputs": {"regex": HERMES}},
    }
    (choice,) = api.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city"}
    with api.chat.completions.stream(**asked, seed=1) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"city"}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=type
)
def test_a_tool_that_must_be_called(api, choice):
    pytest.importorskip("xgrammar")
    asked = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 90, "temperature": 0}
    one = {"parallel_tool_calls": False}
    answer = api.chat.completions.create(model=MODEL, messages=USER, **asked, **one)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in CITY["enum"]


async def test_half_of_the_clients_hang_up(url):
    await faults.half_hang_up(url, num=20, num_tokens=20)


async def test_malformed(url):
    await faults.malformed(url)


async def test_ten_megabytes(url):
    await faults.ten_megabytes(url)


async def test_slow_readers(url):
    await faults.slow_readers(url, num=500, num_tokens=4)


async def test_metrics_of_all_that(url):
    found = metrics_of(url)
    assert found["iteration_tokens_total_sum"] > found["generation_tokens_total"]
    assert found["prefix_cache_hits_total"] > 0
    assert found["request_queue_time_seconds_count"] == found["request_prefill_time_seconds_count"]


async def test_ten_times_too_many_and_sigterm_with_streams_open():
    flags = ["--enforce-eager", "--max-num-queued-reqs", "5", "--shutdown-timeout", "1"]
    with nanoflow(*flags) as server, ExitStack() as stack:
        await faults.ten_times_too_many(server.url, holds=5, num_tokens=4)
        await faults.too_many_who_come_back(server.url, num=10, num_tokens=4)
        streams = faults.open_streams(stack, server.url, num=3, num_tokens=500)
        (engine,) = server.children
        server.process.send_signal(signal.SIGTERM)
        for lines in streams:
            text = "\n".join(lines)
            assert '"finish_reason":"abort"' in text
            assert text.rstrip().endswith("data: [DONE]")
        assert server.process.wait(30) == 0
        assert not is_alive(engine)


def test_an_engine_that_is_killed_and_comes_back():
    flags = ["--enforce-eager", "--max-engine-restarts", "1"]
    with nanoflow(*flags) as server, ExitStack() as stack:
        for comes_back in (True, False):
            streams = faults.open_streams(stack, server.url, num=3, num_tokens=500)
            os.kill(server.children[0], signal.SIGKILL)
            for lines in streams:
                *_, error, done = filter(None, lines)
                assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
                assert done == "data: [DONE]"
            if comes_back:
                wait_until(lambda: health(server) == 200, seconds=120)
        assert health(server) == 503
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def health(server):
    return httpx.get(f"{server.url}/health", timeout=30).status_code
