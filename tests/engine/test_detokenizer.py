"""Text from single tokens: characters of several bytes, spaces, stop strings across tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.engine.detokenizer import Detokenizer
from nanoflow_compiler.engine.sampling_params import SamplingParams
from tiny_tokenizers import byte_tokenizer, word_tokenizer

TOKENIZER = byte_tokenizer()


def make(tokenizer=TOKENIZER, *, prompt=(), **params):
    return Detokenizer(
        tokenizer, prompt_token_ids=prompt, params=SamplingParams(max_tokens=None, **params)
    )


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text)["input_ids"]


def feed(detokenizer, tokens):
    """The number of tokens until the text stopped, or ``None``."""
    for count, token in enumerate(tokens, start=1):
        if detokenizer.append(token):
            return count
    detokenizer.finish()
    return None


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=20), st.text("añ漢🙂 ", max_size=5))
def test_any_text_comes_back(text, prompt):
    detokenizer = make(prompt=ids(prompt))
    assert feed(detokenizer, ids(text)) is None
    assert detokenizer.text == text


def test_incomplete_characters_are_held_back():
    detokenizer = make()
    first, *rest = ids("é")
    detokenizer.append(first)
    assert detokenizer.text == ""
    detokenizer.append(*rest)
    assert detokenizer.text == "é"


def test_an_incomplete_end_shows_at_the_end():
    detokenizer = make()
    feed(detokenizer, ids("ok🙂")[:-1])
    assert detokenizer.text == "ok\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(include):
    detokenizer = make(stop=["never", "END"], include_stop_str_in_output=include)
    assert feed(detokenizer, ids("one ENtwo END three")) == len("one ENtwo END")
    assert detokenizer.text == ("one ENtwo END" if include else "one ENtwo ")


def test_the_first_stop_string_in_the_text_wins():
    tokenizer = word_tokenizer("a", "stop", "here")
    detokenizer = make(tokenizer, stop=["here", "op h"])
    assert feed(detokenizer, ids("a stop here", tokenizer)) == 3
    assert detokenizer.text == "a st"


def test_min_tokens_delays_stop_strings():
    detokenizer = make(stop="a", min_tokens=3)
    assert feed(detokenizer, ids("aaaaa")) == 4
    assert detokenizer.text == "aaa"


def test_the_space_between_prompt_and_output_is_text():
    tokenizer = word_tokenizer("Hello", "world")
    detokenizer = make(tokenizer, prompt=ids("Hello", tokenizer))
    feed(detokenizer, ids("world world", tokenizer))
    assert detokenizer.text == " world world"


def test_special_tokens_are_text_only_if_asked_for():
    for skip, expected in ((True, "ab"), (False, "a</s>b")):
        detokenizer = make(skip_special_tokens=skip)
        feed(detokenizer, [*ids("a"), TOKENIZER.eos_token_id, *ids("b")])
        assert detokenizer.text == expected


def test_a_hidden_token_adds_nothing():
    detokenizer = make(skip_special_tokens=False)
    detokenizer.append(ids("a")[0])
    assert not detokenizer.append(TOKENIZER.eos_token_id, is_hidden=True)
    assert detokenizer.text == "a"
