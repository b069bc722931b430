"""Weights of a model: read from safetensors, or random; and the check that they are numbers."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.checkpoint import check_checkpoint
from nanoflow_compiler.models.messages import one_line
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.quiet import quiet_transformers

__all__ = ["check_finite", "random_weights", "read_weights"]

DUMMY_SEED = 0


def read_weights(
    folder: Path, config: PretrainedConfig, *, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model in ``folder``; every one of its weights must be there."""
    check_checkpoint(folder)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # loaders of transformers raise whatever they trip over
        raise ModelLoadError(
            f"{folder} cannot be loaded: {one_line(error)}; check that weights and config.json belong together"
        ) from error
    model, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    _check_complete(folder, sorted(report["missing_keys"]))
    return model


def _check_complete(folder: Path, missing: list[str]) -> None:
    if missing:
        raise ModelLoadError(
            f"{folder}: {len(missing)} weights of the model are in none of its files, first {missing[0]}; "
            "download the model again"
        )


def random_weights(
    config: PretrainedConfig, *, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """A model with the initial weights of training: the same ones in every run on the same device."""
    chosen = dtype or config.dtype or torch.get_default_dtype()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device), quiet_transformers():
        torch.manual_seed(DUMMY_SEED)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=chosen)
    return model


def check_finite(model: PreTrainedModel, *, where: str) -> None:
    """Refuse weights with NaN or infinity: one pass over each tensor, without a copy."""
    weights = dict(model.named_parameters())
    with progress_bar("Checking weights", total=len(weights)) as bar:
        for name, weight in weights.items():
            if not _is_finite(weight.detach()):
                raise ModelLoadError(
                    f"{where}: the weight {name} contains NaN or infinity; load or download the model again"
                )
            bar.advance()


def _is_finite(weight: torch.Tensor) -> bool:
    # Types of one byte have no reductions, and their scales are tensors of their own.
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        return True
    low, high = torch.aminmax(weight)  # both become NaN if any element is
    return bool(torch.isfinite(low) & torch.isfinite(high))
