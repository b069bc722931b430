"""The one function that makes a ``Decoder``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nanoflow_compiler.errors import ConfigError, ModelLoadError
from nanoflow_compiler.models.checkpoint import read_json
from nanoflow_compiler.models.configuration import make_config
from nanoflow_compiler.models.decoder import Decoder, eos_token_ids, max_model_len
from nanoflow_compiler.models.gguf import load_gguf
from nanoflow_compiler.models.locate import resolve_model
from nanoflow_compiler.models.messages import one_line
from nanoflow_compiler.models.place import find_device
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.published import CATALOG, catalog_config, catalog_names
from nanoflow_compiler.models.quiet import quiet_transformers
from nanoflow_compiler.models.weights import (
    DummyDistribution,
    check_finite,
    random_weights,
    read_weights,
)

__all__ = ["LoadFormat", "load_decoder", "load_tokenizer"]

LoadFormat = Literal["auto", "dummy"]
DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_decoder(  # noqa: PLR0913 - each is a setting of its own
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: LoadFormat = "auto",
    dummy_distribution: DummyDistribution = "normal",
    num_hidden_layers: int | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
) -> Decoder:
    """Load the decoder that ``name_or_path`` names: a path, an alias, a hub id or a catalog entry.

    ``dtype="auto"`` is that of the checkpoint; ``device`` may be ``"auto"`` too, a GPU where there is
    one. ``load_format="dummy"`` takes the configuration alone, with random weights of
    ``dummy_distribution``; only then may ``num_hidden_layers`` differ from it. ``hf_overrides`` are
    values that replace those of the configuration.
    """
    chosen, place = _parse_dtype(dtype), find_device(device)
    _check_choice("load_format", load_format, get_args(LoadFormat))
    _check_choice("dummy_distribution", dummy_distribution, get_args(DummyDistribution))
    if load_format == "dummy":
        path, config = _find_config(
            name_or_path, num_hidden_layers=num_hidden_layers, overrides=hf_overrides
        )
        model = random_weights(config, dtype=chosen, device=place, distribution=dummy_distribution)
        return _decoder(model, _load_tokenizer(path), path=path, name=str(name_or_path))
    if num_hidden_layers is not None:
        raise ConfigError('num_hidden_layers can be changed only with load_format="dummy"')
    path = resolve_model(name_or_path)
    model, tokenizer = _load(
        path, where=str(name_or_path), dtype=chosen, device=place, overrides=hf_overrides
    )
    check_finite(model, where=str(path))
    folder = path if path.is_dir() else path.parent
    # What was not read to the device itself: GGUF files, and safetensors without accelerate.
    torch.nn.Module.to(model, place)  # in place; the wrapper of transformers hides the signature
    return _decoder(model, tokenizer, path=folder, name=str(name_or_path))


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone: of a directory, an alias or a hub id, whose weights stay on the hub."""
    path = Path(name_or_path)
    if not path.is_dir():  # of a model it may be, which a directory of a tokenizer is not
        path = resolve_model(name_or_path, weights=False)
    tokenizer = _load_tokenizer(path) if path.is_dir() else None
    if tokenizer is None:
        raise ModelLoadError(f"{path} holds no tokenizer files; pass the directory of a tokenizer")
    return tokenizer


def _load(
    path: Path,
    *,
    where: str,
    dtype: torch.dtype | None,
    device: torch.device,
    overrides: Mapping[str, Any] | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    if path.suffix == ".gguf":
        if overrides:
            raise ConfigError(f"{path}: hf_overrides need a config.json, not a GGUF file")
        return load_gguf(path, dtype=dtype)
    values = read_json(path / "config.json")
    config = make_config(values, where=str(path), overrides=overrides)
    with progress_bar(f"Loading {where}"):
        return read_weights(path, config, dtype=dtype, device=device), _load_tokenizer(path)


def _find_config(
    name_or_path: str | Path,
    *,
    num_hidden_layers: int | None,
    overrides: Mapping[str, Any] | None,
) -> tuple[Path, PretrainedConfig]:
    name = str(name_or_path)
    if name in catalog_names() and not Path(name).exists():
        path, values = CATALOG, catalog_config(name)
    else:
        path = resolve_model(name_or_path, weights=False)
        if path.suffix == ".gguf":
            raise ModelLoadError(
                f'{path}: load_format="dummy" needs a config.json, not a GGUF file'
            )
        values = read_json(path / "config.json")
    return path, make_config(
        values, where=name, num_hidden_layers=num_hidden_layers, overrides=overrides
    )


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )
    except Exception as error:  # tokenizers raise whatever they trip over
        raise ModelLoadError(
            f"{folder}: the tokenizer cannot be loaded: {one_line(error)}; download its files again"
        ) from error
    return tokenizer


def _decoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, path: Path, name: str
) -> Decoder:
    model.eval().requires_grad_(False)
    return Decoder(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        path=path,
        name=name,
        max_model_len=max_model_len(model.config),
        eos_token_ids=eos_token_ids(
            model.generation_config, model.config.get_text_config(), tokenizer
        ),
    )


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """``None`` means: as the checkpoint."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES[dtype]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be {' or '.join(choices)}, not {value!r}")
