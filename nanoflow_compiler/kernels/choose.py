"""Chooses the tokens of all rows of a step on a GPU: what ``engine.draw`` computes, in a few passes.

Nothing depends on settings but branches inside the kernels: the same launches, with the same memory,
serve greedy rows, drawn rows and any mixture, so that a captured graph may be replayed with others. A row
is divided into chunks, and spread over as many thread blocks as its neighbours leave idle. All that these
blocks put together are maxima and sums of integers, so that their number changes nothing.

1. *scan* reads the logits once (525 MB for 1024 rows of 128,256 in float32: 0.12 to 0.16 ms) and keeps the greatest
   logit of each chunk. Whatever follows leaves out chunks that lie too deep below a row's greatest logit.
2. *narrow* twice, *gather* and *settle* find where ``top_k`` and ``top_p`` cut (:mod:`cut`). Other rows pass
   by. A pass takes about 100 instructions for each token, 0.4 to 0.5 ms for 1024 full rows.
3. *race* draws: about 75 instructions for each token of the chunks with a token that may win. It reads
   the logits again, because a row's chunks must know the greatest logit to be compared as the reference
   compares them, and because most rows are larger than what the caches would hold of all of them.
4. *finish* picks among the blocks' winners, or looks for the greatest logit in the first chunk that has it.

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
from nanoflow_compiler.kernels.cut import gather, narrow, settle
from nanoflow_compiler.kernels.cut_parts import CANDIDATES, SUMS
from nanoflow_compiler.kernels.pdl import launch, take_turn
from nanoflow_compiler.kernels.token_math import (
    log_arrivals,
    row_peak,
    scaled_depths,
)

__all__ = ["choose_tokens"]

_CHUNK = 2048
_NUM_WARPS = 4
_MOST_SPLITS = 64
_LEAST_SPLITS = 4
"""So few that a thread never adds up more weights than fit; see :mod:`cut`."""
_MOST_TOKENS = 1 << 18
_BLOCKS_WANTED = 4096
"""Thread blocks that keep a GPU busy to the end."""


def choose_tokens(logits: Tensor, settings: Draw, *, pdl: bool = False) -> Tensor:
    """A token for each row of ``logits [S, V]`` (any floats); ``settings`` are columns of all ``S`` rows.

    A temperature of 0 and a limit of 1 are greedy. Nothing is read from the device.
    """
    num_rows, num_tokens = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    assert num_tokens <= _MOST_TOKENS, "weights of so many tokens do not add up in 64 bits"
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_chunks = triton.cdiv(num_tokens, _CHUNK)
    shape: dict[str, Any] = {"CHUNK": _CHUNK, "CHUNKS": triton.next_power_of_2(num_chunks)}
    scratch = _Scratch(num_rows, num_chunks, logits.device)
    grid = (num_rows, _num_splits(num_rows))
    row = (logits, logits.stride(0), num_tokens)
    limits = (settings.temperature, settings.least, settings.limit, settings.top_p)
    chunks = (scratch.peaks, num_chunks)
    is_even = num_tokens % 16 == logits.stride(0) % 16 == logits.data_ptr() % 16 == 0
    vector = 16 // logits.itemsize if is_even else 1
    of_threads = {"VECTOR": vector, "THREADS": 32 * _NUM_WARPS, "num_warps": _NUM_WARPS}
    begin = partial(launch, pdl=pdl)
    begin(_scan, grid)(*row, *chunks, scratch.sums, scratch.numbers, SIZE=SUMS, CHUNK=_CHUNK)
    cut = (*row, *limits, *chunks, scratch.sums)
    for turn in range(2):
        begin(narrow, grid)(*cut, ROUND=turn, SIZE=SUMS, **shape, **of_threads)
    begin(gather, grid)(*cut, scratch.numbers, scratch.candidates, SIZE=SUMS, **shape)
    begin(settle, grid[:1])(
        *cut,
        scratch.candidates,
        scratch.bounds,
        SIZE=SUMS,
        **shape,
        VECTOR=vector,
        THREADS=256,
        num_warps=8,
    )
    keys = (settings.key_low, settings.key_high)
    best = (scratch.bounds, scratch.values, scratch.winners)
    drawn = (settings.temperature, settings.limit)
    begin(_race, grid)(*row, *drawn, *keys, *chunks, *best, SPLITS=_MOST_SPLITS, **shape)
    begin(_finish, grid[:1])(
        *row, *drawn, *chunks, *best[1:], tokens, grid[1], SPLITS=_MOST_SPLITS, **shape
    )
    return tokens


class _Scratch:
    """What the kernels leave for each other."""

    def __init__(self, num_rows: int, num_chunks: int, device: torch.device) -> None:
        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(num_rows, width, dtype=dtype, device=device)

        self.peaks = empty(num_chunks, torch.float32)
        self.sums = empty(SUMS, torch.int64)
        self.numbers = empty(1, torch.int32)
        self.candidates = empty(CANDIDATES.value, torch.int32)
        self.bounds = empty(1, torch.int32)
        self.values = empty(_MOST_SPLITS, torch.float32)
        self.winners = empty(_MOST_SPLITS, torch.int32)


def _num_splits(num_rows: int) -> int:
    wanted: int = triton.next_power_of_2(triton.cdiv(_BLOCKS_WANTED, num_rows))
    return max(_LEAST_SPLITS, min(wanted, _MOST_SPLITS))


@triton.jit
def _load_chunk(row_ptr, chunk, num_tokens, CHUNK: tl.constexpr):
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(row_ptr + tokens, mask=tokens < num_tokens, other=float("-inf"))
    logits = logits.to(tl.float32)
    return tokens, logits


@triton.jit
def _scan(
    logits_ptr,
    row_stride,
    num_tokens,
    peaks_ptr,
    num_chunks,
    sums_ptr,
    numbers_ptr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The greatest logit of each chunk; and the sums begin at zero."""
    take_turn(PDL)
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + row * SIZE + tl.arange(0, SIZE), tl.zeros([SIZE], tl.int64))
        tl.store(numbers_ptr + row, 0)
    for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
        _, logits = _load_chunk(row_ptr, chunk, num_tokens, CHUNK)
        tl.store(peaks_ptr + row * num_chunks + chunk, tl.max(logits, 0))


