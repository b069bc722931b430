"""estimate: OpGraph -> OpGraph with the Cost of every operation on one device.

Each operation gets its roofline time, its joules and what bounds it, for the graph's tokens on
the whole device. Nothing else changes. ``roofline`` is also what the later passes call for parts
and shares of the SMs. Belongs after ``lift``.
"""

from dataclasses import replace

from nanoflow_compiler.hardware import DeviceSpec
from nanoflow_compiler.ir import Cost, OpGraph, OpKind, Resource, Work

__all__ = ["estimate", "roofline"]

_FREE = (OpKind.VIEW, OpKind.SIZES)


def estimate(graph: OpGraph, *, device: DeviceSpec) -> OpGraph:
    """The same operations, each with its cost when it has the device to itself."""
    ops = tuple(
        replace(op, cost=roofline(op.work, kind=op.kind, tokens=graph.tokens, device=device))
        for op in graph.ops
    )
    return replace(graph, ops=ops)


def roofline(
    work: Work, *, kind: OpKind, tokens: float, device: DeviceSpec, share: float = 1.0
) -> Cost:
    """Time of ``work`` for ``tokens`` tokens on a ``share`` (0 to 1) of the SMs.

    The longest of arithmetic, memory and link time, plus one launch. Arithmetic slows down with
    the share; memory only below the share that saturates it (``DeviceSpec.memory_sm_share``);
    the links not at all.
    """
    if kind in _FREE:
        return Cost(0.0, 0.0, Resource.HOST)
    flops, moved, linked = work.flops(tokens), work.bytes(tokens), work.link_bytes(tokens)
    memory_share = min(1.0, share / device.memory_sm_share)
    times = {
        Resource.COMPUTE: flops / (device.flops(work.dtype) * share),
        Resource.MEMORY: moved / (device.memory_bytes_per_s * memory_share),
        Resource.NETWORK: linked / device.link_bytes_per_s,
    }
    bound = max(times, key=lambda resource: times[resource])
    joules = flops * device.joules_per_flop + moved * device.joules_per_byte
    return Cost(times[bound] * 1e6 + device.launch_us, joules, bound)
