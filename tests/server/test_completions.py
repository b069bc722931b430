"""``/v1/completions``: what clients send, and what they rely on in the answer."""

import math

import pytest

from server.answers import error_of, joined, text_of
from server.fake_engine import EOS, FakeEngine

pytestmark = pytest.mark.anyio

VLLM_BENCH = {
    "model": "tiny",
    "prompt": "hello",
    "repetition_penalty": 1.0,
    "max_tokens": 4,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}


async def test_shape(api):
    answer = await api.complete(max_tokens=4, model="tiny")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert len(choice.pop("text")) == 4
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_a_stream_says_what_the_whole_answer_says(api):
    body = {"prompt": ["one", "two"], "n": 3, "max_tokens": 7, "seed": 3, "logprobs": 2}
    whole = await api.complete(body.pop("prompt"), **body)
    chunks = await api.stream("/v1/completions", body | {"prompt": ["one", "two"]})
    for index in range(6):
        assert joined(chunks, index) == text_of(whole, index)
    pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 4]
    offsets = [offset for piece in pieces for offset in piece["logprobs"]["text_offset"]]
    assert offsets == whole["choices"][4]["logprobs"]["text_offset"] == list(range(7))
    assert [piece["finish_reason"] for piece in pieces] == [None] * 6 + ["length"]


async def test_what_vllm_bench_serve_sends_and_reads(api):
    chunks = await api.stream("/v1/completions", VLLM_BENCH)
    assert [len(chunk["choices"]) for chunk in chunks] == [1, 1, 1, 1, 0]
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all("usage" not in chunk for chunk in chunks[:-1])


async def test_continuous_usage(api):
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = await api.stream("/v1/completions", {"prompt": "hi", "max_tokens": 3} | options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


async def test_prompts_as_tokens_are_those_of_the_text(api):
    tokens = (await api.post("/tokenize", {"prompt": "hello"}))["tokens"]
    answer = await api.complete([tokens, tokens], max_tokens=5)
    assert text_of(answer, 0) == text_of(answer, 1) == text_of(await api.complete(max_tokens=5))
    assert answer["usage"]["prompt_tokens"] == 10


async def test_stop_strings_are_never_sent_not_even_their_beginning(make_api):
    api = make_api(FakeEngine(script=lambda _: "one two three"))
    body = {"prompt": "x", "stop": ["two th", "zzz"], "max_tokens": 50}
    chunks = await api.stream("/v1/completions", body)
    assert joined(chunks) == "one "
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "two th")
    # What only looked like a beginning is sent after all.
    chunks = await api.stream("/v1/completions", body | {"stop": "two four"})
    assert joined(chunks) == "one two three"
    kept = await api.complete("x", stop="two", include_stop_str_in_output=True, max_tokens=50)
    assert text_of(kept) == "one two"


async def test_fields_reach_the_engine(api):
    await api.complete(
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        seed=7,
        min_tokens=2,
        ignore_eos=True,
        stop=["a", "b"],
        stop_token_ids=[9],
        skip_special_tokens=False,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={"5": 2},
        allowed_token_ids=[7, 5, 7],
        max_tokens=3,
    )
    ((_, _, params),) = api.engine.seen
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 5, 0.9, 0.1)
    assert (params.seed, params.min_tokens, params.ignore_eos) == (7, 2, True)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (9,))
    assert params.skip_special_tokens is False
    assert (params.repetition_penalty, params.presence_penalty) == (1.5, 0.5)
    assert (params.frequency_penalty, params.logit_bias) == (0.25, {5: 2.0})
    assert params.allowed_token_ids == (7, 5)


async def test_stop_tokens_and_end_tokens(make_api):
    api = make_api(FakeEngine(script=lambda _: "ab"))
    (choice,) = (await api.complete("x", max_tokens=9))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    (choice,) = (await api.complete("x", stop_token_ids=[EOS], ignore_eos=True))["choices"]
    assert choice["stop_reason"] == EOS


async def test_echo_and_logprobs_of_the_prompt_alone(api):
    answer = await api.complete("abc", echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2]


async def test_echo_comes_first(api):
    chunks = await api.stream("/v1/completions", {"prompt": ["ab", "cd"], "echo": True, "n": 2})
    whole = await api.complete(["ab", "cd"], echo=True, n=2)
    for index, prompt in enumerate(["ab", "ab", "cd", "cd"]):
        assert joined(chunks, index) == text_of(whole, index)
        assert text_of(whole, index).startswith(prompt)


