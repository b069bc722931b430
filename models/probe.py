"""Finds a model's attention calls, and what each may see, by running it once on two tokens.

A layer's window cannot be read from the model reliably: it is a keyword here, an attribute there, and
elsewhere only in the mask. But a model asks transformers for its masks by rule, so the probe answers
with a number in place of a mask, and each attention call shows by that number which rule governs it.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nanoflow_compiler.attention_plan import Bools, Ints, Visibility
from nanoflow_compiler.errors import UnsupportedGraphError
from nanoflow_compiler.kv_cache import LayerShape

__all__ = ["PROBE", "AttentionCall", "find_attention_calls"]

PROBE = "nanoflow-probe"

# Numbers of mask rules start here, since a mask of booleans or of 0 and -inf must not look like one.
FIRST_RULE = 2.0

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention interface, in the order of a forward."""

    module: nn.Module
    shape: LayerShape
    visibility: Visibility


@dataclass(slots=True)
class _Probe:
    max_length: int
    rules: list[Visibility] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)

    def number(self, rule: Visibility) -> float:
        if rule not in self.rules:
            self.rules.append(rule)
        return FIRST_RULE + self.rules.index(rule)

    def rule(self, mask: Tensor, *, module: nn.Module) -> Visibility:
        index = float(mask.flatten()[0]) - FIRST_RULE
        if index not in range(len(self.rules)):
            raise UnsupportedGraphError(
                f"{type(module).__name__} changes the attention mask that transformers makes "
                "(an added bias, or a mask of its own), which packed attention cannot follow"
            )
        return self.rules[int(index)]


_ACTIVE: ContextVar[_Probe] = ContextVar("nanoflow_probe")


def find_attention_calls(
    forward: Callable[[], object], *, max_length: int
) -> tuple[AttentionCall, ...]:
    """The calls that ``forward`` makes of the implementation named :data:`PROBE`.

    A rule that limits nothing within ``max_length`` tokens counts as plain causal.
    """
    probe = _Probe(max_length)
    with _active(probe), torch.no_grad():
        forward()
    return tuple(probe.calls)


@contextmanager
def _active(probe: _Probe) -> Iterator[None]:
    token = _ACTIVE.set(probe)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: object,
) -> tuple[Tensor, None]:
    probe = _ACTIVE.get()
    if settings.get("position_bias") is not None:
        raise UnsupportedGraphError(f"{type(module).__name__} adds a position bias to attention")
    if attention_mask is not None:
        visibility = probe.rule(attention_mask, module=module)
    else:
        visibility = _unmasked(module, settings)
    shape = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], key.dtype)
    probe.calls.append(AttentionCall(module, shape, visibility))
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _unmasked(module: nn.Module, settings: dict[str, object]) -> Visibility:
    """What a call without a mask sees: transformers' own functions then follow these two settings."""
    is_causal = settings.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedGraphError(
            f"{type(module).__name__} attends to later tokens; only causal attention can be packed"
        )
    window = settings.get("sliding_window")
    return Visibility(window=window if isinstance(window, int) else 0)


def _mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    local_size: int | None = None,
    **_ignored: object,
) -> Tensor:
    probe = _ACTIVE.get()
    rule = _recognise(mask_function, local_size=local_size or 0, max_length=probe.max_length)
    return torch.full((batch_size, 1, q_length, kv_length), probe.number(rule))


def _recognise(mask_function: MaskFunction, *, local_size: int, max_length: int) -> Visibility:
    """The rule that agrees with ``mask_function`` on every key, for the rows where rules differ."""
    edges = {0, 1, max_length - 1}
    edges |= {multiple * local_size + offset for multiple in (1, 2) for offset in (-1, 0, 1)}
    positions = np.array(sorted(edge for edge in edges if 0 <= edge < max_length))
    keys = np.arange(max_length)
    actual = _evaluate(mask_function, positions, keys)
    for rule in (Visibility(), Visibility(window=local_size), Visibility(chunk=local_size)):
        if (rule.mask(positions, keys=keys) == actual).all():
            return rule
    raise UnsupportedGraphError(
        f"the model's attention mask ({inspect.unwrap(mask_function).__qualname__}) is neither "
        "causal, nor a sliding window, nor chunked; packed attention can represent only those"
    )


def _evaluate(mask_function: MaskFunction, positions: Ints, keys: Ints) -> Bools:
    zero = torch.zeros((), dtype=torch.int64)
    rows, columns = torch.from_numpy(positions)[:, None], torch.from_numpy(keys)[None]
    visible: Bools = mask_function(zero, zero, rows, columns).numpy()
    return visible


AttentionInterface.register(PROBE, _attention)
AttentionMaskInterface.register(PROBE, _mask)
