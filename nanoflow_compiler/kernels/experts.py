"""A mixture of experts in four launches, none of which waits for the host: see ``experts.run_experts``.

Pairs of token and expert are ordered by expert, multiplied and activated, multiplied again, and added up
for each token in the order of its experts. Sums are float32 everywhere; what lies between the launches has
the dtype of the tokens. No result depends on the order in which thread blocks run.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_compiler.experts import ExpertWeights, activate
from nanoflow_compiler.kernels.expert_math import KNOWN
from nanoflow_compiler.kernels.expert_plan import ExpertTiles, is_expert, plan_tiles
from nanoflow_compiler.kernels.grouped_gemm import Activation, Matrices, Tiling, multiply_tiles
from nanoflow_compiler.kernels.jit import jit

__all__ = ["run_experts"]

_COLUMNS = 1024


def run_experts(
    hidden: Tensor,
    *,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertWeights,
    tiling: Tiling | None = None,
) -> Tensor:
    """The weighted sum of each token's experts; what is no expert adds nothing."""
    if not top_k_index.numel():
        return hidden.new_zeros(hidden.shape)
    num_experts = len(weights.up)
    tiling = tiling or Tiling.of(top_k_index.numel(), num_experts=num_experts, dtype=hidden.dtype)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    tiles = plan_tiles(top_k_index, num_experts=num_experts, rows=tiling.rows)
    inner = _inner(hidden, weights, tiles=tiles, tiling=tiling)
    down = Matrices(weights.down, weights.down_bias, weights.transposed)
    results = multiply_tiles(inner, down, tiles=tiles, tiling=tiling, to_pairs=True)
    return _weighted_sums(results, top_k_index, top_k_weights, num_experts=num_experts)


def _inner(hidden: Tensor, weights: ExpertWeights, *, tiles: ExpertTiles, tiling: Tiling) -> Tensor:
    """What the second product multiplies, in the order of the tiles."""
    up = Matrices(weights.up, weights.up_bias, weights.transposed)
    given: dict[str, Any] = {"tiles": tiles, "tiling": tiling, "to_pairs": False}
    if weights.activation in KNOWN:
        activation = Activation(weights.activation, weights.gated)
        return multiply_tiles(hidden, up, activation=activation, **given)
    inner = multiply_tiles(hidden, up, **given)
    return activate(inner, name=weights.activation, gated=weights.gated)


def _weighted_sums(
    results: Tensor, chosen: Tensor, top_k_weights: Tensor, *, num_experts: int
) -> Tensor:
    num_tokens, top_k = chosen.shape
    num_columns = results.shape[1]
    out = results.new_empty(num_tokens, num_columns)
    launcher: Any = _add_up[(num_tokens, triton.cdiv(num_columns, _COLUMNS))]
    launcher(
        results,
        chosen,
        top_k_weights,
        out,
        num_columns,
        TOP_K=top_k,
        NUM_EXPERTS=num_experts,
        COLUMNS=_COLUMNS,
    )
    return out


@jit
def _add_up(
    results_ptr,
    chosen_ptr,
    weights_ptr,
    out_ptr,
    num_columns,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    sums = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        is_there = is_expert(tl.load(chosen_ptr + pair), NUM_EXPERTS)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        result = tl.load(
            results_ptr + pair * num_columns + columns, mask=is_column & is_there, other=0.0
        )
        sums += tl.where(is_there, weight * result.to(tl.float32), 0.0)
    tl.store(
        out_ptr + token * num_columns + columns,
        sums.to(out_ptr.dtype.element_ty),
        mask=is_column,
    )
