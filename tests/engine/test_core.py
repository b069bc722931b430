"""The loop: any arrivals, lengths, aborts and cache sizes; tokens as if alone, each end once, no block lost."""

import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow_compiler.engine import lengths
from nanoflow_compiler.engine.messages import NO_TOKEN
from nanoflow_compiler.engine.structured import StructuredOutputsParams
from nanoflow_compiler.errors import (
    EmptyPromptError,
    OutOfBlocksError,
    PromptTooLongError,
    RequestError,
)
from stub_device import VOCABULARY, StubCompiler, alone, make_core, make_request

SHARED = [(7 * number) % VOCABULARY for number in range(60)]


NUMBERS = StructuredOutputsParams(regex="3")


class Client:
    """Adds, aborts and steps, and checks what must always be true."""

    def __init__(self, core):
        self.core = core
        self.tokens, self.ends, self.requests, self.aborted = {}, {}, {}, set()

    def add(self, request):
        self.core.add(request)
        self.requests[request.key] = request
        self.tokens[request.key] = []

    def abort(self, key):
        self.core.abort([key])
        if key not in self.ends:
            self.aborted.add(key)

    def step(self):
        output = self.core.step()
        for key, token in zip(output.keys, output.tokens, strict=True) if output else ():
            assert key not in self.ends
            assert key not in self.aborted
            self.tokens[key].append(token)
        for key, reason in (output.finish_reasons if output else {}).items():
            assert key not in self.ends
            self.ends[key] = reason
        self.check_blocks()

    def check_blocks(self):
        table, allocator = self.core.table, self.core.batcher.allocator
        users = np.zeros(allocator.num_usable + 1, dtype=np.int64)
        for slot in range(len(table.keys)):
            np.add.at(users, table.blocks(slot), 1)
        assert (users == allocator._num_users).all()
        assert np.count_nonzero(users) + allocator.num_free == allocator.num_usable

    def finish(self):
        for _ in range(10_000):
            if not self.core.has_requests:
                break
            self.step()
        allocator = self.core.batcher.allocator
        assert not self.core.has_requests
        assert allocator.num_free == allocator.num_usable
        assert self.core.table.num_free == len(self.core.table.keys)
        assert self.ends.keys() | self.aborted == self.requests.keys()
        assert not self.ends.keys() & self.aborted
        for key, request in self.requests.items():
            tokens, reason = alone(request, most=self.core.limits.max_model_len)
            if key in self.ends:
                assert (self.tokens[key], self.ends[key]) == (tokens, reason)
            else:
                assert self.tokens[key] == tokens[: len(self.tokens[key])]


@st.composite
def prompts(draw, most):
    """Prompts that often begin alike."""
    length = draw(st.integers(1, most - 1))
    shared = draw(st.integers(0, length))
    rest = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=length - shared, max_size=length))
    return (SHARED[:shared] + rest)[:length]


def play(data, core, client):
    """Random arrivals and aborts between steps."""
    num_requests = data.draw(st.integers(1, 12))
    for key in range(1, num_requests + 1):
        request = make_request(
            key,
            data.draw(prompts(core.limits.max_model_len)),
            max_tokens=data.draw(st.sampled_from([None, 1, 2, 5, 30])),
            ignore_eos=data.draw(st.booleans()),
            stop_token_ids=data.draw(st.sampled_from([(), (1, 9)])),
            structured_outputs=data.draw(st.sampled_from([None, None, NUMBERS])),
        )
        try:
            client.add(request)
        except OutOfBlocksError:
            continue
        for _ in range(data.draw(st.integers(0, 4))):
            client.step()
        if data.draw(st.integers(0, 9)) == 0:
            client.abort(data.draw(st.sampled_from(sorted(client.requests))))
    client.finish()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tokens_as_if_alone(data):
    core = make_core(
        num_slots=data.draw(st.integers(1, 6)),
        num_blocks=data.draw(st.integers(3, 30)),
        budget=data.draw(st.integers(1, 24)),
        most=data.draw(st.sampled_from([8, 20, 40])),
        cache=data.draw(st.booleans()),
    )
    play(data, core, Client(core))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tokens_as_if_alone_when_outputs_are_longer_than_expected(data):
    """Every admission is too bold, so requests are preempted all the time."""
    core = make_core(
        num_slots=data.draw(st.integers(2, 6)),
        num_blocks=data.draw(st.integers(8, 14)),
        budget=data.draw(st.integers(1, 24)),
        cache=data.draw(st.booleans()),
    )
    core.batcher.lengths.expected = lambda generated, *, most: np.minimum(generated + 1, most)
    play(data, core, Client(core))


