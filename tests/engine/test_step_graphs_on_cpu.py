"""Captured steps without CUDA: batches that are filled up give what they give as they are."""

import linecache
import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fake_graphs import FakePool, capture, fake_cuda
from mixed_requests import PLAIN, SETTINGS, answers, check_same, make_requests
from nanoflow_compiler.engine import step_graphs
from nanoflow_compiler.engine.buckets import Bucket, Buckets
from nanoflow_compiler.engine.llm import LLM
from nanoflow_compiler.engine.step_graphs import StepGraphs
from nanoflow_compiler.paged_attention import PlanKey
from tiny_models import llama

BUCKETS = Buckets.of_sizes(max_num_seqs=16, max_num_batched_tokens=256).all


@pytest.fixture(scope="module")
def model():
    return llama()


def expected_answers(model, requests, **sizes):
    with LLM(model, enforce_eager=True, **sizes) as llm:
        return answers(llm, requests)


@pytest.mark.parametrize("kinds", [SETTINGS, PLAIN], ids=["all kinds", "plain"])
@pytest.mark.parametrize("parts", [None, 1, 2, 4])
def test_answers_are_those_of_launched_steps(model, monkeypatch, parts, kinds):
    fake_cuda(monkeypatch)
    requests = make_requests(24, settings=kinds)
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256}
    expected = expected_answers(model, requests, **sizes)
    options = {"parts": parts, "clusters": "eager"} if parts else None
    with LLM(model, enforce_eager=parts is None, options=options, **sizes) as llm:
        pool = capture(llm, BUCKETS)
        check_same(answers(llm, requests), expected)
        assert pool.num_replays > 10


@settings(max_examples=15, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 99), number=st.integers(1, 8), sizes=st.sets(st.integers(2, 40)))
def test_any_sizes(model, seed, number, sizes):
    """Some steps are held by a bucket, and others by none."""
    requests = make_requests(number, seed=seed, longest=30, most=5)
    expected = expected_answers(model, requests, num_kv_blocks=6, max_num_batched_tokens=32)
    choice = random.Random(seed)
    buckets = [Bucket(size, size, has_prompts=choice.random() < 0.5) for size in sizes]
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_cuda(monkeypatch)
        with LLM(model, enforce_eager=True, num_kv_blocks=6, max_num_batched_tokens=32) as llm:
            capture(llm, buckets)
            check_same(answers(llm, requests), expected)
            allocator = llm._core.batcher.allocator
            assert allocator.num_free == allocator.num_usable


