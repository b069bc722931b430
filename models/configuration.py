"""From a configuration as JSON to one that is known to describe a decoder."""

from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
)

from nanoflow_compiler.errors import ConfigError, ModelLoadError
from nanoflow_compiler.models.messages import one_line

__all__ = ["make_config"]

_LEGACY = ("rope_theta", "rope_scaling")
"""Still read, and spelled otherwise in what transformers writes."""


def make_config(
    values: dict[str, Any],
    *,
    where: str,
    num_hidden_layers: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The configuration of a causal LM, with other values or another number of layers if asked.

    Refuses what is not a decoder or not known to the installed transformers; ``where`` is for messages.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelLoadError(
            f"{where}: architecture {model_type!r} is unknown to the installed transformers; "
            "upgrade transformers, or check model_type in config.json"
        )
    if overrides:
        values = _with_overrides(values, overrides)
    if num_hidden_layers is not None:
        values = _with_layers(values, num_hidden_layers)
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # each configuration class validates in its own way
        raise ModelLoadError(
            f"{where}: bad configuration: {one_line(error)}; correct config.json"
        ) from error
    _check_decoder(config, where=where)
    return config


def _with_overrides(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A name that the architecture does not read would change nothing, and is refused."""
    model_type = values["model_type"]
    if "model_type" in overrides:
        raise ConfigError("hf_overrides cannot change model_type; pass another model")
    known = {*values, *_LEGACY, *CONFIG_MAPPING[model_type]().to_dict()}
    known |= CONFIG_MAPPING[model_type].attribute_map.keys()
    for name in overrides:
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"hf_overrides: {model_type} has no setting {name!r}{hint}")
    # Copies, because transformers writes into what it is given.
    changed = _with_rope(deepcopy(values), deepcopy(dict(overrides)))
    layers = overrides.get("num_hidden_layers")
    if isinstance(layers, int) and "layer_types" not in overrides:
        return _with_layers(changed, layers)
    return changed


def _with_rope(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Of the two spellings of rotary settings transformers reads one: what is given is said in that."""
    if "rope_parameters" in overrides:
        values = {name: value for name, value in values.items() if name not in _LEGACY}
    elif "rope_parameters" in values and any(name in overrides for name in _LEGACY):
        rope = values.pop("rope_parameters") or {}
        values |= {"rope_theta": rope.pop("rope_theta", None), "rope_scaling": rope or None}
    return {**values, **overrides}


def _with_layers(values: dict[str, Any], count: int) -> dict[str, Any]:
    if count < 1:
        raise ModelLoadError(f"num_hidden_layers must be at least 1, not {count}")
    changed = {**values, "num_hidden_layers": count}
    if layer_types := values.get("layer_types"):
        changed["layer_types"] = layer_types[:count]
    return changed


def _check_decoder(config: PretrainedConfig, *, where: str) -> None:
    kind = type(config)
    # BERT and its family are in both tables: as language models they look both ways unless told.
    two_way = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or two_way or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelLoadError(
            f"{where}: {config.model_type} is not a decoder-only language model; "
            "pass one, such as smollm2-135m"
        )
