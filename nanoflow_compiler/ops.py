"""The custom operators of packed models: schema, shape function and implementation.

They make the graph of a model closed and free of mutation. The KV cache is outside the graph, so
attention names no mutated argument; that an append precedes the read is an edge of the graph instead,
once :func:`attention` is written as its two halves. Tokens are packed: ``T`` rows of any requests, and
``part`` says which rows of the step they are (see :mod:`nanoflow_compiler.attention_state`).
"""

# ruff: noqa: PLR0913, PLR0917 - the arguments of an operator are those of its schema

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.attention_plan import Visibility
from nanoflow_compiler.attention_state import current_state
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.experts import ExpertWeights, run_experts
from nanoflow_compiler.paged_attention import append, attend
from nanoflow_compiler.scoring import Scoring

__all__ = ["attention", "define", "kv_append", "moe_experts", "paged_attention"]

Kernel = Callable[..., Tensor]

_LIBRARY = torch.library.Library("nanoflow", "FRAGMENT")


def define(schema: str, *, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Kernel:
    """The operator of ``schema``.

    A plain library entry and not ``torch.library.custom_op``, whose wrappers double the cost of a call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"nanoflow::{name}", fake, lib=_LIBRARY)
    operator: Kernel = getattr(torch.ops.nanoflow, name).default
    return operator


def _kv_append(key: Tensor, value: Tensor, layer: int, part: int) -> Tensor:
    state = current_state()
    append(key, value, cache=state.cache, layer=layer, part=state.parts[part])
    return key.new_empty(0)


def _kv_append_fake(key: Tensor, value: Tensor, layer: int, part: int) -> Tensor:
    del value, layer, part
    return key.new_empty(0)


def _paged_attention(
    query: Tensor,
    kv_handle: Tensor,
    layer: int,
    v_head_dim: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
    part: int,
) -> Tensor:
    del kv_handle, v_head_dim
    if not causal:
        raise UnsupportedGraphError(
            f"attention {layer} is not causal: a token of a decoder may only see the tokens before it"
        )
    state = current_state()
    return attend(
        query,
        cache=state.cache,
        layer=layer,
        part=state.parts[part],
        visibility=Visibility(window, chunk),
        scoring=Scoring(scale, softcap, sinks),
    )


def _paged_attention_fake(
    query: Tensor, kv_handle: Tensor, layer: int, v_head_dim: int, *_settings: object
) -> Tensor:
    del kv_handle, layer
    return query.new_empty(*query.shape[:2], v_head_dim)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
    part: int,
) -> Tensor:
    handle = _kv_append(key, value, layer, part)
    settings = (scale, window, chunk, softcap, sinks, causal, part)
    return _paged_attention(query, handle, layer, value.shape[-1], *settings)


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_settings: object) -> Tensor:
    del key
    return query.new_empty(*query.shape[:2], value.shape[-1])


def _moe_experts(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
) -> Tensor:
    weights = ExpertWeights(up, down, up_bias, down_bias, activation, gated, transposed)
    return run_experts(
        hidden, top_k_index=top_k_index, top_k_weights=top_k_weights, weights=weights
    )


def _moe_experts_fake(hidden: Tensor, *_inputs: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


# The metadata is read by `part` alone; `window`, `chunk` and `softcap` are 0 where there is none.
_SETTINGS = (
    "float scale, int window, int chunk, float softcap, Tensor? sinks, bool causal, int part"
)

# Appends keys and values [T, KV heads, dim] to the cache of `layer`, then attends: [T, heads, v dim].
attention = define(
    f"attention(Tensor query, Tensor key, Tensor value, int layer, {_SETTINGS}) -> Tensor",
    kernel=_attention,
    fake=_attention_fake,
)

# The first half of `attention`. The handle is empty: it stands for the cache as the append left it.
kv_append = define(
    "kv_append(Tensor key, Tensor value, int layer, int part) -> Tensor",
    kernel=_kv_append,
    fake=_kv_append_fake,
)

# The second half of `attention`.
paged_attention = define(
    f"paged_attention(Tensor query, Tensor kv_handle, int layer, int v_head_dim, {_SETTINGS}) -> Tensor",
    kernel=_paged_attention,
    fake=_paged_attention_fake,
)

# A mixture of experts, row by row: hidden [T, H] and its routing [T, k] to [T, H].
moe_experts = define(
    "moe_experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor up, Tensor down, "
    "Tensor? up_bias, Tensor? down_bias, str activation, bool gated, bool transposed) -> Tensor",
    kernel=_moe_experts,
    fake=_moe_experts_fake,
)