def test_preempted_requests_are_computed_again(model, monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setattr("nanoflow_compiler.engine.lengths.FIRST_GUESS", 1)
    requests = make_requests(6, longest=60, most=90)
    expected = expected_answers(model, requests)
    with LLM(model, enforce_eager=True, num_kv_blocks=4, max_num_seqs=16) as llm:
        capture(llm, BUCKETS)
        check_same(answers(llm, requests), expected)
        assert llm._core.batcher.num_preemptions > 0


class FailingPool(FakePool):
    """Fails from the n-th capture on, as a capture of CUDA does, with the error of ``broken``."""

    num_good = 0

    def capture(self, launch):
        if len(self.graphs) < self.num_good:
            return super().capture(launch)
        return _broken_program()(launch)


def _broken_program():
    """As a generated program that reads a value of the device."""
    name, source = (
        "<nanoflow program 999>",
        "def run(launch):\n    launch()\n    n = count(launch)\n",
    )
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)

    def count(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore about it")

    namespace = {"count": count}
    exec(compile(source, name, "exec"), namespace)
    return namespace["run"]


def test_the_engine_goes_on_when_nothing_is_captured(model, monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(step_graphs, "GraphPool", FailingPool)
    requests = make_requests(8)
    expected = expected_answers(model, requests)
    with LLM(model, enforce_eager=True, max_num_seqs=16) as llm:
        with pytest.warns(UserWarning, match="not captured") as warned:
            pool = capture(llm, [Bucket(4, 4), Bucket(8, 8)])
        (message,) = [str(one.message) for one in warned]
        assert message == (
            "decode steps of up to 8 tokens are not captured as CUDA graphs, and run launched one "
            "operation at a time: operation not permitted when stream is capturing at "
            "`n = count(launch)`"
        )
        check_same(answers(llm, requests), expected)
        assert pool.num_replays == 0


def test_smaller_steps_do_not_run_as_larger_graphs(model, monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(FailingPool, "num_good", 2)
    monkeypatch.setattr(step_graphs, "GraphPool", FailingPool)
    requests = make_requests(3, settings=[{"temperature": 0, "ignore_eos": True}])
    with LLM(model, enforce_eager=True, max_num_seqs=16) as llm:
        with pytest.warns(UserWarning, match="decode steps of up to 4 tokens"):
            pool = capture(llm, [Bucket(4, 4), Bucket(8, 8), Bucket(16, 16)])
        answers(llm, requests)
        assert pool.num_replays == 0
        answers(llm, [requests[0] * 2, requests[1] * 2])
        assert pool.num_replays > 0


def test_decodes_are_captured_where_prompts_are_not(model, monkeypatch):
    fake_cuda(monkeypatch)

    def capture_decode(_, bucket):
        if bucket.has_prompts:
            raise RuntimeError

    monkeypatch.setattr(StepGraphs, "_capture", capture_decode)
    buckets = Buckets.of_sizes(max_num_seqs=4, max_num_batched_tokens=300).all
    with LLM(model, enforce_eager=True, max_num_seqs=16) as llm:
        captured = llm._core.runner.capture(buckets, max_model_len=64)
        with pytest.warns(UserWarning, match="prompts of up to 300 tokens .* RuntimeError$") as w:
            assert list(captured) == [Bucket(4, 4), Bucket(2, 2), Bucket(1, 1)]
        assert len(w) == 1


def record_steps(graphs):
    """The captured steps that run from now on."""
    found, ready = [], graphs.ready

    def recorded(*args):
        step = ready(*args)
        found.extend([step.step] if step else [])
        return step

    graphs.ready = recorded
    return found


def test_full_steps_of_long_prompts_have_a_graph_of_their_own(model, monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(PlanKey, "least_long_keys", property(lambda _: 60))
    prompts, params = make_requests(2, settings=[{"temperature": 0, "ignore_eos": True}])
    prompts[0]["prompt_token_ids"] = [3 + at % 100 for at in range(200)]
    requests = prompts, params
    expected = expected_answers(model, requests, max_num_batched_tokens=128)
    with LLM(model, enforce_eager=True, max_num_seqs=16, max_num_batched_tokens=128) as llm:
        capture(llm, Buckets.of_sizes(max_num_seqs=16, max_num_batched_tokens=128).all)
        graphs = llm._core.runner.graphs
        found = record_steps(graphs)
        check_same(answers(llm, requests), expected)
        assert {bucket.num_tokens for bucket in graphs._long} == {128}
        is_long = [any(step is long for long in graphs._long.values()) for step in found]
        assert any(is_long)
        assert not all(is_long)


def test_a_kernel_of_long_prompts_that_cannot_be_captured_is_not_used(model, monkeypatch):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(PlanKey, "least_long_keys", property(lambda _: 60))
    monkeypatch.setattr(FailingPool, "num_good", 1)
    monkeypatch.setattr(step_graphs, "GraphPool", FailingPool)
    with LLM(model, enforce_eager=True, max_num_seqs=16) as llm:
        captured = llm._core.runner.capture([Bucket(64, 16, has_prompts=True)], max_model_len=64)
        with pytest.warns(UserWarning, match="kernel of long prompts is not captured"):
            assert len(list(captured)) == 1
        assert not llm._core.runner.graphs._long


def test_layers_that_no_kernel_reads_are_not_captured(model, monkeypatch):
    monkeypatch.setattr(step_graphs, "GraphPool", FakePool)
    monkeypatch.setattr(step_graphs, "draw_on_gpu", lambda logits, _: logits.argmax(-1))
    with LLM(model, enforce_eager=True) as llm:
        with pytest.warns(UserWarning, match="heads of multiples of 16 bytes"):
            capture(llm, [Bucket(2, 2)])
        assert len(answers(llm, make_requests(2))[0]) == 2


def test_closed_graphs_hold_nothing(model, monkeypatch):
    fake_cuda(monkeypatch)
    llm = LLM(model, enforce_eager=True)
    capture(llm, [Bucket(2, 2)])
    graphs = llm._core.runner.graphs
    llm.close()
    assert not graphs._captured
    assert not graphs._plans
    assert graphs.buckets.all == ()