def test_preemption_is_logged_with_what_to_do(caplog, monkeypatch):
    monkeypatch.setattr(lengths, "FIRST_GUESS", 0)
    core = make_core(num_blocks=9, most=30)
    client = Client(core)
    with caplog.at_level(logging.WARNING):
        for key in range(1, 5):
            client.add(make_request(key, [key] * 4, max_tokens=25, ignore_eos=True))
        client.finish()
    assert core.batcher.num_preemptions > 0
    assert "requests lost their blocks and are computed again. Raise num_kv_blocks" in caplog.text
    assert core.stats().num_preemptions == core.batcher.num_preemptions


def test_the_device_is_one_step_ahead():
    core = make_core()
    core.add(make_request(1, [5, 6], max_tokens=3, ignore_eos=True))
    assert core.step() is None
    assert len(core.runner.batches) == 1
    assert core.step().keys == [1]
    assert len(core.runner.batches) == 2
    assert core.runner.batches[1].unknown.tolist() == [0]


def test_an_end_for_length_costs_no_extra_step():
    core = make_core()
    client = Client(core)
    client.add(make_request(1, [5, 6], max_tokens=3, ignore_eos=True))
    client.finish()
    assert len(core.runner.batches) == 3


def test_the_budget_is_filled_exactly():
    core = make_core(budget=10, num_slots=3, num_blocks=60)
    for key in (1, 2, 3):
        core.add(make_request(key, [key] * 17, max_tokens=9, ignore_eos=True))
    sizes = []
    while core.has_requests:
        core.step()
    sizes = [batch.num_tokens for batch in core.runner.batches]
    assert sizes[:5] == [10] * 5


def test_completions_of_a_prompt_share_its_blocks_without_a_prefix_cache():
    core = make_core(cache=False, budget=40, num_blocks=60)
    client = Client(core)
    prompt = SHARED[:18]
    for key in (1, 2, 3):
        client.add(make_request(key, prompt, group=1, max_tokens=2))
    client.add(make_request(4, prompt, max_tokens=2))
    client.step()
    tables = core.table.block_tables[:4, :5]
    assert (tables[:3, :4] == tables[0, :4]).all()
    assert len(set(tables[:3, 4].tolist())) == 3
    assert not set(tables[3].tolist()) & set(tables[:3].ravel().tolist())
    client.finish()
    assert core.batcher.allocator.find([b"x"]) == []
    assert not core.batcher.allocator._names


def test_a_second_turn_finds_its_history():
    core = make_core(num_blocks=60)
    client = Client(core)
    first = make_request(1, SHARED[:10], max_tokens=8, ignore_eos=True)
    client.add(first)
    client.finish()
    history = [*first.prompt_token_ids, *client.tokens[1]]
    client.add(make_request(2, [*history, 1, 2], max_tokens=2))
    core.step()
    output = core.step()
    # 17 of the 18 tokens were stored: the last one was sampled and never computed.
    assert output.num_cached_tokens == {2: 16}
    client.tokens[2] += output.tokens
    client.ends.update(output.finish_reasons)
    client.finish()
    assert core.stats().num_cache_hits == 16


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], EmptyPromptError, "no tokens"),
        ([1] * 40, PromptTooLongError, "max_model_len=40"),
        ([VOCABULARY], RequestError, "0 to 49"),
        ([-1], RequestError, "holds -1"),
        ([0.5], RequestError, "a list of integers"),
    ],
)
def test_what_is_refused(prompt, error, message):
    with pytest.raises(error, match=message):
        make_core().add(make_request(1, prompt))


