"""Structured outputs: what is refused, and that masks lead to text of the structure asked for."""

import importlib
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from nanoflow_compiler.engine.json_schema import check_schema
from nanoflow_compiler.engine.structured import (
    GrammarCompiler,
    StructuredOutputsParams,
    num_mask_words,
)
from nanoflow_compiler.errors import ConfigError, RequestError
from tiny_tokenizers import byte_tokenizer

VOCAB = 300
"""More than the tokenizer has, as models pad their vocabularies."""
EOS = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bo"]}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer):
    pytest.importorskip("xgrammar", reason="structured outputs need xgrammar")
    return GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[EOS, 10**6])


def allowed(grammar):
    row = np.zeros(num_mask_words(VOCAB), dtype=np.int32)
    grammar.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:VOCAB]).tolist()


def random_text(grammar, tokenizer, *, seed, most=2000):
    """Follow the masks at random; ends with the end token, or fails after ``most`` tokens."""
    rng = np.random.default_rng(seed)
    tokens = []
    while len(tokens) < most:
        fitting = allowed(grammar)
        # Ends wherever it can, so that the text ends at all.
        token = EOS if EOS in fitting else int(rng.choice(fitting))
        grammar.accept(token)
        if token == EOS:
            return tokenizer.decode(tokens)
        tokens.append(token)
    raise AssertionError(tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar and json_object, not none"),
        ({"regex": "a", "choice": ["b"]}, "not regex and choice"),
        ({"json": {}, "json_object": True}, "not json and json_object"),
        ({"json": "{"}, "no JSON schema"),
        ({"json": "[]"}, "must be a JSON object, not list"),
        ({"json": "[" * 10**6}, "no JSON schema"),
        ({"json": {"a": {1, 2}}}, "no JSON schema"),
        ({"choice": []}, "list of texts"),
        ({"choice": ["a", ""]}, "list of texts"),
        ({"choice": "ab"}, "list of texts"),
    ],
)
def test_bad_values_are_refused_by_name(params, message):
    with pytest.raises(ConfigError, match=message) as caught:
        StructuredOutputsParams(**params)
    assert "\n" not in str(caught.value)


def test_params_are_values():
    params = StructuredOutputsParams(json=PERSON)
    assert params == StructuredOutputsParams(json=json.dumps(PERSON))
    assert hash(params) == hash(StructuredOutputsParams(json=json.dumps(PERSON)))
    assert params.kind == "json"
    assert StructuredOutputsParams(choice=["a", "b"]).choice == ("a", "b")
    assert StructuredOutputsParams(json_object=True).kind == "json_object"


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"type": "array", "contains": {}}}}, "contains"),
        ({"$defs": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"anyOf": [{"type": "string"}, {"if": {}}]}, "if"),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "allOf of several"),
        ({"items": {"pattern": "a", "maxLength": 2}}, "pattern together"),
    ],
)
def test_schemas_that_cannot_be_enforced_are_refused(schema, keyword):
    with pytest.raises(RequestError, match=f"uses {keyword}"):
        check_schema(json.dumps(schema))


def test_names_and_values_are_no_keywords():
    check_schema(json.dumps({"properties": {"not": {"enum": [{"if": 1}]}, "if": {"const": {}}}}))
    check_schema(json.dumps({"uniqueItems": False, "type": "integer", "multipleOf": 3}))


def test_without_xgrammar_it_says_what_to_install(monkeypatch, tokenizer):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install nanoflow-compiler\[structured\]"):
        GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[EOS])


def test_without_a_tokenizer():
    with pytest.raises(ConfigError, match="need a tokenizer"):
        GrammarCompiler(None, vocab_size=VOCAB, eos_token_ids=[EOS])


@pytest.mark.usefixtures("compiler")
def test_without_an_end_token(tokenizer):
    with pytest.raises(ConfigError, match="end token"):
        GrammarCompiler(tokenizer, vocab_size=VOCAB, eos_token_ids=[VOCAB])


@pytest.mark.parametrize("seed", range(3))
def test_a_regex_is_matched(compiler, tokenizer, seed):
    pattern = r"[a-c]{3}-\d{2,4}"
    text = random_text(
        compiler.compile(StructuredOutputsParams(regex=pattern)), tokenizer, seed=seed
    )
    assert re.fullmatch(pattern, text)


CHOICES = ["yes", 'no "quotes" \\ here', "new\nline\ttab\x01", "ünïcödé 😀", "a]b^c-d|e"]


