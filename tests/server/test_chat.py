"""``/v1/chat/completions``: templates, tools and the shape of answers."""

import json

import pytest

from server.answers import error_of
from server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
USER = {"messages": [{"role": "user", "content": "hello"}]}
NAMED = {"type": "function", "function": {"name": "weather"}}
HERMES = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
)
LLAMA = '{"name": "weather", "parameters": {"city": "Köln"}}; {"name": "clock", "parameters": {}}'


def speaking(text):
    return FakeEngine(script=lambda _: text)


def prompt_of(api, index=0):
    return api.engine.tokenizer.decode(list(api.engine.seen[index][1]))


def merge(chunks, index=0):
    """What a client builds from a stream: content, calls by index, the finish reason."""
    content, calls, reason = "", {}, None
    for choice in (one for chunk in chunks for one in chunk["choices"]):
        if choice["index"] != index:
            continue
        content += choice["delta"].get("content", "")
        for call in choice["delta"].get("tool_calls", []):
            known = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            known["name"] += call["function"].get("name", "")
            known["arguments"] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return content, list(calls.values()), reason


async def test_shape(api):
    answer = await api.chat(max_completion_tokens=3, model="tiny")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    message = choice["message"]
    assert message["role"] == "assistant"
    assert len(message["content"]) == 3
    assert "tool_calls" not in message
    assert choice["finish_reason"] == "length"
    assert prompt_of(api) == "user: hello\nassistant:"


async def test_stream_begins_with_the_role_and_says_what_the_whole_says(api):
    body = USER | {"n": 2, "max_tokens": 6, "stream_options": {"include_usage": True}}
    chunks = await api.stream(PATH, body)
    firsts = [chunk["choices"][0]["delta"] for chunk in chunks[:2]]
    assert firsts == [{"role": "assistant", "content": ""}] * 2
    whole = await api.chat(n=2, max_tokens=6)
    for index, choice in enumerate(whole["choices"]):
        assert merge(chunks, index)[0] == choice["message"]["content"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_messages_as_templates_expect_them(api):
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    await api.post(PATH, {"messages": messages})
    expected = "system: be\nuser: a\nb\nassistant: calls weather in Bonn\ntool: rain\nassistant:"
    assert prompt_of(api) == expected


async def test_options_of_the_template(api, make_api):
    await api.chat(add_generation_prompt=False)
    assert prompt_of(api) == "user: hello\n"
    own = make_api(chat_template="{{ messages[0].content }}{{ extra }}{{ reasoning_effort }}")
    await own.chat(chat_template_kwargs={"extra": "!"})
    await own.chat(reasoning_effort="low")
    assert [prompt_of(own, index) for index in (0, 1)] == ["hello!", "hellolow"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "forbidden", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"continue_final_message": True, "messages": [{"role": "user", "content": "\ud800"}]},
        {"chat_template": "x"},
        {"echo": True},
        {"functions": [{"name": "f"}]},
        {"modalities": ["audio"]},
        {"top_logprobs": 3},
        {"tool_choice": "required"},
        {"tool_choice": NAMED, "tools": [CLOCK]},
        {"tool_choice": "required", "tools": [CLOCK], "response_format": {"type": "json_object"}},
        {"tools": [{"type": "retrieval"}]},
        {"reasoning_effort": "enormous"},
    ],
    ids=str,
)
async def test_bad_requests_are_refused_in_one_line(api, fields):
    error_of(await api.post(PATH, USER | fields, status=400))


async def test_a_model_without_a_template_is_refused(make_api):
    engine = FakeEngine()
    engine.tokenizer.chat_template = None
    error = error_of(await make_api(engine).chat(status=400))
    assert "/v1/completions" in error["message"]


async def test_token_ids(api):
    body = {"max_tokens": 3, "n": 2, "return_token_ids": True}
    whole = await api.chat(**body)
    assert api.engine.tokenizer.decode(whole["prompt_token_ids"]) == prompt_of(api)
    chunks = await api.stream(PATH, USER | body)
    assert [chunk.get("prompt_token_ids") is not None for chunk in chunks[:3]] == [1, 0, 0]
    for index, choice in enumerate(whole["choices"]):
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        tokens = [token for piece in pieces for token in piece.get("token_ids", [])]
        assert tokens == choice["token_ids"]
        assert len(tokens) == 3


