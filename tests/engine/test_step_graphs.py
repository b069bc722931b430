"""Captured steps on a GPU: what launched steps find, for any batches, without growth."""

import numpy as np
import pytest
import torch

from mixed_requests import PLAIN, SETTINGS, answers, check_same, make_requests
from nanoflow_compiler.engine.batch import Batch
from nanoflow_compiler.engine.buckets import Bucket
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.graph_pool import GraphPool
from tiny_models import BUILDERS
from watched_steps import Logits, Steps

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice on a reduction that it splits.
    pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled"),
]

SIZES = {"max_num_seqs": 16, "max_num_batched_tokens": 192, "max_model_len": 256}


@pytest.fixture(scope="module")
def model():
    return BUILDERS["llama"]().cuda()


@pytest.fixture(scope="module", params=[1, 2, 4])
def llm(request, model):
    with LLM(model, options={"parts": request.param}, **SIZES) as llm:
        yield llm


@pytest.mark.parametrize("kinds", [SETTINGS, PLAIN], ids=["all kinds", "plain"])
def test_a_replay_equals_a_launched_step(llm, kinds):
    requests = make_requests(30, seed=1, settings=kinds)
    logits = Logits(llm)
    # With the prefix cache, a second run would not be the same steps.
    llm._core.batcher.allocator.forget_names()
    launched, expected = logits.of(requests, is_captured=False)
    llm._core.batcher.allocator.forget_names()
    captured, found = logits.of(requests, is_captured=True)
    check_same(captured, launched)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_a_replay_repeats_itself(llm):
    """Nothing that a step reads is left of a step before."""
    requests = make_requests(20, seed=2)
    others = make_requests(20, seed=3)
    logits = Logits(llm)
    runs = []
    for _ in range(2):
        llm._core.batcher.allocator.forget_names()
        runs.append(logits.of(requests, is_captured=True))
        answers(llm, others)
    (first, first_logits), (second, second_logits) = runs
    assert first[0] == second[0]
    for one, other in zip(first_logits, second_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_steps_are_captured_but_for_those_that_ask_about_prompts(llm):
    steps = Steps(llm)
    try:
        answers(llm, make_requests(20, seed=4, settings=SETTINGS[:-1]))
        assert steps.num_launched == 0
        num_replayed = steps.num_replayed
        assert num_replayed > 0
        answers(llm, make_requests(4, seed=5, settings=SETTINGS[-1:]))
        assert steps.num_launched > 0
        assert steps.num_replayed > num_replayed
        assert not steps.has_nan
    finally:
        llm._core.runner._prepare = steps.prepare


@pytest.mark.parametrize("parts", [1, 2])
def test_graphs_on_and_off(model, parts):
    requests = make_requests(60, seed=6, most=40)
    with LLM(model, enforce_eager=True, **SIZES) as eager:
        expected = answers(eager, requests)
    with LLM(model, options={"parts": parts}, **SIZES) as captured:
        found = answers(captured, requests)
        check_same(found, expected)
        captured._core.runner.graphs = None
        check_same(answers(captured, requests), found)


def test_preempted_requests(model):
    requests = make_requests(20, seed=11, most=40)
    with LLM(model, enforce_eager=True, **SIZES) as eager:
        expected = answers(eager, requests)
    with LLM(model, num_kv_blocks=5, **SIZES) as short:
        check_same(answers(short, requests), expected)


def test_graphs_share_their_memory_and_give_it_back(model):
    with LLM(model, **SIZES) as llm:
        runner = llm._core.runner
        runner.graphs.close()
        runner.graphs = None

        def allocated(buckets):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            list(runner.capture(buckets, max_model_len=256))
            assert len(runner.graphs._captured) == len(buckets)
            held = torch.cuda.memory_allocated() - before
            runner.graphs.close()
            assert runner.graphs.ready(Batch.empty(), None) is None
            runner.graphs = None
            return held

        one = allocated([Bucket(16, 16)])
        # Inputs and plans are in memory that all share, and no graph keeps its logits.
        many = allocated([Bucket(size, size) for size in range(1, 17)])
        assert many <= one + (4 << 10)
        assert allocated([Bucket(16, 16)]) <= many


def test_a_failed_capture_leaves_no_trace():
    pool = GraphPool()
    stream = torch.cuda.current_stream()
    values = torch.arange(4.0, device="cuda")

    def read():
        return (values.sum() + values.max().item(),)  # the host would have to wait

    for _ in range(2):
        with pytest.raises(RuntimeError, match="captur"):
            pool.capture(read)
        assert torch.cuda.current_stream() == stream
        assert values.sum().item() == 6
        assert torch.rand(4, device="cuda").max() < 1

    graph, (doubled,) = pool.capture(lambda: (values * 2,))
    graph.replay()
    assert doubled.tolist() == [0, 2, 4, 6]


def test_what_a_graph_finds_is_borrowed():
    pool = GraphPool()
    values = torch.zeros(1 << 20, device="cuda")
    with torch.inference_mode():
        first = pool.capture(lambda: (values + 1,))
        second = pool.capture(lambda: (values + 2,))
    for graph, (found,) in (first, second, first):
        graph.replay()
        expected = 1 if graph is first[0] else 2
        np.testing.assert_array_equal(found.cpu().numpy(), expected)
    assert first[1][0].data_ptr() == second[1][0].data_ptr()


def test_a_failed_capture_is_told_and_the_engine_goes_on(model):
    requests = make_requests(12, seed=10)
    with LLM(model, enforce_eager=True, **SIZES) as llm:
        expected = answers(llm, requests)
        runner = llm._core.runner
        step = runner.forward.step
        whole = step.model

        def failing(*arguments):
            logits = whole(*arguments)
            if torch.cuda.is_current_stream_capturing():
                logits.sum().item()
            return logits

        step.model = failing
        with pytest.warns(UserWarning, match="decode steps of up to 4 tokens are not captured"):
            list(runner.capture([Bucket(4, 4), Bucket(2, 2)], max_model_len=256))
        check_same(answers(llm, requests), expected)
