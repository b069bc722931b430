"""Chooses the next token of every request of a step, all rows at once and on their device.

A token is a function of its logits, the request's seed and the token's number in the output: the
noise that picks it comes from counters, not from a generator that other requests advance.
On a GPU the same kernels serve all rows, whatever they ask for. Elsewhere rows are grouped by the work
that they need, which is known on the host. Nothing here waits for the device.
"""

from collections.abc import Iterator
from importlib import import_module

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanoflow_compiler.engine.draw import Draw, draw
from nanoflow_compiler.engine.draw_columns import draw_columns
from nanoflow_compiler.engine.logit_changes import change_logits
from nanoflow_compiler.engine.logprobs import MAX_ELEMENTS, TopLogprobs, top_logprobs
from nanoflow_compiler.engine.sampled import Sampled
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.token_mask import TokenMask
from nanoflow_compiler.upload import upload

__all__ = ["draw_on_gpu", "sample"]

Rows = npt.NDArray[np.int64]


def sample(
    logits: Tensor,
    batch: SamplingBatch,
    *,
    token_store: Tensor,
    mask: TokenMask | None,
    drawn: Tensor | None = None,
) -> Sampled:
    """Choose from ``logits [S, V]``, which are left unchanged; what is computed of them is float32.

    ``token_store`` holds the token of every slot of the KV cache. ``drawn`` are tokens that a captured
    step has drawn from the logits as they are: they count if nobody wants the logits changed.
    """
    changed = change_logits(logits, batch, token_store=token_store, mask=mask)
    tokens = drawn if changed is logits and drawn is not None else _chosen(changed, batch)
    return Sampled(tokens, _logprobs(logits, tokens, batch=batch))


def draw_on_gpu(logits: Tensor, settings: Draw) -> Tensor:
    """A token of each row, whatever the columns ``[S]`` of settings say."""
    # Imported where it is used, because it imports Triton.
    kernels = import_module("nanoflow_compiler.kernels.choose")
    pdl = import_module("nanoflow_compiler.kernels.pdl").may_chain_step(logits.device)
    tokens: Tensor = kernels.choose_tokens(logits, settings, pdl=pdl)
    return tokens


def _chosen(logits: Tensor, batch: SamplingBatch) -> Tensor:
    if logits.device.type == "cuda" and batch.num_rows:
        columns = draw_columns(batch, logits.shape[-1])
        return draw_on_gpu(logits, Draw(*upload(columns.arrays, device=logits.device)))
    return _chosen_by_torch(logits, batch)


def _chosen_by_torch(logits: Tensor, batch: SamplingBatch) -> Tensor:
    is_greedy = batch.is_greedy
    if is_greedy.all():
        return logits.argmax(-1)
    tokens = logits.argmax(-1) if is_greedy.any() else torch.zeros_like(logits[:, 0]).long()
    groups = list(_groups(batch, num_tokens=logits.shape[-1]))
    rows = np.concatenate([rows for rows, _ in groups])
    columns = draw_columns(batch, logits.shape[-1])
    there = upload((rows, *(array[rows] for array in columns.arrays)), device=logits.device)
    begin = 0
    for group, num_ordered in groups:
        part = slice(begin, begin := begin + len(group))
        index, *own = (column[part] for column in there)
        settings = Draw(*(column[:, None] for column in own))
        tokens.index_copy_(0, index, draw(logits[index].float(), settings, num_ordered=num_ordered))
    return tokens


def _groups(batch: SamplingBatch, *, num_tokens: int) -> Iterator[tuple[Rows, int | None]]:
    """Rows that are drawn alike and fit in memory together, and ``num_ordered`` of :func:`draw`."""
    is_random = ~batch.is_greedy
    has_top_k = (batch.top_k > 0) & (batch.top_k < num_tokens)
    has_top_p = ~has_top_k & (batch.top_p < 1)
    is_whole = ~has_top_k & ~has_top_p
    has_min_p = is_whole & (batch.min_p > 0)
    for rows in _parts(is_random & is_whole & ~has_min_p, num_tokens=num_tokens):
        yield rows, None
    for rows in _parts(is_random & has_min_p, num_tokens=num_tokens):
        yield rows, 0
    for rows in _parts(is_random & has_top_k, num_tokens=num_tokens):
        yield rows, int(batch.top_k[rows].max())
    for rows in _parts(is_random & has_top_p, num_tokens=num_tokens):
        yield rows, num_tokens


def _parts(chosen: npt.NDArray[np.bool_], *, num_tokens: int) -> Iterator[Rows]:
    rows = np.flatnonzero(chosen)
    size = max(1, MAX_ELEMENTS // num_tokens)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _logprobs(logits: Tensor, tokens: Tensor, *, batch: SamplingBatch) -> TopLogprobs | None:
    asking = np.flatnonzero(batch.num_logprobs >= 0)
    if not len(asking):
        return None
    num = int(batch.num_logprobs[asking].max())
    if len(asking) == batch.num_rows:
        return top_logprobs(logits, tokens, num=num)
    (rows,) = upload((asking,), device=logits.device)
    found = top_logprobs(logits[rows], tokens[rows], num=num)
    return TopLogprobs(
        token_ids=_spread(found.token_ids, rows, num_rows=batch.num_rows),
        logprobs=_spread(found.logprobs, rows, num_rows=batch.num_rows),
        ranks=_spread(found.ranks, rows, num_rows=batch.num_rows),
    )


def _spread(values: Tensor, rows: Tensor, *, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)
