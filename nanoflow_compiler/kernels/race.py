"""Draws a token of a row on a GPU, and says whether ``top_p`` keeps it.

The token that comes first of all is also the first of those that ``top_p`` keeps, if it is one of them.
So no search for the cut is needed: draw, and add up the weights of what is less deep than the winner.
Where they reach ``top_p`` of the whole, only tokens less deep than the winner can stay, and race again.
A draw is refused with a probability of 1 - ``top_p`` at most.
"""

import triton.language as tl

from nanoflow_compiler.kernels.cut_parts import load_depths
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.token_math import (
    NOWHERE,
    log_arrivals,
    scaled_depths,
    weights_at,
)

__all__ = ["depth_of", "first_best", "load_chunk", "race", "share_to_keep", "weigh"]

# A thread adds up at most 2**11 - 1 tokens: a weight is at most 2**40, and the count lies above their sum.
_COUNT = tl.constexpr(52)
_ONE_TOKEN = tl.constexpr(1 << 52)
_WEIGHT = tl.constexpr((1 << 52) - 1)
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@jit
def load_chunk(row_ptr, chunk, num_tokens, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(row_ptr + tokens, mask=tokens < num_tokens, other=float("-inf"))
    return tokens, logits.to(tl.float32)


@jit
def first_best(values, tokens):
    """The greatest value, and the first token that has it."""
    value = tl.max(values, 0)
    return value, tl.min(tl.where(values == value, tokens, _NO_TOKEN), 0)


@jit
def depth_of(row_ptr, token, peak, temperature):
    _, depth = scaled_depths(tl.load(row_ptr + token).to(tl.float32), peak, temperature)
    return depth


@jit
def race(
    row_ptr,
    peaks_ptr,
    num_tokens,
    num_chunks,
    peak,
    temperature,
    bound,
    key_low,
    key_high,
    first_chunk,
    stride,
    CHUNK: tl.constexpr,
):
    """The first of the tokens up to a depth in every ``stride``-th chunk; -inf where there is none."""
    low = key_low.to(tl.uint32, bitcast=True)
    high = key_high.to(tl.uint32, bitcast=True)
    best = tl.full([CHUNK], float("-inf"), tl.float32)
    winners = tl.zeros([CHUNK], tl.int32)
    for chunk in range(first_chunk, num_chunks, stride):
        _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
        if nearest <= bound:
            tokens, logits = load_chunk(row_ptr, chunk, num_tokens, CHUNK)
            scaled, depths = scaled_depths(logits, peak, temperature)
            values = scaled - log_arrivals(tokens, low, high)
            is_better = (depths <= bound) & (values > best)
            best = tl.where(is_better, values, best)
            winners = tl.where(is_better, tokens, winners)
    return first_best(best, winners)


@jit
def weigh(
    row_ptr,
    peaks_ptr,
    num_tokens,
    num_chunks,
    peak,
    temperature,
    bound,
    depth,
    first_chunk,
    stride,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Of the tokens up to a depth: the weight of those above ``depth``, that of all, and their number."""
    wholes = tl.zeros([THREADS], tl.int64)
    aboves = tl.zeros([THREADS], tl.int64)
    for chunk in range(first_chunk, num_chunks, stride):
        _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
        if nearest <= bound:
            depths = load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK)
            is_left = depths <= bound
            weights = weights_at(tl.where(is_left, depths, NOWHERE))
            terms = tl.where(is_left, weights + _ONE_TOKEN, 0)
            above = tl.where(depths < depth, weights, 0)
            # A thread holds what one load gave it, and its repetitions: nothing moves.
            terms = tl.reshape(terms, [CHUNK // (VECTOR * THREADS), THREADS, VECTOR])
            above = tl.reshape(above, [CHUNK // (VECTOR * THREADS), THREADS, VECTOR])
            wholes += tl.sum(tl.sum(terms, 2), 0)
            aboves += tl.sum(tl.sum(above, 2), 0)
    return tl.sum(aboves, 0), tl.sum(wholes & _WEIGHT, 0), tl.sum(wholes >> _COUNT, 0)


@jit
def share_to_keep(whole, count, limit, bound, top_p):
    """Tokens stay while what is above them weighs less. Of equal tokens some may be beyond the limit."""
    surplus = tl.maximum(count - limit, 0) * weights_at(bound)
    return top_p * (whole - surplus).to(tl.float64)
