"""Fields that are known and not supported: refused by name where they would change the answer."""

from collections.abc import Mapping
from typing import Any

from nanoflow_compiler.server.errors import ApiError

__all__ = ["REFUSED", "refuse_unsupported", "refused"]

REFUSED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "web_search_options": (),
    # vLLM's
    "cache_salt": ("",),
    "chat_template": (),
    "data_parallel_rank": (),
    "kv_transfer_params": ({},),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": ([],),
    "return_token_ids": (False,),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Name -> the values that change nothing and pass; null always does, and so does any other field."""


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
