"""Parts of the range of depths, and how a round of :mod:`cut` narrows them."""

import triton
import triton.language as tl

from nanoflow_compiler.kernels.token_math import NOWHERE, scaled_depths, weights_at

__all__ = [
    "CANDIDATES",
    "PIVOTS",
    "SUMS",
    "after",
    "even_step",
    "first_step",
    "load_depths",
    "measure",
    "narrowed",
    "num_wanted",
    "start",
]

CANDIDATES = tl.constexpr(4096)
PIVOTS = tl.constexpr(16)
SUMS = 2 * 2 * 16
"""Of a row: for each of two rounds the counts, then the weights above its pivots."""
_HALF_OCTAVE = tl.constexpr(1 << 22)
# A thread adds up at most 2**11 - 1 tokens: a weight is at most 2**40, and the count lies above their sum.
_COUNT = tl.constexpr(52)
_ONE_TOKEN = tl.constexpr(1 << 52)
_WEIGHT = tl.constexpr((1 << 52) - 1)


@triton.jit
def first_step():
    return _HALF_OCTAVE


@triton.jit
def even_step(low, high):
    return (high - low + PIVOTS - 1) // PIVOTS


@triton.jit
def _joined(sums):
    """``[THREADS, PIVOTS]`` of 16 sums ``[THREADS]``."""
    a = tl.join(tl.join(sums[0], sums[8]), tl.join(sums[4], sums[12]))
    b = tl.join(tl.join(sums[2], sums[10]), tl.join(sums[6], sums[14]))
    c = tl.join(tl.join(sums[1], sums[9]), tl.join(sums[5], sums[13]))
    d = tl.join(tl.join(sums[3], sums[11]), tl.join(sums[7], sums[15]))
    whole = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(whole, [sums[0].shape[0], PIVOTS])


@triton.jit
def load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(row_ptr + tokens, mask=tokens < num_tokens, other=float("-inf"))
    logits = logits.to(tl.float32)
    _, depths = scaled_depths(logits, peak, temperature)
    return depths


@triton.jit
def measure(
    row_ptr,
    peaks_ptr,
    num_tokens,
    peak,
    temperature,
    has_weights,
    low,
    high,
    step,
    first_chunk,
    stride,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """How many tokens lie above each pivot, and their weights (0 unless ``has_weights``)."""
    sums = (tl.zeros([THREADS], tl.int64),) * 16
    for chunk in range(first_chunk, tl.cdiv(num_tokens, CHUNK), stride):
        _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
        if nearest < high:
            depths = load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK)
            terms = tl.full([CHUNK], _ONE_TOKEN, tl.int64)
            if has_weights:
                terms += weights_at(tl.minimum(depths, NOWHERE))
            # A thread holds what one load gave it, and its repetitions: nothing moves.
            depths = tl.reshape(depths, [CHUNK // (VECTOR * THREADS), THREADS, VECTOR])
            terms = tl.reshape(terms, [CHUNK // (VECTOR * THREADS), THREADS, VECTOR])
            for i in tl.static_range(PIVOTS):
                is_above = depths < tl.maximum(high - i * step, low)
                added = tl.sum(tl.sum(tl.where(is_above, terms, 0), 2), 0)
                sums = sums[:i] + (sums[i] + added,) + sums[i + 1 :]  # noqa: RUF005
    packed = _joined(sums)
    counts = tl.sum(packed >> _COUNT, 0)
    weights = tl.sum(packed & _WEIGHT, 0)
    return counts, weights


@triton.jit
def _at(values, place):
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == place, values, 0), 0)


@triton.jit
def narrowed(part, step, counts, weights, by_count, limit, target):
    """The part of ``(low, high, count above low, count above high, weight above low)`` with the cut."""
    low, high, count_low, _, weight_low = part
    pivots = tl.maximum(high - tl.arange(0, PIVOTS) * step, low)
    is_kept = tl.where(by_count, counts < limit, weights.to(tl.float64) < target)
    # The first pivot is the end of the part, which is not kept.
    num_beyond = tl.maximum(tl.sum((is_kept == 0).to(tl.int32), 0), 1)
    is_inside = num_beyond < PIVOTS
    return (
        tl.where(is_inside, _at(pivots, num_beyond), low),
        _at(pivots, num_beyond - 1),
        tl.where(is_inside, _at(counts, num_beyond), count_low),
        _at(counts, num_beyond - 1),
        tl.where(is_inside, _at(weights, num_beyond), weight_low),
    )


@triton.jit
def start(bound):
    """All that ``min_p`` leaves."""
    none = tl.zeros([], tl.int64)
    return (bound * 0, bound + 1, none, none, none)


@triton.jit
def num_wanted(part, by_count, top_p):
    """Tokens that settle a part: with both limits, all above it, because ``top_p`` cuts above it."""
    return part[3] - tl.where(by_count & (top_p < 1), 0, part[2])


@triton.jit
def after(sums_ptr, bound, limit, top_p, NUM_ROUNDS: tl.constexpr):
    """What rounds leave: the part, whether it is searched by count, and the weight to stay below."""
    places = tl.arange(0, PIVOTS)
    counts = tl.load(sums_ptr + places)
    weights = tl.load(sums_ptr + PIVOTS + places)
    by_count = _at(counts, 0) > limit
    target = top_p * _at(weights, 0).to(tl.float64)
    part = start(bound)
    part = narrowed(part, first_step(), counts, weights, by_count, limit, target)
    if NUM_ROUNDS == 2:  # noqa: SIM102
        if num_wanted(part, by_count, top_p) > CANDIDATES:
            counts = tl.load(sums_ptr + 2 * PIVOTS + places)
            weights = tl.load(sums_ptr + 3 * PIVOTS + places)
            step = even_step(part[0], part[1])
            part = narrowed(part, step, counts, weights, by_count, limit, target)
    return part, by_count, target
