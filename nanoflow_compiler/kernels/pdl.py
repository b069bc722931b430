"""Programmatic dependent launch: a kernel begins while the one before it in its stream still runs.

A kernel launched with ``pdl=True`` may begin as soon as all thread blocks of its predecessor have called
:func:`let_next_begin` or ended, and its :func:`wait` returns when the predecessor has ended and everything
that it wrote can be seen. What a kernel does before :func:`wait` therefore costs no time of its own: the
gap of a launch, setting up, and asking for weights. This is correct under one rule.

**A kernel launched with PDL waits before it reads or writes anything that a step writes.** Before
:func:`wait` it may touch only what no kernel of the step writes: weights, and arrays that were copied to
the device before the step's first kernel began; the latter past the first-level cache (``.cg``), which may
hold what they were in another step.

Why the rule is enough. Let A, B, C follow each other, all launched with PDL. C may begin while A still
runs: A and B have both let the next one begin. But when the wait of C returns, B has ended, and B ended
after its own wait, so A has ended too, and whatever was before A. Hence all earlier kernels have ended,
not only the predecessor, and writing memory that an older kernel reads (which an allocator gave away
again, say) is as safe as reading what it wrote. Three things would break this:

- A kernel of which *no* thread block waits. It could end before its predecessor, and the kernel after it
  would wait for nothing. A thread block without work may return without waiting, if another one waits.
- Writing before the wait, even memory of which the predecessor knows nothing: the one before it may.
- Loads that a compiler moves above the wait. The wait is an instruction with side effects, behind which
  Triton and LLVM leave all accesses of memory; loops that are pipelined begin behind it as well.

Kernels launched without PDL (cuBLAS, copies, Inductor) mix freely with these. One that follows a kernel
with PDL begins when that has ended, hence when all before it have. One that precedes it lets nobody begin
early, or it does so by the same rule. Between streams nothing changes, but the first kernel behind a wait
for an event must be launched without PDL: it has two predecessors. Graphs keep all of this when they are
captured: the edge between the two kernels becomes a programmatic one.

Thread blocks that wait keep their registers and shared memory, but never from those they wait for: these
have all begun by then.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton.language as tl

from nanoflow_compiler.kernels.jit import jit
from nanoflow_compiler.sm_budget import is_alone

__all__ = [
    "can_chain",
    "launch",
    "let_next_begin",
    "may_chain",
    "may_chain_step",
    "prefetch_rows",
    "take_turn",
    "wait",
]

_CAPABILITY = (9, 0)


def can_chain(device: torch.device) -> bool:
    """Whether a GPU has programmatic dependent launch."""
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def may_chain(device: torch.device) -> bool:
    """Whether kernels that are launched now may begin before the one in front of them has ended."""
    return is_alone() and can_chain(device)


def may_chain_step(device: torch.device) -> bool:
    """The same for kernels that read plans before they wait: those of a captured step lie there before it."""
    return torch.cuda.is_current_stream_capturing() and may_chain(device)


def launch(kernel: Any, grid: tuple[int, ...], *, pdl: bool) -> Callable[..., None]:
    """The kernel over a grid; it takes ``PDL``, and without it neither waits nor lets others begin."""
    options = {"launch_pdl": True} if pdl else {}
    return partial(kernel[grid], PDL=pdl, **options)


@jit
def wait(PDL: tl.constexpr):
    """Until all kernels before this one have ended."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def let_next_begin(PDL: tl.constexpr):
    """A hint; the next kernel still waits for the end of this one before it reads anything of it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def take_turn(PDL: tl.constexpr):
    """What a kernel begins with that has nothing to do before its wait."""
    let_next_begin(PDL)
    wait(PDL)


@jit
def prefetch_rows(
    ptr,
    row_stride,
    first,
    num_rows,
    length,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ask the second-level cache for ``length`` elements of ``ROWS`` rows from ``first`` on.

    Rows begin at multiples of 16 bytes, and as many bytes are asked for. A warp asks for one row after the
    other, as many as there are lanes with something to ask for; so warps share the rows.
    """
    if PDL:
        threads = tl.arange(0, THREADS)
        of_tile = threads // 32 + threads % 32 * (THREADS // 32)
        row = first + of_tile
        is_row = (of_tile < ROWS) & (row < num_rows)
        size: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        num_bytes = tl.where(is_row, length * size, 0)
        begins = ptr + row.to(tl.int64) * row_stride
        tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
            " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [begins.to(tl.int64), num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
