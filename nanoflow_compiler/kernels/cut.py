"""Where ``top_k`` and ``top_p`` cut rows of logits: a search for a depth, exact and in any order.

A token at depth d stays if fewer than ``limit`` tokens are less deep and their weights add up to less
than ``top_p`` of the whole. Both are monotone in d, so the greatest such d is searched: a round counts
and adds up what lies above 16 *pivots*, and leaves the part between two of them. The first round sets its
pivots half an octave apart from the deepest on, the next ones divide what is left evenly. All sums are of
integers: neither the order of additions nor the number of thread blocks changes a result.

Two rounds and the gathering of what is left spread a row over thread blocks; each reads the sums of the
round before and finds the part anew, so that nothing waits. What is left, at most ``CANDIDATES`` tokens, is
then settled in registers. Rows of which more is left (equal logits, say) go on in one thread block.
"""

import triton
import triton.language as tl

from nanoflow_compiler.kernels.cut_parts import (
    CANDIDATES,
    PIVOTS,
    after,
    even_step,
    first_step,
    load_depths,
    measure,
    narrowed,
    num_wanted,
    start,
)
from nanoflow_compiler.kernels.pdl import take_turn
from nanoflow_compiler.kernels.token_math import (
    NOWHERE,
    farthest_depth,
    is_cut,
    row_peak,
    scaled_depths,
    weights_at,
)

__all__ = ["gather", "narrow", "settle"]


