"""The backend cuda_graph: which calls are alike, what is returned, and what a graph may not have."""

from contextlib import nullcontext

import pytest
import torch
from transformers import StaticCache

from fake_streams import FakeStream, FakeStreams
from nanoflow_compiler.backends import cuda_graph
from nanoflow_compiler.backends.cuda_graph import CudaGraphExecutable, written_inputs
from tiny_models import llama
from traces import trace

OPTIONS = {"backend": "cuda_graph", "parts": 1}


class FakePool:
    """Its graphs launch again, into the memory of the first time."""

    def capture_held(self, launch):
        outputs = launch()
        return FakeGraph(launch, outputs), outputs


class FakeGraph:
    def __init__(self, launch, outputs):
        self.launch, self.outputs = launch, outputs

    def replay(self):
        for there, found in zip(self.outputs, self.launch(), strict=True):
            if there.data_ptr() != found.data_ptr():
                there.copy_(found)


class Program:
    """Doubles its first input, adds a weight, and counts in its last one."""

    source, num_cells, attention_parts = "", 1, ((0, 1),)

    def __init__(self):
        self.num_calls = 0

    def __call__(self, inputs, _):
        self.num_calls += 1
        x, weight, count = inputs
        if count is not None:
            count += 1
        whole = torch.cat([x * 2, x + weight])
        return [whole[: len(x)], whole[len(x) :], *([] if count is None else [count])]

    def close(self):
        self.num_calls = -1


@pytest.fixture
def graphs(monkeypatch):
    """On a CPU, as if it were a GPU."""
    monkeypatch.setattr(cuda_graph, "GraphPool", FakePool)
    monkeypatch.setattr(cuda_graph, "on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    streams = FakeStreams()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams.current())
    monkeypatch.setattr(torch.cuda, "Event", streams.new_event)
    return CudaGraphExecutable(
        Program(),
        weights=frozenset({1}),
        stays=frozenset({2}),
        device=torch.device("cpu"),
    )


def test_results_are_those_of_launches_and_nothing_changes_them(graphs):
    weight, count = torch.ones(3), torch.zeros(1)
    kept = []
    for at in range(5):
        x = torch.full((3,), float(at))
        doubled, added, counted = graphs([x, weight, count], (0, 1))
        # A capture of a device does not run: this one does.
        assert counted.data_ptr() == count.data_ptr()
        kept.append((at, doubled, added))
        x.fill_(-1)
    for at, doubled, added in kept:
        assert doubled.tolist() == [2 * at] * 3
        assert added.tolist() == [at + 1] * 3
        assert doubled.untyped_storage().data_ptr() == added.untyped_storage().data_ptr()
    assert len(graphs._captured) == 1


def test_a_call_on_another_stream_waits_for_the_last(graphs, monkeypatch):
    """It writes where the replay of the last one reads."""
    given = ([torch.ones(3), torch.ones(3), torch.zeros(1)], (0, 1))
    one, other = FakeStream("one"), FakeStream("other")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: one)
    graphs(*given)
    launched = one.launch()
    graphs(*given)
    launched = one.launch()
    graphs(*given)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: other)
    graphs(*given)
    assert other.runs_after(launched)


def test_calls_of_a_kind_share_a_graph(graphs):
    weight, other, count = torch.ones(1), torch.ones(1), torch.zeros(1)

    def call(x, weight=weight, count=count, cuts=(0, 1)):
        for _ in range(2):
            graphs([x, weight, count], cuts)
        return len(graphs._captured)

    assert call(torch.zeros(2)) == 1
    assert call(torch.ones(2)) == 1
    assert call(torch.zeros(3)) == 2
    assert call(torch.zeros(2), other) == 3
    assert call(torch.zeros(2), count=torch.zeros(1)) == 4
    assert call(torch.zeros(4)[::2]) == 5
    assert call(torch.zeros(2), cuts=(0, 2)) == 6
    assert call(torch.zeros(2)) == 6


def test_the_first_call_is_launched(graphs):
    graphs([torch.zeros(2), torch.ones(1), None], (0, 1))
    assert not graphs._captured


def test_there_is_a_most_of_graphs(graphs, monkeypatch):
    monkeypatch.setattr(cuda_graph, "MAX_GRAPHS", 2)
    weight = torch.ones(1)

    def call_all():
        for size in range(1, 6):
            for value in range(3):
                x = torch.full((size,), float(value))
                assert graphs([x, weight, None], (0, 1))[0].tolist() == [2.0 * value] * size

    with pytest.warns(UserWarning, match="there are 2 graphs already") as told:
        call_all()
    assert len(told) == 1
    assert len(graphs._captured) == 2
    assert not graphs._pending


