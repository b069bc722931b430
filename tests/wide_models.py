"""The architectures of ``tiny_models``, wide enough for tensor cores and for logits that are not ties."""

import torch

from tiny_models import BUILDERS, COMMON

WIDTH = 256
VOCAB_SIZE = 512

COMMON_CHANGES = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
HEADS = {"head_dim": 64}
OWN = {
    "mistral": HEADS,
    "qwen3": HEADS,
    "gemma2": HEADS | {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 20.0},
    "gemma3": HEADS | {"query_pre_attn_scalar": 64},
    "gpt2": {"n_embd": WIDTH, "vocab_size": VOCAB_SIZE},
    "opt": {"ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH},
    "falcon": {"ffn_hidden_size": 2 * WIDTH},
    "granite": {"attention_multiplier": 0.125},
    "qwen3_moe": HEADS | {"moe_intermediate_size": WIDTH},
    "deepseek_v3": {
        "moe_intermediate_size": WIDTH,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "gpt_oss": HEADS,
}
WITHOUT_COMMON = ("gpt2",)
"""Whose configuration spells the sizes otherwise."""


def wide(name, *, dtype=torch.float32, device="cpu", **changes):
    """Weights as large as keeps each layer's outputs like those of the tiny model."""
    common = {} if name in WITHOUT_COMMON else COMMON_CHANGES
    model = BUILDERS[name](**(common | OWN.get(name, {}) | changes))
    scale = (COMMON["hidden_size"] / WIDTH) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
            # Buffers, such as the frequencies of rotary embeddings, stay as they are.
            parameter.data = parameter.data.to(dtype)
    return model.to(device)
