"""What the attention kernels share: how they are launched over pages, and the arithmetic of a sink."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.kv_cache import BLOCK_SIZE

__all__ = ["LEAST_SIDE", "LOG2E", "add_sink", "descriptor", "launch", "width"]

LOG2E = 1.4426950408889634
LEAST_SIDE = 16
"""Of a tensor core's tile."""

_LOG2E = tl.constexpr(LOG2E)


def width(pool: Tensor) -> int:
    """The dimensions of a head in a tile; those beyond its own are zero."""
    least: int = triton.next_power_of_2(pool.shape[-1])
    return max(least, LEAST_SIDE)


def descriptor(pool: Tensor) -> Any:
    """Of ``pool [blocks, heads, 64, dim]`` as pages of one head each, for the copy engine.

    What is read of a page beyond its begin or end is zero.
    """
    return TensorDescriptor.from_tensor(pool.flatten(0, 1), [1, BLOCK_SIZE, width(pool)])


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """The kernel over a grid of thread blocks."""
    launcher: Callable[..., None] = kernel[grid]
    return launcher


@jit
def add_sink(greatest, normaliser, sums, sink):
    """A sink, a logit, takes part in the normaliser and has no value."""
    sink = sink.to(tl.float32) * _LOG2E
    raised = tl.maximum(greatest, sink)
    factor = tl.exp2(greatest - raised)
    return normaliser * factor + tl.exp2(sink - raised), sums * factor[:, None]
