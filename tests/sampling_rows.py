"""Rows to sample, as tests write them, and plain reference arithmetic in float64."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from nanoflow_compiler.engine.noise import row_keys
from nanoflow_compiler.engine.sampler import sample
from nanoflow_compiler.engine.sampling_batch import SamplingBatch
from nanoflow_compiler.engine.sampling_columns import SamplingColumns
from nanoflow_compiler.engine.sampling_params import SamplingParams
from nanoflow_compiler.engine.token_mask import TokenMask

BLOCK_SIZE = 4


@dataclass
class Row:
    params: SamplingParams
    seed: int = 0
    prompt: tuple = (1, 2)
    output: tuple = ()


def row(*, seed=0, prompt=(1, 2), output=(), **params):
    return Row(SamplingParams(**params), seed, tuple(prompt), tuple(output))


def make_batch(rows, *, eos=()):
    """The batch and its token store; blocks and slots are in no order."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(len(rows) + 3)[: len(rows)]
    num_blocks = [-(-len(one.prompt + one.output) // BLOCK_SIZE) for one in rows]
    free = rng.permutation(sum(num_blocks) + 5)
    tables = np.full((len(rows) + 3, max(num_blocks)), -1, dtype=np.int32)
    store = torch.full((len(free) * BLOCK_SIZE,), 10**9, dtype=torch.int32)
    columns = SamplingColumns.allocate(len(rows) + 3)
    for slot, one, count in zip(slots, rows, num_blocks, strict=True):
        columns.put(slot, one.params, seed=one.seed, eos_token_ids=eos)
        tables[slot, :count], free = free[:count], free[count:]
        for position, token in enumerate(one.prompt + one.output):
            block = tables[slot, position // BLOCK_SIZE]
            store[block * BLOCK_SIZE + position % BLOCK_SIZE] = token
    batch = SamplingBatch.gather(
        columns,
        slots=slots,
        num_prompt_tokens=np.array([len(one.prompt) for one in rows]),
        num_output_tokens=np.array([len(one.output) for one in rows]),
        block_tables=tables,
        block_size=BLOCK_SIZE,
    )
    return batch, store


def sample_rows(logits, rows, *, eos=(), mask=None):
    batch, store = make_batch(rows, eos=eos)
    return sample(logits, batch, token_store=store.to(logits.device), mask=mask)


def draw_rows(logits, rows, *, eos=(), mask=None):
    return sample_rows(logits, rows, eos=eos, mask=mask).tokens.tolist()


def reference_logits(logits, one, *, eos=(), allowed=None):
    """vLLM's order: masks, bias, bars, repetition, frequency, presence."""
    changed = []
    for token, value in enumerate(np.asarray(logits, dtype=np.float64)):
        own = one.params.allowed_token_ids
        if any(tokens is not None and token not in tokens for tokens in (allowed, own)):
            value = -math.inf
        value += (one.params.logit_bias or {}).get(token, 0.0)
        is_end = token in eos or token in one.params.stop_token_ids
        if is_end and len(one.output) < one.params.min_tokens:
            value = -math.inf
        if token in one.prompt + one.output:
            repetition = one.params.repetition_penalty
            value = value / repetition if value > 0 else value * repetition
        value -= one.params.frequency_penalty * one.output.count(token)
        value -= one.params.presence_penalty * (token in one.output)
        changed.append(value)
    return np.array(changed)


def reference_distribution(logits, params):
    """Of a row without equal logits; greedy rows are certain of one token."""
    if params.temperature == 0 or params.top_k == 1:
        return np.eye(len(logits))[np.argmax(logits)]
    p = np.exp((logits - logits.max()) / params.temperature)
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    return p / p.sum()


def reference_noise(one, num_tokens):
    """Logarithms of exponential times, by the definition."""
    (low,), (high,) = row_keys(
        np.array([one.seed % 2**64], dtype=np.uint64), np.array([len(one.output)], dtype=np.uint64)
    )
    bits = (
        reference_hash(token, int(low) % 2**32, int(high) % 2**32) for token in range(num_tokens)
    )
    return np.array([math.log(-math.log1p(-(number % 2**31 + 0.5) * 2**-31)) for number in bits])


def reference_hash(token, low, high):
    x = token * 0x9E3779B1 % 2**32 ^ low
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = ((x ^ x >> 13) + high) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def reference_tokens(logits, one, *, eos=(), allowed=None):
    """The tokens that rounding may choose: those that are the first, or almost."""
    p = reference_distribution(reference_logits(logits, one, eos=eos, allowed=allowed), one.params)
    with np.errstate(divide="ignore"):
        scores = np.log(p) - reference_noise(one, len(p))
    return set(np.flatnonzero(scores > scores.max() - 1e-3).tolist())


def packed(allowed, *, vocab, rows=None):
    """As xgrammar packs it: token ``t`` is bit ``t % 32`` of word ``t // 32``; by default of all rows."""
    mask = np.zeros((len(allowed), -(-vocab // 32)), dtype=np.uint32)
    for words, tokens in zip(mask, allowed, strict=True):
        for token in tokens:
            words[token // 32] |= np.uint32(1 << token % 32)
    rows = np.arange(len(allowed)) if rows is None else np.array(rows)
    return TokenMask(rows, mask.view(np.int32))
