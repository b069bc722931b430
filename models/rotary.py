"""Fixes rotary embeddings that would choose their frequencies by the length of what they are given.

In a packed step the longest position belongs to whatever requests are in it, so a request's tokens would
depend on its neighbours. The choice is made once, for the longest sequence that the engine admits.
"""

from typing import cast

from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["freeze_rotary"]


def freeze_rotary(model: nn.Module, *, max_length: int) -> None:
    """Change ``model`` so that no rotary embedding looks at lengths any more."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            module.rope_type = _freeze(module, rope_type, max_length=max_length)  # type: ignore[assignment]
        elif isinstance(rope_type, dict):
            module.rope_type = {  # type: ignore[assignment]
                layer: _freeze(module, kind, max_length=max_length, layer_type=layer)
                for layer, kind in rope_type.items()
            }


def _freeze(module: nn.Module, rope_type: str, *, max_length: int, **layer_type: str) -> str:
    if "dynamic" not in rope_type and rope_type != "longrope":
        return rope_type
    prefix = "".join(f"{name}_" for name in layer_type.values())
    device = cast("Tensor", getattr(module, f"{prefix}inv_freq")).device
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](
        module.config, device, seq_len=max_length, **layer_type
    )
    module.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)
    return "frozen"
