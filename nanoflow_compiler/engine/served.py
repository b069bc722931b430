"""A model as an engine needs it, however the user named it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nanoflow_compiler.engine.memory import explain_out_of_memory
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.models import Decoder, load_decoder
from nanoflow_compiler.models.decoder import eos_token_ids, max_model_len
from nanoflow_compiler.models.place import check_device
from nanoflow_compiler.models.weights import DummyDistribution, check_finite

__all__ = ["Loading", "Served"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a model is loaded that is given by its name."""

    dtype: str | torch.dtype = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    device: str = "auto"
    dummy_distribution: DummyDistribution = "normal"
    hf_overrides: Mapping[str, Any] | None = None
    """Replace values of the model's configuration."""

    def __post_init__(self) -> None:
        """Refuse what names no device."""
        check_device(self.device)

    def check_loaded(self, model: PreTrainedModel) -> None:
        """Refuse to change a model that is loaded."""
        if replace(self, device="auto") != Loading():
            raise ConfigError(
                "dtype, load_format, dummy_distribution and hf_overrides are for models given by "
                "name; this one is loaded"
            )
        if self.device != "auto" and not _is_same(torch.device(self.device), model.device):
            raise ConfigError(
                f"device={self.device!r}, but the model is on {model.device}: move it there, or "
                "leave device out"
            )


def _is_same(wanted: torch.device, place: torch.device) -> bool:
    return wanted.type == place.type and wanted.index in (None, place.index)


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
        loading: Loading,
    ) -> "Served":
        loaded = isinstance(model, str | Path)
        if isinstance(model, str | Path):
            with explain_out_of_memory(f"while {model} was loaded"):
                model = load_decoder(model, **asdict(loading))
        if isinstance(model, Decoder):
            if not loaded:
                loading.check_loaded(model.model)
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
        loading.check_loaded(model)
        check_finite(model, where=type(model).__name__)
        return cls(
            model=model,
            tokenizer=tokenizer,
            path=None,
            max_model_len=max_model_len(model.config),
            eos_token_ids=eos_token_ids(getattr(model, "generation_config", None), model.config),
            loaded=False,
        )
