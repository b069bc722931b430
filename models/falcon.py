"""Falcon in packed steps: attention through transformers' interface, keys and values once per group.

``FalconAttention`` computes attention itself, and where query heads share keys and values it first
repeats them for every head, which would make the KV cache as many times larger.
"""

from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import (
    FALCON_ATTENTION_CLASSES,
    FalconAttention,
    apply_rotary_pos_emb,
)

from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.models.interfaces import packed_attention

__all__ = ["adapt"]


class PackedFalconAttention(FalconAttention):
    """As its base class under transformers' own implementations: what we are compared with."""

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        attend = packed_attention(self)
        if attend is None:
            stock: tuple[Tensor, Tensor | None] = super().forward(hidden_states, **inputs)
            return stock
        query, key, value = self._split_groups(self.query_key_value(hidden_states))
        query, key = apply_rotary_pos_emb(query, key, *inputs["position_embeddings"])
        mask = inputs["attention_mask"]
        out, _ = attend(self, query, key, value, mask, scaling=self.inv_norm_factor)
        return self.dense(out.flatten(2)), None

    def _split_groups(self, fused: Tensor) -> tuple[Tensor, ...]:
        """``[1, heads, T, dim]`` each, heads in the order of the weight.

        A group is its query heads, then one key and one value: all heads are one group where they
        share keys and values, and each head is a group where none do. Slices only, no index tensors.
        """
        num_groups = cast("int", self.num_kv_heads)
        queries = self.num_heads // num_groups
        groups = fused.view(*fused.shape[:2], num_groups, queries + 2, self.head_dim)
        parts = groups.split([queries, 1, 1], dim=3)
        return tuple(part.flatten(2, 3).transpose(1, 2) for part in parts)


def adapt(model: PreTrainedModel) -> None:
    """Change the attention modules of ``model``; refuses those that add a position bias."""
    if model.config.alibi:
        raise UnsupportedGraphError(
            f"{type(model).__name__} with alibi adds a position bias to attention, which packed "
            "attention cannot represent; only Falcon models with rotary positions can be packed"
        )
    for module in model.modules():
        # Exactly these classes: one that overrides their forward would lose what it does.
        if type(module) in FALCON_ATTENTION_CLASSES.values():
            module.__class__ = PackedFalconAttention
