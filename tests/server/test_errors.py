"""Whatever is sent, the answer is an error that says what was wrong, in OpenAI's shape."""

import json
import resource

import pytest

from nanoflow_compiler import OutOfBlocksError
from server.answers import error_of
from server.fake_engine import Completion, FakeEngine, Output

pytestmark = pytest.mark.anyio

PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800", "model": "\\ud800", "tokens": "\\ud800"}',
        b'{"prompt": "x", "n": 1' + b"0" * 10_000 + b"}",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt":' * 100_000,
        b"prompt=x&n=1",
        b"\x00\x01\x02",
    ],
    ids=lambda body: repr(body[:20]),
)
async def test_malformed_bodies(api, path, body):
    error = error_of(await api.post(path, body, status=400))
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


@pytest.mark.parametrize("name", ["prompt", "messages", "stop_token_ids", "tokens", "tools"])
async def test_a_million_errors_are_one(api, name):
    """Without that, a body of 8 MB would make gigabytes of them."""
    path = {"messages": "/v1/chat/completions", "tools": "/v1/chat/completions"}.get(name)
    path = path or ("/detokenize" if name == "tokens" else "/v1/completions")
    body = b'{"%s": [%s]}' % (name.encode(), b",".join([b"null"] * 1_000_000))
    before = peak_bytes()
    error_of(await api.post(path, body, status=400))
    assert peak_bytes() - before < 200 << 20


def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def test_a_form_is_refused_with_the_content_type_that_is_needed(api):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    error = error_of(await api.post("/v1/completions", b"prompt=x", status=400, headers=headers))
    assert "application/json" in error["message"]


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\x7f\x1b[0m", "\N{PILE OF POO}" * 9, "\ufffe"])
async def test_strange_characters_are_text(api, text):
    answer = await api.complete(text, echo=True, max_tokens=1, stop=["\x00stop"], user=text)
    assert answer["choices"][0]["text"].startswith(text)
    await api.chat(text, max_tokens=1)
    tokens = (await api.post("/tokenize", {"prompt": text}))["tokens"]
    assert (await api.post("/detokenize", {"tokens": tokens}))["prompt"] == text


@pytest.mark.parametrize("tokens", [[2**31 - 1], [10**6]])
async def test_tokens_outside_of_the_vocabulary(api, tokens):
    answer = await api.http.post("/detokenize", json={"tokens": tokens})
    assert answer.status_code < 500


async def test_routes_that_do_not_exist(api):
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ]:
        answer = await api.http.request(method, path)
        assert answer.status_code == status
        error_of(answer.json())


async def test_a_model_that_is_not_here(make_api):
    api = make_api(served_model_names=("one", "two"))
    assert (await api.complete(model="two"))["model"] == "two"
    assert (await api.complete())["model"] == "one"
    error = error_of(await api.complete(model="gpt-4", status=404))
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "one, two" in error["message"]


async def test_a_prompt_that_is_too_long(make_api):
    api = make_api(FakeEngine(max_model_len=100))
    for length in (100, 3_000, 1_000_000):
        error = error_of(await api.complete("x" * length, status=400))
        assert error["code"] == "context_length_exceeded"


async def test_a_body_that_is_too_large(make_api):
    api = make_api(max_request_bytes=1000)
    error = error_of(await api.complete("x" * 2000, status=413))
    assert "max_request_bytes" in error["message"]

    async def chunks():
        for _ in range(30):
            yield b"x" * 100

    answer = await api.http.post("/v1/completions", content=chunks())
    assert answer.status_code == 413
    error_of(answer.json())
    await api.complete("x" * 500, max_tokens=1)


async def test_ten_megabytes(make_api):
    api = make_api()
    await api.complete("x " * 5_000_000, status=413)
    api = make_api(max_request_bytes=64 << 20)
    error = error_of(await api.complete("x " * 5_000_000, status=400))
    assert error["code"] == "context_length_exceeded"


