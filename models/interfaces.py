"""The functions that transformers calls in place of its own attention and experts.

The mask interface knows no ``"nanoflow"``, so no mask is built: the operator owns causality, windows and
chunks. What it cannot see from a call is left on each module by :mod:`nanoflow_compiler.models.probe`.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanoflow_compiler import ops
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.experts import ACTIVATIONS, activate
from nanoflow_compiler.models.probe import PROBE

__all__ = [
    "IMPLEMENTATION",
    "name_expert_activations",
    "number_attention_calls",
    "packed_attention",
]

IMPLEMENTATION = "nanoflow"

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class NumberedModule(Protocol):
    """An attention module of ours, with the (layer, window, chunk) of each call that it makes."""

    nanoflow_calls: list[tuple[int, int, int]]
    nanoflow_next_call: int


class ExpertsModule(Protocol):
    """What transformers sets on the experts modules that go through its interface, and our name."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    down_proj: Tensor
    down_proj_bias: Tensor
    nanoflow_activation: str

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...

    def act_fn(self, x: Tensor) -> Tensor: ...


def number_attention_calls(module: nn.Module, *, calls: list[tuple[int, int, int]]) -> None:
    """Tell ``module`` the (layer, window, chunk) of each call that it makes in one forward."""
    numbered = cast("NumberedModule", module)
    numbered.nanoflow_calls = calls
    numbered.nanoflow_next_call = 0


def _next_call(module: NumberedModule) -> tuple[int, int, int]:
    index = module.nanoflow_next_call
    # Back at zero after a forward, hence a guard on this number holds for the next one.
    module.nanoflow_next_call = (index + 1) % len(module.nanoflow_calls)
    return module.nanoflow_calls[index]


def attention_forward(  # noqa: PLR0913 - the signature is that of transformers
    module: NumberedModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: object,
) -> tuple[Tensor, None]:
    """``[1, heads, T, dim]`` in, ``[1, T, heads, dim]`` out."""
    del attention_mask
    layer, window, chunk = _next_call(module)
    out = ops.attention(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        layer,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        window,
        chunk,
        softcap or 0.0,
        s_aux,
        True,
        0,
    )
    return out[None], None


def packed_attention(module: nn.Module) -> AttentionFunction | None:
    """What an adapted attention module calls in packed steps.

    ``None`` under transformers' own implementations: the module then does what it did before.
    """
    config = cast("Any", module.config)
    name: str = config._attn_implementation
    return ALL_ATTENTION_FUNCTIONS[name] if name in (PROBE, IMPLEMENTATION) else None


def experts_forward(
    module: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One operator in place of a loop over experts; the stacked weights are its arguments."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return ops.moe_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, up),
        module.down_proj,
        getattr(module, f"{up}_bias") if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        module.nanoflow_activation,
        module.has_gate,
        module.is_transposed,
    )


def name_expert_activations(model: nn.Module) -> None:
    """Leave on each experts module the name by which the operator knows its activation."""
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            experts = cast("ExpertsModule", module)
            experts.nanoflow_activation = _activation_name(experts, where=name)


def _activation_name(module: ExpertsModule, *, where: str) -> str:
    """Recognised by what it computes, because models subclass and rename the same few functions."""
    x = 8 * torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    expected = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    for name in (*ACTIVATIONS, "clamped_swiglu"):
        actual = activate(x, name=name, gated=module.has_gate)
        if actual.shape == expected.shape and torch.allclose(actual, expected, 1e-5, 1e-5):
            return name
    raise UnsupportedGraphError(
        f"the experts in {where} ({type(module).__name__}) use an activation that "
        f"nanoflow::moe_experts does not know; it knows {', '.join(ACTIVATIONS)}, clamped_swiglu"
    )


AttentionInterface.register(IMPLEMENTATION, attention_forward)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
