"""Parts of the range of depths, and how a round of :mod:`cut` narrows them."""

import triton.language as tl

from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.token_math import scaled_depths

__all__ = [
    "CANDIDATES",
    "SUMS",
    "even_step",
    "first_step",
    "load_depths",
    "measure",
    "narrowed",
    "num_inside",
    "opening",
    "store_counts",
]

CANDIDATES = tl.constexpr(4096)
PIVOTS = tl.constexpr(16)
SUMS = 2 * 16
"""Of a row: for each of two rounds the number of tokens above its pivots."""
_HALF_OCTAVE = tl.constexpr(1 << 22)


@jit
def first_step():
    return _HALF_OCTAVE


@jit
def even_step(low, high):
    return (high - low + PIVOTS - 1) // PIVOTS


@jit
def _joined(sums):
    """``[THREADS, PIVOTS]`` of 16 sums ``[THREADS]``."""
    a = tl.join(tl.join(sums[0], sums[8]), tl.join(sums[4], sums[12]))
    b = tl.join(tl.join(sums[2], sums[10]), tl.join(sums[6], sums[14]))
    c = tl.join(tl.join(sums[1], sums[9]), tl.join(sums[5], sums[13]))
    d = tl.join(tl.join(sums[3], sums[11]), tl.join(sums[7], sums[15]))
    whole = tl.join(tl.join(a, b), tl.join(c, d))
    return tl.reshape(whole, [sums[0].shape[0], PIVOTS])


@jit
def load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(row_ptr + tokens, mask=tokens < num_tokens, other=float("-inf"))
    _, depths = scaled_depths(logits.to(tl.float32), peak, temperature)
    return depths


@jit
def measure(
    row_ptr,
    peaks_ptr,
    num_tokens,
    peak,
    temperature,
    low,
    high,
    step,
    first_chunk,
    stride,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """How many tokens of every ``stride``-th chunk lie above each pivot, ``[PIVOTS]``."""
    sums = (tl.zeros([THREADS], tl.int32),) * 16
    for chunk in range(first_chunk, tl.cdiv(num_tokens, CHUNK), stride):
        _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
        if nearest < high:
            depths = load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK)
            # A thread holds what one load gave it, and its repetitions: nothing moves.
            depths = tl.reshape(depths, [CHUNK // (VECTOR * THREADS), THREADS, VECTOR])
            for i in tl.static_range(PIVOTS):
                is_above = depths < tl.maximum(high - i * step, low)
                added = tl.sum(tl.sum(is_above.to(tl.int32), 2), 0)
                sums = sums[:i] + (sums[i] + added,) + sums[i + 1 :]  # noqa: RUF005
    return tl.sum(_joined(sums), 0)


@jit
def store_counts(sums_ptr, counts, ROUND: tl.constexpr):
    """Add what a thread block counted to what the others of a row did."""
    tl.atomic_add(sums_ptr + PIVOTS * ROUND + tl.arange(0, PIVOTS), counts, sem="relaxed")


@jit
def _at(values, place):
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == place, values, 0), 0)


@jit
def narrowed(part, step, counts, limit):
    """The part of ``(low, high, count above low, count above high)`` with the cut."""
    low, high, count_low, _ = part
    pivots = tl.maximum(high - tl.arange(0, PIVOTS) * step, low)
    # The first pivot is the end of the part, which is not kept.
    num_beyond = tl.maximum(tl.sum((counts >= limit).to(tl.int32), 0), 1)
    is_inside = num_beyond < PIVOTS
    return (
        tl.where(is_inside, _at(pivots, num_beyond), low),
        _at(pivots, num_beyond - 1),
        tl.where(is_inside, _at(counts, num_beyond), count_low),
        _at(counts, num_beyond - 1),
    )


@jit
def _start(bound):
    """All that ``min_p`` leaves; how much that is is not known."""
    none = bound * 0
    return (none, bound + 1, none, none)


@jit
def num_inside(part):
    return part[3] - part[2]


@jit
def _after(sums_ptr, bound, limit, NUM_ROUNDS: tl.constexpr):
    """The part that rounds leave, and whether there is more than the limit."""
    places = tl.arange(0, PIVOTS)
    counts = tl.load(sums_ptr + places)
    is_open = _at(counts, 0) > limit
    part = narrowed(_start(bound), first_step(), counts, limit)
    if NUM_ROUNDS == 2:  # noqa: SIM102
        if num_inside(part) > CANDIDATES:
            counts = tl.load(sums_ptr + PIVOTS + places)
            part = narrowed(part, even_step(part[0], part[1]), counts, limit)
    return part, is_open


@jit
def _limited_by_peaks(bound, limit, peaks_ptr, num_chunks, peak, temperature, CHUNKS: tl.constexpr):
    """A depth beyond which no token stays, because ``limit`` chunks have one that is not as deep."""
    chunks = tl.arange(0, CHUNKS)
    peaks = tl.load(peaks_ptr + chunks, mask=chunks < num_chunks, other=float("-inf"))
    peaks = tl.where(peaks == peaks, peaks, float("-inf"))  # noqa: PLR0124 - NaN is not
    ranks = tl.sum((peaks[None, :] > peaks[:, None]).to(tl.int32), 1)
    last = tl.min(tl.where(ranks < limit, peaks, float("inf")), 0)
    _, depth = scaled_depths(last, peak, temperature)
    return tl.minimum(bound, depth)


@jit
def opening(
    sums_ptr,
    bound,
    limit,
    peaks_ptr,
    num_chunks,
    peak,
    temperature,
    NUM_ROUNDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The part with the cut of a row, whether there is one, and whether its size is known.

    A limit below the number of chunks needs no rounds.
    """
    is_counted = limit > num_chunks
    if is_counted:
        part, is_open = _after(sums_ptr, bound, limit, NUM_ROUNDS)
    else:
        part = _start(
            _limited_by_peaks(bound, limit, peaks_ptr, num_chunks, peak, temperature, CHUNKS)
        )
        is_open = limit > 0
    return part, is_open, is_counted