def test_a_request_that_can_never_fit():
    core = make_core(num_blocks=4)
    with pytest.raises(OutOfBlocksError, match="need 4 KV blocks of 4 tokens, and there are 3"):
        core.add(make_request(1, [1] * 6, max_tokens=8))
    assert not core.has_requests


def test_a_grammar_that_cannot_be_compiled_ends_its_request_alone():
    core = make_core()
    client = Client(core)
    client.add(make_request(1, [5, 6], max_tokens=3))
    core.add(make_request(2, [5], structured_outputs=StructuredOutputsParams(regex="no")))
    assert core.stats().num_waiting == 2
    outputs = []
    while core.has_requests:
        outputs.append(core.step())
    (failed,) = [output for output in outputs if output and 2 in output.keys]
    assert failed.errors == {2: "no cannot be compiled"}
    assert failed.finish_reasons[2] == "error"
    assert failed.tokens[failed.keys.index(2)] == NO_TOKEN


def test_a_request_that_waits_for_its_grammar_can_be_aborted():
    held = threading.Event()

    def make_compiler():
        held.wait(10)
        return StubCompiler()

    core = make_core(make_compiler=make_compiler)
    core.add(make_request(1, [5], structured_outputs=NUMBERS))
    assert core.step() is None
    assert core.has_requests
    core.abort([1])
    assert not core.has_requests
    held.set()
    core.close()


def test_what_is_told_with_the_first_token():
    core = make_core()
    core.add(make_request(1, [5, 6], max_tokens=2, ignore_eos=True))
    core.step()
    first, second = core.step(), core.step()
    assert first.times.keys() == {1}
    assert first.times[1].queued_s >= 0 < first.times[1].prefill_s
    assert not second.times


def test_steps_are_counted_by_size():
    core = make_core(budget=10)
    core.add(make_request(1, [5] * 13, max_tokens=2, ignore_eos=True))
    while core.has_requests:
        core.step()
    stats = core.stats()
    assert (stats.num_steps, stats.num_batched_tokens) == (3, 14)
    assert stats.step_tokens[:3] == (1, 1, 1)
    assert sum(stats.step_tokens) == 3


@pytest.mark.slow
def test_a_hundred_thousand_requests():
    """With a device that only counts: nothing is lost, nothing waits forever."""
    rng = np.random.default_rng(0)
    core = make_core(num_slots=256, num_blocks=3000, budget=512, most=200)

    def submit(batch, _sampling, *, mask):
        assert mask is None
        tokens = rng.integers(0, VOCABULARY, len(batch.rows))
        sampled = SimpleNamespace(cpu=lambda: SimpleNamespace(numpy=lambda: tokens))
        return SimpleNamespace(
            result=lambda: SimpleNamespace(tokens=sampled, logprobs=None, prompt_logprobs=None)
        )

    core.runner.submit = submit
    ended, added, total = {}, 0, 100_000
    while added < total or core.has_requests:
        while added < total and core.batcher.num_waiting < 500:
            added += 1
            prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 100)))
            most = int(rng.integers(1, 60))
            core.add(make_request(added, prompt, max_tokens=most, ignore_eos=added % 2 == 0))
        if rng.random() < 0.05:
            gone = rng.integers(max(1, added - 800), added + 1, 5).tolist()
            core.abort(gone)
            ended |= {key: "abort" for key in gone if key not in ended}
        output = core.step()
        for key, reason in (output.finish_reasons if output else {}).items():
            assert key not in ended
            ended[key] = reason
    assert len(ended) == total
    assert core.batcher.allocator.num_free == core.batcher.allocator.num_usable
