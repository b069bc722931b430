"""Schedule: what it prints, and each rule of ``verify``."""

from dataclasses import replace

import pytest

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir import (
    Cost,
    Edge,
    NanoGraph,
    NanoOp,
    Op,
    OpGraph,
    OpKind,
    Resource,
    Schedule,
    Slot,
)
from nanoflow_compiler.ir.verify import verify


def nano_op(name):
    operation = Op(name, OpKind.GEMM, Resource.COMPUTE, (), (), (), splits=False)
    return NanoOp(operation, 0, 1, 0, 1, Cost(10.0, 0.0, Resource.COMPUTE))


NANO = NanoGraph(
    OpGraph((), (), (), (), tokens=1),
    tuple(map(nano_op, ["a", "b", "c"])),
    (Edge("a", "c", "x"),),
    (1,),
)
GOOD = Schedule(
    NANO,
    (Slot("a", 0, 64, 0.0, 10.0), Slot("b", 1, 68, 0.0, 15.0), Slot("c", 0, 64, 10.0, 20.0)),
    num_lanes=2,
    num_sms=132,
    device="h200-sxm",
)


def changed(at, **changes):
    slots = list(GOOD.slots)
    slots[at] = replace(slots[at], **changes)
    return replace(GOOD, slots=tuple(slots))


def test_it_prints_slots():
    assert str(replace(GOOD, power_floor_us=30.0)).splitlines() == [
        "schedule for h200-sxm: 3 slots on 2 lanes, 30.0 us",
        "  power floor 30.0 us",
        "  [       0.0 ..       10.0] lane 0   64 SMs  a",
        "  [       0.0 ..       15.0] lane 1   68 SMs  b",
        "  [      10.0 ..       20.0] lane 0   64 SMs  c",
    ]


def test_the_makespan_is_the_last_end_or_what_the_power_cap_allows():
    assert GOOD.makespan_us == 20.0
    assert replace(GOOD, power_floor_us=30.0).makespan_us == 30.0
    assert replace(GOOD, slots=()).makespan_us == 0.0


def test_the_chart_has_a_row_a_lane_and_a_letter_a_slot():
    first, second, legend = GOOD.chart().splitlines()
    assert first == f"lane 0 |{'A' * 48}{'C' * 48}|"
    assert second == f"lane 1 |{'B' * 72}{' ' * 24}|"
    assert legend == "A a (64 SMs); B b (68 SMs); C c (64 SMs)"


def test_the_chart_of_a_window_shows_what_is_in_it():
    first, second, legend = GOOD.chart(start_us=15.0, end_us=20.0).splitlines()
    assert first == f"lane 0 |{'A' * 96}|"
    assert second == f"lane 1 |{' ' * 96}|"
    assert legend == "A c (64 SMs)"


BROKEN = {
    "slot a appears twice": replace(GOOD, slots=(*GOOD.slots, GOOD.slots[0])),
    "slots and nano-ops differ": replace(GOOD, slots=GOOD.slots[:2]),
    "c starts before a ends": changed(2, lane=1, start_us=9.0, end_us=19.0),
    "b and c overlap on lane 0": changed(1, lane=0, start_us=10.0),
    "a slot is on no lane": changed(1, lane=2),
    "133 SMs in use at b, 132 exist": changed(1, sms=69),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_schedule_is_refused(message):
    verify(GOOD, where="schedule")
    with pytest.raises(InvalidProgramError) as caught:
        verify(BROKEN[message], where="schedule")
    assert str(caught.value) == f"schedule: {message}"
    assert caught.value.where == "schedule"


def test_slots_that_take_no_time_use_no_sms():
    verify(changed(1, sms=500, end_us=0.0), where="schedule")
