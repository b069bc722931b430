"""Weights of a model: read from safetensors, or random; and the check that they are numbers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from nanoflow_compiler.errors import ModelLoadError
from nanoflow_compiler.models.checkpoint import check_checkpoint
from nanoflow_compiler.models.messages import one_line
from nanoflow_compiler.models.progress import progress_bar
from nanoflow_compiler.models.quiet import quiet_transformers

__all__ = ["DummyDistribution", "check_finite", "random_weights", "read_weights"]

DummyDistribution = Literal["normal", "uniform"]
"""``normal``: the initial weights of training. ``uniform``: all, norms too, up to 0.001 either way, which
is what vLLM draws: the power that a GPU takes, and so its clock, depend on what it multiplies."""
DUMMY_SEED = 0
UNIFORM_LIMIT = 1e-3


def read_weights(
    folder: Path, config: PretrainedConfig, *, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """The model in ``folder``; every one of its weights must be there.

    With accelerate each tensor goes from its file to ``device`` on its own; otherwise the model is
    returned on the CPU.
    """
    check_checkpoint(folder)
    is_direct = device.type == "cuda" and find_spec("accelerate") is not None
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                device_map={"": device} if is_direct else None,
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
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    distribution: DummyDistribution,
) -> PreTrainedModel:
    """A model made on ``device``: the same weights in every run on the same kind of device."""
    chosen = dtype or config.dtype or torch.get_default_dtype()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device), quiet_transformers():
        torch.manual_seed(DUMMY_SEED)
        with no_init_weights():  # weights are drawn once, below
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=chosen)
        model.init_weights()
        if distribution == "uniform" and device.type != "meta":
            _draw_uniform(model)
    return model


@torch.no_grad()
def _draw_uniform(model: PreTrainedModel) -> None:
    for weight in model.state_dict().values():
        if weight.is_floating_point():
            weight.uniform_(-UNIFORM_LIMIT, UNIFORM_LIMIT)


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
