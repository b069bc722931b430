"""Random tokens as prompts: nothing in them is alike, unless a common prefix is asked for."""

from collections.abc import Iterator
from math import ceil, floor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["as_text", "random_requests"]

MOST_TRIES = 10


def random_requests(settings: DatasetSettings, *, vocabulary: Vocabulary) -> Iterator[BenchRequest]:
    """Lengths are drawn evenly, up to the range ratio below and above what is asked for."""
    rng = np.random.default_rng(settings.seed)
    ratio = settings.random_range_ratio
    num = settings.num_prompts
    inputs = _lengths(rng, settings.input_len or settings.random_input_len, ratio=ratio, num=num)
    outputs = _lengths(rng, settings.output_len or settings.random_output_len, ratio=ratio, num=num)
    prefix = vocabulary.draw(rng, settings.random_prefix_len)
    for input_len, output_len in zip(inputs.tolist(), outputs.tolist(), strict=True):
        tokens = prefix + vocabulary.draw(rng, input_len)
        yield BenchRequest(prompt_token_ids=tokens, output_len=output_len)


def as_text(
    token_ids: list[int],
    *,
    tokenizer: "PreTrainedTokenizerBase",
    vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> tuple[str, list[int]]:
    """A text of as many tokens, and these tokens.

    The text of random tokens rarely has the same tokens: it is cut or extended until it has the same
    number. A few texts never do; then the one that was tried last is returned.
    """
    length = len(token_ids)
    for tries in range(MOST_TRIES):
        text = str(tokenizer.decode(token_ids))
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if len(token_ids) == length:
            break
        # Not always at the same token: a cut inside a character makes more tokens again.
        token_ids = token_ids[: length - tries]
        token_ids += vocabulary.draw(rng, length - len(token_ids))
    return text, token_ids


def _lengths(
    rng: np.random.Generator, length: int, *, ratio: float, num: int
) -> npt.NDArray[np.int64]:
    least, most = max(1, floor(length * (1 - ratio))), ceil(length * (1 + ratio))
    return rng.integers(least, most + 1, size=num)
