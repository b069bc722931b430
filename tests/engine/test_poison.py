"""What a KV cache holds before a request writes to it changes nothing."""

import pytest
import torch

from mixed_requests import answers, check_same, make_requests
from nanoflow_compiler.engine.llm import LLM
from tiny_models import BUILDERS

# Inductor's advice on a reduction that it splits.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")

SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 96, "max_model_len": 256}
GPU_NAMES = ("llama", "gemma2", "gpt_oss", "mixtral")


def poison(llm, value):
    """All of the cache, the scratch block too, and nothing is found in it any more."""
    core = llm._core
    core.batcher.allocator.forget_names()
    for pool in (*core.runner.cache.keys, *core.runner.cache.values):
        pool.fill_(value)


@pytest.mark.parametrize(
    ("device", "name", "settings", "value"),
    [
        # The zeros that a CPU masks with are multiplied: there the cache must hold numbers.
        ("cpu", "llama", {"enforce_eager": True}, 1e4),
        *[
            pytest.param("cuda", name, settings, torch.nan, marks=pytest.mark.gpu)
            for name in GPU_NAMES
            for settings in ({"enforce_eager": True}, {}, {"options": {"parts": 2}})
        ],
    ],
)
def test_a_poisoned_cache(device, name, settings, value):
    requests = make_requests(22, seed=21)
    with LLM(BUILDERS[name]().to(device), **settings, **SIZES) as llm:
        expected = answers(llm, requests)
        assert not expected[1].isnan().any()
        poison(llm, value)
        check_same(answers(llm, requests), expected)
        # Blocks that are used again are full of what others stored, and of poison behind it.
        poison(llm, value)
        answers(llm, make_requests(7, seed=22))
        check_same(answers(llm, requests), expected)
