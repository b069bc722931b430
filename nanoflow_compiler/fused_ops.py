"""Operators that stand for several nodes of a graph: linears with what follows, rotary with the append.

Each computes what the nodes did, with the same roundings; on a GPU, sums in place have one less. On a
CPU it is those very ATen calls; on a GPU a kernel of ours where one was measured to be faster
(:mod:`nanoflow_compiler.kernel_choice`).
Weights come as a product takes them: ``[depth, columns]``, the transposed view of a parameter.
"""

# ruff: noqa: PLR0913, PLR0917 - the arguments of an operator are those of its schema

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.attention_state import current_state
from nanoflow_compiler.experts import ACTIVATIONS
from nanoflow_compiler.kernel_choice import ATEN, Choice, choose
from nanoflow_compiler.kv_cache import HeadPages
from nanoflow_compiler.ops import define
from nanoflow_compiler.paged_attention import append

__all__ = ["gated_linear", "linear", "linear_add", "linear_add_", "rms_norm", "rotary_append"]


def _linear(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cuda and (choice := choose("linear", x, weight_t)) != ATEN:
        return _computed(choice, x, weight_t, bias=bias)
    return torch.mm(x, weight_t) if bias is None else torch.addmm(bias, x, weight_t)


def _linear_fake(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(x.shape[0], weight_t.shape[1])


def _linear_add(residual: Tensor, x: Tensor, weight_t: Tensor) -> Tensor:
    if x.is_cuda and (choice := choose("linear_add", x, weight_t)) != ATEN:
        return _computed(choice, x, weight_t, residual=residual)
    return torch.mm(x, weight_t).add_(residual)


def _linear_add_fake(residual: Tensor, x: Tensor, weight_t: Tensor) -> Tensor:
    del residual
    return x.new_empty(x.shape[0], weight_t.shape[1])


def _linear_add_in_place(residual: Tensor, x: Tensor, weight_t: Tensor) -> Tensor:
    if x.is_cuda:
        choice = choose("linear_add", x, weight_t)
        return _computed(choice, x, weight_t, residual=residual, in_place=True)
    return residual.add_(torch.mm(x, weight_t))


def _linear_add_in_place_fake(residual: Tensor, x: Tensor, weight_t: Tensor) -> Tensor:
    del x, weight_t
    return residual


def _gated_linear(x: Tensor, weight_t: Tensor, activation: str) -> Tensor:
    if x.is_cuda:
        choice = choose("gated_linear", x, weight_t)
        return _computed(choice, x, weight_t, activation=activation)
    gate, up = torch.mm(x, weight_t).chunk(2, dim=1)
    return ACTIVATIONS[activation](gate) * up


def _gated_linear_fake(x: Tensor, weight_t: Tensor, activation: str) -> Tensor:
    del activation
    return x.new_empty(x.shape[0], weight_t.shape[1] // 2)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, rounds_last: bool) -> Tensor:
    if x.is_cuda:
        kernels = _kernels("norms")
        normed: Tensor | None = kernels.rms_norm(x, weight, eps=eps, rounds_last=rounds_last)
        if normed is not None:
            return normed
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * scaled).to(x.dtype) if rounds_last else weight * scaled.to(x.dtype)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, rounds_last: bool) -> Tensor:
    del weight, eps, rounds_last
    return x.new_empty(x.shape)


def _rotary_append(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, layer: int, part: int
) -> tuple[Tensor, Tensor]:
    state = current_state()
    pages = state.cache.tables[layer]
    handle = key.new_empty(0)
    if isinstance(pages, HeadPages):
        slots = state.parts[part].slots
        rotated = _kernels("rotations").rotary_append(
            query, key, value, angles=(cos, sin), pages=pages, slots=slots
        )
        if rotated is not None:
            return rotated, handle
    turned = _rotate(key, cos, sin)
    append(turned, value, cache=state.cache, layer=layer, part=state.parts[part])
    return _rotate(query, cos, sin).contiguous(), handle


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [T, heads, dim]``, of which as much is rotated as ``cos [T, rotated]`` has."""
    width = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    given, rest = x[..., :width], x[..., width:]
    turned = torch.cat((-given[..., width // 2 :], given[..., : width // 2]), -1)
    rotated = given * cos + turned * sin
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def _rotary_append_fake(query: Tensor, key: Tensor, *_inputs: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(0)


def _computed(choice: Choice, x: Tensor, weight_t: Tensor, **others: Any) -> Tensor:
    linears = _kernels("linears")
    result: Tensor = linears.compute(linears.Linear(x, weight_t, **others), choice=choice)
    return result


def _kernels(name: str) -> Any:
    """Triton is there where CUDA is."""
    return import_module(f"nanoflow_compiler.kernels.{name}")


# x @ weight_t (+ bias): [T, N].
linear = define(
    "linear(Tensor x, Tensor weight_t, Tensor? bias) -> Tensor", kernel=_linear, fake=_linear_fake
)

# residual + x @ weight_t: [T, N], the product rounded before it is added.
linear_add = define(
    "linear_add(Tensor residual, Tensor x, Tensor weight_t) -> Tensor",
    kernel=_linear_add,
    fake=_linear_add_fake,
)

# The same in the memory of the residual, and on a GPU without a rounding between: no graph has it, but
# programs where nothing reads the residual afterwards.
linear_add_ = define(
    "linear_add_(Tensor(a!) residual, Tensor x, Tensor weight_t) -> Tensor(a!)",
    kernel=_linear_add_in_place,
    fake=_linear_add_in_place_fake,
)

# act(x @ gate) * (x @ up): [T, F], where weight_t [K, 2F] is gate beside up.
gated_linear = define(
    "gated_linear(Tensor x, Tensor weight_t, str activation) -> Tensor",
    kernel=_gated_linear,
    fake=_gated_linear_fake,
)

# The RMSNorm of rows [T, N], in float32: rounded before it is multiplied with the weight, or after.
rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool rounds_last) -> Tensor",
    kernel=_rms_norm,
    fake=_rms_norm_fake,
)

# Rotates queries and keys [T, heads, dim] and appends keys and values to the cache of `layer`: the
# rotated queries, and a handle as that of `kv_append`.
rotary_append = define(
    "rotary_append(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, int layer, int part) "
    "-> (Tensor, Tensor)",
    kernel=_rotary_append,
    fake=_rotary_append_fake,
)
