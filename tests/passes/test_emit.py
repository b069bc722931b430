"""emit: slots become instructions with the splits, merges and events that they need, and no more."""

from collections import Counter

from hypothesis import given, settings

from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import (
    Axis,
    Launch,
    Merge,
    Op,
    OpGraph,
    OpKind,
    Read,
    Record,
    Resource,
    Schedule,
    Slot,
    Split,
    Value,
    ValueKind,
    Wait,
    Work,
)
from nanoflow_compiler.ir.verify import verify
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.passes.estimate import estimate
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.schedule import schedule
from strategies import plans

H200 = DEVICE_SPECS["h200-sxm"]
ROWS, COLUMNS = Axis(0), Axis(1)
CACHE = Read("!kv", prefix=True)


def op(name, kind, resource, reads, writes, *, splits=True):
    work = Work(flops_per_token=1e6, dtype="bfloat16")
    return Op(name, kind, resource, (), tuple(reads), tuple(writes), splits, work=work)


def data(name, axis=ROWS):
    return Value(name, ValueKind.DATA, ("s0",), "float32", axis)


GRAPH = estimate(
    OpGraph(
        ops=(
            op("gemm", OpKind.GEMM, Resource.COMPUTE, [Read("x", ROWS), Read("w")], ["h"]),
            op("append", OpKind.KV_APPEND, Resource.MEMORY, [Read("h", COLUMNS)], ["!kv"]),
            op("attend", OpKind.ATTENTION, Resource.MEMORY, [Read("h", COLUMNS), CACHE], ["a"]),
            op("pick", OpKind.OTHER, Resource.COMPUTE, [Read("a")], ["y"], splits=False),
        ),
        values=(
            *(data("x", None), data("w", None), data("h", COLUMNS), data("a"), data("y", None)),
            Value("!kv", ValueKind.KV),
        ),
        inputs=("x", "w"),
        outputs=("y",),
        tokens=8,
    ),
    device=H200,
)


def program_of(parts, lanes):
    nano = nano_split(GRAPH, parts=parts, device=H200)
    return emit(schedule(nano, device=H200, lanes=lanes))


def lines(program):
    return [line.strip() for line in str(program).splitlines()]


def test_one_part_on_one_lane_has_launches_alone():
    assert lines(program_of(1, 1)) == [
        "program cells=1 lanes=1",
        "inputs (x, w)",
        "launch gemm[0:1] lane=0 sms=132 (x, w) -> (h)",
        "launch append[0:1] lane=0 sms=132 (h) -> (!kv)",
        "launch attend[0:1] lane=0 sms=132 (h, !kv) -> (a)",
        "launch pick[0:1] lane=0 sms=132 (a) -> (y)",
        "outputs (y)",
    ]


def test_before_and_after():
    """Inputs are split before their first use; the parts of an append that attention needs are waited for."""
    assert lines(program_of(2, 2)) == [
        "program cells=2 lanes=2",
        "inputs (x, w)",
        "split lane=0 (x) -> (x@0[0:1])",
        "launch gemm[0:1] lane=0 sms=132 (x@0[0:1], w) -> (h@1[0:1])",
        "launch append[0:1] lane=0 sms=132 (h@1[0:1]) -> (!kv@0[0:1])",
        "record lane=0 event=0",
        "wait lane=1 event=0",
        "launch attend[0:1] lane=1 sms=40 (h@1[0:1], !kv@0[0:1]) -> (a@0[0:1])",
        "split lane=0 (x) -> (x@0[1:2])",
        "launch gemm[1:2] lane=0 sms=92 (x@0[1:2], w) -> (h@1[1:2])",
        "launch append[1:2] lane=0 sms=92 (h@1[1:2]) -> (!kv@0[1:2])",
        "record lane=0 event=1",
        "wait lane=1 event=1",
        "launch attend[1:2] lane=1 sms=132 (h@1[1:2], !kv) -> (a@0[1:2])",
        "record lane=1 event=2",
        "wait lane=0 event=2",
        "merge lane=0 dim=0 (a@0[0:1], a@0[1:2]) -> (a)",
        "launch pick[0:2] lane=0 sms=132 (a) -> (y)",
        "outputs (y)",
    ]


def test_cells_that_no_one_wrote_are_split_or_merged():
    assert lines(program_of({"gemm": 2, "append": 1, "attend": 3}, 1)) == [
        "program cells=6 lanes=1",
        "inputs (x, w)",
        "split lane=0 (x) -> (x@0[0:3])",
        "launch gemm[0:3] lane=0 sms=132 (x@0[0:3], w) -> (h@1[0:3])",
        "split lane=0 (x) -> (x@0[3:6])",
        "launch gemm[3:6] lane=0 sms=132 (x@0[3:6], w) -> (h@1[3:6])",
        "merge lane=0 dim=1 (h@1[0:3], h@1[3:6]) -> (h)",
        "launch append[0:6] lane=0 sms=132 (h) -> (!kv)",
        "split lane=0 (h@1[0:3]) -> (h@1[0:2])",
        "launch attend[0:2] lane=0 sms=132 (h@1[0:2], !kv@0[0:2]) -> (a@0[0:2])",
        "split lane=0 (h) -> (h@1[2:4])",
        "launch attend[2:4] lane=0 sms=132 (h@1[2:4], !kv@0[0:4]) -> (a@0[2:4])",
        "split lane=0 (h@1[3:6]) -> (h@1[4:6])",
        "launch attend[4:6] lane=0 sms=132 (h@1[4:6], !kv) -> (a@0[4:6])",
        "merge lane=0 dim=0 (a@0[0:2], a@0[2:4], a@0[4:6]) -> (a)",
        "launch pick[0:6] lane=0 sms=132 (a) -> (y)",
        "outputs (y)",
    ]