def test_calls_that_come_once_leave_little(graphs):
    for size in range(1, 40):
        graphs([torch.zeros(size), torch.ones(1), None], (0, 1))
    assert len(graphs._pending) == 8


def test_a_failed_capture_is_told_once_and_calls_go_on(graphs, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(FakePool, "capture_held", fail)

    weight = torch.ones(1)

    def call_all():
        for value in range(5):
            found = graphs([torch.full((2,), float(value)), weight, None], (0, 1))
            assert found[0].tolist() == [2.0 * value] * 2

    with pytest.warns(UserWarning, match="run launched: operation not permitted") as told:
        call_all()
    assert len(told) == 1


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(1).expand(3), "entries of an input share their memory"),
        (None, "an input is on the CPU"),
    ],
)
def test_inputs_that_no_graph_can_have(graphs, monkeypatch, x, reason):
    if x is None:
        x = torch.ones(3)
        monkeypatch.setattr(cuda_graph, "on_gpu", lambda _: False)
    with pytest.warns(UserWarning, match=reason):
        assert graphs([x, torch.ones(1), None], (0, 1))[0].tolist() == [2.0] * 3


def test_closed(graphs):
    program = graphs.launched
    graphs.close()
    assert program.num_calls == -1


def test_inputs_that_a_graph_writes_to():
    def store(x, cache, other, at):
        cache[:, 1:].index_copy_(1, at, x[:, None] * 2)
        kept = other.clone()
        kept.add_(1)
        return cache.sum(-1) + kept

    inputs = {
        "x": torch.randn(4, 3),
        "cache": torch.randn(4, 5, 3),
        "other": torch.randn(4, 5),
        "at": torch.tensor([3]),
    }
    traced = trace(store, inputs, tokens={"x": 0, "cache": 0, "other": 0})
    assert written_inputs(traced.module) == {"cache"}


def generated(model, ids, *, new=12, has_memory=True):
    cache = StaticCache(config=model.config, max_cache_len=64)
    if has_memory:
        config = model.config
        cache.early_initialization(
            len(ids), config.num_key_value_heads, config.head_dim, model.dtype, model.device
        )
    return model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,  # over a static cache transformers compiles by itself
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")
@pytest.mark.parametrize("parts", [1, 2])
def test_generate_over_a_static_cache_is_that_of_eager(parts):
    model = llama().cuda()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (2, n), generator=generator).cuda() for n in (5, 9, 5)]
    expected = [generated(model, ids) for ids in prompts]
    torch._dynamo.reset()
    model.forward = torch.compile(
        model.forward, backend="nanoflow", options=OPTIONS | {"parts": parts}
    )
    for _ in range(2):
        for ids, wanted in zip(prompts, expected, strict=True):
            assert torch.equal(generated(model, ids), wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled")
def test_prompts_over_a_cache_without_memory_run_launched():
    """Until its first call, a cache of transformers counts its tokens on the CPU."""
    model = llama().cuda()
    ids = torch.arange(3, 12, device="cuda")[None]
    expected = generated(model, ids, has_memory=False)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="nanoflow", options=OPTIONS)
    with pytest.warns(UserWarning, match="an input is on the CPU"):
        found = generated(model, ids, has_memory=False)
    assert torch.equal(found, expected)
    assert torch.equal(generated(model, ids, has_memory=False), expected)


@pytest.mark.gpu
def test_a_compiled_function_keeps_what_it_returned():
    def function(x, weight):
        return torch.relu(x @ weight), (x + 1).sum(-1)

    weight = torch.nn.Parameter(torch.randn(16, 16, device="cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="nanoflow", options=OPTIONS)
    xs = [torch.randn(4, 16, device="cuda") for _ in range(6)]
    with torch.no_grad():
        found = [compiled(x, weight) for x in xs]
        for x, (one, other) in zip(xs, found, strict=True):
            torch.testing.assert_close(one, function(x, weight)[0])
            torch.testing.assert_close(other, function(x, weight)[1])
        weight.mul_(2)
        torch.testing.assert_close(compiled(xs[0], weight)[0], function(xs[0], weight)[0])


@pytest.mark.gpu
def test_what_cannot_be_captured_is_named_and_runs():
    def function(x):
        return x * torch.arange(4.0).cuda()

    torch._dynamo.reset()
    options = OPTIONS | {"clusters": "eager"}
    compiled = torch.compile(function, backend="nanoflow", options=options)
    x = torch.randn(3, 4, device="cuda")

    def call_all():
        for _ in range(4):
            torch.testing.assert_close(compiled(x), function(x))

    with pytest.warns(UserWarning, match="no more calls are captured .* at `") as told:
        call_all()
    assert len(told) == 1
