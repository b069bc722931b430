"""Deletions: no memory is used again before everyone is done with it, on any program."""

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.backends.lifetimes import Line, find_deletions
from nanoflow_compiler.ir import Launch, Merge, Program, Record, Split, Wait
from nanoflow_compiler.ir.replay import is_order
from strategies import programs


def lines_of(program, choice):
    """As a backend would write them; what a line makes is new memory, or may be that of its inputs."""
    lines = []
    for item in program.instructions:
        match item:
            case Launch():
                reads, makes = item.reads, item.writes
            case Split():
                reads, makes = (item.source,), (item.target,)
            case Merge():
                reads, makes = item.sources, (item.target,)
            case _:
                lines.append(Line(str(item), event=item))
                continue
        uses = tuple(str(span) for span in reads if not is_order(span.value))
        made = tuple(str(span) for span in makes if not is_order(span.value))
        is_fresh = isinstance(item, Launch) and choice.draw(st.booleans())
        lines.append(Line(str(item), made, uses, item.lane, is_fresh))
    return lines


def happens_before(lines):
    """Line numbers: what is certain to run after what."""
    order, last, recorded = nx.DiGraph(), {}, {}
    for at, line in enumerate(lines):
        lane = line.event.lane if line.event else line.lane
        order.add_node(at)
        if lane in last:
            order.add_edge(last[lane], at)
        if isinstance(line.event, Wait):
            order.add_edge(recorded[line.event.event], at)
        if isinstance(line.event, Record):
            recorded[line.event.event] = at
        last[lane] = at
    return order


class Allocator:
    """Gives a lane the memory that was let go of there last, at once."""

    def __init__(self, order):
        self.order = order
        self.free = {}
        self.touched = {}
        """By memory, the lines that read or write it now."""
        self.holders = {}
        self.home = {}
        self.num_reused = 0

    def allocate(self, lane, at):
        pool = self.free.setdefault(lane, [])
        if not pool:
            memory = len(self.home)
            self.home[memory] = lane
        else:
            memory = pool.pop()
            self.num_reused += 1
            for before in self.touched[memory]:
                assert nx.has_path(self.order, before, at), f"line {before} still uses it at {at}"
        self.touched[memory] = []
        self.holders[memory] = 0
        return memory

    def release(self, memory):
        self.holders[memory] -= 1
        if not self.holders[memory]:
            self.free.setdefault(self.home[memory], []).append(memory)


def run(program, lines, deletions, choice):
    """Names to memory, line after line."""
    allocator = Allocator(happens_before(lines))
    memory = dict.fromkeys(map(str, program.inputs))
    for at, line in enumerate(lines):
        for name in line.uses:
            assert name in memory, f"{name} is gone at line {at}"
        shared = [memory[name] for name in line.uses if memory[name] is not None]
        for name in line.makes:
            is_view = not line.is_fresh and shared and choice.draw(st.booleans())
            memory[name] = choice.draw(st.sampled_from(shared)) if is_view else None
            if memory[name] is None:
                memory[name] = allocator.allocate(line.lane, at)
            allocator.holders[memory[name]] += 1
        for name in line.names:
            if memory[name] is not None:
                allocator.touched[memory[name]].append(at)
        for name in deletions.get(at, ()):
            place = memory.pop(name)
            if place is not None:
                allocator.release(place)
    return memory, allocator


@settings(max_examples=80, deadline=None)
@given(programs(), st.data())
def test_memory_is_used_again_only_when_all_lanes_are_done_with_it(program, choice):
    lines = lines_of(program, choice)
    deletions = find_deletions(
        lines, inputs=program.inputs, kept=program.outputs, num_lanes=program.num_lanes
    )
    names = [name for gone in deletions.values() for name in gone]
    assert len(names) == len(set(names))
    left, _ = run(program, lines, deletions, choice)
    assert set(program.outputs) <= set(left)


@settings(max_examples=25, deadline=None)
@given(programs(), st.data())
def test_on_one_stream_everything_goes_behind_its_last_use(program, choice):
    lines = [
        Line(line.text, line.makes, line.uses, 0, line.is_fresh)
        for line in lines_of(program, choice)
        if line.event is None
    ]
    last = {name: at for at, line in enumerate(lines) for name in line.names}
    found = find_deletions(lines, inputs=program.inputs, kept=program.outputs, num_lanes=1)
    gone = {name: at for at, names in found.items() for name in names}
    assert gone == {name: at for name, at in last.items() if name not in program.outputs}


def work(text, makes, uses, lane, *, is_fresh=True):
    return Line(text, tuple(makes.split()), tuple(uses.split()), lane, is_fresh)


def ends(lines, **settings):
    """Where each name goes, as the text of the line before its deletion."""
    found = find_deletions(lines, inputs=["x"], kept=["z"], num_lanes=2, **settings)
    return {name: lines[at].text for at, names in found.items() for name in names}


def record(event, lane):
    return Line(f"record {event}", event=Record(event, lane))


def wait(event, lane):
    return Line(f"wait {event}", event=Wait(event, lane))


def test_a_reader_on_another_lane_is_waited_for():
    lines = [
        work("make", "a", "x", 0),
        record(0, 0),
        wait(0, 1),
        work("read", "b", "a", 1),
        work("more", "c", "x", 0),
        record(1, 1),
        wait(1, 0),
        work("last", "z", "b c", 0),
    ]
    found = ends(lines)
    assert found["a"] == "wait 1"
    assert found["c"] == "last"
    assert "b" not in found  # lane 1 never hears of the end of its last reader


def test_a_view_belongs_to_the_lane_of_its_memory():
    lines = [
        work("make", "a", "x", 0),
        record(0, 0),
        wait(0, 1),
        work("view", "v", "a", 1, is_fresh=False),
        work("read", "b", "v", 1),
        record(1, 1),
        wait(1, 0),
        work("last", "z", "b", 0),
    ]
    assert ends(lines)["v"] == "wait 1"
    lines[3] = work("copy", "v", "a", 1)
    assert ends(lines)["v"] == "read"


def test_what_is_returned_or_given_is_not_let_go_of_early():
    lines = [work("only", "z", "x", 1), record(0, 1), wait(0, 0)]
    assert ends(lines) == {"x": "only"}


def test_a_broken_order_is_refused():
    with pytest.raises(Exception, match="before it is recorded"):
        find_deletions([wait(0, 1)], inputs=[], kept=[], num_lanes=2)


def test_programs_of_several_lanes_use_memory_again():
    """The property above is not empty."""
    chain = [work(f"at{at}", f"v{at}", f"v{at - 1}" if at else "x", 0) for at in range(6)]
    deletions = find_deletions(chain, inputs=["x"], kept=["v5"], num_lanes=1)
    program = Program(("x",), ("v5",), 1, 1, ())
    _, allocator = run(program, chain, deletions, choice=None)
    assert allocator.num_reused == 4
