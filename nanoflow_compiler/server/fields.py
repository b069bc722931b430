"""Fields that are known and not declared: refused by name where they would change the answer."""

from collections.abc import Mapping
from typing import Any

from nanoflow_compiler.server.errors import ApiError

__all__ = ["HARMLESS", "REFUSED", "refuse_unsupported", "refused"]

REFUSED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "web_search_options": (),
    # vLLM's
    "cache_salt": ("",),
    "chat_template": (),
    "data_parallel_rank": (),
    "ec_transfer_params": ({},),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "priority": (0,),
    "prompt_embeds": ([],),
    "repetition_detection": ({},),
    "return_prompt_text": (False,),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Name -> the values that change nothing and pass; null always does."""

HARMLESS = frozenset(
    {
        # OpenAI's: who asks, what it may cost, and hints that no answer has to follow
        *("metadata", "prediction", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"),
        "verbosity",
        # vLLM's: about media, reasoning and beams, of which there are none; or about other endpoints
        *("early_stopping", "guided_decoding_backend", "include_reasoning", "media_io_kwargs"),
        *("mm_processor_kwargs", "return_mm_kwargs", "return_token_offsets"),
        *("routed_experts_prompt_start", "session_id"),
    }
)
"""Known fields that change nothing here, whatever they say. They pass, as unknown ones do."""


def refuse_unsupported(extra: Mapping[str, Any] | None) -> None:
    """``extra`` is what the model of the request does not declare."""
    for name, value in (extra or {}).items():
        if name in REFUSED and value not in REFUSED[name]:
            raise refused(name)


def refused(name: str) -> ApiError:
    """Says which field cannot be served."""
    return ApiError(
        f"{name} is not supported by this server; leave it out",
        param=name,
        code="unsupported_parameter",
    )
