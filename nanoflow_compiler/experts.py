"""A mixture of experts: on a CPU in plain PyTorch, with one matrix product per expert hit."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "ExpertWeights", "activate", "run_experts"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": functional.relu,
    "relu_squared": _relu_squared,
}


def _clamped_swiglu(gate_up: Tensor) -> Tensor:
    """The gate of gpt-oss, whose columns alternate between gate and up."""
    gate = gate_up[..., ::2].clamp(max=7.0)
    up = gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def activate(x: Tensor, *, name: str, gated: bool) -> Tensor:
    """What lies between the two matrix products of an expert; a gate halves the size."""
    if name == "clamped_swiglu":
        return _clamped_swiglu(x)
    if not gated:
        return ACTIVATIONS[name](x)
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate) * up


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """All experts of one layer, stacked on the first dimension.

    Matrices are ``[out, in]``, or ``[in, out]`` if ``transposed``. A gated expert computes twice its
    inner size, gate then up, and multiplies the activated gate with up.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    gated: bool
    transposed: bool

    def __call__(self, x: Tensor, *, expert: int) -> Tensor:
        inner = activate(
            self._linear(x, self.up[expert], self.up_bias, expert),
            name=self.activation,
            gated=self.gated,
        )
        return self._linear(inner, self.down[expert], self.down_bias, expert)

    def _linear(self, x: Tensor, weight: Tensor, biases: Tensor | None, expert: int) -> Tensor:
        bias = None if biases is None else biases[expert]
        return functional.linear(x, weight.t() if self.transposed else weight, bias)


def run_experts(
    hidden: Tensor, *, top_k_index: Tensor, top_k_weights: Tensor, weights: ExpertWeights
) -> Tensor:
    """The weighted sum of each token's experts; an index past the last expert adds nothing.

    On a GPU nothing is read by the host: the kernels may be captured.
    """
    if hidden.is_cuda and hidden.dtype is not torch.float64:
        kernels = import_module("nanoflow_compiler.kernels.experts")
        out: Tensor = kernels.run_experts(
            hidden, top_k_index=top_k_index, top_k_weights=top_k_weights, weights=weights
        )
        return out
    return _run_grouped(
        hidden, top_k_index=top_k_index, top_k_weights=top_k_weights, weights=weights
    )


def _run_grouped(
    hidden: Tensor, *, top_k_index: Tensor, top_k_weights: Tensor, weights: ExpertWeights
) -> Tensor:
    num_experts, top_k = weights.up.shape[0], top_k_index.shape[1]
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=num_experts)[:num_experts].tolist()
    out = hidden.new_zeros(hidden.shape[0] * top_k, hidden.shape[1])
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = order[start : start + count]
            out[pairs] = weights(hidden[pairs // top_k], expert=expert)
            start += count
    return torch.einsum(
        "tkh,tk->th", out.view(-1, top_k, out.shape[1]), top_k_weights.to(out.dtype)
    )