async def test_prompt_logprobs_and_tokens_as_ids(api):
    answer = await api.complete(
        "ab", prompt_logprobs=1, logprobs=0, return_tokens_as_token_ids=True
    )
    (choice,) = answer["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert [one["rank"] for one in second.values()] == [1]
    assert choice["logprobs"]["tokens"][0].startswith("token_id:")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, "ef"),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, "ab"),
        ({"truncate_prompt_tokens": 9}, "abcdef"),
        # As many as leave room for the answer, or for one token where the answer could be all.
        ({"truncate_prompt_tokens": -1, "max_tokens": 6}, "cdef"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 6, "truncation_side": "right"}, "abcd"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 50}, "abcdef"),
    ],
    ids=str,
)
async def test_truncation(make_api, fields, kept):
    api = make_api(FakeEngine(max_model_len=10))
    await api.complete("abcdef", **fields)
    ((_, tokens, _),) = api.engine.seen
    assert api.engine.tokenizer.decode(list(tokens)) == kept


async def test_token_ids_are_returned_beside_the_text(api):
    body = {"n": 2, "max_tokens": 3, "return_token_ids": True}
    whole = (await api.complete(["ab", "cd"], **body))["choices"]
    prompts = [choice["prompt_token_ids"] for choice in whole]
    decode = api.engine.tokenizer.decode
    assert [decode(tokens) for tokens in prompts] == ["ab", "ab", "cd", "cd"]
    assert all(decode(choice["token_ids"]) == choice["text"] for choice in whole)
    chunks = await api.stream("/v1/completions", body | {"prompt": ["ab", "cd"]})
    pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 3]
    assert [token for piece in pieces for token in piece["token_ids"]] == whole[3]["token_ids"]
    assert [piece.get("prompt_token_ids") for piece in pieces] == [prompts[3], None, None]


@pytest.mark.parametrize(
    ("setting", "field", "sizes"),
    [(1, 1, [1] * 7), (3, 1, [1, 3, 3]), (1, 4, [1, 4, 2]), (4, 3, [1, 4, 2]), (1, 99, [1, 6])],
)
async def test_a_stream_in_larger_pieces_says_the_same(make_api, setting, field, sizes):
    api = make_api(stream_interval=setting)
    body = {"prompt": "x", "max_tokens": 7, "return_token_ids": True, "stream_interval": field}
    chunks = await api.stream("/v1/completions", body)
    assert [len(chunk["choices"][0]["token_ids"]) for chunk in chunks] == sizes
    assert joined(chunks) == text_of(await api.complete("x", max_tokens=7))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": math.inf},
        {"top_p": 0},
        {"n": 0},
        {"n": 10**6},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 10**30},
        {"seed": 2**64},
        {"top_k": -5},
        {"min_tokens": 99},
        {"logprobs": -1},
        {"logprobs": 500},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"5": 1000}},
        {"allowed_token_ids": []},
        {"stop": [""]},
        {"stop": ["x"] * 1000},
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": [1, "a"]},
        {"prompt": {"a": 1}},
        {"prompt": None},
        {"temperature": "hot"},
        {"stream": True, "prompt_logprobs": 1},
        {"guided_regex": "a", "guided_json": {}, "response_format": {"type": "json_object"}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"structural_tag": "x"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "poem"}},
    ],
    ids=str,
)
async def test_bad_values_are_refused_in_one_line(api, fields):
    error = error_of(await api.complete(**{"prompt": "hello"} | fields, status=400))
    assert error["type"] == "invalid_request_error"
    assert not api.engine.active


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", ("a", "b")),
        ({"guided_grammar": "root ::= x"}, "grammar", "root ::= x"),
        ({"guided_json": {"type": "object"}}, "json", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "b"}}, "regex", "b"),
        ({"structured_outputs": {"json": {}, "regex": None}}, "json", "{}"),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "disable_any_whitespace",
            True,
        ),
        ({"response_format": {"type": "json_object"}}, "json_object", True),
    ],
    ids=str,
)
async def test_structured_outputs_reach_the_engine(api, fields, kind, value):
    await api.complete(**fields)
    ((_, _, params),) = api.engine.seen
    assert kind in (params.structured_outputs.kind, "disable_any_whitespace")
    assert getattr(params.structured_outputs, kind) == value


async def test_one_bad_prompt_of_a_batch_stops_the_others(api):
    error_of(await api.complete(["good", ""], max_tokens=100, status=400))
    assert not api.engine.active
    assert api.context.admission.num_open == 0
