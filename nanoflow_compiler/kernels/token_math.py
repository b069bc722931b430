"""Arithmetic of drawing tokens, as :mod:`nanoflow_compiler.engine.draw` does it, for Triton kernels.

A scaled logit is (logit - greatest) / temperature, with both operations rounded as IEEE 754 has it: the
same bits as on a CPU. It is never above zero, so the bits of its magnitude, read as an integer, order
tokens: this is a token's *depth*, 0 for the most likely one.
"""

import triton.language as tl

from nanoflow_compiler.kernels.jit import jit

__all__ = [
    "FARTHEST",
    "NOWHERE",
    "farthest_depth",
    "is_limited",
    "log_arrivals",
    "row_peak",
    "scaled_depths",
    "weights_at",
]

FARTHEST = tl.constexpr(0x41DE0000)
"""The depth of 27.75. Deeper tokens weigh less than one unit, exp(-27.73) = 2**-40, and lose every race:
the noise of :mod:`nanoflow_compiler.engine.noise` lies between -2.8 and 22.2."""
NOWHERE = tl.constexpr(0x7F800000)
"""The depth of a token that is masked; that of NaN is greater still."""


@jit
def is_limited(temperature, limit, num_tokens):
    """Whether a row is drawn and ``top_k`` may take something from it."""
    return (temperature > 0) & (limit > 1) & (limit < num_tokens)


@jit
def farthest_depth(least):
    """The depth up to which ``min_p`` keeps tokens that may win."""
    return tl.minimum(least.to(tl.int32, bitcast=True) & 0x7FFFFFFF, FARTHEST)


@jit
def row_peak(peaks_ptr, num_chunks, CHUNKS: tl.constexpr):
    """The greatest logit of a row, from those of its chunks."""
    chunks = tl.arange(0, CHUNKS)
    peaks = tl.load(peaks_ptr + chunks, mask=chunks < num_chunks, other=float("-inf"))
    return tl.max(peaks, 0)


@jit
def scaled_depths(logits, peak, temperature):
    """Scaled logits, and their depths; what is no number lies deeper than all numbers."""
    scaled = tl.math.div_rn(logits - peak, temperature)
    return scaled, scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def weights_at(depths):
    """Integers, so that their sums are exact in any order; 2**40 at depth 0."""
    scaled = -depths.to(tl.float32, bitcast=True)
    return (tl.exp(scaled) * 1099511627776.0).to(tl.int64)


@jit
def log_arrivals(tokens, low, high):
    """Logarithms of exponentially distributed times, from the same bits as ``engine.noise`` has."""
    x = (tokens.to(tl.uint32) * 0x9E3779B1) ^ low
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) + high
    x = x * 0xC2B2AE35
    x = x ^ (x >> 16)
    bits = (x & 0x7FFFFFFF).to(tl.int32)
    # 1 - 2**-23, over 2**31.
    uniform = (bits.to(tl.float32) + 0.5) * 4.6566123179658803e-10
    # log1p(-u) = log(w) u / (1 - w) with w = 1 - u rounded: the error of w cancels (Kahan).
    rest = 1.0 - uniform
    quotient = uniform / tl.where(rest < 1, 1.0 - rest, 1.0)
    times = tl.where(rest < 1, -tl.log(rest) * quotient, uniform)
    return tl.log(times)
