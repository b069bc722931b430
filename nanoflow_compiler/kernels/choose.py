"""Chooses the tokens of all rows of a step on a GPU: what ``engine.draw`` computes, in a few passes.

Nothing depends on settings but branches inside the kernels: the same launches, with the same memory,
serve greedy rows, drawn rows and any mixture, so that a captured graph may be replayed with others. A row
is divided into chunks, and spread over as many thread blocks as its neighbours leave idle. All that these
blocks put together are maxima and sums of integers, so that their number changes nothing.

1. *scan* reads the logits once (525 MB for 1024 rows of 128,256 in float32: 0.12 to 0.16 ms) and keeps the greatest
   logit of each chunk. Whatever follows leaves out chunks that lie too deep below a row's greatest logit.
2. *narrow* twice, *gather* and *settle* find where ``top_k`` cuts (:mod:`cut`). Other rows pass by.
3. *draw* lets the tokens race that are left: about 75 instructions for each token of the chunks with a token
   that may win. It reads the logits again, because a row's chunks must know the greatest logit to be compared
   as the reference compares them, and because most rows are larger than what the caches would hold of all.
4. *check* adds up, for rows with ``top_p``, what is more likely than the winner (:mod:`race`).
5. *finish* picks among the blocks' winners, races again where ``top_p`` does not keep them, or looks for the
   greatest logit in the first chunk that has it.

Of equal logits a greedy row takes the first, and so does a race. Logits that are no number are never
chosen; a row of nothing else yields a token of the vocabulary.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.engine.draw import Draw
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.kernels.cut import gather, narrow, settle
from nanoflow_compiler.kernels.cut_parts import CANDIDATES, SUMS
from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kernels.pdl import launch, take_turn
from nanoflow_compiler.kernels.race import (
    depth_of,
    first_best,
    load_chunk,
    race,
    share_to_keep,
    weigh,
)
from nanoflow_compiler.kernels.token_math import row_peak

__all__ = ["choose_tokens"]

_CHUNK = 2048
_NUM_WARPS = 4
_MOST_SPLITS = 64
_LEAST_SPLITS = 4
"""So few that a thread never adds up more weights than fit; see :mod:`race`."""
_MOST_TOKENS = 255 * _CHUNK
"""A thread of the last kernel adds up 8 tokens of each chunk, and 2047 fit; see :mod:`race`."""
_BLOCKS_WANTED = 4096
"""Thread blocks that keep a GPU busy to the end."""


def choose_tokens(logits: Tensor, settings: Draw, *, pdl: bool = False) -> Tensor:
    """A token for each row of ``logits [S, V]`` (any floats); ``settings`` are columns of all ``S`` rows.

    A temperature of 0 and a limit of 1 are greedy. Nothing is read from the device. With ``pdl`` the kernels
    begin as :mod:`pdl` says.
    """
    num_rows, num_tokens = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    if num_tokens > _MOST_TOKENS:
        raise UnsupportedGraphError(
            f"a vocabulary has at most {_MOST_TOKENS} tokens on a GPU, not {num_tokens}"
        )
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_chunks = triton.cdiv(num_tokens, _CHUNK)
    shape: dict[str, Any] = {"CHUNK": _CHUNK, "CHUNKS": triton.next_power_of_2(num_chunks)}
    scratch = _Scratch(num_rows, num_chunks, logits.device)
    grid = (num_rows, _num_splits(num_rows))
    row = (logits, logits.stride(0), num_tokens)
    limits = (settings.temperature, settings.least, settings.limit)
    chunks = (scratch.peaks, num_chunks)
    is_even = num_tokens % 16 == logits.stride(0) % 16 == logits.data_ptr() % 16 == 0
    vector = 16 // logits.itemsize if is_even else 1
    of_threads = {"VECTOR": vector, "THREADS": 32 * _NUM_WARPS, "num_warps": _NUM_WARPS}
    of_one_block = {"VECTOR": vector, "THREADS": 256, "num_warps": 8}
    zeros = (scratch.sums, scratch.numbers, scratch.weights)
    begin = partial(launch, pdl=pdl)
    # It may follow several lanes; then it must not begin before all of them have ended.
    launch(_scan, grid, pdl=False)(*row, *chunks, *zeros, SIZE=SUMS, CHUNK=_CHUNK)
    cut = (*row, *limits, *chunks, scratch.sums)
    for turn in range(2):
        begin(narrow, grid)(*cut, ROUND=turn, SIZE=SUMS, **shape, **of_threads)
    left = (*cut, scratch.numbers, scratch.candidates)
    begin(gather, grid)(*left, SIZE=SUMS, **shape)
    begin(settle, grid[:1])(*left, scratch.bounds, SIZE=SUMS, **shape, **of_one_block)
    keys = (settings.key_low, settings.key_high)
    drawn = (*row, settings.temperature, settings.limit, *chunks, scratch.bounds)
    best = (scratch.values, scratch.winners)
    begin(_draw, grid)(*drawn, *keys, *best, SPLITS=_MOST_SPLITS, **shape)
    top_p = (settings.top_p, *best, scratch.weights, grid[1])
    begin(_check, grid)(*drawn, *top_p, SPLITS=_MOST_SPLITS, **shape, **of_threads)
    begin(_finish, grid[:1])(
        *drawn, *top_p, *keys, tokens, SPLITS=_MOST_SPLITS, **shape, **of_one_block
    )
    return tokens


class _Scratch:
    """What the kernels leave for each other."""

    def __init__(self, num_rows: int, num_chunks: int, device: torch.device) -> None:
        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(num_rows, width, dtype=dtype, device=device)

        self.peaks = empty(num_chunks, torch.float32)
        self.sums = empty(SUMS, torch.int32)
        self.numbers = empty(1, torch.int32)
        self.candidates = empty(CANDIDATES.value, torch.int32)
        self.bounds = empty(1, torch.int32)
        self.weights = empty(3, torch.int64)
        """Above the winner, in all, and the number of tokens."""
        self.values = empty(_MOST_SPLITS, torch.float32)
        self.winners = empty(_MOST_SPLITS, torch.int32)


def _num_splits(num_rows: int) -> int:
    wanted: int = triton.next_power_of_2(triton.cdiv(_BLOCKS_WANTED, num_rows))
    return max(_LEAST_SPLITS, min(wanted, _MOST_SPLITS))


@jit
def _is_drawn(temperature, limit):
    return (temperature > 0) & (limit > 1)


@jit
def _scan(
    logits_ptr,
    row_stride,
    num_tokens,
    peaks_ptr,
    num_chunks,
    sums_ptr,
    numbers_ptr,
    weights_ptr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The greatest logit of each chunk; and the sums begin at zero."""
    take_turn(PDL)
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + row * SIZE + tl.arange(0, SIZE), tl.zeros([SIZE], tl.int32))
        tl.store(numbers_ptr + row, 0)
        for i in tl.static_range(3):
            tl.store(weights_ptr + row * 3 + i, 0)
    for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
        _, logits = load_chunk(row_ptr, chunk, num_tokens, CHUNK)
        tl.store(peaks_ptr + row * num_chunks + chunk, tl.max(logits, 0))


