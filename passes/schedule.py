"""schedule: NanoGraph -> Schedule. Assigns every part a lane, a share of the SMs and a time.

List scheduling on the networkx DAG of the nano-graph. Each resource has a lane (as far as there
are lanes). Whenever a part ends, every free lane takes the ready part with the longest path to
the end. Parts that start together divide the SMs: memory-bound work takes what saturates memory,
a collective a few, compute the rest; a part that starts alone gets the whole device, since until
it ends nothing else can become ready. So budgets never add up to more than the device has.

With one lane the result is the plain sequence, in the order of the graph. Ties break by graph
order: the same nano-graph always gives the same schedule, as tensor-parallel ranks need.
"""

import heapq
from dataclasses import dataclass, field

import networkx as nx

from nanoflow_compiler.hardware import DeviceSpec
from nanoflow_compiler.ir import NanoGraph, NanoOp, Resource, Schedule, Slot
from nanoflow_compiler.passes.estimate import roofline

__all__ = ["schedule"]

SM_STEP = 8
"""Green contexts on Hopper come in steps of 8 SMs."""
COLLECTIVE_SMS = 16
"""8 to 16 SMs saturate NVLink (TokenWeave)."""

_LANES = (Resource.COMPUTE, Resource.MEMORY, Resource.NETWORK, Resource.COPY)


def schedule(nano: NanoGraph, *, device: DeviceSpec, lanes: int) -> Schedule:
    """The list schedule of ``nano`` on ``lanes`` lanes of ``device``."""
    dag = _dag(nano)
    run = _Run(nano, device, lanes, dag, _priorities(dag, nano, lanes))
    run.start_ready()
    while run.running:
        run.advance()
        run.start_ready()
    joules = sum(op.cost.joules for op in nano.ops)
    return Schedule(
        nano=nano,
        slots=tuple(run.slots),
        num_lanes=lanes,
        num_sms=device.num_sms,
        device=device.name,
        power_floor_us=_power_floor_us(joules, device),
    )


def _power_floor_us(joules: float, device: DeviceSpec) -> float:
    """Under a power cap, no plan is faster than its energy allows."""
    if device.power_cap_watts is None:
        return 0.0
    return joules / (device.power_cap_watts - device.idle_watts) * 1e6


def _dag(nano: NanoGraph) -> "nx.DiGraph[str]":
    dag: nx.DiGraph[str] = nx.DiGraph()
    dag.add_nodes_from(op.name for op in nano.ops)
    dag.add_edges_from((edge.source, edge.target) for edge in nano.edges)
    return dag


def _priorities(dag: "nx.DiGraph[str]", nano: NanoGraph, lanes: int) -> dict[str, float]:
    """Larger goes first: the time to the end of the last dependent; nothing on a single lane."""
    if lanes == 1:
        return dict.fromkeys(dag, 0.0)
    costs = {op.name: op.cost.time_us for op in nano.ops}
    level: dict[str, float] = {}
    for name in reversed(list(nx.topological_sort(dag))):
        level[name] = costs[name] + max((level[n] for n in dag.successors(name)), default=0.0)
    return level


@dataclass(slots=True)
class _Run:
    """The device as it works through the parts."""

    nano: NanoGraph
    device: DeviceSpec
    lanes: int
    dag: "nx.DiGraph[str]"
    priority: dict[str, float]
    now_us: float = 0.0
    slots: list[Slot] = field(default_factory=list)
    running: dict[int, Slot] = field(default_factory=dict)
    ops: dict[str, NanoOp] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    ready: list[list[tuple[float, int, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ops = {op.name: op for op in self.nano.ops}
        self.order = {name: at for at, name in enumerate(self.ops)}
        self.waiting = dict(self.dag.in_degree())
        self.ready = [[] for _ in range(self.lanes)]
        for name in [name for name, count in self.waiting.items() if count == 0]:
            self.make_ready(name, lane=0)

    def make_ready(self, name: str, *, lane: int) -> None:
        """Queue a part on its resource's lane; one that takes no time happens on ``lane`` now."""
        op = self.ops[name]
        if op.cost.time_us == 0.0:
            self.slots.append(Slot(name, lane, 0, self.now_us, self.now_us))
            self.release_followers(name, lane=lane)
            return
        own = min(_LANES.index(op.op.resource), self.lanes - 1) if op.op.resource in _LANES else 0
        heapq.heappush(self.ready[own], (-self.priority[name], self.order[name], name))

    def release_followers(self, name: str, *, lane: int) -> None:
        for follower in self.dag.successors(name):
            self.waiting[follower] -= 1
            if self.waiting[follower] == 0:
                self.make_ready(follower, lane=lane)

    def advance(self) -> None:
        """Go to the next end of a part, and release what waited for it."""
        self.now_us = min(slot.end_us for slot in self.running.values())
        ended = [s for s in self.running.values() if s.end_us == self.now_us]
        for slot in ended:
            del self.running[slot.lane]
        for slot in ended:
            self.release_followers(slot.op, lane=slot.lane)

    def start_ready(self) -> None:
        """Start what the free lanes and the free SMs allow."""
        idle = [lane for lane in range(self.lanes) if lane not in self.running and self.ready[lane]]
        wanted = {lane: self.ops[self.ready[lane][0][2]] for lane in idle}
        alone = not self.running and len(idle) == 1
        for lane in sorted(idle, key=lambda lane: _wanted_sms(wanted[lane], self.device)):
            free = self.device.num_sms - sum(slot.sms for slot in self.running.values())
            sms = free if alone else min(_wanted_sms(wanted[lane], self.device), free)
            if sms >= min(SM_STEP, self.device.num_sms):
                self.start(wanted[lane], lane=lane, sms=sms)

    def start(self, op: NanoOp, *, lane: int, sms: int) -> None:
        heapq.heappop(self.ready[lane])
        share = sms / self.device.num_sms
        tokens = sum(self.nano.cell_tokens[op.first : op.last])
        kind, work = op.op.kind, op.op.work
        cost = roofline(work, kind=kind, tokens=tokens, device=self.device, share=share)
        slot = Slot(op.name, lane, sms, self.now_us, self.now_us + cost.time_us)
        self.running[lane] = slot
        self.slots.append(slot)


def _wanted_sms(op: NanoOp, device: DeviceSpec) -> int:
    """SMs that an operation needs beside others; a multiple of the step below the whole."""
    if op.op.resource is Resource.COMPUTE:
        return device.num_sms
    if op.op.resource is Resource.MEMORY:
        share = device.memory_sm_share * device.num_sms
        return min(device.num_sms, -(-int(share) // SM_STEP) * SM_STEP)
    return min(device.num_sms, COLLECTIVE_SMS)