@triton.jit
def _race(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    limit_ptr,
    key_low_ptr,
    key_high_ptr,
    peaks_ptr,
    num_chunks,
    bounds_ptr,
    values_ptr,
    winners_ptr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token of a part of a row, and its value: -inf where no token stays."""
    take_turn(PDL)
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0) & (tl.load(limit_ptr + row) > 1):
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        peaks_ptr += row * num_chunks
        peak = row_peak(peaks_ptr, num_chunks, CHUNKS)
        bound = tl.load(bounds_ptr + row)
        low = tl.load(key_low_ptr + row).to(tl.uint32, bitcast=True)
        high = tl.load(key_high_ptr + row).to(tl.uint32, bitcast=True)
        best = tl.full([CHUNK], float("-inf"), tl.float32)
        winners = tl.zeros([CHUNK], tl.int32)
        for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
            _, nearest = scaled_depths(tl.load(peaks_ptr + chunk), peak, temperature)
            if nearest <= bound:
                tokens, logits = _load_chunk(row_ptr, chunk, num_tokens, CHUNK)
                scaled, depths = scaled_depths(logits, peak, temperature)
                values = scaled - log_arrivals(tokens, low, high)
                is_better = (depths <= bound) & (values > best)
                best = tl.where(is_better, values, best)
                winners = tl.where(is_better, tokens, winners)
        place = row * SPLITS + tl.program_id(1)
        value, winner = _first_best(best, winners)
        tl.store(values_ptr + place, value)
        tl.store(winners_ptr + place, winner)


@triton.jit
def _first_best(values, tokens):
    value = tl.max(values, 0)
    return value, tl.min(tl.where(values == value, tokens, 0x7FFFFFFF), 0)


@triton.jit
def _finish(
    logits_ptr,
    row_stride,
    num_tokens,
    temperature_ptr,
    limit_ptr,
    peaks_ptr,
    num_chunks,
    values_ptr,
    winners_ptr,
    tokens_ptr,
    num_splits,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token of a row: the winner of its race, or the first with the greatest logit."""
    take_turn(PDL)
    row = tl.program_id(0)
    is_drawn = (tl.load(temperature_ptr + row) > 0) & (tl.load(limit_ptr + row) > 1)
    splits = tl.arange(0, SPLITS)
    is_split = splits < tl.where(is_drawn, num_splits, 0)
    place = row * SPLITS + splits
    values = tl.load(values_ptr + place, mask=is_split, other=float("-inf"))
    value, token = _first_best(values, tl.load(winners_ptr + place, mask=is_split, other=0))
    # Nothing stays in a row of which the greatest logit is infinite.
    if value == float("-inf"):
        chunks = tl.arange(0, CHUNKS)
        row_peaks = peaks_ptr + row * num_chunks + chunks
        peaks = tl.load(row_peaks, mask=chunks < num_chunks, other=float("-inf"))
        peak, chunk = _first_best(peaks, chunks)
        chunk = tl.minimum(chunk, num_chunks - 1)
        row_ptr = logits_ptr + row.to(tl.int64) * row_stride
        tokens, logits = _load_chunk(row_ptr, chunk, num_tokens, CHUNK)
        token = tl.min(tl.where(logits == peak, tokens, 0x7FFFFFFF), 0)
        token = tl.where(token < num_tokens, token, 0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
