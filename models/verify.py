"""Compares a packed decoder with its own model on a few tokens, before it serves anyone.

Some models mix tokens outside the attention interface: by convolutions, by recurrent state, by positions
that they count themselves. In a packed step that would make silently wrong text, so it is an error here.
"""

import copy
import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.kv_cache import KVCache
from nanoflow_compiler.models.hf import PackedDecoder

__all__ = ["verify_packed"]

LENGTH = 6
# Two sequences in two steps: how many tokens of each are computed after the first, and in the end.
STEPS = ([4, 3], [LENGTH, LENGTH])
# A model that leaks between requests is off by the order of its logits.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 0.1


@torch.inference_mode()
def verify_packed(packed: PackedDecoder) -> None:
    """Raise :class:`UnsupportedGraphError` if packing changes what the model computes."""
    size = packed.model.config.get_text_config().vocab_size
    sequences = (torch.arange(2 * LENGTH, device=packed.device) * 37 + 11).view(2, LENGTH) % size
    expected = _stock_logits(packed, sequences)
    error = (_packed_logits(packed, sequences) - expected).norm() / expected.norm()
    limit = TOLERANCE.get(packed.layers[0].dtype, COARSE_TOLERANCE)
    # Not a number: the weights themselves are at fault, which eager execution shows as well.
    if error > limit:
        raise UnsupportedGraphError(
            f"{type(packed.model).__name__} computes something else when requests are packed "
            f"(relative error {error:.1e}): its tokens mix outside the attention interface, or it "
            "counts positions itself"
        )


def _stock_logits(packed: PackedDecoder, sequences: Tensor) -> Tensor:
    """By eager attention, because the fused functions of transformers drop what they cannot do."""
    tensors = itertools.chain(packed.model.parameters(), packed.model.buffers())
    model = copy.deepcopy(packed.model, {id(tensor): tensor for tensor in tensors})
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    logits: Tensor = model(input_ids=sequences, use_cache=False).logits
    return logits[:, -1].float()


def _packed_logits(packed: PackedDecoder, sequences: Tensor) -> Tensor:
    cache = KVCache.allocate(packed.layers, num_blocks=3, device=packed.device)
    # Attended in plain PyTorch: a kernel would be compiled first, and it is the model that is in question.
    cache = replace(cache, tables=(None,) * len(cache.tables))
    tables = np.array([[1], [2]])
    logits = torch.empty(0)
    for starts, ends in itertools.pairwise(([0, 0], *STEPS)):
        query_lens = np.subtract(ends, starts)
        layout = StepLayout.pack(
            query_lens=query_lens, context_lens=np.array(starts), block_tables=tables
        )
        spans = [
            torch.arange(*span, device=packed.device) for span in zip(starts, ends, strict=True)
        ]
        input_ids = torch.cat([row[span] for row, span in zip(sequences, spans, strict=True)])
        rows = torch.from_numpy(np.cumsum(query_lens) - 1).to(packed.device)
        part = layout.part(0, len(input_ids), device=packed.device)
        with attention_state(AttentionState(cache, (part,))):
            logits = packed(input_ids, torch.cat(spans), rows)
    return logits
