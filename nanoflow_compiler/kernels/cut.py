"""Where ``top_k`` cuts rows of logits: a search for a depth, exact and in any order.

A token at depth d stays if fewer than ``limit`` tokens are less deep. That is monotone in d, so the
greatest such d is searched. Where the limit is below the number of chunks, the greatest logits of the
chunks say how deep it lies at most, and few tokens are left. Elsewhere a round counts what lies above 16
*pivots*, and leaves the part between two of them. The first round sets its pivots half an octave apart from
the deepest on, the next ones divide what is left evenly. Sums are of integers: neither the order of
additions nor the number of thread blocks changes a result.

Two rounds and the gathering of what is left spread a row over thread blocks; each reads the sums of the
round before and finds the part anew, so that nothing waits. What is left, at most ``CANDIDATES`` tokens, is
then settled in registers. Rows of which more is left (equal logits, say) go on in one thread block.
"""

import triton.language as tl

from nanoflow_compiler.kernels.cut_parts import (
    CANDIDATES,
    even_step,
    first_step,
    load_depths,
    measure,
    narrowed,
    num_inside,
    opening,
    store_counts,
)
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pdl import take_turn
from nanoflow_compiler.kernels.token_math import (
    NOWHERE,
    farthest_depth,
    is_limited,
    row_peak,
    scaled_depths,
)

__all__ = ["gather", "narrow", "settle"]


@jit
def narrow(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    least_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    sums_ptr,
    ROUND: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add what a round counts to ``sums_ptr``; the second does nothing where the first left little."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    if is_limited(temperature, limit, num_tokens) & (limit > num_chunks):
        sums_ptr += row * SIZE
        peaks_ptr += row * num_chunks
        peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
        bound = farthest_depth(tl.load(least_ptr + row))
        is_needed = bound >= 0
        if ROUND == 0:
            low = bound * 0
            high = bound + 1
            step = bound * 0 + first_step()
        else:
            part, is_open, _is_counted = opening(
                sums_ptr, bound, limit, peaks_ptr, num_chunks, peak, temperature, 1, CHUNKS
            )
            is_needed = is_open & (num_inside(part) > CANDIDATES)
            low = part[0]
            high = part[1]
            step = even_step(low, high)
        if is_needed:
            counts = measure(
                logits_ptr + row.to(tl.int64) * row_stride,
                peaks_ptr,
                num_tokens,
                peak,
                temperature,
                low,
                high,
                step,
                tl.program_id(1),
                tl.num_programs(1),
                CHUNK,
                THREADS,
                VECTOR,
            )
            store_counts(sums_ptr, counts, ROUND)


@jit
def gather(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    least_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    sums_ptr,
    numbers_ptr,
    candidates_ptr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the depths of the tokens that are left in any order, and how many there are."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    if is_limited(temperature, limit, num_tokens):
        peaks_ptr += row * num_chunks
        peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
        bound = farthest_depth(tl.load(least_ptr + row))
        sums_ptr += row * SIZE
        part, is_open, _is_counted = opening(
            sums_ptr, bound, limit, peaks_ptr, num_chunks, peak, temperature, 2, CHUNKS
        )
        low = part[0]
        high = part[1]
        if is_open & (num_inside(part) <= CANDIDATES):
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            candidates_ptr += row * CANDIDATES
            counters = numbers_ptr + row + tl.zeros([CHUNK], tl.int32)
            for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
                _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
                if nearest < high:
                    depths = load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK)
                    is_left = (depths >= low) & (depths < high)
                    places = tl.atomic_add(counters, 1, mask=is_left, sem="relaxed")
                    is_left &= places < CANDIDATES
                    tl.store(candidates_ptr + places, depths, mask=is_left)


@jit
def _settle_few(candidates_ptr, number, part, limit):
    """The cut of a part of which the tokens were gathered."""
    low, high, count_before, _ = part
    places = tl.arange(0, CANDIDATES)
    depths = tl.load(candidates_ptr + places, mask=places < number, other=NOWHERE)
    while high - low > 1:
        middle = low + (high - low) // 2
        is_kept = count_before + tl.sum((depths < middle).to(tl.int32), 0) < limit
        low = tl.where(is_kept, middle, low)
        high = tl.where(is_kept, high, middle)
    return low


@jit
def _search(
    row_ptr,
    peaks_ptr,
    num_tokens,
    peak,
    temperature,
    part,
    limit,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The cut, by rounds over the whole row."""
    low, high, count_low, count_high = part
    while high - low > 1:
        step = even_step(low, high)
        counts = measure(
            row_ptr,
            peaks_ptr,
            num_tokens,
            peak,
            temperature,
            low,
            high,
            step,
            0,
            1,
            CHUNK,
            THREADS,
            VECTOR,
        )
        part = narrowed((low, high, count_low, count_high), step, counts, limit)
        low, high, count_low, count_high = part
    return low


@jit
def settle(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    least_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    sums_ptr,
    numbers_ptr,
    candidates_ptr,
    bounds_ptr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the greatest depth that ``min_p`` and ``top_k`` keep of each row."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    bound = farthest_depth(tl.load(least_ptr + row))
    if is_limited(temperature, limit, num_tokens):
        peaks_ptr += row * num_chunks
        peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
        sums_ptr += row * SIZE
        part, is_open, is_counted = opening(
            sums_ptr, bound, limit, peaks_ptr, num_chunks, peak, temperature, 2, CHUNKS
        )
        if is_open:
            number = tl.where(is_counted, num_inside(part), tl.load(numbers_ptr + row))
            if number <= CANDIDATES:
                bound = _settle_few(candidates_ptr + row * CANDIDATES, number, part, limit)
            else:
                bound = _search(
                    logits_ptr + row.to(tl.int64) * row_stride,
                    peaks_ptr,
                    num_tokens,
                    peak,
                    temperature,
                    part,
                    limit,
                    CHUNK,
                    THREADS,
                    VECTOR,
                )
    tl.store(bounds_ptr + row, bound)
