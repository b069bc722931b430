"""schedule: NanoGraph -> Schedule. Assigns every part a lane, a share of the SMs and a time.

List scheduling on the networkx DAG of the nano-graph. Each resource has a lane (as far as there
are lanes). Whenever a part ends, every free lane takes the first of its ready parts. Parts that
start together divide the SMs: the memory lane takes ``memory_sms``, a collective a few, the compute
lane the rest; a part that starts alone gets the whole device, since until it ends nothing else can
become ready. So budgets never add up to more than the device has, and with two lanes they are the
two sides of one division, as green contexts need.

Which part is first, and on which lane short work runs, is a rule. No rule is best for every graph,
so each is simulated, and the schedule that ends first is kept:

- the part with the longest path to the end goes first, but earlier tokens may lead later ones by a
  share of a layer: then the attention of some lies beside the GEMMs of others (software pipelining);
- everything that is bound by memory is on the memory lane, or attention alone, and the clusters
  between two GEMMs stay on their lane, where they do not wait for the attention of other tokens.

With one lane the result is the plain sequence, in the order of the graph. Ties break by graph
order: the same nano-graph always gives the same schedule, as tensor-parallel ranks need.
"""

import heapq
from dataclasses import dataclass, field
from typing import Literal

import networkx as nx

from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.hardware import DeviceSpec
from nanoflow_compiler.ir import NanoGraph, NanoOp, OpKind, Resource, Schedule, Slot
from nanoflow_compiler.passes.estimate import roofline

__all__ = ["SM_STEP", "MemorySms", "schedule"]

MemorySms = int | Literal["auto"]

SM_STEP = 8
"""Green contexts on Hopper come in steps of 8 SMs."""
COLLECTIVE_SMS = 16
"""8 to 16 SMs saturate NVLink (TokenWeave)."""

_LANES = (Resource.COMPUTE, Resource.MEMORY, Resource.NETWORK, Resource.COPY)
_SHORT = (OpKind.CLUSTER, OpKind.KV_APPEND)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a list schedule leaves open."""

    lead: float = 0.0
    """By how much of a layer one cell runs ahead of the next."""
    keeps_short: bool = False
    """Clusters and appends are on the compute lane."""


_RULES = tuple(_Rule(lead, short) for short in (False, True) for lead in (0.0, 0.25, 0.5, 1.0, 2.0))


def schedule(
    nano: NanoGraph, *, device: DeviceSpec, lanes: int, memory_sms: MemorySms = "auto"
) -> Schedule:
    """The list schedule of ``nano`` on ``lanes`` lanes of ``device``."""
    if lanes > 1 and memory_sms != "auto":
        _check_share(memory_sms, device)
    dag = _dag(nano)
    sms = memory_share(device) if memory_sms == "auto" else min(memory_sms, device.num_sms)
    rules = _RULES if lanes > 1 else _RULES[:1]
    runs = [_Run(nano, device, lanes, dag, rule, sms) for rule in rules]
    best = min(runs, key=lambda run: run.simulated_us())
    joules = sum(op.cost.joules for op in nano.ops)
    return Schedule(
        nano=nano,
        slots=tuple(best.slots),
        num_lanes=lanes,
        num_sms=device.num_sms,
        device=device.name,
        power_floor_us=_power_floor_us(joules, device),
    )


def memory_share(device: DeviceSpec) -> int:
    """SMs of the memory lane beside others: what about saturates memory, in whole steps."""
    share = int(device.memory_sm_share * device.num_sms)
    return min(device.num_sms, max(SM_STEP, share // SM_STEP * SM_STEP))


def _power_floor_us(joules: float, device: DeviceSpec) -> float:
    """Under a power cap, no plan is faster than its energy allows."""
    if device.power_cap_watts is None:
        return 0.0
    return joules / (device.power_cap_watts - device.idle_watts) * 1e6


def _check_share(memory_sms: int, device: DeviceSpec) -> None:
    most = device.num_sms - SM_STEP
    if device.num_sms > SM_STEP and not SM_STEP <= memory_sms <= most:
        raise ConfigError(
            f"memory_sms must be from {SM_STEP} to {most} on {device.name}, so that each lane has "
            f"some, not {memory_sms}"
        )


def _dag(nano: NanoGraph) -> "nx.DiGraph[str]":
    dag: nx.DiGraph[str] = nx.DiGraph()
    dag.add_nodes_from(op.name for op in nano.ops)
    dag.add_edges_from((edge.source, edge.target) for edge in nano.edges)
    return dag


def _ranks(dag: "nx.DiGraph[str]", nano: NanoGraph, lanes: int, rule: _Rule) -> dict[str, float]:
    """Smaller goes first; on a single lane, the order of the graph decides alone."""
    if lanes == 1:
        return dict.fromkeys(dag, 0.0)
    total_us = sum(op.cost.time_us for op in nano.ops)
    lead_us = rule.lead * total_us / max(1, nano.graph.num_layers) / nano.num_cells
    times = _times_to_end(dag, nano)
    return {op.name: op.first * lead_us - times[op.name] for op in nano.ops}


def _times_to_end(dag: "nx.DiGraph[str]", nano: NanoGraph) -> dict[str, float]:
    """Of the longest path, itself included."""
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
    rule: _Rule
    memory_sms: int
    now_us: float = 0.0
    slots: list[Slot] = field(default_factory=list)
    running: dict[int, Slot] = field(default_factory=dict)
    ops: dict[str, NanoOp] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    rank: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    ready: list[list[tuple[float, int, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ops = {op.name: op for op in self.nano.ops}
        self.order = {name: at for at, name in enumerate(self.ops)}
        self.rank = _ranks(self.dag, self.nano, self.lanes, self.rule)
        self.waiting = dict(self.dag.in_degree())
        self.ready = [[] for _ in range(self.lanes)]
        for name in [name for name, count in self.waiting.items() if count == 0]:
            self.make_ready(name, lane=0)

    def simulated_us(self) -> float:
        """When the last part ends, after running them all."""
        self.start_ready()
        while self.running:
            self.advance()
            self.start_ready()
        return self.now_us

    def make_ready(self, name: str, *, lane: int) -> None:
        """Queue a part on its resource's lane; one that takes no time happens on ``lane`` now."""
        op = self.ops[name]
        if op.cost.time_us == 0.0:
            self.slots.append(Slot(name, lane, 0, self.now_us, self.now_us))
            self.release_followers(name, lane=lane)
            return
        heapq.heappush(self.ready[self.lane_of(op)], (self.rank[name], self.order[name], name))

    def lane_of(self, op: NanoOp) -> int:
        """That of its resource."""
        stays = self.rule.keeps_short and op.op.kind in _SHORT
        if stays or op.op.resource not in _LANES:
            return 0
        return min(_LANES.index(op.op.resource), self.lanes - 1)

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
        most = {lane: self.wanted_sms(op, lane=lane) for lane, op in wanted.items()}
        for lane in sorted(idle, key=most.__getitem__):
            free = self.device.num_sms - sum(slot.sms for slot in self.running.values())
            sms = free if alone else min(most[lane], free)
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

    def wanted_sms(self, op: NanoOp, *, lane: int) -> int:
        """What a part takes beside others: the compute lane all that is free."""
        if lane == 0:
            return self.device.num_sms
        if op.op.resource is Resource.MEMORY:
            return self.memory_sms
        return min(self.device.num_sms, COLLECTIVE_SMS)
