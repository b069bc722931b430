"""What a request may ask for."""

import pytest

from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.structured import StructuredOutputsParams
from nanoflow_compiler.errors import ConfigError, RequestError

NAN = float("nan")
ANY_JSON = StructuredOutputsParams(json_object=True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 0}, "n must be 1 to 128, not 0"),
        ({"n": 129}, "n must be 1 to 128"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": NAN}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["a", ""]}, "empty string"),
        ({"presence_penalty": 2.1}, "presence_penalty must be from -2 to 2"),
        ({"presence_penalty": NAN}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"logit_bias": {5: 100.5}}, "logit_bias of token 5"),
        ({"logit_bias": {5: NAN}}, "logit_bias of token 5"),
        ({"logit_bias": {-1: 0.0}}, "-1 is no token id"),
        ({"logit_bias": {"7": 0.0}}, "'7' is no token id"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [3, -1]}, r"holds \[-1\]"),
        ({"allowed_token_ids": ["3"]}, r"holds \['3'\]"),
        ({"logprobs": -1}, "logprobs must be 0 to 20"),
        ({"logprobs": 21}, "logprobs must be 0 to 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be 0 to 20"),
        ({"min_tokens": 1, "structured_outputs": ANY_JSON}, "exclude each other"),
    ],
)
def test_bad_values_are_refused_by_name(params, message):
    with pytest.raises(ConfigError, match=message) as caught:
        SamplingParams(**params)
    assert "\n" not in str(caught.value)


def test_the_ends_of_every_range_are_good():
    SamplingParams(n=128, presence_penalty=2, frequency_penalty=-2, repetition_penalty=0.01)
    SamplingParams(logit_bias={0: -100, 1: 100}, logprobs=20, prompt_logprobs=0)
    SamplingParams(logprobs=0, prompt_logprobs=20, top_k=-1, top_p=1, min_p=1)


def test_sequences_become_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(allowed_token_ids=[2, 1, 2]).allowed_token_ids == (2, 1)
    assert hash(params) == hash(SamplingParams(stop=["end"], stop_token_ids=(1, 2)))
    assert SamplingParams().stop_strings == ()


def test_a_bias_is_the_requests_own():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0}
    assert params != SamplingParams()
    assert hash(params) == hash(SamplingParams(logit_bias={3: 1.0}))
    assert SamplingParams(logit_bias={}) == SamplingParams()


def test_a_bias_names_tokens_of_the_model():
    params = SamplingParams(logit_bias={3: 1.0, 9: 1.0})
    params.check_vocabulary(10)
    with pytest.raises(RequestError, match="token 9, but the model's tokens are 0 to 8"):
        params.check_vocabulary(9)


def test_penalties_are_any_of_three():
    assert not SamplingParams().has_penalties
    assert SamplingParams(presence_penalty=-0.1).has_penalties
    assert SamplingParams(frequency_penalty=0.1).has_penalties
    assert SamplingParams(repetition_penalty=0.9).has_penalties


def test_params_cross_a_process_border():
    msgspec = pytest.importorskip("msgspec")
    params = SamplingParams(
        stop=["a"], logit_bias={3: 1.5}, structured_outputs=StructuredOutputsParams(json={})
    )
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params
