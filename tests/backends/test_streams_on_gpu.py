"""Lanes on a GPU: the step that they compute, the multiprocessors that they use, and graphs of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixed_requests import PLAIN, answers, check_same, make_requests
from nanoflow_compiler.attention_state import AttentionState, StepLayout, attention_state
from nanoflow_compiler.backends import lanes
from nanoflow_compiler.backends.green_contexts import divide
from nanoflow_compiler.backends.lanes import Budgets
from nanoflow_compiler.backends.streams import StreamsExecutable
from nanoflow_compiler.capture import capture_step, weights_of
from nanoflow_compiler.config import CompileConfig
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.graph_pool import GraphPool
from nanoflow_compiler.hardware import device_spec
from nanoflow_compiler.kv_cache import KVCache
from nanoflow_compiler.models.hf import PackedDecoder
from nanoflow_compiler.packed import PackedStep
from nanoflow_compiler.pipeline import analyse_graph, compile_analysed
from nanoflow_compiler.stepper import Stepper
from tiny_models import BUILDERS, llama

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice on a reduction that it splits.
    pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled"),
]

LENS = (5, 1, 1, 17, 1, 40, 1, 1, 9, 1)
"""Tokens of each request in the step."""
KINDS = ("green", "ctas", "none")


@pytest.fixture(scope="module")
def step():
    """A packed step of a tiny decoder, and how to run any plan of it."""
    return _Step()


class _Step:
    def __init__(self):
        self.packed = PackedDecoder(llama(num_hidden_layers=3).cuda(), max_length=128)
        name = torch.cuda.get_device_name()
        self.spec = device_spec("cuda", device_name=name)
        captured = replace(capture_step(self.packed, tokens=512), kv_tokens=2048)
        with torch.no_grad():
            self.analysed = analyse_graph(
                captured, config=CompileConfig(), device=self.spec, step=Stepper()
            )
        generator = torch.Generator().manual_seed(0)
        tokens = sum(LENS)
        self.ids = torch.randint(3, 128, (tokens,), generator=generator).cuda()
        self.rows = torch.tensor(LENS).cumsum(0).cuda() - 1
        self.positions = torch.cat([torch.arange(3, 3 + count) for count in LENS]).cuda()

    def compiled(self, **options):
        config = CompileConfig(**options)
        with torch.no_grad():
            compiled = compile_analysed(
                self.analysed, config=config, device=self.spec, step=Stepper()
            )
        return PackedStep(compiled, weights_of(self.packed))

    def layout(self):
        lens = np.array(LENS)
        tables = 1 + np.arange(len(lens), dtype=np.int64)[:, None]
        return StepLayout.pack(
            query_lens=lens, context_lens=np.full(len(lens), 3), block_tables=tables
        )

    def state(self, step, cuts):
        layout = self.layout()
        cache = KVCache.allocate(self.packed.layers, num_blocks=len(LENS) + 1, device="cuda")
        generator = torch.Generator(device="cuda").manual_seed(1)
        for pool in (*cache.keys, *cache.values):
            pool.normal_(generator=generator)
        parts = tuple(
            layout.part(cuts[first], cuts[last], device="cuda")
            for first, last in step.attention_parts
        )
        return AttentionState(cache, parts)

    @torch.inference_mode()
    def run(self, step, cuts):
        with attention_state(self.state(step, cuts)):
            return step(self.ids, self.positions, self.rows, cuts)


def cuts_of(num_cells):
    total = sum(LENS)
    yield tuple(total * at // num_cells for at in range(num_cells + 1))
    yield (*range(num_cells), total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_lanes", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_plan_finds_what_the_sequence_finds(step, parts, num_lanes, kind):
    whole = step.compiled(parts=1)
    expected = step.run(whole, (0, sum(LENS)))
    plan = step.compiled(parts=parts, lanes=num_lanes, sm_budgets=kind)
    is_on_streams = isinstance(plan.compiled.executables[-1], StreamsExecutable)
    assert is_on_streams == (parts > 1 and num_lanes > 1)
    stream = torch.cuda.current_stream()
    for cuts in cuts_of(plan.num_cells):
        for _ in range(5):  # memory that is used again too early shows when it is used again
            found = step.run(plan, cuts)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert torch.cuda.current_stream() == stream


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_plan_finds_it_too(step, kind):
    plan = step.compiled(parts=2, lanes=2, sm_budgets=kind)
    (cuts, _) = cuts_of(2)
    expected = step.run(step.compiled(parts=1), (0, sum(LENS)))
    state = step.state(plan, cuts)
    pool = GraphPool()

    @torch.inference_mode()
    def launch():
        with attention_state(state):
            return (plan(step.ids, step.positions, step.rows, cuts),)

    launch()
    graph, (found,) = pool.capture(launch)
    for _ in range(3):
        found.zero_()
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_memory_does_not_grow(step):
    plan = step.compiled(parts=2, lanes=2)
    (cuts, _) = cuts_of(2)
    state = step.state(plan, cuts)

    @torch.inference_mode()
    def run():
        with attention_state(state):
            plan(step.ids, step.positions, step.rows, cuts)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(50):
        run()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_engine_captures_lanes(parts, kind):
    requests = make_requests(24, seed=3, settings=PLAIN)
    model = BUILDERS["llama"]().cuda()
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 192, "max_model_len": 256}
    with LLM(model, enforce_eager=True, **sizes) as eager:
        expected = answers(eager, requests)
    options = {"parts": parts, "lanes": 2, "sm_budgets": kind}
    with LLM(model, options=options, **sizes) as llm:
        graphs = llm._core.runner.graphs
        assert len(graphs._captured) == len(graphs.buckets.all)
        check_same(answers(llm, requests), expected)
        llm._core.runner.graphs = None
        check_same(answers(llm, requests), expected)
        llm._core.runner.graphs = graphs


def test_lanes_that_cannot_be_captured_are_launched(step, monkeypatch):
    """And their streams are good for what comes next."""
    plan = step.compiled(parts=2, lanes=2)
    (cuts, _) = cuts_of(2)
    expected = step.run(plan, cuts)
    state = step.state(plan, cuts)
    pool = GraphPool()
    wait = lanes.Lanes.wait

    def failing(self, lane, event):
        wait(self, lane, event)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while this is captured")

    @torch.inference_mode()
    def launch():
        with attention_state(state):
            return (plan(step.ids, step.positions, step.rows, cuts),)

    launch()
    with monkeypatch.context() as patch:
        patch.setattr(lanes.Lanes, "wait", failing)
        with pytest.raises(RuntimeError, match="not while this is captured"):
            pool.capture(launch)
    torch.testing.assert_close(step.run(plan, cuts), expected)
    graph, (found,) = pool.capture(launch)
    graph.replay()
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def note():
    """A kernel of many blocks, each of which says where it ran."""
    from smid_kernel import note_sm

    def run(places):
        note_sm[(4096,)](places, 200)

    return run


def num_used(places):
    torch.cuda.synchronize()
    return int((places > 0).sum())


@pytest.mark.parametrize("sms", [16, 40])
def test_a_side_is_all_that_its_streams_use(note, sms):
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).multi_processor_count
    division = divide(device, sms=sms)
    assert divide(device, sms=sms) is division
    assert division.group.num_sms >= sms
    assert division.group.num_sms + division.rest.num_sms <= total
    used = []
    for side in (division.group, division.rest):
        places = torch.zeros(1024, dtype=torch.int32, device=device)
        torch.cuda.synchronize()
        with torch.cuda.stream(side.new_stream()):
            note(places)
        assert 0 < num_used(places) <= side.num_sms
        used.append(places > 0)
    assert not (used[0] & used[1]).any()
    places = torch.zeros(1024, dtype=torch.int32, device=device)
    note(places)
    assert num_used(places) > division.rest.num_sms


def test_sides_in_a_captured_graph(note):
    device = torch.device("cuda", torch.cuda.current_device())
    division = divide(device, sms=40)
    streams = [side.new_stream() for side in (division.group, division.rest)]
    places = [torch.zeros(1024, dtype=torch.int32, device=device) for _ in range(2)]
    note(places[0])
    places[0].zero_()

    def launch():
        home = torch.cuda.current_stream()
        for stream, where in zip(streams, places, strict=True):
            stream.wait_stream(home)
            with torch.cuda.stream(stream):
                note(where)
            home.wait_stream(stream)
        return (places[0],)

    graph, _ = GraphPool().capture_held(launch)
    assert num_used(places[0]) == 0
    graph.replay()
    assert 0 < num_used(places[0]) <= division.group.num_sms
    assert 0 < num_used(places[1]) <= division.rest.num_sms
    assert not ((places[0] > 0) & (places[1] > 0)).any()


def test_budgets_name_the_side_that_there_is():
    device = torch.device("cuda", torch.cuda.current_device())
    budgets = Budgets(kind="green", num_sms=132, memory_sms=37)
    seats, kind = lanes.lane_streams(device, budgets)
    assert kind == "green"
    group = divide(device, sms=37).group.num_sms
    seat = seats.seat(1, sms=37, kind=kind, home=None)
    assert seat.sms == group >= 37
    assert lanes.lane_streams(device, budgets)[0] is seats
