"""What a step found: on a CPU it is there at once."""

import pytest
import torch

from nanoflow_compiler.engine.logprobs import TopLogprobs
from nanoflow_compiler.engine.sampled import Sampled


def make_sampled(device="cpu"):
    def found():
        return TopLogprobs(
            token_ids=torch.arange(6, device=device).view(2, 3),
            logprobs=torch.rand(2, 3, device=device),
            ranks=torch.ones(2, dtype=torch.int64, device=device),
        )

    return Sampled(torch.tensor([4, 5], device=device), found(), prompt_logprobs=found())


def test_nothing_is_sent_on_a_cpu():
    sampled = make_sampled()
    assert sampled.sent() is sampled
    assert sampled.received() is sampled


@pytest.mark.gpu
def test_what_is_sent_does_not_change_with_what_comes_later():
    sampled = make_sampled("cuda")
    expected = sampled.logprobs.logprobs.cpu()
    sent = sampled.sent()
    sampled.tokens.zero_()
    sampled.logprobs.logprobs.zero_()
    received = sent.received()
    assert received.tokens.tolist() == [4, 5]
    torch.testing.assert_close(received.logprobs.logprobs, expected, rtol=0, atol=0)
    assert received.prompt_logprobs.ranks.tolist() == [1, 1]


@pytest.mark.gpu
def test_what_nobody_asked_for_is_not_sent():
    received = Sampled(torch.tensor([4], device="cuda"), None).sent().received()
    assert received.logprobs is None
    assert received.prompt_logprobs is None
