"""What a request may ask for."""

import pytest

from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.errors import ConfigError


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 2}, "repeat the prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stop": ""}, "empty string"),
        ({"stop": ["a", ""]}, "empty string"),
    ],
)
def test_bad_values_are_refused_by_name(params, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**params)


def test_sequences_become_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert hash(params) == hash(SamplingParams(stop=["end"], stop_token_ids=(1, 2)))
    assert SamplingParams().stop_strings == ()
