"""Conversations of people with a chat model, from the well-known JSON file.

The rules are vLLM's: of every conversation with two turns or more, in random order, the first turn is
the prompt and the second gives the length of the answer. Left out are prompts of fewer than 4 or
more than 1024 tokens, answers of fewer than 4, and pairs of more than 2048. A file that has too few
is an error: a prompt that is asked twice would be found in the prefix cache.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_compiler.bench.dataset import BenchRequest, DatasetSettings
from nanoflow_compiler.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["sharegpt_requests"]

LEAST, MOST_PROMPT, MOST_TOTAL = 4, 1024, 2048


def sharegpt_requests(
    settings: DatasetSettings, *, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[BenchRequest]:
    """All that the rules leave."""
    conversations = [turns for turns in _read(settings.path) if len(turns) >= 2]
    random.Random(settings.seed).shuffle(conversations)
    given = settings.output_len or settings.sharegpt_output_len
    for prompt, answer, *_ in conversations:
        ids = tokenizer(prompt).input_ids
        output_len = given or len(tokenizer(answer).input_ids)
        if _is_kept(len(ids), output_len, is_given=given is not None):
            yield BenchRequest(prompt_token_ids=ids, text=prompt, output_len=output_len)


def _is_kept(prompt_len: int, output_len: int, *, is_given: bool) -> bool:
    return (
        LEAST <= prompt_len <= MOST_PROMPT
        and (is_given or output_len >= LEAST)
        and prompt_len + output_len <= MOST_TOTAL
    )


def _read(path: Path) -> list[list[str]]:
    """The texts of each conversation."""
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [[turn["value"] for turn in entry.get("conversations", ())] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not the JSON file of ShareGPT "
            f'([{{"conversations": [{{"value": ...}}, ...]}}, ...]): {error!r:.100}'
        ) from error
