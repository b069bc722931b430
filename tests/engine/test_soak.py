"""An engine under requests that come and go at random for thousands of steps."""

import pytest
import torch

from nanoflow_compiler.engine import lengths
from nanoflow_compiler.engine.llm import LLM
from soak import Soak
from tiny_models import BUILDERS
from watched_steps import Steps

# Inductor's advice on a reduction that it splits.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")

SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 96, "max_model_len": 256}
NUM_KV_BLOCKS = 14
"""For some four of the sixteen requests at their longest, so that requests are preempted."""


def on_gpu(*values):
    return pytest.param("cuda", *values, marks=pytest.mark.gpu)


@pytest.mark.parametrize(
    ("device", "name", "parts", "num_steps"),
    [
        ("cpu", "llama", None, 200),
        on_gpu("llama", 1, 6000),
        on_gpu("llama", 2, 2000),
        on_gpu("gpt_oss", 1, 2000),
    ],
)
def test_requests_come_and_go(device, name, parts, num_steps, monkeypatch):
    monkeypatch.setattr(lengths, "FIRST_GUESS", 1)  # too bold, so that the cache runs full
    settings = {"enforce_eager": True} if parts is None else {"options": {"parts": parts}}
    with LLM(BUILDERS[name]().to(device), num_kv_blocks=NUM_KV_BLOCKS, **settings, **SIZES) as llm:
        steps, soak = Steps(llm), Soak(llm, seed=1)
        soak.run(num_steps // 5)
        early = soak.drain()
        soak.run(num_steps - num_steps // 5)
        late = soak.drain()
        # Workspaces of libraries for sizes that are new are allowed; a leak of every step is more.
        assert late <= early + (1 << 20)
        check_counts(llm, soak, steps, is_captured=parts is not None)
        soak.check_again(llm)
        if device == "cuda":
            torch.cuda.synchronize()
        assert not steps.has_nan


def check_counts(llm, soak, steps, *, is_captured):
    """That it was a soak, and that nothing is left of it."""
    stats = llm._core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert not llm._processor._open
    assert not soak.params
    allocator = llm._core.batcher.allocator
    assert allocator.num_free == allocator.num_usable == NUM_KV_BLOCKS
    assert not allocator._num_users.any()
    assert stats.num_preemptions > soak.num_steps / 1000
    assert stats.num_cache_hits > soak.num_steps
    assert soak.num_cancelled > soak.num_steps / 400
    assert soak.num_ended > soak.num_steps / 20
    if is_captured:
        assert steps.num_replayed > soak.num_steps / 3
    else:
        assert not steps.num_replayed