async def test_logprobs(api):
    answer = await api.chat(logprobs=True, top_logprobs=2, max_tokens=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    assert content[0]["bytes"] == list(content[0]["token"].encode())
    assert len(content[0]["top_logprobs"]) == 2
    chunks = await api.stream(PATH, USER | {"logprobs": True, "max_tokens": 2})
    assert [len(chunk["choices"][0]["logprobs"]["content"]) for chunk in chunks[1:]] == [1, 1]


@pytest.mark.parametrize(
    ("parser", "text", "content", "names"),
    [
        ("auto", HERMES, "Let me see.", ["weather"]),
        ("hermes", HERMES + "\n" + HERMES.partition("\n")[2], "Let me see.", ["weather"] * 2),
        ("llama3_json", LLAMA, None, ["weather", "clock"]),
        ("llama3_json", "<|python_tag|>" + LLAMA, None, ["weather", "clock"]),
    ],
)
async def test_tools_that_the_model_may_call(make_api, parser, text, content, names):
    api = make_api(speaking(text), tool_call_parser=parser)
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": "auto"}
    (choice,) = (await api.chat(**fields))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == content
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == names
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Köln"}
    assert len({call["id"] for call in calls}) == len(calls)
    streamed, pieces, reason = merge(await api.stream(PATH, USER | fields))
    assert (streamed, reason) == (content or "", "tool_calls")
    assert pieces == [call["function"] for call in calls]
    assert "weather" in prompt_of(api)


async def test_tools_that_nobody_would_find_in_the_text_are_refused(make_api):
    api = make_api(tool_call_parser="none")
    for fields in ({}, {"tool_choice": "auto"}, {"tool_choice": None}):
        error = error_of(await api.chat(tools=[WEATHER], **fields, status=400))
        assert error["param"] == "tools"
        assert "--tool-call-parser" in error["message"]
    for choice in ("none", "required", NAMED):
        await api.chat(tools=[WEATHER], tool_choice=choice)


async def test_one_call_at_a_time(make_api):
    api = make_api(speaking(LLAMA), tool_call_parser="llama3_json")
    answer = await api.chat(tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1


async def test_text_that_is_no_call_is_content(make_api):
    for text in ("plain < text", '<tool_call>{"name": </tool_call>', "<tool_call", '{"a": 1}'):
        api = make_api(speaking(text), tool_call_parser="hermes")
        (choice,) = (await api.chat(tools=[WEATHER]))["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        streamed, calls, _ = merge(await api.stream(PATH, USER | {"tools": [WEATHER]}))
        assert (streamed, calls) == (text, [])


async def test_no_tools_are_shown_or_parsed_if_none_may_be_called(make_api):
    api = make_api(speaking(HERMES))
    (choice,) = (await api.chat(tools=[WEATHER], tool_choice="none"))["choices"]
    assert choice["message"]["content"] == HERMES
    assert "weather" not in prompt_of(api)


async def test_a_named_function_is_a_grammar_for_its_arguments(make_api):
    api = make_api(speaking('{"city": "Bonn"}'))
    fields = {"tools": [CLOCK, WEATHER], "tool_choice": NAMED}
    (choice,) = (await api.chat(**fields))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert choice["finish_reason"] == "stop"
    assert json.loads(api.engine.seen[0][2].structured_outputs.json) == SCHEMA
    _, calls, _ = merge(await api.stream(PATH, USER | fields))
    assert calls == [call["function"]]


async def test_required_calls_are_a_grammar_for_a_list(make_api):
    api = make_api(speaking('[{"name": "clock", "parameters": {}}]'))
    fields = {"tools": [CLOCK, WEATHER], "tool_choice": "required"}
    (choice,) = (await api.chat(**fields))["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "clock", "arguments": "{}"}
    assert choice["finish_reason"] == "tool_calls"
    schema = json.loads(api.engine.seen[0][2].structured_outputs.json)
    assert (schema["type"], len(schema["items"]["anyOf"])) == ("array", 2)
    assert "maxItems" not in schema
    _, calls, reason = merge(await api.stream(PATH, USER | fields))
    assert (calls, reason) == ([{"name": "clock", "arguments": "{}"}], "tool_calls")
    await api.chat(**fields, parallel_tool_calls=False)
    assert json.loads(api.engine.seen[-1][2].structured_outputs.json)["maxItems"] == 1


async def test_response_format(api):
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    await api.chat(response_format=wanted)
    await api.chat(response_format={"type": "text"})
    first, second = (params for _, _, params in api.engine.seen)
    assert json.loads(first.structured_outputs.json) == SCHEMA
    assert second.structured_outputs is None
