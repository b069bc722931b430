"""Everything around generation."""

import pytest

pytestmark = pytest.mark.anyio


async def test_models(make_api):
    api = make_api(served_model_names=("org/model", "alias"))
    answer = (await api.get("/v1/models")).json()
    assert [card["id"] for card in answer["data"]] == ["org/model", "alias"]
    assert {card["root"] for card in answer["data"]} == {"tiny"}
    assert answer["data"][0]["max_model_len"] == 2048
    assert (await api.get("/v1/models/org/model")).json()["id"] == "org/model"
    await api.get("/v1/models/none", status=404)


async def test_tokens(api):
    answer = await api.post(
        "/tokenize", {"model": "tiny", "prompt": "ab", "return_token_strs": True}
    )
    assert answer["count"] == len(answer["tokens"]) == 2
    assert answer["max_model_len"] == 2048
    assert answer["token_strs"] == ["a", "b"]
    text = await api.post("/detokenize", {"model": "tiny", "tokens": answer["tokens"]})
    assert text == {"prompt": "ab"}
    messages = [{"role": "user", "content": "x"}]
    chat = await api.post("/tokenize", {"messages": messages})
    assert chat["count"] == len("user: x\nassistant:")
    await api.post("/tokenize", {}, status=400)
    await api.post("/tokenize", {"messages": messages, "chat_template": "x"}, status=400)


async def test_health_and_version(api):
    for method, path in [
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/ping"),
        ("POST", "/ping"),
    ]:
        answer = await api.http.request(method, path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert (await api.get("/version")).json().keys() == {"version"}
    api.context.admission.is_draining = True
    await api.get("/health", status=503)


async def test_load(api):
    with api.context.admission.open(["a"], num_each=3):
        assert (await api.get("/load")).json() == {"server_load": 3}


async def test_request_ids_are_taken_and_returned(api, caplog):
    caplog.set_level("INFO", "nanoflow_compiler.server")
    body = {"prompt": "x", "max_tokens": 2}
    answer = await api.http.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["id"] == "cmpl-mine"
    assert "cmpl-mine-0: 1 tokens in, 2 out, length" in caplog.text
    for bad in ("x" * 500, "a b", ""):
        answer = await api.http.get("/health", headers={"x-request-id": bad})
        assert len(answer.headers["x-request-id"]) == 32


async def test_equal_request_ids_are_told_apart(api):
    await api.complete(["a", "b"], request_id="same")
    with api.context.admission.open(["cmpl-same-0"]):
        await api.complete("c", request_id="same")
    ids = [request_id for request_id, _, _ in api.engine.seen]
    assert ids == ["cmpl-same-0", "cmpl-same-1", "cmpl-same-0-1"]


async def test_documentation_can_be_hidden(make_api, api):
    schema = (await api.get("/openapi.json")).json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= schema["paths"].keys()
    await api.get("/docs")
    hidden = make_api(disable_fastapi_docs=True)
    for path in ("/openapi.json", "/docs", "/redoc"):
        await hidden.get(path, status=404)
