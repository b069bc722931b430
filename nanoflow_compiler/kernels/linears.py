"""Linears by those of our kernels that ``kernel_choice`` names; each has a row in ``IMPLEMENTATIONS``.

A kernel that cannot take what it is given (its strides, a type, too many rows) leaves it to ATen, so
that a table may be wrong about speed and nothing else.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nanoflow_compiler.experts import ACTIVATIONS
from nanoflow_compiler.kernel_choice import ATEN, Choice

__all__ = [
    "IMPLEMENTATIONS",
    "Linear",
    "by_aten",
    "by_kernel",
    "choices",
    "compute",
    "gate",
]


@dataclass(frozen=True, slots=True)
class Linear:
    """A call: ``x [rows, depth] @ weight_t [depth, columns]``, and what is done with the product."""

    x: Tensor
    weight_t: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    in_place: bool = False
    """The result takes the place of the residual."""
    activation: str = ""
    """Of a gate, which is the first half of the columns; the second is what it multiplies."""


Implementation = Callable[[Linear, Mapping[str, Any]], Tensor | None]


def compute(call: Linear, *, choice: Choice) -> Tensor:
    """The result, by ATen where ``choice`` says so or cannot take the call."""
    result = by_kernel(call, choice=choice)
    return by_aten(call) if result is None else result


def by_kernel(call: Linear, *, choice: Choice) -> Tensor | None:
    """The result; None where ``choice`` is ATen or cannot take the call."""
    run = None if choice == ATEN else IMPLEMENTATIONS.get(choice.implementation)
    try:
        return None if run is None else run(call, dict(choice.tiling))
    except _UnknownTilingError:
        return None


def by_aten(call: Linear) -> Tensor:
    """The product by ATen, then what follows it; in place it is added before it is rounded."""
    if call.in_place and call.residual is not None:
        return call.residual.addmm_(call.x, call.weight_t)
    if call.bias is None:
        product = torch.mm(call.x, call.weight_t)
    else:
        product = torch.addmm(call.bias, call.x, call.weight_t)
    if call.activation:
        return gate(product, activation=call.activation)
    return product if call.residual is None else product.add_(call.residual)


def gate(product: Tensor, *, activation: str) -> Tensor:
    """``act(gate) * up`` of a product ``[rows, 2 F]``."""
    kernels = _kernels("gated")
    if kernels.can_gate(product, activation=activation):
        pdl = _kernels("pdl").may_chain(product.device)
        gated: Tensor = kernels.gate_rows(product, activation=activation, pdl=pdl)
        return gated
    first, second = product.chunk(2, dim=1)
    return ACTIVATIONS[activation](first) * second


def _persistent(call: Linear, tiling: Mapping[str, Any]) -> Tensor | None:
    kernels = _kernels("gemm")
    given = {"tiling": _tiling(kernels.GemmTiling, tiling)}
    x, weight = call.x, call.weight_t
    result: Tensor | None = None
    if call.activation:
        if call.bias is None and kernels.can_gate(x, weight, activation=call.activation):
            result = kernels.multiply_gated(x, weight, activation=call.activation, **given)
    elif kernels.can_run(x, weight, bias=call.bias, residual=call.residual):
        given["out"] = call.residual if call.in_place else None
        result = kernels.multiply(x, weight, bias=call.bias, residual=call.residual, **given)
    return result


def _few_rows(call: Linear, tiling: Mapping[str, Any]) -> Tensor | None:
    kernels = _kernels("few_rows")
    if not _fits_few_rows(kernels, call, tiling):
        return None
    chosen = _tiling(kernels.FewRowsTiling, tiling)
    given = {"bias": call.bias, "tiling": chosen, "pdl": _kernels("pdl").may_chain(call.x.device)}
    weight = call.weight_t.t()
    result: Tensor
    if call.activation:
        result = kernels.multiply_gated(call.x, weight, activation=call.activation, **given)
    else:
        given["out"] = call.residual if call.in_place else None
        result = kernels.multiply(call.x, weight, residual=call.residual, **given)
    return result


def _fits_few_rows(kernels: Any, call: Linear, tiling: Mapping[str, Any]) -> bool:
    x, weight = call.x, call.weight_t.t()
    if not tiling.get("uses_dot", True) and len(x) > kernels.MOST_ADDED_ROWS:
        return False
    if call.residual is not None and call.residual.stride(1) != 1:
        return False
    if call.bias is not None and not call.bias.is_contiguous():
        return False
    if call.activation:
        return bool(kernels.can_gate_product(x, weight, activation=call.activation))
    return bool(kernels.can_multiply(x, weight))


class _UnknownTilingError(Exception):
    """A table of another release names what a tiling no longer has."""


def _tiling(kind: Any, given: Mapping[str, Any]) -> Any:
    """What a table has; None, for the kernel's own, where it has nothing."""
    try:
        return kind(**given) if given else None
    except TypeError:
        raise _UnknownTilingError from None


IMPLEMENTATIONS: dict[str, Implementation] = {"persistent": _persistent, "few_rows": _few_rows}


def choices(num_rows: int) -> Iterator[Choice]:
    """What is worth timing for so many rows, beside ATen."""
    few = _kernels("few_rows")
    if num_rows <= few.MOST_ROWS:
        for tiling in few.TILINGS:
            if tiling.uses_dot or num_rows <= few.MOST_ADDED_ROWS:
                yield _choice("few_rows", asdict(tiling))
    if num_rows > _FEWEST_PERSISTENT_ROWS:
        yield from (_choice("persistent", tiling) for tiling in _PERSISTENT)


def _choice(implementation: str, tiling: Mapping[str, Any]) -> Choice:
    return Choice(implementation, tuple(sorted(tiling.items())))


_FEWEST_PERSISTENT_ROWS = 16
_PERSISTENT: tuple[dict[str, Any], ...] = (
    {"rows": 64, "columns": 128, "num_warps": 4, "store_columns": 64},
    {"rows": 64, "columns": 256, "num_warps": 4},
    {"rows": 128, "columns": 128},
    {"rows": 128, "columns": 256, "store_columns": 64},
    {"rows": 128, "columns": 256, "num_stages": 3},
    {"rows": 256, "columns": 128, "num_stages": 3, "store_columns": 64},
)


def _kernels(name: str) -> Any:
    """Imported where they are used, because they import Triton."""
    return import_module(f"nanoflow_compiler.kernels.{name}")
