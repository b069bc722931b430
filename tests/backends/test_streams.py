"""Lanes as streams: what is launched where, who waits for whom, and that the source does it."""

import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conformance_cases import CUTS, GRAPHS, assert_alike
from fake_streams import FakeSide, FakeStream, FakeStreams
from nanoflow_compiler.backends.clusters import Kernels
from nanoflow_compiler.backends.codegen import CodegenExecutable, write
from nanoflow_compiler.backends.lanes import Lanes, LaneStreams, running_lanes
from nanoflow_compiler.backends.unit import Unit, attention_parts
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.errors import ConfigError
from nanoflow_compiler.hardware import DEVICE_SPECS
from nanoflow_compiler.ir import Launch
from nanoflow_compiler.passes.emit import emit
from nanoflow_compiler.passes.estimate import estimate
from nanoflow_compiler.passes.nano_split import nano_split
from nanoflow_compiler.passes.schedule import schedule
from nanoflow_compiler.pipeline import compile_graph
from nanoflow_compiler.sm_budget import budget, sm_budget
from nanoflow_compiler.stepper import Stepper

H200 = DEVICE_SPECS["h200-sxm"]


def seats(*, divided=True):
    numbers = itertools.count(1)
    sides = {0: FakeSide("rest", 92), 1: FakeSide("group", 40)} if divided else None
    return LaneStreams(lambda: FakeStream(f"own{next(numbers)}"), sides=sides)


@pytest.fixture
def streams():
    return FakeStreams()


def test_lane_0_is_the_current_stream_and_others_follow_it(streams):
    before = streams.home.launch()
    with running_lanes(streams, seats(), kind="green") as lanes:
        lanes.use(1)
        assert streams.at.name == "own1"
        assert streams.at.runs_after(before)
        other = streams.at.launch()
        lanes.record(1, 0)
        lanes.use(0)
        assert streams.at is streams.home
        assert not streams.at.runs_after(other)
        lanes.wait(0, 0)
        assert streams.at.runs_after(other)
    assert streams.at is streams.home


def test_a_lane_stays_a_sequence_on_two_streams(streams):
    with running_lanes(streams, seats(), kind="green") as lanes:
        launched = [streams.at.launch()]
        for sms in (92, None, 92, None):
            lanes.use(0, sms=sms)
            assert streams.at.name == ("home" if sms is None else "rest")
            assert all(map(streams.at.runs_after, launched))
            launched.append(streams.at.launch())
        lanes.use(0, sms=92)
        launched.append(streams.at.launch())
    assert streams.at is streams.home
    assert all(map(streams.at.runs_after, launched))


def test_a_lane_that_begins_late_follows_what_was_there_before_the_program(streams):
    """And not what lane 0 launched since: nobody asked for that."""
    before = streams.home.launch()
    with running_lanes(streams, seats(), kind="none") as lanes:
        since = streams.home.launch()
        lanes.use(2, sms=16)
        assert streams.at.runs_after(before)
        assert not streams.at.runs_after(since)


@pytest.mark.parametrize(
    ("kind", "divided", "expected"),
    [
        ("green", True, [("rest", 92), ("group", 40), ("own1", 16), ("home", None)]),
        ("ctas", False, [("home", 92), ("own1", 48), ("own2", 16), ("home", None)]),
        ("none", False, [("home", None), ("own1", None), ("own2", None), ("home", None)]),
    ],
)
def test_budgets(streams, kind, divided, expected):
    """On a divided GPU, a budget is that of the side: also where it was planned otherwise."""
    found = []
    with running_lanes(streams, seats(divided=divided), kind=kind) as lanes:
        for lane, sms in ((0, 92), (1, 48), (2, 16), (0, None)):
            lanes.use(lane, sms=sms)
            found.append((streams.at.name, budget()))
    assert found == expected
    assert budget() is None


def test_a_budget_from_outside_is_that_of_launches_alone(streams):
    with sm_budget(100):
        with running_lanes(streams, seats(), kind="green") as lanes:
            lanes.use(1, sms=40)
            assert budget() == 40
            lanes.use(1)
            assert budget() == 100
        assert budget() == 100


def test_after_an_error_streams_are_as_before_and_joined(streams):
    def fail(lanes):
        lanes.use(1, sms=40)
        launched.append(streams.at.launch())
        raise ValueError("broken")

    launched = []
    with (
        pytest.raises(ValueError, match="broken"),
        running_lanes(streams, seats(), kind="green") as lanes,
    ):
        fail(lanes)
    assert streams.at is streams.home
    assert budget() is None
    assert streams.home.runs_after(launched[0])


def test_a_run_from_another_stream_is_behind_the_last(streams):
    """Which may still read what a lane allocated, and gives out again."""
    shared = seats()
    with running_lanes(streams, shared, kind="none") as lanes:
        lanes.use(1)
        streams.at.launch()
        lanes.record(1, 0)
        lanes.use(0)
        lanes.wait(0, 0)
        read = streams.at.launch()
    streams.home = streams.at = FakeStream("another")
    with running_lanes(streams, shared, kind="none") as lanes:
        lanes.use(1)
        assert streams.at.runs_after(read)