async def test_api_keys(make_api):
    api = make_api(api_keys=("first", "zweiter-schlüssel"))
    for path in ("/health", "/version", "/metrics"):
        await api.get(path)
    wrong = ["", "Bearer", "Bearer wrong", "Basic first", "first", "Bearer first2", "Bearer \xe9"]
    for value in wrong:
        headers = {"authorization": value.encode("latin-1")}
        answer = await api.get("/v1/models", status=401, headers=headers)
        assert error_of(answer.json())["code"] == "invalid_api_key"
    for key in ("first", "zweiter-schlüssel"):
        await api.get("/v1/models", headers={"authorization": f"bearer {key}".encode()})
    await api.get("/openapi.json", status=401)


async def test_a_dead_engine(make_api):
    api = make_api()
    await api.get("/health")
    api.engine.errored = True
    for answer in (await api.complete(status=503), (await api.get("/health", status=503)).json()):
        assert error_of(answer)["code"] == "engine_dead"
    text = (await api.get("/metrics")).text
    assert "nanoflow:request_success_total" in text
    assert "num_requests_running" not in text


async def test_an_engine_that_dies_mid_stream_ends_the_stream_with_an_error(make_api):
    api = make_api(FakeEngine(delay_s=0.001))
    events = [event async for event in _events_until_death(api)]
    assert json.loads(events[-2])["error"]["code"] == "engine_dead"
    assert events[-1] == "[DONE]"
    assert not api.engine.active
    assert api.context.admission.num_open == 0


async def _events_until_death(api):
    real = api.engine.generate

    async def dying(prompt, params, *, request_id):
        async for output in real(prompt, params, request_id=request_id):
            yield output
            api.engine.errored = len(output.outputs[0].token_ids) == 3

    api.engine.generate = dying
    answer = await api.http.post("/v1/completions", json={"prompt": "x", "stream": True})
    for line in filter(None, answer.text.split("\n\n")):
        yield line.removeprefix("data: ")


async def test_a_bug_is_an_answer_too(api, caplog):
    async def broken(*_, **__):
        raise ZeroDivisionError("secret")
        yield

    api.engine.generate = broken
    error = error_of(await api.complete(status=500))
    assert "secret" not in error["message"]
    assert "ZeroDivisionError: secret" in caplog.text
    answer = await api.http.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 500


async def test_a_request_that_the_engine_failed_on(api):
    async def failing(prompt, *_, **__):
        completion = Completion(0, "", (), "error", None, None)
        yield Output(tuple(prompt["prompt_token_ids"]), (completion,), None, None, None)

    api.engine.generate = failing
    assert error_of(await api.complete(status=500))["code"] == "engine_error"
    assert 'finished_reason="error"' in (await api.get("/metrics")).text


async def test_a_prompt_that_the_cache_can_never_hold(api):
    async def full(*_, **__):
        raise OutOfBlocksError("the request needs 9 blocks, and there are 8")
        yield

    api.engine.generate = full
    assert "9 blocks" in error_of(await api.complete(status=400))["message"]


async def test_a_request_has_only_so_much_time(make_api):
    api = make_api(FakeEngine(delay_s=0.01), request_timeout=0.05)
    error = error_of(await api.complete(max_tokens=1000, status=504))
    assert error["type"] == "timeout_error"
    body = {"prompt": "x", "max_tokens": 1000}
    *_, last = await api.stream("/v1/completions", body)
    assert error_of(last)["code"] == "timeout"
    assert not api.engine.active


async def test_a_full_queue_says_when_to_come_back(make_api):
    api = make_api(max_num_queued_reqs=4)
    with api.context.admission.open(["a", "b"]):
        answer = await api.http.post("/v1/completions", json={"prompt": ["x"] * 3})
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert error_of(answer.json())["code"] == "queue_full"
        await api.complete(n=2)
    error = error_of(await api.complete(["x"] * 5, status=400))
    assert "fewer prompts" in error["message"]
    assert "nanoflow:admission_rejections_total{" in (await api.get("/metrics")).text
