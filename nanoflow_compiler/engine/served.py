"""A model as an engine needs it, however the user named it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.models import Decoder, load_decoder
from nanoflow_compiler.models.decoder import eos_token_ids, max_model_len
from nanoflow_compiler.models.weights import check_finite

__all__ = ["Served"]


@dataclass(frozen=True, slots=True)
class Served:
    """What the engine needs of a model, however the user named it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    path: Path | None
    max_model_len: int
    eos_token_ids: frozenset[int]
    loaded: bool
    """Loaded here, so that no one can have changed its modules."""

    @classmethod
    def find(
        cls,
        model: str | Path | Decoder | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        dtype: str | torch.dtype,
        load_format: Literal["auto", "dummy"],
    ) -> "Served":
        loaded = isinstance(model, str | Path)
        if isinstance(model, str | Path):
            model = load_decoder(model, dtype=dtype, load_format=load_format)
        elif dtype != "auto" or load_format != "auto":
            raise ConfigError(
                "dtype and load_format are for models given by name; this one is loaded"
            )
        if isinstance(model, Decoder):
            return cls(
                model=model.model,
                tokenizer=tokenizer or model.tokenizer,
                path=model.path,
                max_model_len=model.max_model_len,
                eos_token_ids=model.eos_token_ids,
                loaded=loaded,
            )
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                "the model must be a name, a path or a model of transformers, not "
                + type(model).__name__
            )
        check_finite(model, where=type(model).__name__)
        return cls(
            model=model,
            tokenizer=tokenizer,
            path=None,
            max_model_len=max_model_len(model.config),
            eos_token_ids=eos_token_ids(getattr(model, "generation_config", None), model.config),
            loaded=False,
        )