def test_streams_are_made_once(streams):
    shared = seats()
    names = []
    for _ in range(2):
        with running_lanes(streams, shared, kind="green") as lanes:
            for sms in (None, 40):
                lanes.use(1, sms=sms)
                names.append(streams.at)
    assert names[:2] == names[2:]


class Memory(TorchDispatchMode):
    """Watches what reads and writes which storage, and that none is let go of too early."""

    def __init__(self, streams):
        super().__init__()
        self.streams = streams
        self.lanes = None
        self.storages = {}
        """By number: a weak reference, the lane that made it (None: inputs), and what touched it."""
        self.num_freed = 0

    def __torch_dispatch__(self, target, types, args=(), kwargs=None):
        self.check()
        read = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        known = [self.storages[self.number(t)] for t in read if self.number(t) in self.storages]
        for _, _, touched in known:
            assert all(map(self.streams.at.runs_after, touched)), f"{target} does not wait"
        found = target(*args, **(kwargs or {}))
        launched = self.streams.at.launch()
        for tensor in (t for t in tree_leaves(found) if isinstance(t, torch.Tensor)):
            if self.number(tensor) not in {self.number(t) for t in read}:
                self.storages.setdefault(self.number(tensor), self.new(tensor, launched))
        for _, _, touched in known:
            # A second reader need not wait for the first: only the end of the memory is after all.
            touched.others.append(launched)
        return found

    def number(self, tensor):
        return tensor.untyped_storage()._cdata

    def new(self, tensor, launched):
        touched = Touched([launched])
        return StorageWeakRef(tensor.untyped_storage()), self.lane(), touched

    def lane(self):
        return next(lane for lane, at in self.lanes._at.items() if at is self.streams.at)

    def check(self):
        for number, (reference, lane, touched) in list(self.storages.items()):
            if reference.expired():
                del self.storages[number]
                next_at = self.lanes._at[lane]
                assert all(map(next_at.runs_after, [*touched, *touched.others]))
                self.num_freed += 1


class Touched(list):
    """Who wrote it, and who else reads it."""

    def __init__(self, writers):
        super().__init__(writers)
        self.others = []


class WatchedLanes(Lanes):
    memory = None

    def use(self, lane, sms=None):
        self.memory.check()
        super().use(lane, sms)

    def wait(self, lane, event):
        self.memory.check()
        super().wait(lane, event)


def streams_program(traced, *, parts, lanes):
    """Of a graph on a CPU: its program, the source for streams, and values for its inputs."""
    ops = estimate(traced.analyse(), device=H200)
    unit = Unit.of(ops, traced.module)
    plan = schedule(nano_split(ops, parts=parts, device=H200), device=H200, lanes=lanes)
    program = emit(plan)
    function = write(
        program, unit=unit, kernels=Kernels(), clusters="eager", path=None, num_sms=H200.num_sms
    )
    executable = CodegenExecutable(function, parts=attention_parts(program, unit), cells=parts)
    return program, executable, traced.bind(ops)


@pytest.mark.parametrize(
    ("name", "parts", "lanes"), [("block", 2, 2), ("block", 3, 3), ("llama", 2, 2)]
)
def test_the_source_launches_each_operation_behind_what_it_reads(name, parts, lanes, streams):
    traced = GRAPHS[name]()
    with torch.no_grad():
        expected = traced.run()
    program, executable, inputs = streams_program(traced, parts=parts, lanes=lanes)
    assert {item.lane for item in program.instructions if isinstance(item, Launch)} > {0}
    for cuts in CUTS[parts]:
        memory = Memory(streams)
        lanes_now = WatchedLanes(streams, seats(), kind="green")
        memory.lanes, lanes_now.memory = lanes_now, memory
        with torch.no_grad(), memory:
            found = executable._run(list(inputs), cuts, lanes_now)
        memory.storages.clear()
        assert memory.num_freed > 5
        lanes_now.leave()
        lanes_now.come_home()
        assert_alike(found, expected)


def test_source_for_streams(golden):
    _, executable, _ = streams_program(GRAPHS["block"](), parts=2, lanes=2)
    golden("block.streams.txt", executable.source)


@pytest.mark.parametrize("backend", ["streams", "cuda_graph"])
def test_a_cpu_is_told_to_use_codegen(backend):
    traced = GRAPHS["block"]()
    config = CompileConfig(backend=backend, parts=2, clusters="eager", device="h200-sxm")
    with pytest.raises(ConfigError, match='needs a GPU; use backend="codegen"'), torch.no_grad():
        compile_graph(traced.captured, config=config, device=H200, step=Stepper())


def test_auto_is_codegen_on_a_cpu():
    traced = GRAPHS["block"]()
    config = CompileConfig(parts=2, clusters="eager", device="h200-sxm")
    with torch.no_grad():
        graph = compile_graph(traced.captured, config=config, device=H200, step=Stepper())
    assert graph.plans[-1].num_lanes == 2
    assert "def run(inputs, cuts):" in graph.executables[-1].source