@jit
def _draw(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    bounds_ptr,
    key_low_ptr,
    key_high_ptr,
    values_ptr,
    winners_ptr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token of a part of a row, and its value."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if _is_drawn(temperature, tl.load(limit_ptr + row)):
        peaks_ptr += row * num_chunks
        value, winner = race(
            logits_ptr + row.to(tl.int64) * row_stride,
            peaks_ptr,
            num_tokens,
            num_chunks,
            row_peak(peaks_ptr, num_chunks, CHUNKS),
            temperature,
            tl.load(bounds_ptr + row),
            tl.load(key_low_ptr + row),
            tl.load(key_high_ptr + row),
            tl.program_id(1),
            tl.num_programs(1),
            CHUNK,
        )
        place = row * SPLITS + tl.program_id(1)
        tl.store(values_ptr + place, value)
        tl.store(winners_ptr + place, winner)


@jit
def _best_of_splits(values_ptr, winners_ptr, row, num_splits, SPLITS: tl.constexpr):
    splits = tl.arange(0, SPLITS)
    is_split = splits < num_splits
    place = row * SPLITS + splits
    values = tl.load(values_ptr + place, mask=is_split, other=float("-inf"))
    return first_best(values, tl.load(winners_ptr + place, mask=is_split, other=0))


@jit
def _check(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    bounds_ptr,
    top_p_ptr,
    values_ptr,
    winners_ptr,
    weights_ptr,
    num_splits,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up what a part of a row holds above the winner, and in all."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if _is_drawn(temperature, tl.load(limit_ptr + row)) & (tl.load(top_p_ptr + row) < 1):
        value, token = _best_of_splits(values_ptr, winners_ptr, row, num_splits, SPLITS)
        if value > float("-inf"):
            row_ptr = logits_ptr + row.to(tl.int64) * row_stride
            peaks_ptr += row * num_chunks
            peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
            above, whole, count = weigh(
                row_ptr,
                peaks_ptr,
                num_tokens,
                num_chunks,
                peak,
                temperature,
                tl.load(bounds_ptr + row),
                depth_of(row_ptr, token, peak, temperature),
                tl.program_id(1),
                tl.num_programs(1),
                CHUNK,
                THREADS,
                VECTOR,
            )
            weights_ptr += row * 3
            tl.atomic_add(weights_ptr, above, sem="relaxed")
            tl.atomic_add(weights_ptr + 1, whole, sem="relaxed")
            tl.atomic_add(weights_ptr + 2, count, sem="relaxed")


@jit
def _finish(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    bounds_ptr,
    top_p_ptr,
    values_ptr,
    winners_ptr,
    weights_ptr,
    num_splits,
    key_low_ptr,
    key_high_ptr,
    tokens_ptr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token of a row: the winner of a race that is kept, or the first with the greatest logit."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    limit = tl.load(limit_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    peaks_ptr += row * num_chunks
    is_drawn = _is_drawn(temperature, limit)
    num_splits = tl.where(is_drawn, num_splits, 0)
    value, token = _best_of_splits(values_ptr, winners_ptr, row, num_splits, SPLITS)
    if (top_p < 1) & (value > float("-inf")):
        peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
        bound = tl.load(bounds_ptr + row)
        weights_ptr += row * 3
        above = tl.load(weights_ptr)
        whole = tl.load(weights_ptr + 1)
        target = share_to_keep(whole, tl.load(weights_ptr + 2), limit, bound, top_p)
        while (above.to(tl.float64) >= target) & (value > float("-inf")):
            bound = depth_of(row_ptr, token, peak, temperature) - 1
            value, token = race(
                row_ptr,
                peaks_ptr,
                num_tokens,
                num_chunks,
                peak,
                temperature,
                bound,
                tl.load(key_low_ptr + row),
                tl.load(key_high_ptr + row),
                0,
                1,
                CHUNK,
            )
            above, _whole, _count = weigh(
                row_ptr,
                peaks_ptr,
                num_tokens,
                num_chunks,
                peak,
                temperature,
                bound,
                depth_of(row_ptr, token, peak, temperature),
                0,
                1,
                CHUNK,
                THREADS,
                VECTOR,
            )
    # Nothing stays in a row of which the greatest logit is infinite.
    if value == float("-inf"):
        chunks = tl.arange(0, CHUNKS)
        peaks = tl.load(peaks_ptr + chunks, mask=chunks < num_chunks, other=float("-inf"))
        peak, chunk = first_best(peaks, chunks)
        chunk = tl.minimum(chunk, num_chunks - 1)
        tokens, logits = load_chunk(row_ptr, chunk, num_tokens, CHUNK)
        token = tl.min(tl.where(logits == peak, tokens, 0x7FFFFFFF), 0)
        token = tl.where(token < num_tokens, token, 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
