"""Noise by counter: as random as it must look, the same anywhere, and never infinite."""

import numpy as np
import torch

from nanoflow_compiler.engine.noise import log_arrivals, row_keys
from sampling_rows import reference_noise, row


def arrivals(seeds, counters, *, num_tokens):
    keys = row_keys(np.array(seeds, dtype=np.uint64), np.array(counters, dtype=np.uint64))
    low, high = (torch.from_numpy(half)[:, None] for half in keys)
    return log_arrivals(low, high, num_tokens=num_tokens)


def test_it_is_the_hash_that_it_is_defined_as():
    seeds, counters = [0, 1, 2**64 - 1], [0, 7, 2]
    found = arrivals(seeds, counters, num_tokens=300)
    for values, seed, counter in zip(found, seeds, counters, strict=True):
        expected = reference_noise(row(seed=seed, output=[0] * counter), 300)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5)


def test_times_are_exponential_and_independent():
    times = arrivals(range(200), [3] * 200, num_tokens=1000).double().exp()
    assert torch.isfinite(times).all()
    assert times.min() > 0
    shares = torch.histc(1 - (-times).exp(), bins=20, min=0, max=1) / times.numel()
    assert (shares * 20 - 1).abs().max() < 0.05
    uniform = 1 - (-times).exp()
    for one, other in (
        (uniform[:, :-1], uniform[:, 1:]),
        (uniform[:-1], uniform[1:]),
        (uniform[:, :-16], uniform[:, 16:]),
    ):
        correlation = np.corrcoef(one.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 0.012  # 5 standard deviations of 200,000 pairs


def test_the_extremes_are_finite(monkeypatch):
    """All bits 0 and all bits 1, wherever the hash leads there."""
    for bits in (0, -1):
        monkeypatch.setattr(torch, "arange", lambda n, bits=bits, **_: Bits(n, bits))
        values = log_arrivals(torch.zeros(1, 1), torch.zeros(1, 1), num_tokens=3)
        monkeypatch.undo()
        assert torch.isfinite(values).all()


class Bits:
    """Stays what it is, whatever the hash does, until it becomes numbers."""

    def __init__(self, num, bits):
        self.num, self.bits = num, bits

    def same(self, *_):
        return self

    __mul__ = __imul__ = __xor__ = __ixor__ = __rshift__ = __iadd__ = same

    def bitwise_and_(self, mask):
        if mask == 0x7FFFFFFF:
            return torch.full((self.num,), self.bits & mask, dtype=torch.int32)
        return self
