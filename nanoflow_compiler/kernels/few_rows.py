"""Matrix products of few rows, whose time is that of reading the weight once: decodes of few requests.

What follows a product in a model is done where it is computed: adding a bias or a residual, or multiplying
the halves of a gated MLP with each other. What precedes it may be as well: the norm of its rows, for up to
:data:`MOST_ADDED_ROWS` of them. Kernels chain with PDL, see :mod:`pdl`; results are the same without.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_compiler.kernels.gated import GATES
from nanoflow_compiler.kernels.norm import RmsNorm
from nanoflow_compiler.kernels.pdl import can_chain, launch
from nanoflow_compiler.kernels.row_products import add_products, dot_products

__all__ = [
    "MOST_ADDED_ROWS",
    "MOST_ROWS",
    "TILINGS",
    "FewRowsTiling",
    "can_gate_product",
    "can_multiply",
    "multiply",
    "multiply_gated",
]

MOST_ROWS = 16
"""The side of a tensor core's tile: fewer rows cost as much."""
MOST_ADDED_ROWS = 4
_TMA_BYTES = 16


@dataclass(frozen=True, slots=True)
class FewRowsTiling:
    """What may be tuned."""

    columns: int
    """Of the result, for a thread block; a gate needs two rows of the weight for each."""
    depth: int
    num_stages: int
    num_warps: int
    uses_dot: bool = True
    """Tensor cores; the only way for more rows than :data:`MOST_ADDED_ROWS`."""
    prefetch: int = 512
    """Elements of each row of the weight that are asked for before the wait; a multiple of 8."""
    begins_early: bool = False
    """Whether the next kernel may begin with this one, and not just when the last weights are there."""

    @classmethod
    def of(
        cls, num_rows: int, *, has_norm: bool = False, is_gated: bool = False
    ) -> "FewRowsTiling":
        """The one to take unless another was measured to be faster."""
        if has_norm:
            assert num_rows <= MOST_ADDED_ROWS, "the norm of so many rows is computed by itself"
            return cls(4 if is_gated else 8, 512, 4, 4, uses_dot=False)
        return cls(16, 128, 6, 2) if is_gated else cls(16, 256, 6, 2)


TILINGS = (
    FewRowsTiling(16, 256, 6, 2),
    FewRowsTiling(16, 256, 4, 2),
    FewRowsTiling(16, 128, 6, 2),
    FewRowsTiling(32, 128, 4, 4),
    FewRowsTiling(4, 512, 4, 4, uses_dot=False),
    FewRowsTiling(8, 512, 4, 4, uses_dot=False),
    FewRowsTiling(4, 1024, 3, 4, uses_dot=False),
    FewRowsTiling(4, 1024, 1, 4, uses_dot=False),
    FewRowsTiling(16, 256, 4, 4, uses_dot=False),
)
"""To choose from; which is fastest depends on the weight and the card."""


def can_multiply(x: Tensor, weight: Tensor, *, norm: RmsNorm | None = None) -> bool:
    """Whether ``x [M, K]`` has few rows, and a linear layer's ``weight [N, K]`` can be streamed.

    GPUs that have the copy engine for it have programmatic dependent launch as well.
    """
    is_half = x.dtype is weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    is_flat = x.ndim == weight.ndim == 2 and x.stride(1) == weight.stride(1) == 1
    is_norm = norm is None or (norm.fits(x) and len(x) <= MOST_ADDED_ROWS)
    steps = (weight.stride(0) * weight.itemsize, weight.data_ptr(), x.shape[1] * x.itemsize)
    is_aligned = not any(step % _TMA_BYTES for step in steps)
    has_few = 0 < len(x) <= MOST_ROWS
    return is_half and is_flat and is_norm and is_aligned and has_few and can_chain(x.device)


def can_gate_product(
    x: Tensor, weight: Tensor, *, activation: str, norm: RmsNorm | None = None
) -> bool:
    """The same for ``weight [2 F, K]``, whose first half makes gates."""
    return activation in GATES and len(weight) % 2 == 0 and can_multiply(x, weight, norm=norm)


def multiply(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: RmsNorm | None = None,
    tiling: FewRowsTiling | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """``x @ weight.T + bias``, rounded to the dtype, plus ``residual [M, N]``; ``norm`` is of ``x``.

    ``out`` may be the residual.
    """
    tiling = tiling or FewRowsTiling.of(len(x), has_norm=norm is not None)
    out = x.new_empty(len(x), len(weight)) if out is None else out
    _run(x, weight, out, tiling=tiling, pdl=pdl, bias=bias, residual=residual, norm=norm)
    return out


def multiply_gated(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str,
    bias: Tensor | None = None,
    norm: RmsNorm | None = None,
    tiling: FewRowsTiling | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """``activation(gate) * up`` for the halves of ``x @ weight.T + bias``, every factor rounded."""
    tiling = tiling or FewRowsTiling.of(len(x), has_norm=norm is not None, is_gated=True)
    out = x.new_empty(len(x), len(weight) // 2) if out is None else out
    _run(x, weight, out, tiling=tiling, pdl=pdl, bias=bias, norm=norm, activation=activation)
    return out


def _run(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    tiling: FewRowsTiling,
    pdl: bool,
    bias: Tensor | None,
    norm: RmsNorm | None,
    residual: Tensor | None = None,
    activation: str = "",
) -> None:
    given: dict[str, Any] = {
        "x_ptr": x,
        "x_row_stride": x.stride(0),
        "weight_ptr": weight,
        "weight_row_stride": weight.stride(0),
        "bias_ptr": bias,
        "residual_ptr": residual,
        "residual_row_stride": 0 if residual is None else residual.stride(0),
        "out_ptr": out,
        "out_row_stride": out.stride(0),
        "num_rows": len(x),
        "num_columns": out.shape[1],
        "depth": x.shape[1],
        "prefetch": tiling.prefetch,
        "COLUMNS": tiling.columns,
        "DEPTH": tiling.depth,
        "STAGES": tiling.num_stages,
        "THREADS": 32 * tiling.num_warps,
        "BEGINS_EARLY": tiling.begins_early,
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "num_warps": tiling.num_warps,
    }
    grid = (triton.cdiv(out.shape[1], tiling.columns),)
    if tiling.uses_dot:
        assert norm is None, "a norm needs a tiling without tensor cores"
        matrix = TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth])
        launch(dot_products, grid, pdl=pdl)(matrix=matrix, ROWS=MOST_ROWS, **given)
    else:
        launch(add_products, grid, pdl=pdl)(**given, **_added(x, norm, depth=tiling.depth))


def _added(x: Tensor, norm: RmsNorm | None, *, depth: int) -> dict[str, Any]:
    """What only the kernel without tensor cores takes."""
    assert len(x) <= MOST_ADDED_ROWS, "so many rows need a tiling with tensor cores"
    return {
        "norm_ptr": norm.weight if norm else None,
        "eps": norm.eps if norm else 0.0,
        "ROWS": triton.next_power_of_2(len(x)),
        "IS_EVEN": x.shape[1] % depth == 0,
        "HAS_NORM": norm is not None,
        "ADDS_ONE": norm is not None and norm.adds_one,
        "ROUNDS_LAST": norm is not None and norm.rounds_last,
    }
