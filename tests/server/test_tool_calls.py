"""The parsers of tool calls, by themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoflow_compiler.server.tool_calls import (
    HermesParser,
    LlamaParser,
    RequiredParser,
    make_parser,
)

PIECES = ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "\n", " ", "text", "<"]
PIECES += ["<tool", '{"name": 1}', "{", ";", "<|python_tag|>", "é", "[]", "null"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.mark.parametrize("parser", [HermesParser(), LlamaParser(), RequiredParser()])
@given(text=TEXTS, sizes=st.lists(st.integers(1, 9), max_size=20))
def test_what_was_sent_is_never_taken_back(parser, text, sizes):
    whole = parser.parse(text, is_finished=True)
    end = 0
    content, calls = "", ()
    for size in sizes:
        end += size
        partial = parser.parse(text[:end], is_finished=False)
        assert partial.content.startswith(content)
        assert partial.calls[: len(calls)] == calls
        content, calls = partial.content, partial.calls
    if end <= len(text):
        assert whole.content.startswith(content)
        assert whole.calls[: len(calls)] == calls


@given(text=TEXTS)
def test_nothing_is_lost_where_there_is_no_call(text):
    parsed = HermesParser().parse(text, is_finished=True)
    if not parsed.calls:
        assert parsed.content == text


def test_a_call_that_was_not_closed_counts_at_the_end():
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}'
    (call,) = HermesParser().parse(text, is_finished=True).calls
    assert (call.name, call.arguments) == ("f", '{"a": 1}')


def test_of_a_list_that_was_cut_whole_calls_count():
    text = (
        '[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}, {"name": "f", "pa'
    )
    for is_finished in (True, False):
        parsed = RequiredParser().parse(text, is_finished=is_finished)
        assert [call.name for call in parsed.calls] == ["f", "g"]
        assert parsed.content == ""
    assert RequiredParser().parse("[", is_finished=True).content == "["


def test_deep_nesting_is_text():
    deep = '{"name": "f", "arguments": ' + "[" * 100_000
    assert HermesParser().parse(f"<tool_call>{deep}", is_finished=True).calls == ()
    assert LlamaParser().parse(deep, is_finished=True).content == deep
    assert RequiredParser().parse(deep, is_finished=True).content == deep


@pytest.mark.parametrize(
    ("kind", "template", "expected"),
    [
        ("auto", "... <tool_call> ...", HermesParser),
        ("auto", 'as {"name": f, "parameters": d}', LlamaParser),
        ("auto", "plain", type(None)),
        ("none", "<tool_call>", type(None)),
        ("llama3_json", "", LlamaParser),
    ],
)
def test_the_parser_is_that_of_the_template(kind, template, expected):
    assert type(make_parser(kind, template=template)) is expected
