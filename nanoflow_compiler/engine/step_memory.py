"""What a step needs on a GPU beside weights and KV cache, estimated before it runs.

A formula, not a profile: attention needs a cache, whose size is what is sought. It counts the logits of the
most rows that are sampled at once, what the sampler makes of them part by part, and a few buffers as
wide as the widest linear, and adds a quarter. ``nanoflow bench throughput`` reports the peak that torch saw
(``peak_memory_bytes``), beside which the estimate can be held.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from nanoflow_compiler.engine.engine_config import EngineSizes
from nanoflow_compiler.engine.logprobs import MAX_ELEMENTS

__all__ = ["StepMemory"]

_LOGIT_BYTES = 4
"""Of a changed copy of the logits, in float32; those in the model's dtype come on top."""
_SAMPLER_BYTES = 32
"""Of each element that the sampler orders at once: values, indices in int64, sums, noise."""
_BUFFERS = 6
"""As wide as the widest linear: gate and up, their product, residual, keys, queries and values."""
_SAFETY = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes."""

    activation_bytes: int
    graph_bytes: int
    """Graphs share one pool, which holds the buffers of a step beside those of steps that run without."""

    @classmethod
    def estimate(
        cls, model: PreTrainedModel, sizes: EngineSizes, *, is_captured: bool
    ) -> "StepMemory":
        """``is_captured``: steps may run as CUDA graphs."""
        config = model.config.get_text_config()
        itemsize = model.dtype.itemsize
        num_rows = min(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        num_logits = num_rows * config.vocab_size
        sampled = _SAMPLER_BYTES * min(num_logits, MAX_ELEMENTS)
        wide = _BUFFERS * sizes.max_num_batched_tokens * _widest(model) * itemsize
        logits = num_logits * (_LOGIT_BYTES + itemsize)
        return cls(
            activation_bytes=int(_SAFETY * (logits + sampled + wide)),
            graph_bytes=int(_SAFETY * (logits + wide)) if is_captured else 0,
        )


def _widest(model: PreTrainedModel) -> int:
    """Of the linears in the layers; the experts that a token visits count together."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    widths = [max(linear.in_features, linear.out_features) for linear in linears]
    experts = [p.shape[1] for p in model.parameters() if p.dim() == 3]
    visited = getattr(config, "num_experts_per_tok", None) or 1
    return max([int(config.hidden_size), *widths, *(width * visited for width in experts)])
