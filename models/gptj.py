"""GPT-J in packed steps: scores and softmax, which it computes itself, through transformers' interface."""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJ_ATTENTION_CLASSES, GPTJAttention

from nanoflow_compiler.models.interfaces import packed_attention

__all__ = ["adapt"]


class PackedGPTJAttention(GPTJAttention):
    """As its base class under transformers' own implementations: what we are compared with."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        attend = packed_attention(self)
        if attend is None:
            stock: tuple[Tensor, Tensor] = super()._attn(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
            return stock
        out, _ = attend(self, query, key, value, attention_mask, scaling=1 / self.scale_attn)
        return out.transpose(1, 2), None


def adapt(model: PreTrainedModel) -> None:
    """Change the attention modules of ``model``."""
    for module in model.modules():
        # Exactly these classes: one that overrides their methods would lose what it does.
        if type(module) in GPTJ_ATTENTION_CLASSES.values():
            module.__class__ = PackedGPTJAttention
