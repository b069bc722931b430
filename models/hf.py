"""Any transformers decoder on packed tokens: many requests on one axis, their past in a paged KV cache."""

import copy
import inspect
import itertools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.kv_cache import LayerShape
from nanoflow_compiler.models import adapt
from nanoflow_compiler.models.interfaces import (
    IMPLEMENTATION,
    name_expert_activations,
    number_attention_calls,
)
from nanoflow_compiler.models.probe import PROBE, AttentionCall, find_attention_calls
from nanoflow_compiler.models.rotary import freeze_rotary

__all__ = ["PackedDecoder"]


class PackedDecoder(nn.Module):
    """``(input_ids [T], positions [T], rows [R]) -> logits [R, V]``, in the dtype of the model.

    ``rows`` are the tokens whose logits are wanted. The keys and values of a call are in the layer of
    its number in ``layers``, of the cache in :func:`nanoflow_compiler.attention_state.attention_state`.

    The modules are copies that share the parameters of ``model``, which stays as it is and usable.
    """

    layers: tuple[LayerShape, ...]

    def __init__(self, model: PreTrainedModel, *, max_length: int) -> None:
        super().__init__()
        _refuse_unpackable(model, max_length=max_length)
        self.model = _share_parameters(model)
        adapt(self.model)
        self.max_length = max_length
        self.keeps_rows = "logits_to_keep" in _parameters(model)
        freeze_rotary(self.model, max_length=max_length)
        name_expert_activations(self.model)
        self.model.config._experts_implementation = IMPLEMENTATION
        calls = self._probe()
        self.layers = tuple(call.shape for call in calls)
        _number(calls)
        self.model.config._attn_implementation = IMPLEMENTATION

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        kept = {"logits_to_keep": rows} if self.keeps_rows else {}
        output = self.model(
            input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **kept
        )
        logits: Tensor = output.logits[0] if self.keeps_rows else output.logits[0, rows]
        return logits

    def _probe(self) -> tuple[AttentionCall, ...]:
        self.model.config._attn_implementation = PROBE
        positions = torch.arange(2, device=self.device)
        calls = find_attention_calls(
            lambda: self(positions, positions, positions[-1:]), max_length=self.max_length
        )
        if not calls:
            raise UnsupportedGraphError(
                f"{type(self.model).__name__} computes attention itself instead of calling "
                "transformers' AttentionInterface, so its KV cache cannot be paged"
            )
        return calls


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _refuse_unpackable(model: PreTrainedModel, *, max_length: int) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedGraphError(f"{name} is an encoder-decoder; only decoders can be packed")
    if not model.can_generate():
        raise UnsupportedGraphError(
            f"{name} has no language-model head; pass a causal language model, such as what "
            "AutoModelForCausalLM loads"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedGraphError(
            f"{name} keeps recurrent state beside keys and values; packed steps carry only those"
        )
    if "position_ids" not in _parameters(model):
        raise UnsupportedGraphError(
            f"{name}.forward takes no position_ids: it counts positions from the start of its "
            "input, where a packed step has tokens of many requests"
        )

    if any(_scales_by_row(module, max_length) for module in model.modules()):
        raise UnsupportedGraphError(
            f"{name} scales queries by their row in the input (attn_temperature_tuning): right for "
            "one sequence, wrong for packed ones. Lower max_model_len below its floor_scale, where "
            "the scale is 1"
        )


def _scales_by_row(module: nn.Module, max_length: int) -> bool:
    floor_scale = getattr(module, "floor_scale", None)
    return (
        isinstance(floor_scale, int | float)
        and bool(getattr(module, "attn_temperature_tuning", False))
        and max_length >= floor_scale
    )


def _share_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules and configuration around the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    packed: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    packed.eval()
    return packed


def _number(calls: tuple[AttentionCall, ...]) -> None:
    """By call and not by ``layer_idx``, which some models share between calls and others lack."""
    by_module: dict[nn.Module, list[tuple[int, int, int]]] = {}
    for layer, call in enumerate(calls):
        settings = (layer, call.visibility.window, call.visibility.chunk)
        by_module.setdefault(call.module, []).append(settings)
    for module, settings_of_calls in by_module.items():
        number_attention_calls(module, calls=settings_of_calls)