@settings(max_examples=15, deadline=None)
@given(plans())
def test_each_slot_is_launched_where_it_was_planned(plan):
    program = emit(plan)
    verify(program, where="emit")
    parts = plan.nano.by_name()
    planned = [
        (parts[slot.op].op.name, parts[slot.op].first, parts[slot.op].last, slot.lane, slot.sms)
        for slot in plan.slots
    ]
    launches = [item for item in program.instructions if isinstance(item, Launch)]
    assert [(i.op, i.first, i.last, i.lane, i.sms) for i in launches] == planned


@settings(max_examples=15, deadline=None)
@given(plans())
def test_every_event_is_recorded_once_and_waited_for(plan):
    """That no wait can be spared is for tests/ir/test_mutations.py to show."""
    items = emit(plan).instructions
    recorded = Counter(item.event for item in items if isinstance(item, Record))
    waited = Counter((item.event, item.lane) for item in items if isinstance(item, Wait))
    assert sorted(recorded) == list(range(len(recorded)))
    assert set(recorded.values()) <= {1}
    assert set(recorded) == {event for event, _ in waited}
    assert set(waited.values()) <= {1}
    if plan.num_lanes == 1:
        assert not recorded


@settings(max_examples=15, deadline=None)
@given(plans())
def test_whatever_is_split_or_merged_is_read(plan):
    program = emit(plan)
    read = set(program.outputs)
    for item in program.instructions:
        match item:
            case Launch():
                read |= set(map(str, item.reads))
            case Merge():
                read |= set(map(str, item.sources))
            case Split():
                read.add(str(item.source))
    made = [item.target for item in program.instructions if isinstance(item, Split | Merge)]
    assert {str(span) for span in made} <= read


def test_attention_waits_for_appends_up_to_its_own_cells():
    """The append of the second part has been issued by then, and is none of its business."""
    nano = nano_split(GRAPH, parts=2, device=H200)
    order = [("gemm.0", 0), ("append.0", 0), ("gemm.1", 0), ("append.1", 0), ("attend.0", 1)]
    order += [("attend.1", 1), ("pick", 0)]
    slots = tuple(
        Slot(name, lane, 66, float(at), float(at + 1)) for at, (name, lane) in enumerate(order)
    )
    plan = Schedule(nano, slots, num_lanes=2, num_sms=132, device="h200-sxm")
    verify(plan, where="schedule")
    assert [line for line in lines(emit(plan)) if not line.startswith("split")][2:11] == [
        "launch gemm[0:1] lane=0 sms=66 (x@0[0:1], w) -> (h@1[0:1])",
        "launch append[0:1] lane=0 sms=66 (h@1[0:1]) -> (!kv@0[0:1])",
        "record lane=0 event=0",
        "launch gemm[1:2] lane=0 sms=66 (x@0[1:2], w) -> (h@1[1:2])",
        "launch append[1:2] lane=0 sms=66 (h@1[1:2]) -> (!kv@0[1:2])",
        "record lane=0 event=1",
        "wait lane=1 event=0",
        "launch attend[0:1] lane=1 sms=66 (h@1[0:1], !kv@0[0:1]) -> (a@0[0:1])",
        "wait lane=1 event=1",
    ]


def test_cells_are_taken_from_the_smallest_span_that_holds_them():
    """So that nothing is waited for that they are not in."""
    ops = (
        op("halves", OpKind.GEMM, Resource.COMPUTE, [Read("x", ROWS)], []),
        op("thirds", OpKind.GEMM, Resource.COMPUTE, [Read("x", ROWS)], []),
    )
    graph = estimate(OpGraph(ops, (data("x", None),), ("x",), (), tokens=6), device=H200)
    nano = nano_split(graph, parts={"halves": 2, "thirds": 3}, device=H200)
    text = lines(emit(schedule(nano, device=H200, lanes=1)))
    assert [line for line in text if line.startswith("split")] == [
        "split lane=0 (x) -> (x@0[0:3])",
        "split lane=0 (x) -> (x@0[3:6])",
        "split lane=0 (x@0[0:3]) -> (x@0[0:2])",
        "split lane=0 (x) -> (x@0[2:4])",
        "split lane=0 (x@0[3:6]) -> (x@0[4:6])",
    ]
