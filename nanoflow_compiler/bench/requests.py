"""Makes the requests of a benchmark, whatever they come from."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings, Vocabulary
from nanoflow_compiler.bench.progress import progress
from nanoflow_compiler.bench.random_prompts import as_text, random_requests
from nanoflow_compiler.bench.sharegpt import sharegpt_requests
from nanoflow_compiler.bench.trace import trace_requests
from nanoflow_compiler.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["make_requests", "with_texts"]


def make_requests(
    settings: DatasetSettings,
    *,
    vocabulary: Vocabulary,
    tokenizer: "PreTrainedTokenizerBase | None",
    longest: int | None,
) -> list[BenchRequest]:
    """``num_prompts`` requests; those that are longer than ``longest`` are left out, and counted."""
    settings.check()
    num_long = 0
    found = []
    for request in _all(settings, vocabulary=vocabulary, tokenizer=tokenizer):
        length = len(request.prompt_token_ids) + request.output_len
        if longest is not None and length > longest:
            num_long += 1
            continue
        found.append(request)
        if len(found) == settings.num_prompts:
            break
    left_out = f"; {num_long} longer than {longest} tokens were left out" if num_long else ""
    if len(found) < settings.num_prompts:
        raise ConfigError(
            f"--dataset-name {settings.name} has {len(found)} requests for --num-prompts "
            f"{settings.num_prompts}{left_out}; lower it, or the lengths"
        )
    if num_long:
        print(f"{len(found)} requests{left_out}", file=sys.stderr)  # noqa: T201
    return found


def with_texts(
    requests: list[BenchRequest],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    vocabulary: Vocabulary,
    seed: int,
) -> list[BenchRequest]:
    """The same, each with a text of as many tokens, those included that a server puts before it."""
    num_special = tokenizer.num_special_tokens_to_add()
    rng = np.random.default_rng(seed)
    made = []
    with progress("prompts", total=len(requests)) as advance:
        for request in requests:
            if request.text is None:
                ids = request.prompt_token_ids[num_special:] or request.prompt_token_ids
                text, ids = as_text(ids, tokenizer=tokenizer, vocabulary=vocabulary, rng=rng)
                request = replace(request, text=text, prompt_token_ids=ids)
            made.append(request)
            advance(1)
    return made


def _all(
    settings: DatasetSettings,
    *,
    vocabulary: Vocabulary,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> Iterator[BenchRequest]:
    """For as long as the dataset has any."""
    if settings.name == "random":
        return random_requests(settings, vocabulary=vocabulary)
    if settings.name == "trace":
        return trace_requests(settings, vocabulary=vocabulary)
    if tokenizer is None:
        raise ConfigError("--dataset-name sharegpt needs a tokenizer; pass --tokenizer")
    return sharegpt_requests(settings, tokenizer=tokenizer)