@triton.jit
def narrow(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    least_ptr,
    limit_ptr,
    top_p_ptr,
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
    """Add what a round finds to ``sums_ptr``; the second does nothing where the first left little."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if is_cut(temperature, limit, top_p, num_tokens):
        sums_ptr += row * SIZE
        peaks_ptr += row * num_chunks
        bound = farthest_depth(tl.load(least_ptr + row))
        is_needed = bound >= 0
        if ROUND == 0:
            low = bound * 0
            high = bound + 1
            step = bound * 0 + first_step()
        else:
            part, by_count, _target = after(sums_ptr, bound, limit, top_p, NUM_ROUNDS=1)
            is_needed = (by_count | (top_p < 1)) & (num_wanted(part, by_count, top_p) > CANDIDATES)
            low = part[0]
            high = part[1]
            step = even_step(low, high)
        if is_needed:
            counts, weights = measure(
                logits_ptr + row.to(tl.int64) * row_stride,
                peaks_ptr,
                num_tokens,
                row_peak(peaks_ptr, num_chunks, CHUNKS),
                temperature,
                top_p < 1,
                low,
                high,
                step,
                tl.program_id(1),
                tl.num_programs(1),
                CHUNK,
                THREADS,
                VECTOR,
            )
            places = sums_ptr + 2 * PIVOTS * ROUND + tl.arange(0, PIVOTS)
            tl.atomic_add(places, counts, sem="relaxed")
            tl.atomic_add(places + PIVOTS, weights, sem="relaxed")


@triton.jit
def gather(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    least_ptr,
    limit_ptr,
    top_p_ptr,
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
    """Write the depths of the tokens that are left, if they are few, in any order."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if is_cut(temperature, limit, top_p, num_tokens):
        bound = farthest_depth(tl.load(least_ptr + row))
        sums_ptr += row * SIZE
        part, by_count, _target = after(sums_ptr, bound, limit, top_p, NUM_ROUNDS=2)
        is_both = by_count & (top_p < 1)
        low = tl.where(is_both, 0, part[0])
        high = part[1]
        is_open = by_count | (top_p < 1)
        if is_open & (num_wanted(part, by_count, top_p) <= CANDIDATES):
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            peaks_ptr += row * num_chunks
            peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
            candidates_ptr += row * CANDIDATES
            counters = numbers_ptr + row + tl.zeros([CHUNK], tl.int32)
            for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
                _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
                if nearest < high:
                    depths = load_depths(row_ptr, chunk, num_tokens, peak, temperature, CHUNK)
                    is_left = (depths >= low) & (depths < high)
                    places = tl.atomic_add(counters, 1, mask=is_left, sem="relaxed")
                    tl.store(candidates_ptr + places, depths, mask=is_left)


@triton.jit
def _settled_by_count(depths, part, count_before, limit):
    """The part of one depth, of which the counts are known."""
    low, high, count_low, count_high, weight_low = part
    while high - low > 1:
        middle = low + (high - low) // 2
        count = count_before + tl.sum((depths < middle).to(tl.int32), 0)
        is_kept = count < limit
        low = tl.where(is_kept, middle, low)
        high = tl.where(is_kept, high, middle)
        count_low = tl.where(is_kept, count, count_low)
        count_high = tl.where(is_kept, count_high, count)
    return (low, high, count_low, count_high, weight_low)


@triton.jit
def _settled_by_weight(depths, weights, low, high, weight_before, target):
    """The deepest that is kept."""
    while high - low > 1:
        middle = low + (high - low) // 2
        weight = weight_before + tl.sum(tl.where(depths < middle, weights, 0), 0)
        is_kept = weight.to(tl.float64) < target
        low = tl.where(is_kept, middle, low)
        high = tl.where(is_kept, high, middle)
    return low


@triton.jit
def _whole_weight(part, limit):
    """Of the first ``limit`` tokens, for a part of one depth; of equal tokens some may not count."""
    low, _, count_low, count_high, weight_low = part
    return weight_low + weights_at(low) * (tl.minimum(limit, count_high) - count_low)


@triton.jit
def _settle_few(candidates_ptr, part, by_count, limit, top_p, target):
    """The cut of a row of which the candidates were gathered."""
    low, high, count_low, count_high, weight_low = part
    is_both = by_count & (top_p < 1)
    places = tl.arange(0, CANDIDATES)
    number = num_wanted(part, by_count, top_p)
    depths = tl.load(candidates_ptr + places, mask=places < number, other=NOWHERE)
    weights = tl.zeros([CANDIDATES], tl.int64)
    if top_p < 1:
        weights = weights_at(depths)
    if by_count:
        count_before = tl.where(is_both, 0, count_low)
        part = _settled_by_count(depths, part, count_before, limit)
        low, high, count_low, count_high, weight_low = part
        if is_both:
            weight_low = tl.sum(tl.where(depths < low, weights, 0), 0)
            part = (low, high, count_low, count_high, weight_low)
            target = top_p * _whole_weight(part, limit).to(tl.float64)
            low = low * 0
            weight_low = weight_low * 0
    if top_p < 1:
        low = _settled_by_weight(depths, weights, low, high, weight_low, target)
    return low


@triton.jit
def _search(
    row_ptr,
    peaks_ptr,
    num_tokens,
    peak,
    temperature,
    part,
    by_count,
    limit,
    top_p,
    target,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The part of one depth with the cut, by rounds over the whole row."""
    low, high, count_low, count_high, weight_low = part
    while high - low > 1:
        step = even_step(low, high)
        counts, weights = measure(
            row_ptr,
            peaks_ptr,
            num_tokens,
            peak,
            temperature,
            top_p < 1,
            low,
            high,
            step,
            0,
            1,
            CHUNK,
            THREADS,
            VECTOR,
        )
        part = (low, high, count_low, count_high, weight_low)
        part = narrowed(part, step, counts, weights, by_count, limit, target)
        low, high, count_low, count_high, weight_low = part
    return (low, high, count_low, count_high, weight_low)


@triton.jit
def settle(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    least_ptr,
    limit_ptr,
    top_p_ptr,
    peaks_ptr,
    num_chunks,
    sums_ptr,
    candidates_ptr,
    bounds_ptr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the greatest depth that each row keeps."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    bound = farthest_depth(tl.load(least_ptr + row))
    if is_cut(temperature, limit, top_p, num_tokens):
        part, by_count, target = after(sums_ptr + row * SIZE, bound, limit, top_p, NUM_ROUNDS=2)
        if by_count | (top_p < 1):
            if num_wanted(part, by_count, top_p) <= CANDIDATES:
                few_ptr = candidates_ptr + row * CANDIDATES
                bound = _settle_few(few_ptr, part, by_count, limit, top_p, target)
            else:
                row_ptr = logits_ptr + row.to(tl.int64) * row_stride
                peaks_ptr += row * num_chunks
                peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
                # The second turn is for the weights above the cut of the first.
                is_open = by_count | (top_p < 1)
                while is_open:
                    part = _search(
                        row_ptr,
                        peaks_ptr,
                        num_tokens,
                        peak,
                        temperature,
                        part,
                        by_count,
                        limit,
                        top_p,
                        target,
                        CHUNK,
                        THREADS,
                        VECTOR,
                    )
                    bound = part[0]
                    is_open = by_count & (top_p < 1)
                    target = top_p * _whole_weight(part, limit).to(tl.float64)
                    by_count = by_count & (limit < 0)
                    part = start(bound)
    tl.store(bounds_ptr + row, bound)
