import json
from pathlib import Path

import numpy as np
import pytest

from nanoflow_compiler.bench.dataset import DatasetSettings, Vocabulary
from nanoflow_compiler.bench.requests import make_requests, with_texts
from nanoflow_compiler.errors import ConfigError
from tiny_tokenizers import byte_tokenizer

VOCABULARY = Vocabulary(np.arange(100, 200))


def make(*, tokenizer=None, longest=None, **settings):
    return make_requests(
        DatasetSettings(**settings), vocabulary=VOCABULARY, tokenizer=tokenizer, longest=longest
    )


def lengths(requests):
    return [(len(request.prompt_token_ids), request.output_len) for request in requests]


def conversation(*texts):
    return {"conversations": [{"from": "human", "value": text} for text in texts]}


@pytest.fixture
def sharegpt(tmp_path):
    path = tmp_path / "sharegpt.json"
    entries = [
        conversation("p" * 10, "a" * 20, "and so on"),
        conversation("q" * 11, "a" * 3),
        conversation("r" * 3, "a" * 20),
        conversation("s" * 1025, "a" * 20),
        conversation("t" * 1000, "a" * 1100),
        conversation("alone"),
        {"id": "without turns"},
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = ["10.5,5,2", "2023-11-16 18:15:46.6805900,6,0", "11.75,7,3", "12,9,4000", "13,1,1"]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return path


def test_random_lengths_are_exact_or_differ_by_the_ratio():
    assert lengths(make(num_prompts=2, input_len=7, output_len=3)) == [(7, 3), (7, 3)]
    found = make(
        num_prompts=200, random_input_len=100, random_output_len=10, random_range_ratio=0.2
    )
    inputs, outputs = zip(*lengths(found), strict=True)
    assert (min(inputs), max(inputs)) == (80, 120)
    assert (min(outputs), max(outputs)) == (8, 12)


def test_random_prompts_repeat_with_the_seed_and_share_only_the_prefix():
    settings = {"num_prompts": 3, "input_len": 20, "random_prefix_len": 5}
    found = make(**settings)
    assert found == make(**settings)
    assert found != make(**settings, seed=1)
    prompts = [request.prompt_token_ids for request in found]
    assert {len(prompt) for prompt in prompts} == {25}
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
    assert len({tuple(prompt[5:]) for prompt in prompts}) == 3
    assert {token for prompt in prompts for token in prompt} <= set(range(100, 200))


def test_sharegpt_keeps_what_vllm_keeps(sharegpt):
    tokenizer = byte_tokenizer()
    (only,) = make(
        dataset_name="sharegpt", dataset_path=sharegpt, num_prompts=1, tokenizer=tokenizer
    )
    assert only.text == "p" * 10
    assert only.prompt_token_ids == tokenizer(only.text).input_ids
    assert only.output_len == len(tokenizer("a" * 20).input_ids)
    with pytest.raises(ConfigError, match="1 requests for --num-prompts 2"):
        make(dataset_name="sharegpt", dataset_path=sharegpt, num_prompts=2, tokenizer=tokenizer)


def test_sharegpt_with_a_given_length_keeps_short_answers(sharegpt):
    found = make(
        dataset_name="sharegpt",
        dataset_path=sharegpt,
        num_prompts=3,
        output_len=9,
        tokenizer=byte_tokenizer(),
    )
    assert sorted(request.text[0] for request in found) == ["p", "q", "t"]
    assert {request.output_len for request in found} == {9}


def test_sharegpt_needs_a_tokenizer_and_its_file(sharegpt, tmp_path):
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        make(dataset_name="sharegpt", dataset_path=sharegpt, num_prompts=1)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="is not the JSON file of ShareGPT"):
        make(
            dataset_name="sharegpt",
            dataset_path=tmp_path / "other.json",
            num_prompts=1,
            tokenizer=byte_tokenizer(),
        )


def test_trace_has_lengths_and_arrivals(trace):
    found = make(trace=trace, num_prompts=3, longest=100)
    assert lengths(found) == [(5, 2), (7, 3), (1, 1)]
    assert [request.arrival_s for request in found] == [0.0, 1.25, 2.5]


def test_requests_that_are_too_long_are_counted(trace, capsys):
    make(trace=trace, num_prompts=3, longest=100)
    assert capsys.readouterr().err == "3 requests; 1 longer than 100 tokens were left out\n"


def test_trace_without_times(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,107,15\nXXX,396,513\n")
    found = make(dataset_name="trace", dataset_path=path, num_prompts=2)
    assert lengths(found) == [(107, 15), (396, 513)]
    assert [request.arrival_s for request in found] == [None, None]


def test_dates_are_times(tmp_path):
    path = tmp_path / "trace.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_text(f"{head}2023-11-16 18:15:46.6805900,1,1\n2023-11-16 18:15:50.9951690,1,1\n")
    _, second = make(trace=path, num_prompts=2)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,x,2\n", "line 2"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make(trace=path, num_prompts=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset_path": Path("x.json")},
        {"dataset_name": "sharegpt"},
        {"dataset_name": "trace", "dataset_path": Path("/no/such/file")},
        {"dataset_name": "random", "trace": Path("x.csv")},
        {"random_range_ratio": 1.0},
    ],
)
def test_settings_that_contradict_each_other(settings):
    with pytest.raises(ConfigError):
        make(**settings)


def test_texts_have_as_many_tokens():
    tokenizer = byte_tokenizer()
    letters = tokenizer.encode("abcdefghij \N{EM DASH}", add_special_tokens=False)
    vocabulary = Vocabulary(np.array(letters))
    requests = make_requests(
        DatasetSettings(num_prompts=20, input_len=40),
        vocabulary=vocabulary,
        tokenizer=None,
        longest=None,
    )
    found = with_texts(requests, tokenizer=tokenizer, vocabulary=vocabulary, seed=0)
    for request in found:
        ids = tokenizer.encode(request.text, add_special_tokens=False)
        assert ids == request.prompt_token_ids
        assert len(tokenizer(request.text).input_ids) == 40


def test_special_tokens_are_not_drawn():
    tokenizer = byte_tokenizer()
    drawn = Vocabulary.of(tokenizer.vocab_size, tokenizer).token_ids
    assert not set(drawn.tolist()) & set(tokenizer.all_special_ids)
