"""Vector clocks against the transitive closure of the graph that they stand for."""

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.errors import InvalidProgramError
from nanoflow_compiler.ir.order import HappensBefore

MOST_LANES = 4


@st.composite
def streams(draw):
    """Lanes, and items in the order of issue: ``(lane, None)``, ``(lane, "record")`` or the event waited for."""
    lanes = draw(st.integers(1, MOST_LANES))
    items, num_events = [], 0
    for _ in range(draw(st.integers(0, 25))):
        lane = draw(st.integers(0, lanes - 1))
        kind = draw(st.sampled_from(["issue", "record", "wait"]))
        if kind == "wait" and num_events:
            items.append((lane, draw(st.integers(0, num_events - 1))))
        elif kind == "record":
            items.append((lane, "record"))
            num_events += 1
        else:
            items.append((lane, None))
    return lanes, items


def closure_of(lanes, items):
    """Who is certain to run before whom; the nodes ``("end", lane)`` come after all of their lane."""
    graph = nx.DiGraph()
    last = {lane: ("start", lane) for lane in range(lanes)}
    events = []
    for at, (lane, what) in enumerate(items):
        graph.add_edge(last[lane], at)
        last[lane] = at
        if what == "record":
            events.append(at)
        elif what is not None:
            graph.add_edge(events[what], at)
    graph.add_edges_from((last[lane], ("end", lane)) for lane in range(lanes))
    return nx.transitive_closure_dag(graph)


def clocks_of(lanes, items):
    """The clocks after all items, and the stamp of each that was issued."""
    order = HappensBefore(lanes, where="test")
    stamps, num_events = {}, 0
    for at, (lane, what) in enumerate(items):
        if what is None:
            stamps[at] = order.issue(lane)
        elif what == "record":
            order.record(num_events, lane)
            num_events += 1
        else:
            order.wait(what, lane)
    return order, stamps


@settings(max_examples=80, deadline=None)
@given(streams())
def test_clocks_see_what_a_path_leads_to(stream):
    lanes, items = stream
    closure = closure_of(lanes, items)
    order, stamps = clocks_of(lanes, items)
    for lane in range(lanes):
        seen = {at for at, stamp in stamps.items() if order.sees(lane, stamp)}
        assert seen == {at for at in stamps if closure.has_edge(at, ("end", lane))}
        last = {items[at][0]: at for at in sorted(stamps)}
        unseen = [other for other, at in sorted(last.items()) if at not in seen]
        assert order.unseen_lanes(lane) == unseen


def test_an_event_is_recorded_once():
    order = HappensBefore(2, where="step")
    order.record(3, 0)
    with pytest.raises(InvalidProgramError, match="step: event 3 is recorded twice") as caught:
        order.record(3, 1)
    assert caught.value.where == "step"


def test_an_event_is_waited_for_after_it_is_recorded():
    order = HappensBefore(2, where="step")
    with pytest.raises(InvalidProgramError, match="lane 1 waits for event 0 before it is recorded"):
        order.wait(0, 1)
