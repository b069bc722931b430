"""What requests change of their logits before a token is drawn, all rows at once on the device."""

import torch
from torch import Tensor

from nanoflow_compiler.engine.logprobs import MAX_ELEMENTS
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.token_mask import TokenMask
from nanoflow_compiler.upload import upload

__all__ = ["change_logits"]


def change_logits(
    logits: Tensor, batch: SamplingBatch, *, token_store: Tensor, mask: TokenMask | None
) -> Tensor:
    """Masks, bias, bars and penalties, in the order of vLLM, in float32; the same tensor if no row asks for any."""
    few = (batch.allowed_rows, batch.bias_rows, batch.barred_rows, batch.penalty_rows)
    if mask is None and not any(map(len, few)):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if mask is not None:
        _apply_mask(logits, mask)
    if len(batch.allowed_rows):
        _keep_allowed(logits, batch)
    if len(batch.bias_rows):
        _add_bias(logits, batch)
    if len(batch.barred_rows):
        _bar(logits, batch)
    if len(batch.penalty_rows):
        _penalise(logits, batch, token_store=token_store)
    return logits


def _apply_mask(logits: Tensor, mask: TokenMask) -> None:
    num_tokens = logits.shape[-1]
    assert mask.words.shape[-1] * 32 >= num_tokens
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    size = max(1, MAX_ELEMENTS // num_tokens)
    rows, words = upload((mask.rows, mask.words), device=logits.device)
    for some, their_words in zip(rows.split(size), words.split(size), strict=True):
        bits = (their_words[:, :, None] >> shifts) & 1
        is_barred = bits.flatten(1)[:, :num_tokens] == 0
        logits[some] = logits[some].masked_fill_(is_barred, -torch.inf)


def _keep_allowed(logits: Tensor, batch: SamplingBatch) -> None:
    rows, tokens = upload((batch.allowed_rows, batch.allowed_tokens), device=logits.device)
    kept = logits[rows, tokens]
    logits.index_fill_(0, rows, -torch.inf)
    logits[rows, tokens] = kept


def _add_bias(logits: Tensor, batch: SamplingBatch) -> None:
    rows, tokens, values = upload(
        (batch.bias_rows, batch.bias_tokens, batch.bias_values), device=logits.device
    )
    logits[rows, tokens] += values


def _bar(logits: Tensor, batch: SamplingBatch) -> None:
    known = (batch.barred_tokens >= 0) & (batch.barred_tokens < logits.shape[-1])
    rows, tokens = upload(
        (batch.barred_rows[known], batch.barred_tokens[known]), device=logits.device
    )
    logits.view(-1).index_fill_(0, rows * logits.shape[-1] + tokens, -torch.inf)


def _penalise(logits: Tensor, batch: SamplingBatch, *, token_store: Tensor) -> None:
    """By what each row holds; a token that it holds often is written as often, with one value."""
    penalised = batch.penalty_rows
    rows, tables, lens, prompt_lens, repetition, presence, frequency = upload(
        (
            penalised,
            batch.history_tables,
            batch.history_lens,
            batch.history_prompt_lens,
            batch.repetition[penalised],
            batch.presence[penalised],
            batch.frequency[penalised],
        ),
        device=logits.device,
    )
    # One entry for each token; their number is given, so that the host does not wait for it.
    places = torch.repeat_interleave(lens, output_size=int(batch.history_lens.sum()))
    positions = torch.arange(len(places), device=logits.device) - (lens.cumsum(0) - lens)[places]
    blocks = tables[places, positions // batch.block_size].long()
    tokens = token_store[blocks * batch.block_size + positions % batch.block_size].long()
    is_output = (positions >= prompt_lens[places]).int()
    num_tokens = logits.shape[-1]
    index = places * num_tokens + tokens
    counts = is_output.new_zeros(len(penalised) * num_tokens)
    number = counts.scatter_add_(0, index, is_output)[index]
    values = logits[rows[places], tokens]
    values = torch.where(values > 0, values / repetition[places], values * repetition[places])
    values -= frequency[places] * number
    values -= presence[places] * (number > 0)
    logits[rows[places], tokens] = values
