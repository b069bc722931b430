"""Tiny decoders with random weights, one builder per architecture that the tests exercise.

Every model has two layers, a vocabulary of 128 tokens, float32 weights drawn from one seed, and is in
evaluation mode. The weights are larger than an initialisation for training would be, so that greedy
continuations differ between prompts and a wrong mask or position changes the tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB_SIZE = 128
MAX_LENGTH = 256
SLIDING_WINDOW = 8

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}


def _common(**changes: Any) -> dict[str, Any]:
    return COMMON | changes


def _without(*names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in _common(**changes).items() if name not in names}


def build(config: hf.PretrainedConfig, *, seed: int = 0) -> hf.PreTrainedModel:
    """The causal LM of ``config`` with seeded weights; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                _fill(name, parameter)
    model.generation_config.pad_token_id = 0
    return model.eval()


def _fill(name: str, parameter: torch.Tensor) -> None:
    if parameter.ndim >= 2:
        parameter.normal_(std=0.2)
    elif name.endswith("bias") or "sinks" in name:
        parameter.normal_(std=0.1)
    else:
        parameter.uniform_(0.8, 1.2)


def llama(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.LlamaConfig(**_common(**changes)))


def mistral(**changes: Any) -> hf.PreTrainedModel:
    window = {"sliding_window": SLIDING_WINDOW, "head_dim": 8}
    return build(hf.MistralConfig(**_common(**(window | changes))))


def qwen2(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.Qwen2Config(**_common(**changes)))


def qwen3(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.Qwen3Config(**_common(**({"head_dim": 16} | changes))))


def gemma2(**changes: Any) -> hf.PreTrainedModel:
    heads = {"head_dim": 8, "query_pre_attn_scalar": 6, "sliding_window": SLIDING_WINDOW}
    softcaps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    # The SDPA path of transformers drops the softcap without a word.
    settings = heads | softcaps | {"attn_implementation": "eager"} | changes
    return build(hf.Gemma2Config(**_common(**settings)))


def gemma3(**changes: Any) -> hf.PreTrainedModel:
    heads = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": SLIDING_WINDOW}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    return build(hf.Gemma3TextConfig(**_common(**(heads | layers | changes))))


def phi3(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.Phi3Config(**_common(**({"sliding_window": None} | changes))))


def gpt2(**changes: Any) -> hf.PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MAX_LENGTH}
    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    tokens = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2}
    return build(hf.GPT2Config(**(sizes | dropouts | tokens | changes)))


def gpt_neox(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.GPTNeoXConfig(**_without("num_key_value_heads", **changes)))


def opt(**changes: Any) -> hf.PreTrainedModel:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "pad_token_id": 1}
    ignored = ("num_key_value_heads", "intermediate_size")
    return build(hf.OPTConfig(**_without(*ignored, **(sizes | changes))))


def falcon(**changes: Any) -> hf.PreTrainedModel:
    shape = {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 48}
    ignored = ("num_key_value_heads", "intermediate_size")
    return build(hf.FalconConfig(**_without(*ignored, **(shape | changes))))


def olmo2(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.Olmo2Config(**_common(**changes)))


def granite(**changes: Any) -> hf.PreTrainedModel:
    scales = {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    }
    return build(hf.GraniteConfig(**_common(**(scales | changes))))


def stablelm(**changes: Any) -> hf.PreTrainedModel:
    return build(hf.StableLmConfig(**_common(**changes)))


def starcoder2(**changes: Any) -> hf.PreTrainedModel:
    dropouts = {"residual_dropout": 0.0, "embedding_dropout": 0.0}
    settings = dropouts | {"sliding_window": SLIDING_WINDOW} | changes
    return build(hf.Starcoder2Config(**_common(**settings)))


def cohere2(**changes: Any) -> hf.PreTrainedModel:
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    settings = layers | {"sliding_window": SLIDING_WINDOW} | changes
    return build(hf.Cohere2Config(**_common(**settings)))


def mixtral(**changes: Any) -> hf.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return build(hf.MixtralConfig(**_common(**(experts | changes))))


def qwen3_moe(**changes: Any) -> hf.PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    settings = experts | {"head_dim": 16} | changes
    return build(hf.Qwen3MoeConfig(**_common(**settings)))


def deepseek_v3(**changes: Any) -> hf.PreTrainedModel:
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    latent = {
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "num_key_value_heads": 4,
    }
    return build(hf.DeepseekV3Config(**_common(**(experts | latent | changes))))


def gpt_oss(**changes: Any) -> hf.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    settings = experts | layers | rope | {"sliding_window": SLIDING_WINDOW} | changes
    return build(hf.GptOssConfig(**_common(**settings)))


BUILDERS: dict[str, Callable[..., hf.PreTrainedModel]] = {
    builder.__name__: builder
    for builder in (
        llama,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        phi3,
        gpt2,
        gpt_neox,
        opt,
        falcon,
        olmo2,
        granite,
        stablelm,
        starcoder2,
        cohere2,
        mixtral,
        qwen3_moe,
        deepseek_v3,
        gpt_oss,
    )
}