@pytest.mark.parametrize("text", CHOICES)
def test_choices_hold_any_character(compiler, tokenizer, text):
    grammar = compiler.compile(StructuredOutputsParams(choice=CHOICES))
    for token in tokenizer(text)["input_ids"]:
        grammar.accept(token)
    assert allowed(grammar) == [EOS]


@pytest.mark.parametrize("seed", range(3))
def test_json_follows_the_schema(compiler, tokenizer, seed):
    text = random_text(compiler.compile(StructuredOutputsParams(json=PERSON)), tokenizer, seed=seed)
    found = json.loads(text)
    assert list(found) == ["name", "age"]
    assert found["name"] in ("Ada", "Bo")
    assert isinstance(found["age"], int)


def test_any_json_object(compiler, tokenizer):
    grammar = compiler.compile(StructuredOutputsParams(json_object=True))
    assert tokenizer(" ")["input_ids"][0] not in allowed(grammar)
    for token in tokenizer('{"a": [1, {"b": null}], "c": "d"}')["input_ids"]:
        grammar.accept(token)
    assert allowed(grammar) == [EOS]


def test_a_grammar_of_rules(compiler, tokenizer):
    rules = 'root ::= sum\nsum ::= digit ("+" sum)?\ndigit ::= [0-9]'
    grammar = compiler.compile(StructuredOutputsParams(grammar=rules))
    assert re.fullmatch(r"\d(\+\d)*", random_text(grammar, tokenizer, seed=0))


def test_the_end(compiler, tokenizer):
    grammar = compiler.compile(StructuredOutputsParams(choice=["a"]))
    grammar.accept(tokenizer("a")["input_ids"][0])
    assert not grammar.is_terminated
    grammar.accept(EOS)
    assert grammar.is_terminated
    assert allowed(grammar) == list(range(VOCAB))


def test_a_token_that_does_not_fit(compiler):
    grammar = compiler.compile(StructuredOutputsParams(choice=["a"]))
    for token in (EOS, 299):
        with pytest.raises(RequestError, match=f"token {token} does not fit"):
            grammar.accept(token)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"regex": "(((a"}, "regex cannot be compiled: Regex parsing error at position 5"),
        ({"grammar": "nonsense"}, "grammar cannot be compiled: EBNF parser error at line 1"),
        ({"json": {"type": "nonsense"}}, 'json cannot be compiled: Unsupported type "nonsense"'),
        ({"json": {"$ref": "#/x"}}, "json cannot be compiled"),
        ({"json": {"uniqueItems": True}}, "uses uniqueItems"),
        ({"regex": "\ud800"}, "regex cannot be compiled"),
    ],
)
def test_what_cannot_be_compiled(compiler, params, message):
    params = StructuredOutputsParams(**params)
    with pytest.raises(RequestError, match=message) as caught:
        compiler.compile(params)
    assert "\n" not in str(caught.value)


def test_grammars_of_one_structure_go_their_own_ways(compiler, tokenizer):
    params = StructuredOutputsParams(choice=["ab", "cd"])
    with ThreadPoolExecutor(4) as pool:
        first, second, *_ = pool.map(compiler.compile, [params] * 4)
    a, c = tokenizer("ac")["input_ids"]
    first.accept(a)
    second.accept(c)
    assert len(allowed(first)) == len(allowed(second)) == 1
    assert allowed(first) != allowed(second)


def test_special_tokens_and_those_beyond_the_tokenizer_are_barred(compiler):
    grammar = compiler.compile(StructuredOutputsParams(regex=r"(.|\n)*"))
    assert allowed(grammar)[:2] == [EOS, 3]
    assert allowed(grammar)[-1] < 259
    assert num_mask_words(32) == 1
    assert num_mask_words(33) == 2


@pytest.mark.parametrize("kind", [{"json": PERSON}, {"json_object": True}], ids=str)
def test_json_without_any_line_breaks(compiler, kind):
    loose, compact = (
        compiler.compile(StructuredOutputsParams(**kind, disable_any_whitespace=is_compact))
        for is_compact in (False, True)
    )
    brace, newline = (3 + sorted(ByteLevel.alphabet()).index(one) for one in ("{", "\u010a"))
    for grammar in (loose, compact):
        grammar.accept(brace)
    assert newline in allowed(loose)
    assert newline not in allowed(compact)
