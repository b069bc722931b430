"""A model that is loaded and can be served, with the facts that an engine asks about it."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Decoder", "eos_token_ids", "max_model_len"]

DEFAULT_MAX_MODEL_LEN = 2048
LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
"""How configurations spell the context length; models without positions may have none."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model in evaluation mode, whose weights need no gradient."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """``None`` where the directory holds none."""
    config: PretrainedConfig
    path: Path
    """The local directory that it was read from."""
    name: str
    """What the user called it."""
    max_model_len: int
    eos_token_ids: frozenset[int]


def max_model_len(config: PretrainedConfig) -> int:
    """The longest sequence that the positions of ``config`` can hold."""
    text = config.get_text_config()
    lengths = (getattr(text, name, None) for name in LENGTH_NAMES)
    return next((n for n in lengths if isinstance(n, int) and n > 0), DEFAULT_MAX_MODEL_LEN)


def eos_token_ids(*sources: object) -> frozenset[int]:
    """The end tokens of the first source that names any, as transformers' generate chooses them."""
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
