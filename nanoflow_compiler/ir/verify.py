"""``verify(value, where=...)`` raises :class:`InvalidProgramError` if a value breaks its rule."""

from collections.abc import Iterable, Mapping
from functools import singledispatch
from itertools import pairwise

import networkx as nx

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir.graph import Op, OpGraph, Read, Value, ValueKind
from nanoflow_compiler.ir.nano import NanoGraph, required_edges
from nanoflow_compiler.ir.program import Program
from nanoflow_compiler.ir.replay import is_order, replay
from nanoflow_compiler.ir.schedule import Schedule, Slot

__all__ = ["verify"]

_EPSILON_US = 1e-6


@singledispatch
def verify(value: object, *, where: str) -> None:
    """Check the rule of ``value``'s type; ``where`` names the step that made it."""
    raise InvalidProgramError(f"nothing is known of a {type(value).__name__}", where=where)


@verify.register
def _(graph: OpGraph, *, where: str) -> None:
    values = graph.value_by_name()
    known = set(graph.inputs)
    _require_unique((op.name for op in graph.ops), "operation", where)
    _check_values(graph, where)
    for op in graph.ops:
        for read in op.reads:
            if read.value not in known:
                raise InvalidProgramError(
                    f"{op.name} reads {read.value} before it is written", where=where
                )
        for name in op.writes:
            if name in known:
                raise InvalidProgramError(f"{name} has two writers, one is {op.name}", where=where)
            if name not in values:
                raise InvalidProgramError(
                    f"{op.name} writes {name}, which is no value", where=where
                )
            known.add(name)
        _check_parts_rule(op, values, where)
    if missing := [name for name in graph.outputs if name not in known]:
        raise InvalidProgramError(f"outputs {missing} are never written", where=where)


def _check_values(graph: OpGraph, where: str) -> None:
    _require_unique((value.name for value in graph.values), "value", where)
    for value in graph.values:
        if is_order(value.name) != (value.kind in (ValueKind.KV, ValueKind.CONTROL)):
            raise InvalidProgramError(
                f"{value}: what only orders has a name with '!', all else has none", where=where
            )
    if missing := set(graph.inputs) - {value.name for value in graph.values}:
        raise InvalidProgramError(f"inputs {sorted(missing)} are no values", where=where)


def _check_parts_rule(op: Op, values: Mapping[str, Value], where: str) -> None:
    if not op.splits:
        if any(read.axis or read.prefix for read in op.reads):
            raise InvalidProgramError(f"{op.name} runs whole but reads a part", where=where)
        return
    for read in op.reads:
        _check_part_read(op, read, values[read.value], where)
    for name in op.writes:
        value = values[name]
        if value.axis is None and not is_order(name):
            raise InvalidProgramError(
                f"{op.name} runs in parts but {name} has no token axis", where=where
            )


def _check_part_read(op: Op, read: Read, value: Value, where: str) -> None:
    if read.prefix and value.kind is not ValueKind.KV:
        raise InvalidProgramError(
            f"{op.name} reads {read}, but only a KV cache is read up to a token", where=where
        )
    if read.axis and value.axis and read.axis != value.axis:
        raise InvalidProgramError(
            f"{op.name} reads {read}, but its parts lie along {value.axis}", where=where
        )


@verify.register
def _(nano: NanoGraph, *, where: str) -> None:
    names = [op.name for op in nano.ops]
    _require_unique(names, "nano-op", where)
    parts: dict[str, list[tuple[int, int]]] = {}
    for op in nano.ops:
        parts.setdefault(op.op.name, []).append((op.first, op.last))
    for name, ranges in parts.items():
        _require_tiling(ranges, nano.num_cells, name, where)
    dag = nx.DiGraph()
    dag.add_nodes_from(names)
    dag.add_edges_from((edge.source, edge.target) for edge in nano.edges)
    if len(dag) != len(names):
        raise InvalidProgramError("an edge names an unknown nano-op", where=where)
    if not nx.is_directed_acyclic_graph(dag):
        raise InvalidProgramError(f"cycle {nx.find_cycle(dag)}", where=where)
    if missing := set(required_edges(nano.ops)) - set(nano.edges):
        raise InvalidProgramError(f"no edge {min(map(str, missing))}", where=where)


@verify.register
def _(schedule: Schedule, *, where: str) -> None:
    slots = {slot.op: slot for slot in schedule.slots}
    _require_unique((slot.op for slot in schedule.slots), "slot", where)
    if set(slots) != {op.name for op in schedule.nano.ops}:
        raise InvalidProgramError("slots and nano-ops differ", where=where)
    for edge in schedule.nano.edges:
        if slots[edge.target].start_us < slots[edge.source].end_us - _EPSILON_US:
            raise InvalidProgramError(
                f"{edge.target} starts before {edge.source} ends", where=where
            )
    _require_free_lanes(schedule, where)
    _require_sm_budget(schedule, where)


def _require_free_lanes(schedule: Schedule, where: str) -> None:
    for lane in range(schedule.num_lanes):
        on_lane = sorted(
            (slot for slot in schedule.slots if slot.lane == lane),
            key=lambda slot: (slot.start_us, slot.end_us),
        )
        for before, after in pairwise(on_lane):
            if after.start_us < before.end_us - _EPSILON_US:
                raise InvalidProgramError(
                    f"{before.op} and {after.op} overlap on lane {lane}", where=where
                )
    if any(not 0 <= slot.lane < schedule.num_lanes for slot in schedule.slots):
        raise InvalidProgramError("a slot is on no lane", where=where)


def _require_sm_budget(schedule: Schedule, where: str) -> None:
    running: list[Slot] = []
    for slot in sorted(schedule.slots, key=lambda slot: slot.start_us):
        running = [other for other in running if other.end_us > slot.start_us + _EPSILON_US]
        if slot.end_us > slot.start_us:
            running.append(slot)
        if (total := sum(other.sms for other in running)) > schedule.num_sms:
            raise InvalidProgramError(
                f"{total} SMs in use at {slot.op}, {schedule.num_sms} exist", where=where
            )


@verify.register
def _(program: Program, *, where: str) -> None:
    for name, ranges in replay(program, where=where).items():
        _require_tiling(ranges, program.num_cells, name, where)


def _require_unique(names: Iterable[str], noun: str, where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidProgramError(f"{noun} {name} appears twice", where=where)
        seen.add(name)


def _require_tiling(ranges: list[tuple[int, int]], num_cells: int, name: str, where: str) -> None:
    edges = [0, *(last for _, last in sorted(ranges))]
    starts = [first for first, _ in sorted(ranges)]
    if starts != edges[:-1] or edges[-1] != num_cells or len(set(edges)) != len(edges):
        raise InvalidProgramError(
            f"the parts of {name}, {sorted(ranges)}, do not tile 0..{num_cells}", where=where
        )
